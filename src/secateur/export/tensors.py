"""The weights alone, as safetensors, reloaded and compared bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.checkpoint import read_model, save_model
from secateur.errors import CheckpointError, ExportError
from secateur.export._checks import Export, check_zeros
from secateur.types import Tensors


def write(model: nn.Module, path: Path, masks: Tensors) -> Export:
    """Export the state dict to one safetensors file, for :func:`secateur.checkpoint.load_model`.

    Args:
        model: The model.
        path: The file.
        masks: Where its weights must be zero.

    Returns:
        The checked export.

    Raises:
        ExportError: The file does not hold what the model does, or pruned weights are not zero in it.
        CheckpointError: The model cannot be saved or the file not be written.
    """
    save_model(path, model)
    try:
        _check(model, path, masks)
    except (ExportError, CheckpointError):
        path.unlink()  # the disk or the memory is at fault: leave nothing that looks right
        raise
    return Export("safetensors", path, path.stat().st_size, 0.0, "reloaded, equal bit for bit")


def _check(model: nn.Module, path: Path, masks: Tensors) -> None:
    """Read the file again and compare it with the model."""
    stored = read_model(path)
    check_zeros(stored, masks, "safetensors")
    state = model.state_dict()
    wrong = [name for name in state if name not in stored or not _same(state[name], stored[name])]
    if wrong or len(stored) != len(state):
        raise ExportError(f"safetensors: the file does not hold the model's tensors: {wrong[:8]}; report this as a bug")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten() for t in (a, b))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))
