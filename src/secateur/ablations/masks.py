"""As many zeros in every layer as the method wants, in other places."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError, check_whole
from secateur.patterns import NM, Channel
from secateur.scores import Random
from secateur.types import Masks, Pattern, Tensors, Weight


@dataclass(frozen=True)
class _OtherPlaces:
    """Keeps as many units of every layer as the method does, and leaves the weights alone."""

    name: ClassVar[str]

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(f"{self.name}: seed", self.seed, least=0)

    @property
    def restarts(self) -> bool:
        """No: the weights that stay are left alone."""
        return False

    def check(self, pattern: object, *, rounds: bool) -> None:
        """Refuse units that cannot change places within one layer.

        Raises:
            RecipeError: Names the pattern.
        """
        if isinstance(pattern, Channel) and pattern.coupled:
            raise RecipeError(
                f"prune.ablate '{self.name}' moves zeros within one layer, and units of coupled groups go from many "
                "layers at once: use score = {name = 'random', seed = 0}, or the pattern without coupled"
            )
        if not isinstance(pattern, Pattern) or (pattern.density is not None and not isinstance(pattern, NM)):
            raise RecipeError(f"prune.ablate '{self.name}' does not know which units of {pattern} may change places")

    def restart_(self, model: nn.Module) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Shuffle(_OtherPlaces):
    r"""Permute the mask within each layer: the method says how much goes where, chance says what.

    .. math:: M_l \leftarrow \pi_l(M_l), \qquad \pi_l \text{ a uniform permutation of the layer's units}

    Units are the pattern's own: weights, blocks, or channels with their biases; blocks at a ragged edge change places
    with their like, and N:M is permuted within each group of M, so that every layer keeps exactly the number of weights
    that it had. In later rounds only what is still there is permuted: pruned stays pruned. A method that is no better
    than its shuffled self has found proportions of layers, not weights. In one shot it is ``random_masks`` with other
    numbers; over several rounds it draws anew each time.

    Args:
        seed: Seed of the permutations; layers and rounds get different ones.

    Raises:
        RecipeError: For coupled channels, and for patterns of a fixed density other than N:M.

    References:
        Jonathan Frankle, Gintare Karolina Dziugaite, Daniel M. Roy, Michael Carbin, Pruning Neural Networks at
        Initialization: Why are We Missing the Mark?, 2021.
    """

    name = "shuffle"

    def masks(self, weights: Mapping[str, Weight], pattern: Pattern, masks: Masks, previous: Tensors | None) -> Masks:
        """Return the masks, permuted layer by layer."""

        def order(weight: Weight, kept: Tensor) -> Tensor:
            # The number kept tells one round from another; there is no other state.
            seed = zlib.crc32(f"{self.seed}/{weight.name}/{int(kept.sum())}".encode())
            return torch.rand(kept.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        return _as_many(weights, pattern, masks, previous, order)


@dataclass(frozen=True)
class RandomMasks(_OtherPlaces):
    r"""Keep as many units of each layer as the method does, chosen by a random score.

    .. math:: M_l = \text{the } k_l \text{ highest of } S \sim U(0, 1), \qquad k_l = \|M_l\|_0 \text{ of the method}

    The random baseline of the same layerwise proportions. Within the groups of N:M, and among blocks of one size at a
    ragged edge, as many stay as in the method's own masks. One random score ranks the units in all rounds, where
    ``shuffle`` draws anew in each.

    Args:
        seed: Seed of the score.

    Raises:
        RecipeError: For coupled channels, and for patterns of a fixed density other than N:M.

    References:
        Davis Blalock, Jose Javier Gonzalez Ortiz, Jonathan Frankle, John Guttag, What is the State of Neural Network
        Pruning?, 2020 (the mandatory baselines).
    """

    name = "random_masks"

    def masks(self, weights: Mapping[str, Weight], pattern: Pattern, masks: Masks, previous: Tensors | None) -> Masks:
        """Return masks of the same size, layer by layer."""
        scores = Random(self.seed)({name: torch.empty(w.shape) for name, w in weights.items()}, {})

        def order(weight: Weight, kept: Tensor) -> Tensor:
            return pattern.reduce(weight, scores[weight.name]).double()

        return _as_many(weights, pattern, masks, previous, order)


def _as_many(
    weights: Mapping[str, Weight],
    pattern: Pattern,
    masks: Masks,
    previous: Tensors | None,
    scored: Callable[[Weight, Tensor], Tensor],
) -> Masks:
    """Return masks that keep as many units of each kind in every layer, those with the highest scores."""
    out: Masks = {}
    for name, weight in weights.items():
        kept = pattern.reduce(weight, masks[name].cpu())
        alive = torch.ones_like(kept) if previous is None else pattern.reduce(weight, previous[name].cpu())
        kinds = _kinds(weight, pattern, kept.numel())
        scores = scored(weight, kept).masked_fill(~alive, -torch.inf)
        # By kind, and within a kind by score, falling: the first of each kind stay, as many as did.
        order = _by(kinds, -scores)
        place = torch.arange(kept.numel()) - torch.searchsorted(kinds[order], kinds[order])
        many = torch.zeros(int(kinds.max()) + 1, dtype=torch.long).index_add(0, kinds, kept.long())
        chosen = torch.zeros_like(kept)
        chosen[order] = place < many[kinds[order]]
        out |= pattern.expand(weight, chosen.to(masks[name].device))
    return out


def _kinds(weight: Weight, pattern: Pattern, count: int) -> Tensor:
    """Number the units such that those of one number may change places: groups of N:M, blocks of one size."""
    if isinstance(pattern, NM):
        return torch.arange(count) // pattern.m
    sizes = pattern.sizes(weight)
    return sizes.cpu().long() if isinstance(sizes, Tensor) else torch.zeros(count, dtype=torch.long)


def _by(kinds: Tensor, keys: Tensor) -> Tensor:
    """Return the order by kind, then by key."""
    order = torch.sort(keys, stable=True).indices
    return order[torch.sort(kinds[order], stable=True).indices]
