"""Pressure on weights during training, so that what can go is small before it goes."""

from secateur.penalties.activity import PenalisedActivity
from secateur.penalties.chauvin import Chauvin
from secateur.penalties.group_lasso import GroupLasso
from secateur.penalties.group_norm import GroupNorm
from secateur.penalties.growing import Growing
from secateur.penalties.l1 import L1
from secateur.penalties.penalised import Penalised
from secateur.penalties.scale_l1 import ScaleL1
from secateur.penalties.weight_decay import WeightDecay
from secateur.penalties.weight_elimination import WeightElimination
from secateur.registry import Registry

PENALTIES = Registry(
    "penalty",
    {
        "weight_decay": WeightDecay,
        "l1": L1,
        "weight_elimination": WeightElimination,
        "group_lasso": GroupLasso,
        "scale_l1": ScaleL1,
        "growing": Growing,
        "group_norm": GroupNorm,
        "chauvin": Chauvin,
    },
)

__all__ = [
    "L1",
    "PENALTIES",
    "Chauvin",
    "GroupLasso",
    "GroupNorm",
    "Growing",
    "Penalised",
    "PenalisedActivity",
    "ScaleL1",
    "WeightDecay",
    "WeightElimination",
]
