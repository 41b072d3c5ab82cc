"""Laws and oracles for plug-ins: what every score, pattern, schedule and allocation must obey.

A plug-in's own test is one line per part:

    from secateur.testing import check_score
    check_score(MyScore())

Each law raises ``AssertionError`` with the part, the case and both values. The oracles are slow and obvious
pure-Python versions of what the library does fast.
"""

from secateur.testing.ablation_laws import check_ablation
from secateur.testing.allocation_laws import check_allocation
from secateur.testing.dynamics_laws import check_dynamics
from secateur.testing.oracles import (
    loss_changes,
    mask_derivatives,
    mask_differences,
    rank,
    remove_to_budget,
    select_k,
)
from secateur.testing.parametrisation_laws import check_parametrisation
from secateur.testing.pattern_laws import LAYOUTS, check_pattern
from secateur.testing.penalty_laws import check_activity_penalty, check_penalty
from secateur.testing.schedule_laws import check_schedule
from secateur.testing.score_laws import check_group_score, check_score
from secateur.testing.solver_laws import check_solver

__all__ = [
    "LAYOUTS",
    "check_ablation",
    "check_activity_penalty",
    "check_allocation",
    "check_dynamics",
    "check_group_score",
    "check_parametrisation",
    "check_pattern",
    "check_penalty",
    "check_schedule",
    "check_score",
    "check_solver",
    "loss_changes",
    "mask_derivatives",
    "mask_differences",
    "rank",
    "remove_to_budget",
    "select_k",
]
