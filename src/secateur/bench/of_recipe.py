"""The sensitivity of a recipe's own network: on data that choosing by it does not spoil."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from secateur.bench.sensitivity import Figure, Progress, SensitivityResult, sensitivity
from secateur.checkpoint import load_weights
from secateur.errors import DataError, RecipeError, nearest
from secateur.masks import parameters_of
from secateur.method import Method
from secateur.pipeline.data import Data, Split, derive_seed, length, order_of, sample_inputs, score_batches
from secateur.pipeline.factories import make_data, make_model
from secateur.pipeline.tasks import TASKS, Task, evaluate, loss_of
from secateur.prunable import find_prunable
from secateur.recipe import Recipe
from secateur.recover import rematch_bn_
from secateur.stats import collect
from secateur.types import Source, Stats

HELD_OUT = 0.2
"""Part of the training split that stands in for a missing validation split."""


def recipe_sensitivity(
    recipe: Recipe,
    *,
    base: str | Path = ".",
    weights: str | Path | None = None,
    levels: Sequence[float] | None = None,
    layers: Sequence[str] = (),
    metric: str | None = None,
    repair_bn: bool = False,
    progress: Progress | None = None,
) -> SensitivityResult:
    """Measure the sensitivity of a recipe's trained network with the recipe's score and pattern.

    Evaluated on the recipe's validation split; without one, on a fifth of the training split, which then neither the
    score nor the repair looks at. Never on the test split: what is chosen by these curves must not have seen it.

    Args:
        recipe: The recipe; nothing is trained.
        base: Folder that its relative paths start from.
        weights: Trained weights, instead of ``model.weights``.
        levels: As in :func:`~secateur.bench.sensitivity.sensitivity`.
        layers: As there.
        metric: A figure of the task, or ``"loss"``; the task's first by default.
        repair_bn: Match batch norms to the dense model's after each pruning.
        progress: As in :func:`sensitivity`.

    Returns:
        The curves.

    Raises:
        RecipeError: When the network would have to be trained first, or the metric does not exist.
    """
    if weights is None and recipe.model.weights is None and recipe.train.epochs:
        raise RecipeError(
            f"the network of this recipe is trained for {recipe.train.epochs} epochs first, and sensitivity trains "
            "nothing: name a finished run of it with --run DIR (secateur run makes one), or trained weights with "
            "model.weights"
        )
    if recipe.train.parametrisation is not None:
        raise RecipeError(
            f"train.parametrisation {recipe.train.parametrisation.name!r} lets training decide what goes, and "
            "sensitivity needs a score: name a recipe with a [prune] table instead"
        )
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    task, method = TASKS[recipe.task](), recipe.prune.build(under_dynamics=recipe.train.dynamics is not None)
    torch.manual_seed(derive_seed(recipe.seed, "init"))
    model = make_model(recipe.model.factory, recipe.model.args, base=Path(base))
    if weights is not None:
        load_weights(model, weights)
    elif recipe.model.weights is not None:
        load_weights(model, Path(base) / recipe.model.weights)
    data = make_data(recipe.data.factory, recipe.data.args, base=Path(base))
    train, held_out, on = _splits(data, recipe.seed)
    return sensitivity(
        model,
        method,
        _figure(task, metric, held_out, recipe.data.eval_batch_size, on),
        levels=levels,
        layers=layers,
        stats=_stats(model, method, task, train, recipe),
        repair=_repair(model, train, recipe) if repair_bn else None,
        progress=progress,
    )


def _splits(data: Data, seed: int) -> tuple[Split, Split, str]:
    """Return what scores and repairs may look at, what is evaluated, and its name."""
    if data.validation is not None:
        return data.train, data.validation, f"{length(data.validation):,} samples of data.validation"
    n = length(data.train)
    count = max(1, round(n * HELD_OUT))
    if n < 2:
        raise DataError("data.train has one sample and data.validation none: nothing can be held out")
    order = order_of(data.train, seed, "sensitivity")
    on = f"{count:,} of {n:,} samples of data.train (no data.validation; training may have seen them)"
    return _take(data.train, order[count:]), _take(data.train, order[:count]), on


def _take(split: Split, rows: Tensor) -> Split:
    if isinstance(split, tuple):
        return split[0][rows], split[1][rows]
    return Subset(split, rows.tolist())


def _figure(task: Task, metric: str | None, split: Split, batch_size: int, on: str) -> Figure:
    name = metric or next(iter(task.higher_is_better))
    if name not in task.higher_is_better:
        raise RecipeError(
            f"--metric {name}: the task {task.name} has no such figure; {nearest(name, task.higher_is_better)}"
        )

    def measure(model: nn.Module) -> float:
        figures = evaluate(model, split, task, batch_size=batch_size)
        if name not in figures:
            raise RecipeError(f"--metric {name}: not measured on this network; {nearest(name, set(figures) - {'n'})}")
        return figures[name] if math.isfinite(figures[name]) else math.nan

    return Figure(name, task.higher_is_better[name], measure, on)


def _stats(model: nn.Module, method: Method, task: Task, train: Split, recipe: Recipe) -> Stats:
    if not method.score.needs:
        return {}
    found = find_prunable(model, include=method.include, exclude=method.exclude, types=method.types)

    some = list(score_batches(train, recipe.seed, size=recipe.data.batch_size, count=recipe.prune.score_batches))
    source = Source(
        model,
        parameters_of(model, found.weights),
        partial(loss_of, task),
        lambda: some,
        (sample_inputs(train, recipe.seed, "macs", 1),),
    )
    return collect(method.score.needs, source)


def _repair(model: nn.Module, train: Split, recipe: Recipe) -> Callable[[nn.Module], object]:
    dense = copy.deepcopy(model)
    inputs = sample_inputs(train, recipe.seed, "batch norm", recipe.recover.batch_norm_samples)
    return lambda pruned: rematch_bn_(pruned, dense, inputs)
