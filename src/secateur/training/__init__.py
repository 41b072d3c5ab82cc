"""Sparsity that is found while the network trains: weights made from others, and masks that move."""

from secateur.registry import Registry
from secateur.training.ac_dc import ACDC
from secateur.training.granet import GraNet
from secateur.training.l0 import L0
from secateur.training.movement import Movement
from secateur.training.reparametrised import Finished, FinishReport, Reparametrised
from secateur.training.rigl import RigL
from secateur.training.set_ import SET
from secateur.training.soft_filter import SoftFilter
from secateur.training.soft_movement import SoftMovement
from secateur.training.soft_threshold import SoftThreshold
from secateur.training.sparse_training import SparseTraining
from secateur.training.sr_ste import SrSte
from secateur.training.static import Static
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

DYNAMICS = Registry(
    "dynamics",
    {"static": Static, "set": SET, "rigl": RigL, "granet": GraNet, "ac_dc": ACDC, "soft_filter": SoftFilter},
)

__all__ = [
    "ACDC",
    "DYNAMICS",
    "L0",
    "PARAMETRISATIONS",
    "SET",
    "FinishReport",
    "Finished",
    "GraNet",
    "Movement",
    "Reparametrised",
    "RigL",
    "SoftFilter",
    "SoftMovement",
    "SoftThreshold",
    "SparseTraining",
    "SrSte",
    "Static",
    "VariationalDropout",
]
