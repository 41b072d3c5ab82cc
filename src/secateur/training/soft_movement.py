"""Movement pruning with one threshold for all scores, and a penalty that presses them under it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from secateur.errors import check_number
from secateur.training._tensors import total, wide
from secateur.training.movement import straight_through
from secateur.types import Masks, Moment, Tensors, Weight


@dataclass(frozen=True)
class SoftMovement:
    r"""A trained score per weight; weights with scores above a threshold stay, and a penalty presses on the scores.

    .. math::
        W = w \odot [S > \tau], \qquad \frac{\partial L}{\partial S} := \frac{\partial L}{\partial W} \odot w, \qquad
        R = \lambda \sum \mathrm{sigmoid}(S)

    with :math:`\tau` = ``threshold`` and :math:`\lambda` = ``strength``. Unlike with ``Movement`` every layer keeps as
    much as it needs; how much that is in total is found and not set. Scores start at zero, so the threshold lies below:
    the default is where :math:`\mathrm{sigmoid}(S) = 0.1`.

    Pitfalls:
        How much goes is found and not set: it follows from the strength, the learning rate of the scores and the length
        of training. A strength that is too large closes whole layers, and what lies in front of a closed layer gets no
        gradient.

    Args:
        strength: :math:`\lambda`, for each weight.
        threshold: :math:`\tau`.

    Raises:
        RecipeError: When the strength is negative or not finite, or the threshold does not lie below zero.

    Example:
        >>> w, s = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([-2.0, 0.4, -2.5])
        >>> SoftMovement().final(Moment({"w": w}, {"w": s}, {"w": Weight("w", (3,))}))[0]["w"].tolist()
        [3.0, -1.0, 0.0]

    References:
        Victor Sanh, Thomas Wolf, Alexander M. Rush, Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020.
    """

    strength: float = 1e-5
    threshold: float = -2.1972

    def __post_init__(self) -> None:
        check_number("soft_movement: strength", self.strength)
        what = "soft_movement: threshold (scores start at 0, above it)"
        check_number(what, self.threshold, least=-math.inf, most=0.0, below=True)

    def check(self, weight: Weight) -> None:
        """Accept every shape."""

    def asked(self, step: int | None) -> float | None:
        """Return nothing: the sparsity follows from the strength."""
        return None

    def start(self, weights: Tensors, layouts: Mapping[str, Weight], noise: Generator) -> dict[str, Tensor]:
        """Return scores of zero."""
        return {n: torch.zeros_like(wide(weights[n])) for n in layouts}

    def _masks(self, at: Moment) -> Masks:
        # What is not a number is not below the threshold: a training that has diverged must not pass for a sparse one.
        return {n: ~(at.latents[n].detach() <= self.threshold) for n in at.layouts}

    def weights(self, at: Moment, noise: Generator | None) -> dict[str, Tensor]:
        """Return the masked weights."""
        return {n: straight_through(at.weights[n], m, at.latents[n]) for n, m in self._masks(at).items()}

    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        """Return the masked weights."""
        masks = self._masks(at)
        return {n: torch.where(m, at.weights[n], 0.0) for n, m in masks.items()}, masks

    def penalty(self, at: Moment) -> Tensor:
        """Return the sum of the scores' sigmoids, times the strength."""
        return self.strength * total([torch.sigmoid(s).sum() for s in at.latents.values()])

    def advance(self, at: Moment) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
