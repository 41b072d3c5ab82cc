"""Experts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Expert:
    """One expert of a mixture, with its row of the router, as one unit.

    A router chooses the ``k`` highest of its outputs (``topk``, or ``argmax`` and ``max`` for one); an expert is one of
    these outputs and everything that is looked up by its number: slices of stacked parameters, entries of a list of
    modules. The result equals the dense model whose router never chooses the experts that are gone. They are cut out
    with ``secateur.shrink_``; at least as many stay as the router chooses at a time.

    Example:
        >>> Expert().unit
        'expert'

    References:
        Mike Lasby, Ivan Lazarevich, Nish Sinnadurai, Sean Lie, Yani Ioannou, Vithursan Thangarasa, REAP the Experts:
        Why Pruning Prevails for One-Shot MoE Compression, 2026.
    """

    @property
    def unit(self) -> Literal["expert", "layer"]:
        """An expert."""
        return "expert"
