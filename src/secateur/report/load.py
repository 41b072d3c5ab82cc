"""Read a run directory back: ``result.json`` and ``metrics.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError
from secateur.report.words import dig, number

SCHEMA = 1
REALISED = ("mask", "slice", "sparse")
_REQUIRED = {"name": str, "quality": dict, "prune": dict, "profile": dict, "realised": str}
_TABLES = (
    (("prune", "layers"), ("name", "total", "kept")),
    (("profile", "dense", "layers"), ("name", "params", "kept")),
    (("profile", "pruned", "layers"), ("name", "params", "kept")),
    (("exports",), ("format", "path", "checked")),
    (("engines",), ("engine", "network", "median_ms")),
)
"""Lists of objects, and what each object must have."""


@dataclass(frozen=True)
class RunRecord:
    """One finished run, as plain values.

    Attributes:
        result: The content of ``result.json``.
        events: The lines of ``metrics.jsonl``, in order.
        notes: What was found wrong while reading, besides the run's own notes.
    """

    result: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    notes: tuple[str, ...] = ()


def load_run(directory: str | Path) -> RunRecord:
    """Read a run directory.

    A last line of ``metrics.jsonl`` that a crash cut short is left out, and a note says so.

    Args:
        directory: What ``secateur run`` wrote.

    Returns:
        The run.

    Raises:
        CheckpointError: When ``result.json`` is missing or not a result, or a line of ``metrics.jsonl`` other than
            the last is not JSON; names the file.
    """
    folder = Path(directory)
    result = _result(folder / "result.json")
    events, notes = _events(folder / "metrics.jsonl")
    return RunRecord(result, events, notes)


def _read(path: Path, hint: str) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="strict")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text at byte {error.start}; {hint}") from None


def _result(path: Path) -> dict[str, Any]:
    hint = "a run writes it when it is finished: go on with an interrupted one (--resume), or name another directory"
    try:
        result = json.loads(_read(path, hint))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); {hint}") from None
    if not isinstance(result, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(result).__name__}; {hint}")
    if result.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: field 'schema' must be {SCHEMA}, got {result.get('schema')!r}; "
            "read it with the version of secateur that wrote it"
        )
    for field, kind in _REQUIRED.items():
        if not isinstance(result.get(field), kind):
            got = type(result[field]).__name__ if field in result else "nothing"
            raise CheckpointError(f"{path}: field {field!r} must be a {kind.__name__}, got {got}; run the recipe again")
    if result["realised"] not in REALISED:
        raise CheckpointError(
            f"{path}: field 'realised' must be one of {', '.join(REALISED)}, got {result['realised']!r}"
        )
    for keys, fields in _TABLES:
        rows = dig(result, *keys)
        if rows is not None and not _is_table(rows, fields):
            raise CheckpointError(
                f"{path}: field {'.'.join(keys)!r} must be a list of objects with {', '.join(fields)}; run again"
            )
    histograms = result.get("histograms") or {}
    if not isinstance(histograms, dict) or not all(_is_histogram(h) for h in histograms.values()):
        raise CheckpointError(
            f"{path}: field 'histograms' must be objects with n + 1 edges, n dense and n pruned counts; run again"
        )
    return result


def _is_table(rows: Any, fields: Sequence[str]) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= set(fields) for row in rows)


def _is_histogram(found: Any) -> bool:
    lists = [dig(found, key) for key in ("edges", "dense", "pruned")]
    if not all(isinstance(values, list) and all(number(v) is not None for v in values) for values in lists):
        return False
    edges, dense, pruned = lists
    return len(edges) - 1 == len(dense) == len(pruned) > 0


def _events(path: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    if not path.exists():
        return [], (f"{path.name} is missing: the course of the run cannot be shown",)
    # Only "\n" ends a line of JSON: str.splitlines would also break at U+2028 inside a string. A torn last line may
    # end in the middle of a character.
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    numbered = [(place, line) for place, line in enumerate(lines, 1) if line.strip()]
    events: list[dict[str, Any]] = []
    for place, line in numbered:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            events.append(event)
        elif place == numbered[-1][0]:
            return events, (f"the last line of {path.name} ({place}) was cut short and is left out",)
        else:
            raise CheckpointError(
                f"{path}: line {place} is not a JSON object: the file is damaged; remove the line, or run again"
            )
    return events, ()
