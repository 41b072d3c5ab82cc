"""Proximal steps: of absolute values, and of a sum of norms, for one rate or one per element."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.penalties._units import Member, Units
from secateur.types import Tensors

# Shapes: M rows of a member, E elements per row

_TINY = 1e-30
_MOST = 200
"""Newton steps; two or three do."""


def softened(weights: Tensors, rates: Tensors, strength: float) -> dict[str, Tensor]:
    """Return the soft threshold: every element nearer to zero by rate times strength, and not beyond."""
    return {n: w.sign() * (w.abs() - rates[n] * strength).clamp_min(0.0) for n, w in weights.items()}


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
    # Float32 is enough for float32: rounding in the sums moves no element by more than its own last places.
    wide = {n: torch.promote_types(weights[n].dtype, torch.float32) for n in own}
    w = {n: weights[n].to(wide[n]) for n in own}
    pull = {
        m.name: (rates[m.name].to(wide[m.name]) * m.spread(strength.to(wide[m.name]), w[m.name], 0.0)).expand_as(
            w[m.name]
        )
        for m in units.members
    }
    alive = units.total({n: (w[n] / pull[n].clamp_min(_TINY)).square_() for n in own}) > 1
    length = _length(units, w, pull, alive)
    out = {}
    for member in units.members:
        n = member.name
        t, stays = member.spread(length, w[n], 1.0), member.spread(alive.to(wide[n]), w[n], 1.0)
        out[n] = (w[n] * (t / (t + pull[n])).mul_(stays)).to(weights[n].dtype)
    return out


def _length(units: Units, w: dict[str, Tensor], pull: dict[str, Tensor], alive: Tensor) -> Tensor:
    """Return each unit's norm after the step; of no meaning where it is zero.

    Newton's method on 1 / sqrt(sum) - 1, which rises and bends down: from the left it never oversteps the root.
    """
    rows = [(m, m.rows(w[m.name]), m.rows(pull[m.name])) for m in units.members]
    t = _from_the_left(units.count, rows)
    enough = torch.finfo(t.dtype).eps ** 0.5  # convergence is quadratic: the next step would not be seen
    for _ in range(_MOST):
        square, slope = torch.zeros_like(t), torch.zeros_like(t)
        for member, w_ME, pull_ME in rows:
            inverse_ME = (pull_ME + member.per_row(t.to(pull_ME), 1.0)[:, None]).reciprocal_()
            squares_ME = (w_ME * inverse_ME).square_()
            square += member.per_unit(squares_ME.sum(1), units.count).to(square)
            slope += member.per_unit(squares_ME.mul_(inverse_ME).sum(1), units.count).to(slope)
        step = torch.where(alive, (square.sqrt() - 1) * square / torch.where(alive, slope, 1.0), 0.0).clamp_min_(0.0)
        t = t + step
        if bool((step <= enough * t).all()):
            break
    return t


def _from_the_left(count: int, rows: list[tuple[Member, Tensor, Tensor]]) -> Tensor:
    """Return a length that is not above the root, for each unit.

    With p the pulls, the sum is at least (|w| / (t + mean of p, weighted by w^2))^2, as 1 / x^2 bends up, and at least
    each of its terms. The first bound is near the root; the second keeps all terms below one, where nothing overflows.
    """
    like = rows[0][1]
    square, pulled, largest = (like.new_zeros(count) for _ in range(3))
    for member, w_ME, pull_ME in rows:
        squares_ME = w_ME.square()
        square += member.per_unit(squares_ME.sum(1), count).to(square)
        pulled += member.per_unit(squares_ME.mul_(pull_ME).sum(1), count).to(pulled)
        over_M = (w_ME.abs() - pull_ME).amax(1)
        largest = torch.maximum(largest, member.most_per_unit(over_M, count).to(largest))
    mean = pulled / square.clamp_min(_TINY)
    return torch.maximum(square.sqrt() - mean, largest).clamp_min_(_TINY)
