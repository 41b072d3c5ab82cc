"""One density, but for the first convolution and the last layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from secateur.allocate._apportion import apportion
from secateur.errors import TargetError
from secateur.select import cost_of_best, live
from secateur.types import Edge, Units


@dataclass(frozen=True)
class UniformPlus:
    r"""Keep the first convolution whole and a fifth of the last layer, and give all others one density.

    .. math:: k_{first} = n_{first}, \qquad k_{last} = \max\bigl(\mathrm{round}(d\,n_{last}), \lceil n_{last} / 5
        \rceil\bigr), \qquad k_l = \mathrm{round}(d\,n_l), \\ \text{the largest } d \text{ with }
        \textstyle\sum_l c_l(k_l) \le K

    with :math:`n_l` units and :math:`c_l(k)` the cost of the layer's :math:`k` best: ``layerwise`` with higher floors,
    which the others pay for, so that the total is as exact as there. The first convolution has few weights and every
    input passes through it; the last layer tells the classes apart. In every round of a schedule the two keep that
    much.

    First and last are by the order in which the model registers its layers, of those that can be pruned; for another
    order, or other shares, use ``layerwise`` with overrides. Without a convolution, or where it is the last layer too,
    none is kept whole. Units of several tensors (coupled channels, heads) have no such places and get one density.

    A target that these two layers leave no room for is refused, with the one in reach.

    Pitfalls:
        A sparsity under this rule is another object than one of all layers: beside ``layerwise`` or ``erk``, compare
        multiply-accumulates as well.

    Cost:
        A bisection over one number per layer; of the scores it sees only which units are gone.

    Raises:
        TargetError: When what must stay costs more than may stay.

    Example:
        >>> import torch
        >>> sizes = {"conv1": (20, "first"), "conv2": (300, ""), "conv3": (600, ""), "fc": (100, "last")}
        >>> units = {name: Units(torch.zeros(n), 1, edge=edge) for name, (n, edge) in sizes.items()}
        >>> UniformPlus()(units, 130)  # 20, then 20 of the last, and a tenth of the others
        {'conv1': 20, 'conv2': 30, 'conv3': 60, 'fc': 20}

    References:
        Trevor Gale, Erich Elsen, Sara Hooker, The State of Sparsity in Deep Neural Networks, 2019; under this name in
        Jaeho Lee, Sejun Park, Sangwoo Mo, Sungsoo Ahn, Jinwoo Shin, Layer-adaptive Sparsity for the Magnitude-based
        Pruning, 2021.
    """

    def floor(self, units: int, edge: Edge) -> int:
        """Return the fewest of a layer's units that stay, by its place in the network."""
        return {"first": units, "last": -(-units // 5)}.get(edge, 0)

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer."""
        sizes = {name: u.scores.numel() for name, u in units.items()}
        raised = {n: replace(u, floor=max(u.floor, self.floor(sizes[n], u.edge))) for n, u in units.items()}
        least = math.fsum(cost_of_best(u)(min(u.floor, live(u))) for u in raised.values())
        if least > kept + 1e-9 * max(abs(kept), 1.0):
            raise TargetError(
                f"uniform_plus keeps the first convolution whole and a fifth of the last layer: with one unit in every "
                f"other that costs {least:g}, and only {kept:g} may stay. Ask for less, or use layerwise"
            )
        return apportion(raised, kept, {name: Fraction(size) for name, size in sizes.items()})
