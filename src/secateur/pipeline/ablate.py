"""Ablations in a run: what is checked before it, and the smaller dense network that is trained after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from secateur.ablations import SmallerDense
from secateur.errors import RecipeError, SecateurError
from secateur.pruner import prune_
from secateur.recipe import Recipe, from_dict
from secateur.schedules import one_shot
from secateur.scores import Random

if TYPE_CHECKING:
    from secateur.pipeline.plan import Plan
    from secateur.pipeline.run import Runner

SMALLER = "smaller_dense"
_LONGEST_NAME = 100


def budget(plan: Plan) -> int:
    """Return the epochs of the whole run: those of its training and of all its retraining."""
    return round(plan.steps / plan.steps_per_epoch)


def check_smaller(recipe: Recipe, plan: Plan, model: nn.Module, example_inputs: Callable[[], Any]) -> None:
    """Refuse, before anything is trained, a smaller network that could not be built or trained.

    Args:
        recipe: The recipe.
        plan: What the run will do.
        model: The dense network.
        example_inputs: Returns a batch of its inputs.

    Raises:
        RecipeError: Says what stands in the way.
    """
    part = recipe.prune.build_ablation()
    if not isinstance(part, SmallerDense) or plan.method is None:
        return
    if not budget(plan):
        raise RecipeError(
            "prune.ablate 'smaller_dense' trains a smaller network for as long as this run trains, which is for no "
            "epoch: give train.epochs, or a retraining"
        )
    # Sizes are all that matters here, so neither a score nor a solver that would ask for data.
    trial = replace(plan.method, score=Random(0), solver=None, schedule=one_shot(), when="after")
    inputs = example_inputs()
    try:
        pruned = copy.deepcopy(model)
        masks = prune_(pruned, trial, example_inputs=inputs).masks
        part.build(pruned, masks, inputs)
    except SecateurError as error:
        raise RecipeError(f"prune.ablate 'smaller_dense': there is no dense network of that size: {error}") from error


def train_smaller(runner: Runner, small: nn.Module | None, example_inputs: Any, notes: list[str]) -> dict[str, Any]:
    """Train the smaller dense network, in a directory of its own that can be taken up again like the run itself.

    Args:
        runner: The run, its stages done.
        small: The pruned network, if its units were cut out.
        example_inputs: One batch, as positional and keyword arguments.
        notes: Where to say what was done.

    Returns:
        What the result says about the ablation.
    """
    from secateur.pipeline.run import run  # it ends by calling this

    recipe = runner.recipe
    part = recipe.prune.build_ablation()
    if not isinstance(part, SmallerDense):
        if part is not None:
            notes.append(f"ablation: {part}; these are not the method's own results")
        return {} if recipe.prune.ablate is None else {"name": recipe.prune.ablate.name, "text": str(part)}
    if small is None:
        model = part.build(runner.model, runner.thinning.masks, example_inputs)
    else:
        model = part.build(small, {}, example_inputs)
    epochs = budget(runner.plan)
    directory = runner.directory / SMALLER
    done = run(
        _recipe(recipe, epochs),
        directory,
        resume=(directory / "recipe.toml").exists(),
        listener=runner.listener,
        model=model,
        data=runner.data,
        report=False,
    )
    parameters = sum(p.numel() for p in model.parameters())
    started = "" if recipe.model.weights is None else ", and the pruned one started from trained weights"
    notes.append(
        f"ablation: a dense network of {parameters:,} parameters, trained from scratch for {epochs} epochs{started}; "
        f"its figures are under ablation in result.json and in {SMALLER}/"
    )
    return {
        "name": SMALLER,
        "text": str(part),
        "quality": done.result["quality"]["dense"],
        "parameters": parameters,
        "macs": done.result["profile"]["dense"]["macs"],
        "epochs": epochs,
    }


def _recipe(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe of a plain training of so many epochs, with nothing pruned."""
    values = recipe.to_dict()
    suffix = " dense"
    values["name"] = values["name"][: _LONGEST_NAME - len(suffix)] + suffix
    values["model"].pop("weights", None)
    values["train"]["epochs"] = epochs
    values["prune"] = {"target": {"sparsity": 0.0}}
    values["recover"] = {}
    values["export"] = []
    values["measure"] |= {"latency": False, "energy": False}
    return from_dict(values)
