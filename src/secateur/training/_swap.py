"""What the dynamics share: their clock, and dropping and growing as many units."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secateur.select import keep_top_k
from secateur.types import Connections, Move, Turn

Growth = Callable[[str, Connections], Tensor]
"""Says of each unit how much it deserves to grow; only inactive ones are asked."""


def due_every(every: int, time: int, *, begin: int = 0) -> bool:
    """Tell whether a whole number of intervals has passed since the beginning; never before training has begun."""
    return time > 0 and time >= begin and (time - begin) % every == 0


def cosine(fraction: float, progress: float) -> float:
    """Return a fraction that falls to zero along half a cosine."""
    return fraction / 2 * (1 + math.cos(math.pi * progress))


def noise(seed: int, time: int) -> Growth:
    """Return uniform numbers that depend on seed, time and name alone: nothing to save, nothing to restore."""

    def growth(name: str, units: Connections) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{time}/{name}".encode()))
        return torch.rand(units.sizes.shape, generator=generator, device="cpu").to(units.sizes.device)

    return growth


def swap(units: Mapping[str, Connections], fraction: float, growth: Growth) -> dict[str, Tensor]:
    """Drop the smallest active units of every weight, and let as many grow.

    Args:
        units: The units.
        fraction: Fraction of the active units that is dropped, rounded down.
        growth: What decides who grows, among the inactive and those just dropped.

    Returns:
        Flags of the active units; as many in each weight as before.
    """
    out = {}
    for name, unit in units.items():
        active = int(unit.active.sum())
        dropped = math.floor(fraction * active + 1e-9)  # 0.29 of 100 is 29, whatever the product says
        kept = keep_top_k(unit.sizes.masked_fill(~unit.active, -torch.inf), active - dropped)
        out[name] = kept | keep_top_k(growth(name, unit).masked_fill(kept, -torch.inf), dropped)
    return out


def moved(turn: Turn, active: Mapping[str, Tensor], level: float) -> Move:
    """Return the move to other active units: new ones start at zero, without momentum.

    What was dropped and grew again in one move has never left, and keeps both.
    """
    new = turn.expand({name: flags & ~turn.units[name].active for name, flags in active.items()})
    return Move(turn.expand(active), level, zero=new, clear=new)
