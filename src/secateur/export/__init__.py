"""Export to other programs' formats, each file run and compared with the model before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoint import check_masks
from secateur.errors import ExportError, UnknownNameError, nearest
from secateur.export import onnx, pt2, sparse, tensors
from secateur.export._cases import prepare
from secateur.export._checks import Export, check_zeros
from secateur.forward import attention_fast_path, evaluation_mode_of
from secateur.types import Tensors

__all__ = ["FORMATS", "Export", "check_formats", "export_model"]

EXCHANGED = ("safetensors", "onnx", "pt2")
"""Formats of other programs, which are written by default."""

FORMATS = (*EXCHANGED, "sparse")


def check_formats(formats: Sequence[str]) -> None:
    """Refuse, before anything is made, formats that do not exist or whose packages are not installed.

    Args:
        formats: Names from :data:`FORMATS`.

    Raises:
        UnknownNameError: When a format does not exist.
        MissingExtraError: When ``onnx`` is asked for and one of its packages is missing.
        SparseError: When ``sparse`` is asked for and its kernels are not installed.
    """
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError(f"unknown export format {name!r}; {nearest(str(name), FORMATS)}")
    if "onnx" in formats:
        onnx.require()
    if "sparse" in formats:
        from secateur.sparse import library

        library.library()


def export_model(
    model: nn.Module,
    args: Tensor | Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    out_dir: str | Path,
    formats: Sequence[str] = EXCHANGED,
    name: str = "model",
    tolerance: float = 1e-4,
    masks: Tensors | None = None,
) -> list[Export]:
    """Write a model in several formats and prove that each file gives the model's own answers.

    The model runs in eval mode; afterwards every submodule has the mode it had. Each file is compared on
    the given inputs, on other values of the same shapes and, where all input tensors share their first
    dimension, on a batch of one and on a batch of one more than given: that dimension is left open. When
    it cannot be, the file has a fixed batch size and :attr:`Export.notes` says why.

    Args:
        model: The model; it is not changed.
        args: Positional inputs, or a single tensor.
        kwargs: Keyword inputs.
        out_dir: Folder for ``<name>.safetensors``, ``<name>.onnx``, ``<name>.pt2`` and ``<name>.sparse.safetensors``;
            made when missing.
        formats: Which of :data:`FORMATS` to write; ``"sparse"`` compiles the model for the sparse CPU runtime.
        name: Name of the files, without suffix.
        tolerance: Largest difference allowed, absolute or relative to the largest output, whichever is larger.
        masks: Bool masks by parameter name, ``True`` = keep. Nothing is masked here: weights that should be
            zero and are not are an error, in the model and again in every file.

    Returns:
        One record per format, in the order asked for.

    Raises:
        UnknownNameError: A format that does not exist; nothing was written.
        ExportError: A failed export, a file that differs from the model, or a pruned weight that is not
            zero. The file concerned is not there, or still the previous one.
        MissingExtraError: ONNX is asked for and not installed; nothing was written.
        WeightError: A mask that does not belong to the model.
        CheckpointError: A file cannot be written.
    """
    _check_request(formats, name, tolerance)
    masks = masks or {}
    check_masks(model, masks)
    check_zeros(dict(model.named_parameters(remove_duplicate=False)), masks, "the model")
    positional = (args,) if isinstance(args, Tensor) else tuple(args)
    folder = Path(out_dir)
    done = []
    with evaluation_mode_of(model), torch.no_grad(), attention_fast_path(False):
        graphs = [form for form in formats if form != "safetensors"]
        job = prepare(model, positional, kwargs or {}, masks=masks, tolerance=tolerance) if graphs else None
        _make_folder(folder)
        for form in formats:
            path = folder / f"{name}.{sparse.SUFFIX if form == 'sparse' else form}"
            if job is None or form == "safetensors":
                done.append(tensors.write(model, path, masks))
            else:
                done.append({"onnx": onnx, "pt2": pt2, "sparse": sparse}[form].write(job, path))
    return done


def _check_request(formats: Sequence[str], name: str, tolerance: float) -> None:
    """Refuse what can be refused before anything is written."""
    if isinstance(formats, str):
        raise ExportError(f"formats={formats!r}: expected a list of names, such as [{formats!r}]")
    check_formats(formats)
    if len(set(formats)) != len(formats):
        raise ExportError(f"formats={list(formats)!r}: a format comes twice")
    if not name or Path(name).name != name or name in (".", ".."):
        raise ExportError(f"name={name!r}: expected the name of a file without folder, such as 'model'")
    if not tolerance >= 0:
        raise ExportError(f"tolerance={tolerance!r}: expected a number of at least 0")


def _make_folder(folder: Path) -> None:
    """Make the folder for the exports."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"out_dir={str(folder)!r}: cannot make this folder: {error.strerror}") from error
