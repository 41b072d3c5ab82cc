"""Pressure on weights during training, so that what can go is small before it goes."""

from secateur.penalties.penalised import Penalised
from secateur.penalties.scale_l1 import ScaleL1
from secateur.registry import Registry

PENALTIES = Registry("penalty", {"scale_l1": ScaleL1})

__all__ = ["PENALTIES", "Penalised", "ScaleL1"]
