"""Sparsity that is found while the network trains: weights made from others, and masks that move."""

from secateur.registry import Registry
from secateur.training.l0 import L0
from secateur.training.movement import Movement
from secateur.training.reparametrised import Finished, FinishReport, Reparametrised
from secateur.training.soft_movement import SoftMovement
from secateur.training.soft_threshold import SoftThreshold
from secateur.training.sr_ste import SrSte
from secateur.training.variational_dropout import VariationalDropout

PARAMETRISATIONS = Registry(
    "parametrisation",
    {
        "l0": L0,
        "variational_dropout": VariationalDropout,
        "soft_threshold": SoftThreshold,
        "movement": Movement,
        "soft_movement": SoftMovement,
        "sr_ste": SrSte,
    },
)

__all__ = [
    "L0",
    "PARAMETRISATIONS",
    "FinishReport",
    "Finished",
    "Movement",
    "Reparametrised",
    "SoftMovement",
    "SoftThreshold",
    "SrSte",
    "VariationalDropout",
]
