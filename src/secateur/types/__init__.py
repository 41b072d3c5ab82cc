"""Every protocol and value that crosses a module boundary, room by room: read these pages and you know the library.

A pruning method is one value on each axis:

    stats -> score -> pattern.reduce to units -> allocate -> select exactly k -> masks -> solver -> recover

Words: *density* = fraction kept, *sparsity* = fraction removed, *k* = number kept, mask ``True`` = keep,
a high score = keep, *macs* = multiply-accumulates. A *unit* is what is removed together.

The modules are called after the rooms that keep their contracts (``types/scores.py`` says what is in ``scores/``), plus
``values`` for what all of them speak of and ``reports`` for what a step returns. Import the names from here.
"""

from secateur.types.ablations import Ablation
from secateur.types.allocate import Allocation, Budget, Edge, FlooredAllocation, Units
from secateur.types.patterns import Pattern, UnitPattern
from secateur.types.penalties import ActivityPenalty, CoupledGroup, CoupledSlices, LossPenalty, Penalty
from secateur.types.reports import GroupReport, LayerReport, PruneReport
from secateur.types.scores import GroupScore, GroupView, MemberView, OutputScore, Score
from secateur.types.solvers import Solver
from secateur.types.stats import Need, Source, Statistic, Stats
from secateur.types.training import (
    ActivationNoise,
    Connections,
    Dynamics,
    Moment,
    Move,
    Parametrisation,
    PatternedParametrisation,
    Turn,
)
from secateur.types.values import Masks, Tensors, Update, Weight

__all__ = [
    "Ablation",
    "ActivationNoise",
    "ActivityPenalty",
    "Allocation",
    "Budget",
    "Connections",
    "CoupledGroup",
    "CoupledSlices",
    "Dynamics",
    "Edge",
    "FlooredAllocation",
    "GroupReport",
    "GroupScore",
    "GroupView",
    "LayerReport",
    "LossPenalty",
    "Masks",
    "MemberView",
    "Moment",
    "Move",
    "Need",
    "OutputScore",
    "Parametrisation",
    "Pattern",
    "PatternedParametrisation",
    "Penalty",
    "PruneReport",
    "Score",
    "Solver",
    "Source",
    "Statistic",
    "Stats",
    "Tensors",
    "Turn",
    "UnitPattern",
    "Units",
    "Update",
    "Weight",
]
