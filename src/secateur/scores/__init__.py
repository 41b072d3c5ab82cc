"""Which weights matter: a pure function of weights and collected statistics.

Element scores rate single weights; group scores rate whole coupled units (channels, heads) by everything they own.
"""

from secateur.registry import Registry
from secateur.scores._watching import watches_training, with_path
from secateur.scores.activation_statistic import ActivationStatistic
from secateur.scores.activation_taylor import ActivationTaylor, skeletonization
from secateur.scores.block_influence import BlockInfluence
from secateur.scores.brute_force import BruteForce
from secateur.scores.coupled import Coupled
from secateur.scores.geometric_median import GeometricMedian
from secateur.scores.gradient import WeightGradient
from secateur.scores.grasp import Grasp
from secateur.scores.karnin import Karnin, Movement
from secateur.scores.lamp import Lamp
from secateur.scores.magnitude import Magnitude
from secateur.scores.norm_scale import NormScale
from secateur.scores.optimal_brain_damage import OptimalBrainDamage
from secateur.scores.optimal_brain_surgeon import OptimalBrainSurgeon
from secateur.scores.random import Random
from secateur.scores.sensitivity import Sensitivity
from secateur.scores.snip import Snip
from secateur.scores.synflow import Synflow
from secateur.scores.taylor import Taylor

SCORES = Registry(
    "score",
    {
        "random": Random,
        "magnitude": Magnitude,
        "weight_gradient": WeightGradient,
        "brute_force": BruteForce,
        "optimal_brain_damage": OptimalBrainDamage,
        "karnin": Karnin,
        "movement": Movement,
        "snip": Snip,
        "grasp": Grasp,
        "synflow": Synflow,
        "lamp": Lamp,
        "optimal_brain_surgeon": OptimalBrainSurgeon,
    },
)

GROUP_SCORES = Registry(
    "group score",
    {
        "coupled": Coupled,
        "lamp": Lamp,
        "norm_scale": NormScale,
        "geometric_median": GeometricMedian,
        "taylor": Taylor,
        "activation_taylor": ActivationTaylor,
        "skeletonization": skeletonization,
        "activation": ActivationStatistic,
        "sensitivity": Sensitivity,
        "block_influence": BlockInfluence,
    },
)

__all__ = [
    "GROUP_SCORES",
    "SCORES",
    "ActivationStatistic",
    "ActivationTaylor",
    "BlockInfluence",
    "BruteForce",
    "Coupled",
    "GeometricMedian",
    "Grasp",
    "Karnin",
    "Lamp",
    "Magnitude",
    "Movement",
    "NormScale",
    "OptimalBrainDamage",
    "OptimalBrainSurgeon",
    "Random",
    "Sensitivity",
    "Snip",
    "Synflow",
    "Taylor",
    "WeightGradient",
    "skeletonization",
    "watches_training",
    "with_path",
]
