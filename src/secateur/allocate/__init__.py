"""How much to keep where."""

from secateur.allocate.layerwise import Layerwise
from secateur.allocate.ranked import Global
from secateur.registry import Registry

ALLOCATIONS = Registry("allocate", {"layerwise": Layerwise, "global": Global})

__all__ = ["ALLOCATIONS", "Global", "Layerwise"]
