"""How much to keep where."""

from secateur.allocate.isomorphic import Isomorphic
from secateur.allocate.layerwise import Layerwise
from secateur.allocate.per_round import PerRound
from secateur.allocate.ranked import Global
from secateur.registry import Registry

ALLOCATIONS = Registry(
    "allocate", {"layerwise": Layerwise, "global": Global, "isomorphic": Isomorphic, "per_round": PerRound}
)

__all__ = ["ALLOCATIONS", "Global", "Isomorphic", "Layerwise", "PerRound"]
