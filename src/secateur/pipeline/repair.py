"""Batch norms after a pruning step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.pipeline.data import batches, order_of, sample_inputs
from secateur.recover import reestimate_bn_, rematch_bn_
from secateur.recover.batch_norm import Moved

if TYPE_CHECKING:
    from secateur.pipeline.run import Runner


def repairs_batch_norm(runner: Runner) -> bool:
    """Whether there is anything to repair, and no rewinding follows that puts all batch norms back anyway."""
    if runner.plan.rewind_to is not None or runner.recipe.recover.batch_norm == "nothing":
        return False
    return any(isinstance(m, _BatchNorm) for m in runner.model.modules())


def repair_batch_norm(runner: Runner, before: nn.Module) -> Moved:
    """Undo what a pruning step did to the batch norms.

    Args:
        runner: The run.
        before: The network just before the step; not the dense network of the first round, which would also undo what
            retraining taught scales and shifts since.

    Returns:
        What was changed.
    """
    recipe, train = runner.recipe, runner.data.train
    count = recipe.recover.batch_norm_samples
    if recipe.recover.batch_norm == "rematch":
        return rematch_bn_(runner.model, before, sample_inputs(train, recipe.seed, "batch norm", count))
    order = order_of(train, recipe.seed, "batch norm")[:count]
    return reestimate_bn_(runner.model, (x for x, _ in batches(train, recipe.data.batch_size, order=order)))
