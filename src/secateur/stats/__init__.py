"""What scores and solvers need beyond the weights, collected once and streaming."""

from secateur.stats.collect import STATISTICS, check_needs, collect
from secateur.stats.gradients import collect_gradients

__all__ = ["STATISTICS", "check_needs", "collect", "collect_gradients"]
