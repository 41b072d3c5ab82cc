"""The exact change of the loss: what every other saliency estimates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.scores._wide import wide
from secateur.stats.loss_change import LossChange, Per
from secateur.types import Need, Stats, Tensors


@dataclass(frozen=True)
class BruteForce:
    r"""Change of the loss when the weight is set to zero, measured.

    .. math:: S_i = \bar L(w \text{ with } w_i = 0) - \bar L(w)

    One evaluation over all batches for each weight: for tiny networks, single layers, and to judge other scores by.
    Weights whose removal lowers the loss go first.

    Pitfalls:
        Removals together cost more or less than the sum of removals one by one: of two units that do the same, each
        alone can be spared. Single removals change the loss little: a few samples or float32 may rank by noise.

    Cost:
        One pass over all batches for every weight or unit that is tried; no memory.

    Args:
        per: ``"element"``, or ``"unit"``: all weights of an output unit and its bias go together and share the unit's
            change, for the pattern ``channel``.
        limit: Weights or units to try at most; more are refused before anything is computed.

    Example:
        >>> import torch
        >>> score = BruteForce()
        >>> (need,) = score.needs
        >>> score({"w": torch.ones(2)}, {need: {"w": torch.tensor([0.5, -0.1])}})["w"].tolist()
        [0.5, -0.10000000149011612]

    References:
        Russell Reed, Pruning algorithms - a survey, 1993.
    """

    per: Per = "element"
    limit: int = 10_000

    def __post_init__(self) -> None:
        LossChange(self.per, self.limit)

    @property
    def needs(self) -> frozenset[Need]:
        """The change itself."""
        return frozenset({LossChange(self.per, self.limit)})

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return the change."""
        changes = stats[LossChange(self.per, self.limit)]
        return {name: wide(changes[name]) for name in weights}
