"""What all parametrisations do with tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least: in half precision small latents and their updates would round to nothing."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def total(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of numbers, zero of none, in the widest of their types."""
    if not terms:
        return torch.zeros(())
    out = terms[0]
    for term in terms[1:]:
        out = out + term.to(out.device)
    return out
