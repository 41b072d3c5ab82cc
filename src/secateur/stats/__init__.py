"""What scores and solvers need beyond the weights, collected once and streaming."""

from secateur.stats._common import check_data
from secateur.stats.collect import STATISTICS, check_needs, collect
from secateur.stats.curvature import GaussNewtonDiagonal, HessianGradient, HutchinsonDiagonal
from secateur.stats.fisher import FisherDiagonal
from secateur.stats.gradients import collect_gradients
from secateur.stats.loss_change import LossChange
from secateur.stats.sensitivity import ConnectionSensitivity
from secateur.stats.synaptic_flow import SynapticFlow
from secateur.stats.trajectory import PathIntegral, Trajectory

__all__ = [
    "STATISTICS",
    "ConnectionSensitivity",
    "FisherDiagonal",
    "GaussNewtonDiagonal",
    "HessianGradient",
    "HutchinsonDiagonal",
    "LossChange",
    "PathIntegral",
    "SynapticFlow",
    "Trajectory",
    "check_data",
    "check_needs",
    "collect",
    "collect_gradients",
]
