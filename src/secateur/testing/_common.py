"""What all laws share: how a broken one is told, and the numbers that parts are tried on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def require(holds: bool, part: object, law: str) -> None:
    """Raise unless a law holds.

    Args:
        holds: Whether it does.
        part: What was checked.
        law: What was found instead, in words.

    Raises:
        AssertionError: Names the part and the law.
    """
    if not holds:
        raise AssertionError(f"{part}: {law}")


def random_tensor(shape: Sequence[int], seed: int) -> Tensor:
    """Return normal numbers that depend on shape and seed alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
