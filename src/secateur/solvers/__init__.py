"""What the surviving weights become when others go: a pure function of weights, masks and collected statistics."""

from secateur.registry import Registry
from secateur.solvers.optimal_brain_surgeon import OptimalBrainSurgeon
from secateur.stats.quadratic import downdate, remove

SOLVERS = Registry("solver", {"optimal_brain_surgeon": OptimalBrainSurgeon})

__all__ = ["SOLVERS", "OptimalBrainSurgeon", "downdate", "remove"]
