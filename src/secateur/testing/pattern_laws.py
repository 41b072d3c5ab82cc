"""The laws of patterns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from secateur.errors import PatternError
from secateur.testing._common import random_tensor, require
from secateur.testing.oracles import select_k
from secateur.types import Pattern, Weight

LAYOUTS: Mapping[str, Weight] = {
    "linear": Weight("fc.weight", (6, 8), bias="fc.bias"),
    "linear of odd sizes": Weight("fc.weight", (5, 7)),
    "one unit": Weight("fc.weight", (1, 1), bias="fc.bias"),
    "one row": Weight("fc.weight", (1, 8)),
    "one column": Weight("fc.weight", (5, 1)),
    "conv1d": Weight("conv.weight", (5, 4, 3), bias="conv.bias"),
    "conv2d": Weight("conv.weight", (4, 8, 3, 2)),
    "conv3d": Weight("conv.weight", (3, 4, 2, 1, 2)),
    "grouped conv": Weight("conv.weight", (6, 4, 3, 3), groups=3, bias="conv.bias"),
    "depthwise conv": Weight("conv.weight", (6, 1, 3, 3), groups=6),
    "transposed conv": Weight("up.weight", (4, 5, 2, 3), 1, 0, transposed=True, bias="up.bias"),
    "grouped transposed conv": Weight("up.weight", (8, 3, 3), 1, 0, groups=2, transposed=True, bias="up.bias"),
    "input first": Weight("c_fc.weight", (4, 6), 1, 0),
}
"""Shapes that a pattern must either accept or refuse with ``PatternError``."""


def check_pattern(pattern: Pattern, layouts: Mapping[str, Weight] = LAYOUTS) -> None:
    """Check that reduce, sizes, select and expand agree with each other on every layout that the pattern accepts.

    Args:
        pattern: The pattern.
        layouts: Weights to try; those that ``check`` refuses with ``PatternError`` are left out.

    Raises:
        AssertionError: When a law is broken, or no layout is accepted.
    """
    tried = accepted(pattern, layouts)
    for label, weight in tried.items():
        count = _check_units(pattern, weight, label)
        _check_reduce_is_local(pattern, weight, label, count)
        for keep in _keeps(pattern, count):
            _check_selection(pattern, weight, f"{label}, keep {keep}", keep)
    require(len(tried) > 0, pattern, f"refuses every layout: {', '.join(layouts)}")


def accepted(pattern: Pattern, layouts: Mapping[str, Weight] = LAYOUTS) -> dict[str, Weight]:
    """Return the layouts that a pattern does not refuse with ``PatternError``."""
    out = {}
    for label, weight in layouts.items():
        with suppress(PatternError):
            pattern.check(weight)
            out[label] = weight
    return out


def _keeps(pattern: Pattern, count: int) -> list[int]:
    if pattern.density is not None:
        return [round(count * pattern.density)]
    return sorted({0, 1, count // 3, count // 2, count - 1, count} & set(range(count + 1)))


def _sizes(pattern: Pattern, weight: Weight, count: int) -> Tensor:
    sizes = pattern.sizes(weight)
    return sizes if isinstance(sizes, Tensor) else torch.full((count,), sizes)


def _check_units(pattern: Pattern, weight: Weight, label: str) -> int:
    """Every element belongs to exactly one unit; returns the number of units."""
    values = random_tensor(weight.shape, 6)
    before = values.clone()
    scores = pattern.reduce(weight, values)
    count = scores.numel()
    require(scores.dim() == 1, pattern, f"{label}: reduce gave shape {tuple(scores.shape)}, expected 1-D")
    require(torch.equal(values, before), pattern, f"{label}: reduce changed its input")
    sizes = _sizes(pattern, weight, count)
    require(sizes.shape == (count,), pattern, f"{label}: {tuple(sizes.shape)} sizes for {count} units")
    covered = torch.zeros(weight.shape, dtype=torch.int64)
    for unit in range(count):
        one = torch.zeros(count, dtype=torch.bool)
        one[unit] = True
        mask = pattern.expand(weight, one)[weight.name]
        got, size = int(mask.sum()), int(sizes[unit])
        require(got == size, pattern, f"{label}: unit {unit} has {got} elements, sizes says {size}")
        covered += mask
    require(bool((covered == 1).all()), pattern, f"{label}: an element lies in no unit, or in two")
    return count


def _check_reduce_is_local(pattern: Pattern, weight: Weight, label: str, count: int) -> None:
    """A unit's score depends on the unit's own elements only."""
    values = random_tensor(weight.shape, 7)
    other = random_tensor(weight.shape, 8)
    scores = pattern.reduce(weight, values)
    for unit in {0, count // 2, count - 1}:
        one = torch.zeros(count, dtype=torch.bool)
        one[unit] = True
        inside = pattern.expand(weight, one)[weight.name]
        mixed = pattern.reduce(weight, torch.where(inside, values, other))
        same = torch.equal(mixed[unit], scores[unit])
        require(same, pattern, f"{label}: the score of unit {unit} depends on elements outside it")


def _check_selection(pattern: Pattern, weight: Weight, label: str, keep: int) -> None:
    """Exactly ``keep`` units, ties included, and the masks keep exactly their elements."""
    distinct = pattern.reduce(weight, random_tensor(weight.shape, 9))
    count = distinct.numel()
    coarse = (torch.arange(count) * 7 % 3).float()
    marked = distinct.clone()
    if pattern.density is None:
        marked[: (count - keep) // 2] = -torch.inf
    for kind, scores in {"distinct": distinct, "tied": coarse, "equal": torch.zeros(count), "marked": marked}.items():
        at = f"{label}, {kind} scores"
        before = scores.clone()
        kept = pattern.select(weight, scores, keep)
        require(kept.dtype == torch.bool and kept.shape == (count,), pattern, f"{at}: select gave {kept.dtype}")
        require(int(kept.sum()) == keep, pattern, f"{at}: select kept {int(kept.sum())} units")
        require(torch.equal(scores, before), pattern, f"{at}: select changed the scores")
        if pattern.density is None:
            expected = select_k({"": scores.tolist()}, keep)[""]
            require(kept.tolist() == expected, pattern, f"{at}: not the {keep} last in the order (score, index)")
        _check_expand(pattern, weight, at, kept)


def _check_expand(pattern: Pattern, weight: Weight, at: str, kept: Tensor) -> None:
    masks = pattern.expand(weight, kept.clone())
    mask = masks[weight.name]
    require(mask.dtype == torch.bool, pattern, f"{at}: expand gave a mask of {mask.dtype}")
    require(mask.shape == weight.shape, pattern, f"{at}: mask of shape {tuple(mask.shape)} for {weight.shape}")
    expected = int(_sizes(pattern, weight, kept.numel())[kept].sum())
    require(int(mask.sum()) == expected, pattern, f"{at}: the mask keeps {int(mask.sum())} elements, not {expected}")
    alive = pattern.reduce(weight, mask)
    require(alive.dtype == torch.bool, pattern, f"{at}: reduce of a mask gave {alive.dtype}")
    require(torch.equal(alive, kept), pattern, f"{at}: reduce(expand(kept)) is not kept")
    others = [m for name, m in masks.items() if name != weight.name]
    require(all(m.dtype == torch.bool for m in others), pattern, f"{at}: a mask beside the weight's is not bool")
    if bool(kept.all()):
        require(all(bool(m.all()) for m in others), pattern, f"{at}: something dies though every unit stays")
