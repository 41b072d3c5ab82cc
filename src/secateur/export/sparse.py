"""A model compiled for the sparse CPU runtime, loaded back and run before the file gets its name."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from secateur.export._cases import Case, Job
from secateur.export._checks import Export, compare, publish
from secateur.export._common import tensors_of

SUFFIX = "sparse.safetensors"


def write(job: Job, path: Path) -> Export:
    """Compile the model, and save what was compiled to one ``.sparse.safetensors`` file.

    Every layer with many zeros is measured, dense and packed; see :func:`secateur.sparse.compile`. Notes of the export
    say what came out: how many layers run packed, and the time of the whole beside the dense model's.

    Args:
        job: The model and its answers.
        path: The file.

    Returns:
        The checked export.

    Raises:
        ExportError: The file does not give the model's answers.
        SparseError: The kernels are not installed, or the model is not in float32 on the CPU.
    """
    return publish(job, path, "sparse", lambda tmp, dynamic: _write(job, tmp, dynamic=dynamic))


def _write(job: Job, path: Path, *, dynamic: bool) -> tuple[float, str, list[str]]:
    from secateur.sparse import compile, load, save

    example = (job.cases[0].args, job.cases[0].kwargs)
    compiled = compile(job.model, example)
    save(compiled, path)
    stored = load(path, job.model, example, mapped=False)

    def run(case: Case) -> list[Tensor]:
        return tensors_of(stored(*case.args, **case.kwargs))

    gap, cases = compare(job, run, dynamic=dynamic, what="sparse")
    return gap, f"secateur.sparse, {compiled.report.isa}: {cases} inputs", compiled.report.summary()
