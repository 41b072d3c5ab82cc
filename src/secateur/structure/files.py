"""A pruned model on disk: ``plan.json`` and ``model.safetensors``, read back into the user's own class."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from secateur.checkpoint import load_model, save_model
from secateur.errors import CheckpointError
from secateur.graph.plan import Plan
from secateur.structure.report import ShrinkReport

PLAN = "plan.json"
MODEL = "model.safetensors"


def save_pruned(folder: str | Path, model: nn.Module, plan: Plan | ShrinkReport) -> None:
    """Write a shrunk model and its plan.

    Args:
        folder: Made if it is not there.
        model: The shrunk model, trained further or not.
        plan: Its plan, or the report that holds it.

    Raises:
        CheckpointError: When a file cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be made: {error}") from error
    plan = plan.plan if isinstance(plan, ShrinkReport) else plan
    save_model(path / MODEL, model)
    plan.save(path / PLAN)


def load_pruned(model: nn.Module, folder: str | Path) -> Plan:
    """Shrink a fresh model of the original class as its plan says, and load the weights; no pickle is read.

    Args:
        model: A model as it was before pruning; its weights do not matter.
        folder: What :func:`save_pruned` wrote.

    Returns:
        The plan.

    Raises:
        PlanError: When the plan is damaged or was made for another model; the model is untouched then.
        CheckpointError: When the weights do not fit.
    """
    path = Path(folder)
    plan = Plan.load(path / PLAN)
    undo = plan.apply_(model)
    try:
        load_model(model, path / MODEL)
    except BaseException:
        undo.revert()
        raise
    return plan
