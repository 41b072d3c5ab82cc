"""Chance: the baseline that every other score has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.types import Stats, Tensors


@dataclass(frozen=True)
class Random:
    r"""Uniform noise from an explicit seed.

    .. math:: S_{ij} \sim U(0, 1)

    The stream depends on the seed and the weight's name only, so a layer's scores do not change when another layer is
    added, and pruning again (a further round) ranks the survivors as before.

    Pitfalls:
        One seed says little: report several. Ranked globally every layer keeps about the same share; for a control with
        the shares of the method that is judged, use the allocation ``proportions``.

    Cost:
        Nothing but the numbers themselves.

    Args:
        seed: Seed of the generator, required: a random baseline without one cannot be repeated.

    Example:
        >>> score = Random(seed=0)
        >>> a, b = (score({"w": torch.zeros(2, 2)}, {})["w"] for _ in range(2))
        >>> bool((a == b).all())
        True

    References:
        Davis Blalock, Jose Javier Gonzalez Ortiz, Jonathan Frankle, John Guttag, What is the State of Neural Network
        Pruning?, 2020 (the mandatory baseline).
    """

    seed: int

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return one uniform number per element."""
        out = {}
        for name, weight in weights.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
            out[name] = torch.rand(weight.shape, generator=generator, device="cpu").to(weight.device)
        return out
