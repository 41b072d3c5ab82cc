"""A pruned model on disk: ``plan.json`` and ``model.safetensors``, read back into the user's own class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from secateur.checkpoint import load_model, save_model
from secateur.errors import CheckpointError
from secateur.graph.changes import Undo
from secateur.graph.plan import Plan, load_plans, save_plans
from secateur.structure.remembered import plans_of, remember
from secateur.structure.report import ShrinkReport

PLAN = "plan.json"
MODEL = "model.safetensors"


Planned = Plan | ShrinkReport


def save_pruned(folder: str | Path, model: nn.Module, plans: Planned | Sequence[Planned] | None = None) -> None:
    """Write a shrunk model and its plan.

    Args:
        folder: Made if it is not there.
        model: The shrunk model, trained further or not.
        plans: Its plan, or the report that holds it; all of them in order where it was shrunk in several rounds. Not
            needed for the very object that was shrunk.

    Raises:
        PlanError: When no plan is given and none is known.
        CheckpointError: When a file cannot be written.
    """
    path = Path(folder)
    if plans is None:
        plans = plans_of(model, "save_pruned(folder, model, report)")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be made: {error}") from error
    steps = [plans] if isinstance(plans, Plan | ShrinkReport) else list(plans)
    save_model(path / MODEL, model)
    save_plans(path / PLAN, [step.plan if isinstance(step, ShrinkReport) else step for step in steps])


def load_pruned(model: nn.Module, folder: str | Path) -> tuple[Plan, ...]:
    """Shrink a fresh model of the original class as its plans say, and load the weights; no pickle is read.

    Args:
        model: A model as it was before pruning; its weights do not matter.
        folder: What :func:`save_pruned` wrote.

    Returns:
        The plans, in the order in which they were carried out.

    Raises:
        PlanError: When the plan is damaged or was made for another model; the model is untouched then.
        CheckpointError: When the weights do not fit.
    """
    path = Path(folder)
    plans = load_plans(path / PLAN)
    undo = Undo()
    try:
        for plan in plans:
            undo.add(plan.apply_(model).revert)
        load_model(model, path / MODEL)
    except BaseException:
        undo.revert()
        raise
    remember(model, *plans)
    return plans
