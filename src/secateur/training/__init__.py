"""Sparsity that is found while the network trains: weights made from others, and masks that move."""

from secateur.registry import Registry
from secateur.training.ac_dc import ACDC
from secateur.training.granet import GraNet
from secateur.training.rigl import RigL
from secateur.training.set_ import SET
from secateur.training.soft_filter import SoftFilter
from secateur.training.sparse_training import SparseTraining
from secateur.training.static import Static

DYNAMICS = Registry(
    "dynamics",
    {"static": Static, "set": SET, "rigl": RigL, "granet": GraNet, "ac_dc": ACDC, "soft_filter": SoftFilter},
)

__all__ = ["ACDC", "DYNAMICS", "SET", "GraNet", "RigL", "SoftFilter", "SparseTraining", "Static"]
