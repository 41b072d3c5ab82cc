"""The laws of ablations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.testing._common import require
from secateur.testing.pattern_laws import accepted
from secateur.types import Ablation, Masks, Pattern, Weight

PATTERNS: Sequence[Pattern] = (Unstructured(), NM(2, 4), NM(1, 4), Block(2, 3), Block(4, 1), Channel())


def check_ablation(ablation: Ablation, patterns: Sequence[Pattern] = PATTERNS) -> None:
    """Check that an ablation takes nothing but what it says.

    On every layout and pattern, in two rounds: the same number of weights stays in each layer, in whole units of the
    pattern; what was pruned stays pruned; the same masks give the same answer, and are not changed.

    Args:
        ablation: The ablation.
        patterns: Patterns to lay over the weights.

    Raises:
        AssertionError: When a law is broken, or no layout is accepted.
    """
    tried = 0
    for pattern in patterns:
        for label, weight in accepted(pattern).items():
            tried += 1
            generator = torch.Generator().manual_seed(tried)
            scores = torch.rand(weight.shape, generator=generator)
            before: Masks | None = None
            for part in (0.75, 0.4):
                own = _masks(pattern, weight, scores, part, before)
                before = _check_round(ablation, pattern, weight, own, before, f"{pattern} on {label}")
    require(tried > 0, ablation, "no layout takes any of the patterns")


def _masks(pattern: Pattern, weight: Weight, scores: Tensor, part: float, before: Masks | None) -> Masks:
    units = pattern.reduce(weight, scores)
    if before is not None:
        units = units.masked_fill(~pattern.reduce(weight, before[weight.name]), -torch.inf)
    density = part if pattern.density is None else pattern.density
    keep = min(round(units.numel() * density), int((~torch.isneginf(units)).sum()))
    chosen = pattern.select(weight, units, keep) & ~torch.isneginf(units)
    return pattern.expand(weight, chosen)


def _check_round(
    ablation: Ablation, pattern: Pattern, weight: Weight, own: Masks, before: Masks | None, at: str
) -> Masks:
    copies = {name: mask.clone() for name, mask in own.items()}
    made, again = (ablation.masks({weight.name: weight}, pattern, own, before) for _ in range(2))
    require(all(torch.equal(own[n], copies[n]) for n in own), ablation, f"changes its arguments ({at})")
    require(made.keys() == own.keys(), ablation, f"masks {sorted(made)}, not {sorted(own)} ({at})")
    for name, mask in made.items():
        alike = mask.shape == own[name].shape and mask.dtype == torch.bool
        require(alike, ablation, f"{name}: a mask of another shape or dtype ({at})")
        require(torch.equal(mask, again[name]), ablation, f"{name}: not the same twice ({at})")
        counts = int(mask.sum()), int(own[name].sum())
        require(counts[0] == counts[1], ablation, f"{name}: keeps {counts[0]}, not {counts[1]} ({at})")
        if before is not None:
            require(not bool((mask & ~before[name]).any()), ablation, f"{name}: what was pruned came back ({at})")
    kept = pattern.reduce(weight, made[weight.name])
    whole = pattern.expand(weight, kept)
    require(all(torch.equal(whole[n], made[n]) for n in made), ablation, f"breaks up units ({at})")
    if isinstance(pattern, NM):
        groups = kept.reshape(-1, pattern.m).sum(1)
        require(bool((groups == pattern.n).all()), ablation, f"keeps not {pattern.n} of every {pattern.m} ({at})")
    return made
