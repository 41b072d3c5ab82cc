"""Whether two runs of a forward gave the same, output by output."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-10
"""Largest difference allowed, relative to the scale of what differs: rounding of float64 and no more."""

_SMALLEST_SCALE = 1e-2
"""Outputs are rounded as what led to them, which is larger where they cancel: no smaller scale is assumed."""

_NOTHING = 1e-8
"""Outputs that are smaller everywhere prove nothing: a mistake in them could pass for rounding."""

_ROUNDING = 1e-12
"""Relative to a value itself, a difference that is rounding whatever stands beside it."""

_PIECE = 1 << 20
"""Outputs are compared this many elements at a time, which takes less memory."""

_NOISE = 100
"""How much more rounding a value may have than the others of its tensor."""


def tolerated(scale: float) -> float:
    """Return the largest difference that is rounding, given the scale of what differs."""
    return TOLERANCE * max(_SMALLEST_SCALE, scale)


def compare(
    reference: Sequence[Sequence[Any]], small: Sequence[Sequence[Any]], resized: Collection[tuple[int, int]] = ()
) -> tuple[float, float]:
    """Return the worst difference of all outputs, and the size of what differs; infinite where they do not match.

    Every output has a scale of its own, that of its values which differ beyond their own rounding: next to a masked
    score of -1e9, or to another output in the billions, a wrong 1.0 would otherwise pass for rounding.

    Args:
        reference: Output leaves of the masked dense model, per example.
        small: Those of the pruned one.
        resized: Sizes before and after: a whole number among the outputs may be one of these.

    Example:
        >>> compare([[torch.tensor([-1e9, 1.0])]], [[torch.tensor([-1e9, 1.5])]])
        (0.5, 1.0)
    """
    worst, scale = 0.0, 0.0
    for ours, theirs in zip(small, reference, strict=True):
        if len(ours) != len(theirs):
            return math.inf, scale
        for a, b in zip(ours, theirs, strict=True):
            gap, size = _gap(a, b, resized)
            if (gap / tolerated(size), size) > (worst / tolerated(scale), scale):
                worst, scale = gap, size
    return worst, scale


def says_nothing(outputs: Sequence[Sequence[Any]]) -> bool:
    """Whether all outputs are zero or next to it, NaN, infinite or empty, so that any two models would agree on them.

    Example:
        >>> says_nothing([[torch.zeros(2)], [torch.ones(0)]]), says_nothing([[torch.zeros(2), torch.ones(1)]])
        (True, False)
    """
    return not any(_says_something(leaf) for leaves in outputs for leaf in leaves if isinstance(leaf, Tensor))


def _says_something(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return bool((torch.isfinite(tensor) & (tensor.abs() > _NOTHING)).any())
    return tensor.numel() > 0


def _gap(a: Any, b: Any, resized: Collection[tuple[int, int]]) -> tuple[float, float]:
    """Return how far an output is from what it should be, and the size of the values that differ."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        if type(a) is not type(b) or (isinstance(a, int | str) and a != b and (b, a) not in resized):
            return math.inf, 0.0
        if isinstance(a, float | complex) and a != b and not (a != a and b != b):
            return (abs(a - b), abs(b)) if math.isfinite(abs(a - b)) else (math.inf, 0.0)
        return 0.0, 0.0
    if a.shape != b.shape:
        return math.inf, 0.0
    if not a.numel():
        return 0.0, 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return (0.0 if bool((a == b).all()) else math.inf), 0.0
    return _apart(a.flatten(), b.flatten())


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the largest difference beyond a value's own rounding, and the scale of what differs by that much."""
    near = far = near_size = far_size = 0.0
    for x, y in zip(torch.split(a, _PIECE), torch.split(b, _PIECE), strict=True):
        if bool((torch.isnan(x) != torch.isnan(y)).any()):
            return math.inf, 0.0
        gaps = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(0.0, posinf=math.inf)
        sizes = y.abs().nan_to_num(0.0, posinf=0.0)
        off = gaps > _ROUNDING * sizes
        far, far_size = max(far, _largest(gaps[off])), max(far_size, _largest(sizes[off]))
        near, near_size = max(near, _largest(gaps[~off])), max(near_size, _largest(sizes))
    return (far, max(far_size, _NOISE * near / TOLERANCE)) if far else (near, near_size)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
