"""The same density in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from secateur.allocate._apportion import apportion
from secateur.types import Units


@dataclass(frozen=True)
class Layerwise:
    r"""Give every layer the density of the whole, rounded to units.

    .. math:: k_l = \mathrm{round}(d\,n_l), \qquad \text{the largest } d \text{ with } \sum_l c_l(k_l) \le K

    where :math:`c_l(k)` is the cost of the layer's :math:`k` best units. Layers whose next unit falls due at the same
    :math:`d` get it in the order of their names, as long as the budget reaches; with unit costs the total is exactly
    :math:`K`. Each layer keeps at least its floor.

    Rounding by one common :math:`d` (Webster's method of apportionment) never gives a layer more units when the
    budget shrinks. Handing out the largest remainders can, and a schedule would then ask for units already pruned.

    Cost:
        A bisection over one number per layer; of the scores it sees only which units are gone.

    Example:
        >>> import torch
        >>> units = {"a": Units(torch.zeros(6), 1), "b": Units(torch.zeros(4), 1)}
        >>> Layerwise()(units, 5)
        {'a': 3, 'b': 2}

    References:
        Song Han, Jeff Pool, John Tran, William J. Dally, Learning both Weights and Connections for Efficient Neural
        Networks, 2015 (per-layer thresholds).
    """

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer."""
        return apportion(units, kept, {name: Fraction(u.scores.numel()) for name, u in units.items()})
