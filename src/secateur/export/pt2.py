"""PyTorch's own graph format (``torch.export``), reloaded and run before the file gets its name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.errors import ExportError
from secateur.export._capture import capture
from secateur.export._cases import Case, Job
from secateur.export._checks import Export, check_zeros, compare, publish
from secateur.export._common import CAPTURE_ERRORS, first_line, quiet, tensors_of


def write(job: Job, path: Path) -> Export:
    """Export to one ``.pt2`` file.

    Dataclasses that PyTorch does not know become dicts of their fields in the output. The file holds
    neither the example inputs nor the places of source lines.

    Args:
        job: The model and its answers.
        path: The file.

    Returns:
        The checked export.

    Raises:
        ExportError: The model cannot be captured, or the file does not give the model's answers.
    """
    return publish(job, path, "pt2", lambda tmp, dynamic: _write(job, tmp, dynamic=dynamic))


def _write(job: Job, path: Path, *, dynamic: bool) -> tuple[float, str, list[str]]:
    """Write, reload and compare one file."""
    program = capture(job, dynamic=dynamic, flat=False)
    try:
        # Through an open file: with a path, the suffix of a temporary name would be complained of.
        with quiet(), path.open("xb") as written:
            torch.export.save(program, written)
        with quiet(), path.open("rb") as read:
            stored = torch.export.load(read)
    except CAPTURE_ERRORS as error:
        if isinstance(error, OSError):
            raise  # a full disk is not the model's fault
        raise ExportError(f"pt2: the captured model cannot be saved and loaded: {first_line(error)}") from error
    check_zeros(stored.state_dict, job.masks, "pt2")
    missing = [name for name in job.masks if name not in stored.state_dict]
    notes = [f"pt2: these weights are not in the file under their names: {', '.join(missing)}"] if missing else []
    module = stored.module()

    def run(case: Case) -> list[Tensor]:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (case.args, case.kwargs))
        return tensors_of(module(*args, **kwargs))

    gap, cases = compare(job, run, dynamic=dynamic, what="pt2")
    return gap, f"torch.export {torch.__version__}: {cases} inputs", notes
