"""Ablations: rob a method of one thing, and see what that was worth."""

from secateur.ablations.masks import RandomMasks, Shuffle
from secateur.ablations.smaller import SmallerDense, smaller_dense
from secateur.ablations.weights import Reinitialise, reinitialise_
from secateur.registry import Registry

ABLATIONS = Registry(
    "ablation",
    {
        "shuffle": Shuffle,
        "random_masks": RandomMasks,
        "reinitialise": Reinitialise,
        "smaller_dense": SmallerDense,
    },
)

__all__ = [
    "ABLATIONS",
    "RandomMasks",
    "Reinitialise",
    "Shuffle",
    "SmallerDense",
    "reinitialise_",
    "smaller_dense",
]
