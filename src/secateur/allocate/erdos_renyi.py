"""Small layers dense, large ones sparse: densities by a layer's dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from secateur.allocate._apportion import apportion
from secateur.types import Units


@dataclass(frozen=True)
class ErdosRenyi:
    r"""Density by a layer's numbers of inputs and outputs.

    .. math:: d_l = \min\Bigl(1,\ \varepsilon\,\frac{n_{in} + n_{out}}{n_{in}\,n_{out}}\Bigr), \qquad
        \text{the largest } \varepsilon \text{ with } \sum_l c_l(k_l) \le K, \quad k_l = \mathrm{round}(d_l n_l)

    with :math:`n_l` units and :math:`c_l(k)` the cost of the layer's :math:`k` best. A layer that would get more than
    it has is dense, and :math:`\varepsilon` is that of the others. With unit costs the total is exactly :math:`K`, and
    each layer keeps at least its floor. Grouped convolutions count the inputs of one group. Kernel positions do not
    count; in :class:`ErdosRenyiKernel` they do.

    Units of several tensors (coupled channels, heads) have no such dimensions and get one common density.

    Cost:
        A bisection over one number per layer; of the scores it sees only which units are gone.

    Example:
        >>> import torch
        >>> shapes = {"a": (4, 4), "b": (20, 20)}
        >>> units = {name: Units(torch.zeros(m * n), 1, shape=(m, n)) for name, (m, n) in shapes.items()}
        >>> ErdosRenyi()(units, 24)  # 8 of 16 and 40 of 400, times 1/2
        {'a': 4, 'b': 20}

    References:
        Decebal Constantin Mocanu, Elena Mocanu, Peter Stone, Phuong H. Nguyen, Madeleine Gibescu, Antonio Liotta,
        Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by Network Science,
        2018.
    """

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer."""
        return apportion(units, kept, {name: _claim(u, u.shape[:2]) for name, u in units.items()})


@dataclass(frozen=True)
class ErdosRenyiKernel:
    r"""Density by all of a layer's dimensions: the default of sparse training.

    .. math:: d_l = \min\Bigl(1,\ \varepsilon\,\frac{n_{in} + n_{out} + k_h + k_w}{n_{in}\,n_{out}\,k_h\,k_w}\Bigr),
        \qquad \text{the largest } \varepsilon \text{ with } \sum_l c_l(k_l) \le K, \quad k_l = \mathrm{round}(d_l n_l)

    with as many kernel sizes :math:`k` as the convolution has, :math:`n_l` units and :math:`c_l(k)` the cost of the
    layer's :math:`k` best. Otherwise as :class:`ErdosRenyi`, which it is for linear layers.

    Pitfalls:
        The small layers that it spares are often those with many output positions: at one sparsity it leaves more
        multiply-accumulates than ``layerwise`` (about twice as many on ResNet-50). Compare methods at equal MACs too.

    Cost:
        A bisection over one number per layer; of the scores it sees only which units are gone.

    Example:
        >>> import torch
        >>> shapes = {"conv": (4, 3, 3, 3), "fc": (30, 60)}
        >>> units = {name: Units(torch.zeros(torch.Size(s).numel()), 1, shape=s) for name, s in shapes.items()}
        >>> ErdosRenyiKernel()(units, 206)  # 13 of 108 and 90 of 1800, times 2
        {'conv': 26, 'fc': 180}

    References:
        Utku Evci, Trevor Gale, Jacob Menick, Pablo Samuel Castro, Erich Elsen, Rigging the Lottery: Making All Tickets
        Winners, 2020.
    """

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each layer."""
        return apportion(units, kept, {name: _claim(u, u.shape) for name, u in units.items()})


def _claim(units: Units, sizes: tuple[int, ...]) -> Fraction:
    """Units that the layer keeps at epsilon = 1."""
    return units.scores.numel() * (Fraction(sum(sizes), math.prod(sizes)) if sizes else Fraction(1))
