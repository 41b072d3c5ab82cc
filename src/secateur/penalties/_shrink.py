"""The proximal step of a sum of norms, for one rate or one per element."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.penalties._units import Units
from secateur.types import Tensors

_TINY = 1e-60
_MOST = 200
"""Newton steps; a handful do."""


def shrunk(units: Units, weights: Tensors, rates: Tensors, strength: Tensor) -> dict[str, Tensor]:
    r"""Return, of every unit, the minimum of distance and norm.

    .. math:: \underset{x}{\operatorname{argmin}} \sum_i \frac{(x_i - w_i)^2}{2 \eta_i} + c \|x\|_2

    It is zero where :math:`\sum_i (w_i / (\eta_i c))^2 \le 1`, and elsewhere :math:`x_i = w_i t / (t + \eta_i c)`,
    with :math:`t = \|x\|` the root of :math:`\sum_i (w_i / (t + \eta_i c))^2 = 1`.

    Args:
        units: The units; no element is in two of them.
        weights: Their weights.
        rates: Per weight one number, or one per element.
        strength: :math:`c`, per unit.

    Returns:
        New tensors for the weights that have a place for the units; what belongs to no unit is as it was.
    """
    own = [m.name for m in units.members]
    first = rates[own[0]]
    if first.dim() == 0 and all(rates[n].dim() == 0 and float(rates[n]) == float(first) for n in own):
        norms = units.norms(weights)
        short = first.to(norms) * strength.to(norms)
        gone = torch.where(norms > short, short / torch.where(norms > short, norms, 1.0), (short > 0).to(norms))
        return {
            m.name: weights[m.name] - weights[m.name] * m.spread(gone, weights[m.name], 0.0).to(weights[m.name].dtype)
            for m in units.members
        }
    w = {n: weights[n].double() for n in own}
    pull = {m.name: rates[m.name].double() * m.spread(strength.double(), w[m.name], 0.0) for m in units.members}
    alive = units.total({n: (w[n] / pull[n].clamp_min(_TINY)).square() for n in own}) > 1
    length = _length(units, w, pull, alive)
    out = {}
    for member in units.members:
        n = member.name
        t, stays = member.spread(length, w[n], 1.0), member.spread(alive.double(), w[n], 1.0)
        out[n] = (w[n] * (t / (t + pull[n])) * stays).to(weights[n].dtype)
    return out


def _length(units: Units, w: dict[str, Tensor], pull: dict[str, Tensor], alive: Tensor) -> Tensor:
    """Return each unit's norm after the step; of no meaning where it is zero.

    Newton's method on 1 / sqrt(sum) - 1, which rises and bends down: from the left it never oversteps the root.
    """
    t = torch.full_like(alive, _TINY, dtype=torch.float64)
    for _ in range(_MOST):
        inverse = {m.name: (m.spread(t, w[m.name], 1.0) + pull[m.name]).reciprocal_() for m in units.members}
        squares = {n: (w[n] * d).square_() for n, d in inverse.items()}
        square = units.total(squares)
        slope = units.total({n: q.mul_(inverse[n]) for n, q in squares.items()})
        step = torch.where(alive, (square.sqrt() - 1) * square / torch.where(alive, slope, 1.0), 0.0).clamp_min(0.0)
        t = t + step
        if bool((step <= 1e-8 * t).all()):  # convergence is quadratic: the next one would not be seen
            break
    return t
