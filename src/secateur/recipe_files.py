"""Reading TOML, YAML and JSON from people who may be mistaken or hostile."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError, nearest

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


def parse(path: Path) -> dict[str, Any]:
    """Read a file into plain values, by its suffix.

    Args:
        path: A ``.toml``, ``.yaml``, ``.yml`` or ``.json`` file of at most 1 MiB.

    Returns:
        The top-level table.

    Raises:
        RecipeError: When the file is missing, too large, of an unknown kind, malformed, nested deeper than 32 levels,
            has a key twice, uses YAML anchors or tags, or is not a table at the top.
    """
    readers = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}
    if path.suffix not in readers:
        raise RecipeError(f"{path}: a recipe is a .toml, .yaml or .json file; {nearest(path.suffix, readers)}")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: is larger than {MAX_BYTES} bytes; a recipe never is")
    try:
        values = readers[path.suffix](raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise RecipeError(f"{path}: is nested deeper than {MAX_DEPTH} levels") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, _Malformed) as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a table at the top, got {type(values).__name__}")
    _check_depth(path, values, 0)
    return values


class _Malformed(Exception):
    """Text that the hardened readers refuse."""


def _toml(text: str) -> Any:
    return tomllib.loads(text)


def _json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise _Malformed(f"the key {key!r} appears twice")
            out[key] = value
        return out

    def refuse(constant: str) -> Any:
        raise _Malformed(f"{constant} is not JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _yaml(text: str) -> Any:
    """Read YAML 1.2's core schema: no anchors, no tags, no key twice; ``no`` is a word and ``1e-3`` a number."""
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # Counted here, before anything is built: the scanner's time grows with the square of the depth.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH + 1:
                raise _Malformed(f"is nested deeper than {MAX_DEPTH} levels")
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise _Malformed(f"line {line}: anchors and aliases are not allowed in a recipe")
            if getattr(event, "tag", None):
                raise _Malformed(f"line {line}: tags are not allowed in a recipe")
        return yaml.load(text, Loader=_core_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _Malformed(f"{where}{getattr(error, 'problem', None) or error}") from None


def _core_loader() -> Any:
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader with YAML 1.2's scalars and unique keys."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - pyyaml reads it from the class

    def construct_mapping(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _Malformed(f"line {key_node.start_mark.line + 1}: the key {key!r} is not text")
            if key in out:
                raise _Malformed(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice")
            out[key] = loader.construct_object(value_node, deep=True)
        return out

    scalars = {
        "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "int": (r"[-+]?[0-9]+", "-+0123456789"),
        "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
        "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    }
    for kind, (pattern, first) in scalars.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"^(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:map", construct_mapping)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    return Loader


def _check_depth(path: Path, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RecipeError(f"{path}: is nested deeper than {MAX_DEPTH} levels")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _check_depth(path, child, depth + 1)
