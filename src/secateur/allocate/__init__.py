"""How much to keep where."""

from secateur.allocate.erdos_renyi import ErdosRenyi, ErdosRenyiKernel
from secateur.allocate.isomorphic import Isomorphic
from secateur.allocate.layerwise import Layerwise
from secateur.allocate.per_round import PerRound
from secateur.allocate.proportions import Proportions
from secateur.allocate.ranked import Global
from secateur.allocate.uniform_plus import UniformPlus
from secateur.registry import Registry

ALLOCATIONS = Registry(
    "allocate",
    {
        "layerwise": Layerwise,
        "global": Global,
        "isomorphic": Isomorphic,
        "per_round": PerRound,
        "uniform_plus": UniformPlus,
        "er": ErdosRenyi,
        "erk": ErdosRenyiKernel,
        "proportions": Proportions,
    },
)

__all__ = [
    "ALLOCATIONS",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "Global",
    "Isomorphic",
    "Layerwise",
    "PerRound",
    "Proportions",
    "UniformPlus",
]
