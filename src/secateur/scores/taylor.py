"""First-order change of the loss when a whole unit is removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from secateur.errors import check_choice
from secateur.types import GroupView, Stats

Form = Literal["square", "absolute", "signed"]


@dataclass(frozen=True)
class Taylor:
    r"""Change of the loss along the removal of everything that makes a unit.

    With :math:`p_b = \sum_{s \in u} g_{b,s} w_s` over the unit's producing weights, its biases and its scales, on
    batch :math:`b` of :math:`B`:

    .. math::
        \text{square:}\quad & S_u = \tfrac1B \sum_b p_b^2 \\
        \text{absolute:}\quad & S_u = \tfrac1B \sum_b |p_b| \\
        \text{signed:}\quad & S_u = \bigl|\tfrac1B \sum_b p_b\bigr|

    Sum first, then square: the parameters of a unit go together, so their effects may cancel. (The square of each
    product, summed, is another score, which cannot tell a unit whose effects cancel from one whose effects add up.)
    Where a scale without a bias is all that follows, ``square`` is the gate form :math:`(g_z z)^2`.

    Pitfalls:
        At a minimum the mean over batches vanishes: ``signed`` says nothing, and the other forms measure how much
        batches differ, so the batch size counts. A removal is no small step: after many of them, score anew.

    Cost:
        One forward and backward pass per batch, and one more number per unit.

    Args:
        form: ``"square"``, ``"absolute"`` or ``"signed"``.

    Example:
        >>> import torch
        >>> stats = {"unit_product_square": {"conv": torch.tensor([4.0, 1.0])}}
        >>> Taylor().units(GroupView("conv", 2, ()), stats).tolist()
        [4.0, 1.0]

    References:
        Pavlo Molchanov, Arun Mallya, Stephen Tyree, Iuri Frosio, Jan Kautz, Importance Estimation for Neural Network
        Pruning, 2019.
    """

    form: Form = "square"

    def __post_init__(self) -> None:
        check_choice("taylor: form", self.form, get_args(Form))

    @property
    def needs(self) -> frozenset[str]:
        """Products of weights and gradients, added up per unit and batch."""
        return frozenset({self._statistic})

    @property
    def _statistic(self) -> str:
        return {"square": "unit_product_square", "absolute": "unit_product_absolute", "signed": "unit_product"}[
            self.form
        ]

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one score per unit."""
        values: Tensor | None = stats[self._statistic].get(group.name)
        if values is None:
            return None
        return values.abs() if self.form == "signed" else values
