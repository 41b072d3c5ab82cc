"""What all parametrisations do with tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least: in half precision small latents and their updates would round to nothing."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def zeroed(tensor: Tensor, keep: Tensor) -> Tensor:
    """Return ``torch.where(keep, tensor, 0.0)`` bit for bit, for code that autograd does not look into.

    By the bits, since a choice between two numbers at random is guessed wrong by the processor half of the time.
    """
    bits = _BITS[tensor.dtype.itemsize]
    return (tensor.view(bits) & -keep.to(bits)).view(tensor.dtype)


def total(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of numbers, zero of none, in the widest of their types."""
    if not terms:
        return torch.zeros(())
    out = terms[0]
    for term in terms[1:]:
        out = out + term.to(out.device)
    return out
