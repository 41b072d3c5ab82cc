"""As much in each layer as somebody else kept there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from secateur.allocate._apportion import apportion
from secateur.errors import TargetError
from secateur.types import PruneReport, Tensors, Units


@dataclass(frozen=True)
class Proportions:
    r"""Densities in given proportions, such as those that another method came to.

    .. math:: d_l = \min(1,\ t\,p_l), \qquad
        \text{the largest } t \text{ with } \sum_l c_l(k_l) \le K, \quad k_l = \mathrm{round}(d_l n_l)

    with :math:`p_l` the given density, :math:`n_l` units and :math:`c_l(k)` the cost of the layer's :math:`k` best. At
    the same total :math:`t` is 1, and every layer keeps what it kept there. :meth:`like` reads the densities off a
    report or masks, for the control of every criterion:
    ``Method(target=target, score=Random(0), allocate=Proportions.like(report))`` keeps random weights in the same
    layerwise proportions.

    Cost:
        A bisection over one number per layer; of the scores it sees only which units are gone.

    Args:
        densities: Pairs of a parameter's name and its density, or a dict. Every weight needs one.

    Raises:
        TargetError: When a density is outside [0, 1], or a weight has none.

    Example:
        >>> import torch
        >>> units = {"a": Units(torch.zeros(6), 1), "b": Units(torch.zeros(4), 1)}
        >>> Proportions({"a": 1 / 3, "b": 1.0})(units, 6)
        {'a': 2, 'b': 4}

    References:
        Jonathan Frankle, Gintare Karolina Dziugaite, Daniel M. Roy, Michael Carbin, Pruning Neural Networks at
        Initialization: Why are We Missing the Mark?, 2021 (the control: masks shuffled within their layers).
    """

    densities: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        given = self.densities
        try:
            pairs = {str(n): float(d) for n, d in (given.items() if isinstance(given, Mapping) else given)}
        except (TypeError, ValueError) as error:
            raise TargetError(f"proportions: densities are pairs of a name and a number, got {given!r}") from error
        for name, density in pairs.items():
            if not (math.isfinite(density) and 0.0 <= density <= 1.0):
                raise TargetError(f"proportions: the density of {name!r} must lie in [0, 1], got {density!r}")
        object.__setattr__(self, "densities", tuple(sorted(pairs.items())))

    @classmethod
    def like(cls, source: PruneReport | Tensors) -> Self:
        """Take the densities of a report, or of masks.

        Args:
            source: What pruning returned, or bool masks by parameter name.

        Returns:
            The allocation.
        """
        if isinstance(source, PruneReport):
            return cls(tuple((row.name, row.kept / row.total) for row in source.layers))
        return cls(tuple((name, int(mask.sum()) / mask.numel()) for name, mask in source.items()))

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer.

        Raises:
            TargetError: When a layer has no density.
        """
        known = dict(self.densities)
        missing = [name for name in units if name not in known]
        if missing:
            raise TargetError(
                f"proportions: no density for {missing[0]!r} ({len(missing)} of {len(units)} weights); exclude what "
                "the other method left alone, or name a density for each"
            )
        return apportion(units, kept, {name: Fraction(known[name]) * u.scores.numel() for name, u in units.items()})
