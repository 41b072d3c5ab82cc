"""Weights are judged by where training moves them: those that move towards zero go."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from secateur.errors import TargetError, check_number
from secateur.schedules import Schedule, cubic
from secateur.select import keep_top_k
from secateur.training._tensors import wide
from secateur.types import Masks, Moment, Tensors, Weight


def straight_through(weight: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
    """Return the masked weight; its gradient reaches the scores as if the mask were the scores themselves."""
    # The difference is exactly zero, and carries the gradient g * w to every score, those of pruned weights included.
    factor = mask.to(scores.dtype) + (scores - scores.detach())
    return (wide(weight) * factor).to(weight.dtype)


@dataclass(frozen=True)
class Movement:
    r"""A trained score per weight, and in every layer the share with the highest scores that a schedule allows.

    .. math::
        W = w \odot \mathrm{top}_k(S), \qquad \frac{\partial L}{\partial S} := \frac{\partial L}{\partial W} \odot w

    so that plain SGD makes :math:`S = -\eta \sum_t g_t w_t`: weights that training moves away from zero stay, whatever
    their size, and a pruned weight whose score rises comes back. The number kept is exact in every layer; ties, such as
    scores that never had a gradient, lose the lowest index first. Made for fine-tuning a pretrained network.

    Scores start at zero. The authors give them a learning rate of their own, 0.01; give the optimizer
    ``wrapped.latents.parameters()`` as a group for that.

    Pitfalls:
        Until scores have seen gradients their ties are broken by index: let the schedule begin after a while, and end
        well before the training does. Every layer loses the same share, needed or not.

    Args:
        sparsity: Share of every layer's weights that is gone in the end.
        schedule: When, and how fast, in optimizer steps. It should begin after the scores have seen some gradients and
            end well before the training does.

    Raises:
        TargetError: When the sparsity is not in [0, 1), or the schedule does not count steps.

    Example:
        >>> w, s = torch.tensor([3.0, -1.0, 0.5, 2.0]), torch.tensor([0.1, 0.4, 0.3, -0.2])
        >>> at = Moment({"w": w}, {"w": s}, {"w": Weight("w", (4,))}, step=10)
        >>> Movement(0.5, cubic(begin=0, end=10)).final(at)[0]["w"].tolist()
        [0.0, -1.0, 0.5, 0.0]

    References:
        Victor Sanh, Thomas Wolf, Alexander M. Rush, Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020.
    """

    sparsity: float = 0.9
    schedule: Schedule = field(default_factory=lambda: cubic(begin=100, end=1000, every=10))

    def __post_init__(self) -> None:
        check_number("movement: sparsity", self.sparsity, most=1.0, below=True, error=TargetError)
        if not isinstance(self.schedule, Schedule):
            raise TargetError(f"movement: expected a schedule such as cubic(begin=0, end=1000), got {self.schedule!r}")
        if self.schedule.unit != "steps":
            raise TargetError(
                f"movement: the schedule counts {self.schedule.unit}, and masks are made anew at optimizer steps; give "
                "it unit = 'steps'"
            )

    def check(self, weight: Weight) -> None:
        """Refuse a weight of which the sparsity would leave nothing.

        Raises:
            TargetError: Names the weight and the highest sparsity that it bears.
        """
        if weight.numel - round(self.sparsity * weight.numel) < 1:
            raise TargetError(
                f"{weight.name}: sparsity {self.sparsity:g} leaves none of its {weight.numel} weights; at most "
                f"{1 - 1 / weight.numel:g} can be asked for, or leave it out with exclude = [{weight.name!r}]"
            )

    def asked(self, step: int | None) -> float | None:
        """Return the schedule's sparsity."""
        last = self.schedule.updates - 1
        update = last if step is None else self._due(step) - 1
        return self.schedule.level(update, self.sparsity) if update >= 0 else 0.0

    def _due(self, step: int) -> int:
        """Return how many updates have come due."""
        return bisect_right(range(self.schedule.updates), step, key=lambda i: self.schedule.step(i, None))

    def start(self, weights: Tensors, layouts: Mapping[str, Weight], noise: Generator) -> dict[str, Tensor]:
        """Return scores of zero."""
        return {n: torch.zeros_like(wide(weights[n])) for n in layouts}

    def _masks(self, at: Moment) -> Masks:
        gone = self.asked(at.step) or 0.0
        return {
            name: keep_top_k(at.latents[name].detach(), weight.numel - round(gone * weight.numel), name)
            for name, weight in at.layouts.items()
        }

    def weights(self, at: Moment, noise: Generator | None) -> dict[str, Tensor]:
        """Return the masked weights."""
        return {n: straight_through(at.weights[n], m, at.latents[n]) for n, m in self._masks(at).items()}

    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        """Return the masked weights, at the sparsity that the schedule has reached."""
        masks = self._masks(at)
        return {n: torch.where(m, at.weights[n], 0.0) for n, m in masks.items()}, masks

    def penalty(self, at: Moment) -> Tensor:
        """Return zero."""
        return torch.zeros(())

    def advance(self, at: Moment) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
