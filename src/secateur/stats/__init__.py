"""What scores need beyond the weights, collected once and streaming."""

from secateur.stats.gradients import collect_gradients

STATISTICS = frozenset({"gradient", "absolute_gradient"})
"""Names that a score may list in ``needs``."""

__all__ = ["STATISTICS", "collect_gradients"]
