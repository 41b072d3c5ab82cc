"""As many zeros in every layer as the method wants, in other places."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.patterns import NM, Channel
from secateur.scores import Random
from secateur.types import Masks, Pattern, Tensors, Weight


@dataclass(frozen=True)
class Shuffle:
    r"""Permute the mask within each layer: the method says how much goes where, chance says what.

    .. math:: M_l \leftarrow \pi_l(M_l), \qquad \pi_l \text{ a uniform permutation of the layer's units}

    Units are the pattern's own: weights, blocks, or channels with their biases; blocks at a ragged edge change places
    with their like, and N:M is permuted within each group of M, so that every layer keeps exactly the number of weights
    that it had. In later rounds only what is still there is permuted: pruned stays pruned. A method that is no better
    than its shuffled self has found proportions of layers, not weights. The masks are drawn as those of
    ``random_masks`` are.

    Args:
        seed: Seed of the permutations; layers and rounds get different ones.

    Raises:
        RecipeError: For coupled channels, and for patterns of a fixed density other than N:M.

    References:
        Jonathan Frankle, Gintare Karolina Dziugaite, Daniel M. Roy, Michael Carbin, Pruning Neural Networks at
        Initialization: Why are We Missing the Mark?, 2021.
    """

    seed: int = 0

    @property
    def restarts(self) -> bool:
        """No: the weights that stay are left alone."""
        return False

    def check(self, pattern: object, *, rounds: bool) -> None:
        """Refuse units that cannot change places within one layer.

        Raises:
            RecipeError: Names the pattern.
        """
        _check_pattern("shuffle", pattern)

    def masks(self, weights: Mapping[str, Weight], pattern: Pattern, masks: Masks, previous: Tensors | None) -> Masks:
        """Return the masks, permuted layer by layer."""
        out: Masks = {}
        for name, weight in weights.items():
            kept, alive, kinds = _units(weight, pattern, masks[name], None if previous is None else previous[name])
            # The number kept tells one round from another; there is no other state.
            seed = zlib.crc32(f"{self.seed}/{name}/{int(kept.sum())}".encode())
            keys = torch.rand(kept.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            out |= pattern.expand(weight, _moved(kept, alive, kinds, keys).to(masks[name].device))
        return out

    def restart_(self, model: nn.Module) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class RandomMasks:
    r"""Keep as many units of each layer as the method does, chosen by a random score.

    .. math:: M_l = \text{the } k_l \text{ highest of } S \sim U(0, 1), \qquad k_l = \|M_l\|_0 \text{ of the method}

    The random baseline of the same layerwise proportions. Within the groups of N:M, and among blocks of one size at a
    ragged edge, as many stay as in the method's own masks. Where ``shuffle`` draws anew in each round, the random score
    ranks the survivors as before.

    Args:
        seed: Seed of the score.

    Raises:
        RecipeError: For coupled channels, and for patterns of a fixed density other than N:M.

    References:
        Davis Blalock, Jose Javier Gonzalez Ortiz, Jonathan Frankle, John Guttag, What is the State of Neural Network
        Pruning?, 2020 (the mandatory baselines).
    """

    seed: int = 0

    @property
    def restarts(self) -> bool:
        """No: the weights that stay are left alone."""
        return False

    def check(self, pattern: object, *, rounds: bool) -> None:
        """Refuse units that cannot be chosen within one layer.

        Raises:
            RecipeError: Names the pattern.
        """
        _check_pattern("random_masks", pattern)

    def masks(self, weights: Mapping[str, Weight], pattern: Pattern, masks: Masks, previous: Tensors | None) -> Masks:
        """Return masks of the same size, layer by layer."""
        scores = Random(self.seed)({name: torch.empty(w.shape) for name, w in weights.items()}, {})
        out: Masks = {}
        for name, weight in weights.items():
            kept, alive, kinds = _units(weight, pattern, masks[name], None if previous is None else previous[name])
            keys = pattern.reduce(weight, scores[name]).double()
            # Of each kind of unit, the kept flags go to the highest scores.
            ordered = torch.zeros_like(kept)
            where = alive.nonzero().flatten()
            order = where[_by(kinds[where], kept[where].double())]
            ordered[_by_kind(where, kinds)] = kept[order]
            out |= pattern.expand(weight, _moved(ordered, alive, kinds, keys).to(masks[name].device))
        return out

    def restart_(self, model: nn.Module) -> None:
        """Do nothing."""


def _check_pattern(name: str, pattern: object) -> None:
    if isinstance(pattern, Channel) and pattern.coupled:
        raise RecipeError(
            f"prune.ablate '{name}' moves zeros within one layer, and units of coupled groups go from many layers at "
            "once: use score = {name = 'random', seed = 0}, or the pattern without coupled"
        )
    if not isinstance(pattern, Pattern) or (pattern.density is not None and not isinstance(pattern, NM)):
        raise RecipeError(f"prune.ablate '{name}' does not know which units of {pattern} may change places")


def _units(weight: Weight, pattern: Pattern, mask: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for every unit: whether it is kept, whether it was there before, and with which others it may change."""
    kept = pattern.reduce(weight, mask.cpu())
    alive = torch.ones_like(kept) if previous is None else pattern.reduce(weight, previous.cpu())
    if isinstance(pattern, NM):
        return kept, alive, torch.arange(kept.numel()) // pattern.m
    sizes = pattern.sizes(weight)
    return kept, alive, sizes.cpu().long() if isinstance(sizes, Tensor) else torch.zeros(kept.numel(), dtype=torch.long)


def _moved(kept: Tensor, alive: Tensor, kinds: Tensor, keys: Tensor) -> Tensor:
    """Give the flags of the living units, kind by kind and in their order, to those units in the order of the keys."""
    out = torch.zeros_like(kept)
    where = alive.nonzero().flatten()
    out[where[_by(kinds[where], keys[where])]] = kept[_by_kind(where, kinds)]
    return out


def _by_kind(where: Tensor, kinds: Tensor) -> Tensor:
    return where[torch.sort(kinds[where], stable=True).indices]


def _by(kinds: Tensor, keys: Tensor) -> Tensor:
    """Return the order by kind, then by key."""
    order = torch.sort(keys, stable=True).indices
    return order[torch.sort(kinds[order], stable=True).indices]
