"""Comparing an exported file with its model, and giving it its name when it is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.checkpoint import nonzero_pruned, write_atomic
from secateur.errors import ExportError
from secateur.export._cases import Case, Job
from secateur.export._common import CAPTURE_ERRORS, difference, first_line
from secateur.types import Tensors


@dataclasses.dataclass(frozen=True)
class Export:
    """One exported file and how it was checked.

    Attributes:
        format: ``"safetensors"``, ``"onnx"`` or ``"pt2"``.
        path: The file.
        size_bytes: Its size, measured.
        max_difference: Largest difference between the file's outputs and the model's, measured:
            absolute, divided by the largest absolute output where that is above 1.
        checked: What ran the file, on how many inputs.
        notes: What is not as asked for, such as a fixed batch size, and what could not be checked.
    """

    format: str
    path: Path
    size_bytes: int
    max_difference: float
    checked: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path), "notes": list(self.notes)}


def compare(job: Job, run: Callable[[Case], list[Tensor]], *, dynamic: bool, what: str) -> tuple[float, int]:
    """Run an exported file on every case and return the largest difference and the number of cases.

    Args:
        job: The model's own answers and the tolerance.
        run: Runs the exported file.
        dynamic: Try other batch sizes too.
        what: Name of the format, for the message.

    Returns:
        The largest difference, as in :class:`Export`, and how many inputs were tried.

    Raises:
        ExportError: The file does not run, or a difference is above the tolerance.
    """
    worst = 0.0
    cases = (*job.cases, *(job.resized if dynamic else ()))
    for case in cases:
        try:
            found = run(case)
        except CAPTURE_ERRORS as error:
            raise ExportError(f"{what}: the exported file does not run on {case.label}: {first_line(error)}") from error
        if len(found) != len(case.outputs):
            raise ExportError(f"{what}: {len(found)} output tensors on {case.label}; expected {len(case.outputs)}")
        for name, expected, tensor in zip(job.names, case.outputs, found, strict=True):
            gap = difference(expected, tensor)
            if gap > job.tolerance:
                raise ExportError(
                    f"{what}: output {name!r} differs from the model's by {gap:.3g} on {case.label}, and the tolerance "
                    f"is {job.tolerance:.3g}; the file was not kept. {_hint(expected, tensor)}"
                )
            worst = max(worst, gap)
    return worst, len(cases)


def _hint(expected: Tensor, found: Tensor) -> str:
    """Say what may be behind a difference."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"Expected {expected.dtype}{list(expected.shape)}, got {found.dtype}{list(found.shape)}."
    return "Does the model branch on its inputs, or draw random numbers in eval mode? Else raise tolerance=."


def check_zeros(tensors: Tensors, masks: Tensors, what: str) -> None:
    """Refuse weights that a mask prunes and that are not exactly zero.

    Raises:
        ExportError: Naming the parameters.
    """
    if bad := nonzero_pruned(tensors, masks):
        found = ", ".join(f"{name!r} ({count} elements)" for name, count in list(bad.items())[:8])
        raise ExportError(f"{what}: pruned weights are not zero in {found}; apply the masks to the model first")


def publish(job: Job, path: Path, form: str, write: Callable[[Path, bool], tuple[float, str, list[str]]]) -> Export:
    """Write and check a file under a temporary name, and give it its name only when it is right.

    Tries an open batch size first, and a fixed one, with a note, when that fails.

    Args:
        job: The model.
        path: The file.
        form: Name of the format.
        write: Writes and checks a file, with an open batch size or a fixed one; returns the largest
            difference, what checked it, and notes.

    Returns:
        The finished export.

    Raises:
        ExportError: It could not be made or is not equal to the model; a previous file is untouched.
    """
    why = job.why_fixed
    for dynamic in (True, False) if job.resized else (False,):
        results: list[tuple[float, str, list[str]]] = []
        try:
            write_atomic(path, lambda tmp, d=dynamic, r=results: r.append(write(tmp, d)))  # type: ignore[misc]
        except ExportError as error:
            if not dynamic:
                raise
            why = "an open batch size failed: " + str(error).partition("; the file")[0].removeprefix(f"{form}: ")
            continue
        gap, checked, notes = results[0]
        if not dynamic:
            notes = [f"{form}: the batch size is fixed, because {why}", *notes]
        notes = [*(f"{form}: {note}" for note in job.notes), *notes]
        return Export(form, path, path.stat().st_size, gap, checked, tuple(notes))
    raise AssertionError("the last attempt returns or raises")
