"""Whole residual blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """A whole residual block as one unit: the stream passes by, as if the block were not there.

    Blocks are the entries of an ``nn.ModuleList`` or ``nn.Sequential`` that add something to the tensor they get and
    return it in the same shape: transformer layers, the repeated blocks of a stage. They are cut out with
    ``secateur.shrink_`` or planned with ``secateur.make_plan``; the result equals the dense model that bypasses them.
    At least one entry of a list stays.

    Example:
        >>> Layer().unit
        'layer'

    References:
        Xin Men, Mingyu Xu, Qingyu Zhang, Bingning Wang, Hongyu Lin, Yaojie Lu, Xianpei Han, Weipeng Chen, ShortGPT:
        Layers in Large Language Models are More Redundant Than You Expect, 2024. Andrey Gromov, Kushal Tirumala,
        Hassan Shapourian, Paolo Glorioso, Daniel A. Roberts, The Unreasonable Ineffectiveness of the Deeper Layers,
        2025.
    """

    @property
    def unit(self) -> Literal["expert", "layer"]:
        """A layer."""
        return "layer"
