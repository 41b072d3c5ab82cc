"""What makes scores of one group comparable with those of another."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Normalise = Literal["none", "mean", "max", "l2"]


def normalised(scores: Tensor, how: Normalise) -> Tensor:
    """Divide a group's scores by their own mean, maximum or L2 norm; scores that are all zero stay so."""
    scale = {
        "none": lambda: scores.new_ones(()),
        "mean": lambda: scores.mean(),
        "max": lambda: scores.amax(),
        "l2": lambda: scores.square().sum().sqrt(),
    }[how]()
    return scores / scale if float(scale) > 0 else scores
