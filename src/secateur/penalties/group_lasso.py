"""Group lasso: rows, columns, filters or coupled channels, all of one or nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from secateur.errors import check_number
from secateur.penalties._shrink import shrunk
from secateur.penalties._units import By, check_units, parameters_by, scaled, units_of
from secateur.penalties._weights import settle
from secateur.types import CoupledGroup, Tensors


@dataclass(frozen=True)
class GroupLasso:
    r"""The sum of the norms of groups of weights.

    .. math:: R = \lambda \sum_g \sqrt{|g|} \, \|w_g\|_2

    with :math:`\lambda` = ``strength`` and :math:`|g|` the elements of a group. The subgradient
    :math:`\lambda \sqrt{|g|}\, w_g / \|w_g\|_2` (zero at zero) is added before each step. With ``proximal_step`` the
    step is followed by

    .. math:: w_g \leftarrow \max(0, 1 - \frac{\eta \lambda \sqrt{|g|}}{\|w_g\|_2}) \, w_g

    instead, with :math:`\eta` how far the optimizer's step goes for a gradient of one: whole groups become exactly
    zero, the others only shorter. Where an optimizer rescales element by element (Adam), :math:`\eta` differs within
    a group, and the step solves that problem, by Newton's method on the group's norm.

    =========== =======================================================================
    ``by``      a group is
    =========== =======================================================================
    ``out``     what makes one output: a row, a filter
    ``in``      what reads one input: a column, a channel of all filters
    ``kernel``  one kernel of a convolution, from one input to one output
    ``shape``   one place in all filters
    ``layer``   a whole weight
    ``coupled`` everything of one channel, in all tensors that make it
    =========== =======================================================================

    For ``coupled``, a recipe finds the groups itself; in Python they come from
    :func:`~secateur.structure.coupled_groups`. With the columns that read a channel (``readers=True``) elements are in
    two groups, and there is no proximal step. In grouped convolutions ``in`` takes the same place of every group.

    Pitfalls:
        Large groups shrink along with the small ones: prune, and train on without it. Without ``proximal_step`` no
        group is ever exactly zero. A norm behind a layer divides its scale out again, so that weights can shrink
        without anything getting smaller; ``coupled`` groups include the norm's scale.

    Args:
        strength: :math:`\lambda`.
        by: What a group is.
        proximal_step: Whether to act after the step, with groups of exact zeros.
        include: Shell patterns of the parameters to press on; by default all of at least two dimensions.
        exclude: Shell patterns of the parameters to leave alone.
        groups: The coupled groups; not in recipes, which find them themselves.

    Raises:
        RecipeError: When the strength is negative or not finite, or groups do not go with ``by``.

    Example:
        >>> w = {"fc.weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
        >>> penalty = GroupLasso(2**-0.5, proximal_step=True)
        >>> penalty.proximal(w, {}, {"fc.weight": torch.tensor(1.0)})["fc.weight"].mul(10).round().tolist()
        [[24.0, 32.0], [0.0, 0.0]]

    References:
        Ming Yuan, Yi Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006; Wei Wen,
        Chunpeng Wu, Yandan Wang, Yiran Chen, Hai Li, Learning Structured Sparsity in Deep Neural Networks, 2016.
    """

    strength: float = 1e-4
    by: By = "out"
    proximal_step: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[CoupledGroup, ...] = ()

    def __post_init__(self) -> None:
        check_number("group_lasso: strength", self.strength)
        settle(self, "include", "exclude", "groups")
        check_units("group_lasso", self.by, self.groups)

    def parameters(self, model: Module) -> tuple[str, ...]:
        """Return the names of the parameters that have groups and pass the filters.

        Raises:
            WeightError: When there are none, a pattern matches nothing, or a weight has no such groups.
            RecipeError: When the coupled groups are missing, or overlap where there is a proximal step.
        """
        return parameters_by(
            "group_lasso", model, self.by, self.groups, self.include, self.exclude, disjoint=self.proximal_step
        )

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        """Return nothing: no step differs from another."""
        return {}

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        """Return the penalty."""
        sets = units_of(self.by, self.groups, weights)
        sums = [(s.sizes(weights).sqrt() * s.norms(weights)).sum() for s in sets]
        return self.strength * torch.stack([x.to(sums[0]) for x in sums]).sum()

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        """Return the subgradient, zero at zero."""
        if self.proximal_step:
            return {}
        sets, factors = units_of(self.by, self.groups, weights), {}
        for some in sets:
            norms = some.norms(weights)
            inverse = torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1.0), 0.0)
            factors[some.name] = self.strength * some.sizes(weights).sqrt() * inverse
        return scaled(sets, factors, weights)

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        """Return the weights, with every group shorter, or zero."""
        if not self.proximal_step:
            return {}
        out = dict(weights)
        for some in units_of(self.by, self.groups, weights):
            out |= shrunk(some, out, rates, self.strength * some.sizes(weights).sqrt())
        return out

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        """Return nothing."""
        return {}
