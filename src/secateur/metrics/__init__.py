"""Counted, measured and modelled figures of a model, never mixed. Nothing here prints."""

from secateur.metrics.energy import Energy, measure_energy, modelled_joules
from secateur.metrics.latency import Latency, measure_latency, speedup
from secateur.metrics.macs import MacCount, WeightMacs, count_macs
from secateur.metrics.memory import Memory, measure_memory
from secateur.metrics.params import ParamCount, ParamRow, count
from secateur.metrics.profile import LayerProfile, Profile, Row, compare, profile
from secateur.metrics.storage import Storage, measure_storage

__all__ = [
    "Energy",
    "Latency",
    "LayerProfile",
    "MacCount",
    "Memory",
    "ParamCount",
    "ParamRow",
    "Profile",
    "Row",
    "Storage",
    "WeightMacs",
    "compare",
    "count",
    "count_macs",
    "measure_energy",
    "measure_latency",
    "measure_memory",
    "measure_storage",
    "modelled_joules",
    "profile",
    "speedup",
]
