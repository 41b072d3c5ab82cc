"""What all parametrisations do with numbers and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import RecipeError


def at_least(what: str, value: float, low: float) -> None:
    """Refuse a number below a limit, or none.

    Raises:
        RecipeError: Names the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
        raise RecipeError(f"{what} must be a number of at least {low:g}, got {value!r}")


def finite(what: str, value: float) -> None:
    """Refuse a number that is not finite.

    Raises:
        RecipeError: Names the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"{what} must be a finite number, got {value!r}")


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
