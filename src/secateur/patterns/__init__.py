"""What is removed together: single weights, N of every M, blocks, output channels; whole experts and layers."""

from secateur.patterns.block import Block
from secateur.patterns.channel import Channel
from secateur.patterns.expert import Expert
from secateur.patterns.layer import Layer
from secateur.patterns.nm import NM
from secateur.patterns.unstructured import Unstructured
from secateur.registry import Registry

PATTERNS = Registry(
    "pattern",
    {"unstructured": Unstructured, "nm": NM, "block": Block, "channel": Channel},
)

UNIT_PATTERNS = Registry("unit pattern", {"expert": Expert, "layer": Layer})

__all__ = ["NM", "PATTERNS", "UNIT_PATTERNS", "Block", "Channel", "Expert", "Layer", "Unstructured"]
