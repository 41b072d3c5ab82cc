"""What a recipe can name: the axes, their fields and their registered parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import UnknownNameError, nearest

# The value in the example, and what the number means; the docstring of Target has the formulas of all.
TARGETS: Mapping[str, tuple[float, str]] = {
    "sparsity": (0.9, "Fraction of the prunable weights that is removed."),
    "kept_parameters": (100_000, "Parameters of the whole model that stay."),
    "compression_ratio": (10, "Parameters of the whole model before pruning, over those that stay."),
    "macs": (0.5, "Fraction of the model's multiply-accumulates that stays, each weight's times its density."),
    "channels": (0.5, "Fraction of the units of coupled groups (channels, heads, neurons) that stays."),
}


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        name: As in ``secateur ls AXIS``.
        question: What it answers.
        table: Table of the recipe that holds its field; empty at the top.
        field: Field of the recipe that names its part; empty where parts are for Python and single verbs only.
        parts: Name to factory.
        committed: Whether its cards lie in ``docs/methods``; torch's own parts are documented by torch.
        home: Where Python imports its parts from, and how they are used, where no recipe names them.
    """

    name: str
    question: str
    table: str
    field: str
    parts: Mapping[str, Callable[..., Any]]
    committed: bool = True
    home: tuple[str, str] = ("", "")

    @property
    def where(self) -> str:
        """Where its parts are named."""
        field = f"{self.table}.{self.field}" if self.table else self.field
        return field or self.home[0]


def axes() -> dict[str, Axis]:
    """Return every axis by name, in the order in which a run meets them."""
    from secateur.ablations import ABLATIONS
    from secateur.allocate import ALLOCATIONS
    from secateur.patterns import PATTERNS, UNIT_PATTERNS
    from secateur.penalties import PENALTIES
    from secateur.pipeline.optim import LEARNING_RATES, OPTIMIZERS
    from secateur.pipeline.tasks import TASKS
    from secateur.recover import DISTILLATIONS, RECOVERIES, reestimate_bn_, rematch_bn_
    from secateur.schedules import SCHEDULES
    from secateur.scores import GROUP_SCORES, SCORES
    from secateur.solvers import SOLVERS
    from secateur.targets import Target
    from secateur.training import DYNAMICS, PARAMETRISATIONS

    targets: dict[str, Callable[..., Any]] = dict.fromkeys(TARGETS, Target)
    norms: dict[str, Callable[..., Any]] = {"rematch": rematch_bn_, "reestimate": reestimate_bn_}
    found = (
        Axis("target", "how much", "prune", "target", targets),
        Axis("score", "which weights matter", "prune", "score", SCORES),
        Axis(
            "unit-score",
            "which coupled units go, in physical pruning and under masks",
            "",
            "",
            GROUP_SCORES,
            home=("secateur.scores", "method = secateur.Method(target=target, score={}, pattern=Channel())"),
        ),
        Axis("pattern", "what is removed together", "prune", "pattern", PATTERNS),
        Axis(
            "unit-pattern",
            "what is cut out whole",
            "",
            "",
            UNIT_PATTERNS,
            home=("secateur.patterns", "method = secateur.Method(target=target, pattern={})"),
        ),
        Axis("allocate", "how much where", "prune", "allocate", ALLOCATIONS),
        Axis("solver", "what the surviving weights become", "prune", "solver", SOLVERS),
        Axis("schedule", "when, and how fast", "prune", "schedule", SCHEDULES),
        Axis("ablation", "what a method is robbed of, to see its worth", "prune", "ablate", ABLATIONS),
        Axis("penalty", "what makes weights small during training", "train", "penalty", PENALTIES),
        Axis(
            "parametrisation",
            "how weights are made anew in every forward pass, so that training finds what goes",
            "train",
            "parametrisation",
            PARAMETRISATIONS,
        ),
        Axis("dynamics", "how masks move during training", "train", "dynamics", DYNAMICS),
        Axis("recover", "how the network is retrained", "recover", "retrain", RECOVERIES),
        Axis("distill", "what it learns from the dense network", "recover", "distill", DISTILLATIONS),
        Axis("batch-norm", "how batch norms are repaired", "recover", "batch_norm", norms),
        Axis("optimizer", "what trains it", "train", "optimizer", OPTIMIZERS, committed=False),
        Axis("learning-rate", "how the learning rate falls", "train", "lr_schedule", LEARNING_RATES),
        Axis("task", "what the network is for", "", "task", TASKS),
    )
    return {axis.name: axis for axis in found}


def axis_named(name: str) -> Axis:
    """Return an axis.

    Raises:
        UnknownNameError: When there is none; names the nearest.
    """
    known = axes()
    if name not in known:
        raise UnknownNameError(f"unknown axis {name!r}; {nearest(name, known)}")
    return known[name]
