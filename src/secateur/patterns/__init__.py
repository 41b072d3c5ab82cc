"""What is removed together: single weights, N of every M, blocks, output channels."""

from secateur.patterns.block import Block
from secateur.patterns.channel import Channel
from secateur.patterns.nm import NM
from secateur.patterns.unstructured import Unstructured
from secateur.registry import Registry

PATTERNS = Registry(
    "pattern",
    {"unstructured": Unstructured, "nm": NM, "block": Block, "channel": Channel},
)

__all__ = ["NM", "PATTERNS", "Block", "Channel", "Unstructured"]
