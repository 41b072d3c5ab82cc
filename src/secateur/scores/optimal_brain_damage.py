"""Second-order change of the loss, with a diagonal Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from secateur.errors import check_choice
from secateur.scores._wide import wide
from secateur.stats.curvature import GaussNewtonDiagonal, HutchinsonDiagonal
from secateur.stats.fisher import FisherDiagonal, PerSample
from secateur.types import Need, Statistic, Stats, Tensors

Diagonal = Literal["fisher", "gauss_newton", "hutchinson"]


@dataclass(frozen=True)
class OptimalBrainDamage:
    r"""Predicted rise of the loss at a minimum, when weights do not interact.

    .. math:: S_i = \tfrac12 h_{ii} w_i^2

    with :math:`h_{ii}` the diagonal of the loss's Hessian, or of a matrix in its place. ``fisher`` is the mean over
    samples of each sample's own squared gradient: one backward pass; it is the Hessian where the network's own
    probabilities are those of the labels. ``gauss_newton`` is the exact generalised Gauss-Newton diagonal, never
    negative: as many backward passes per sample as outputs. ``hutchinson`` is the Hessian itself, from products with
    random signs; negative estimates count as zero.

    Pitfalls:
        Off a minimum the gradient's part, which ``weight_gradient`` scores, is missing; and where samples are fitted
        perfectly their gradients vanish, and ``fisher`` with them. Weights are taken to act alone: of two that do the
        same, each looks free, and both may go.

    Cost:
        ``fisher``: one backward pass per batch and the products of each layer's own; ``gauss_newton``: as many backward
        passes per sample as the network has outputs; ``hutchinson``: ``samples`` double backward passes per batch. One
        more number per weight.

    Args:
        diagonal: ``"fisher"``, ``"gauss_newton"`` or ``"hutchinson"``.
        per_sample: How ``fisher`` gets gradients of single samples: ``"layers"``, ``"vmap"`` or ``"loop"``.
        samples: Random products per batch for ``hutchinson``.
        seed: Seed of their signs.

    Example:
        >>> import torch
        >>> score = OptimalBrainDamage()
        >>> (need,) = score.needs
        >>> score({"w": torch.tensor([2.0])}, {need: {"w": torch.tensor([3.0])}})["w"].tolist()
        [6.0]

    References:
        Yann LeCun, John S. Denker, Sara A. Solla, Optimal Brain Damage, 1989.
    """

    diagonal: Diagonal = "fisher"
    per_sample: PerSample = "layers"
    samples: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("optimal_brain_damage: diagonal", self.diagonal, get_args(Diagonal))
        FisherDiagonal(self.per_sample)  # building them checks the options
        HutchinsonDiagonal(self.samples, self.seed)

    @property
    def needs(self) -> frozenset[Need]:
        """One of the diagonals."""
        return frozenset({self._statistic})

    @property
    def _statistic(self) -> Statistic:
        if self.diagonal == "fisher":
            return FisherDiagonal(self.per_sample)
        return GaussNewtonDiagonal() if self.diagonal == "gauss_newton" else HutchinsonDiagonal(self.samples, self.seed)

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the score in float32 or better."""
        diagonal = stats[self._statistic]
        return {name: wide(w).square() * diagonal[name] / 2 for name, w in weights.items()}
