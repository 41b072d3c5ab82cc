"""Which weights matter: a pure function of weights and collected statistics."""

from secateur.registry import Registry
from secateur.scores.gradient import WeightGradient
from secateur.scores.magnitude import Magnitude
from secateur.scores.random import Random

SCORES = Registry("score", {"random": Random, "magnitude": Magnitude, "weight_gradient": WeightGradient})

__all__ = ["SCORES", "Magnitude", "Random", "WeightGradient"]
