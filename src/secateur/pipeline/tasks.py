"""What a network is for: the loss to train on and the figures to report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import DataError
from secateur.forward import call_model, evaluation_mode_of
from secateur.pipeline.data import Split, batches
from secateur.registry import Registry


@dataclass(frozen=True)
class Task:
    """Loss and figures of one kind of problem.

    Attributes:
        name: As in the recipe.
        loss: Mean loss of (outputs, targets).
        figures: Sums over a batch of every figure but the loss.
        higher_is_better: Direction of each figure; the first is the headline.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    figures: Callable[[Tensor, Tensor], dict[str, float]]
    higher_is_better: dict[str, bool]


def _correct(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    figures = {"accuracy": float((outputs.argmax(1) == targets).sum())}
    if outputs.shape[1] >= 10:
        figures["top5_accuracy"] = float((outputs.topk(5, 1).indices == targets[:, None]).any(1).sum())
    return figures


def _errors(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return {"mean_absolute_error": float((outputs - targets.reshape(outputs.shape)).abs().mean(-1).sum())}


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))


def classification() -> Task:
    """Cross-entropy, and the share of samples whose highest output (or one of the five highest) is the label."""
    return Task("classification", F.cross_entropy, _correct, {"accuracy": True, "top5_accuracy": True, "loss": False})


def regression() -> Task:
    """Mean squared error, and the mean absolute error."""
    return Task("regression", _squared, _errors, {"mean_absolute_error": False, "loss": False})


TASKS = Registry("task", {"classification": classification, "regression": regression})


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """Run the model on one batch of inputs.

    Raises:
        DataError: When its output is not one tensor.
    """
    outputs = call_model(model, inputs)
    if not isinstance(outputs, Tensor):
        raise DataError(f"the model returned a {type(outputs).__name__}; this task needs one tensor of outputs")
    return outputs


def loss_of(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """Return the task's mean loss on one batch of (inputs, targets)."""
    return task.loss(outputs_of(model, batch[0]), batch[1])


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, task: Task, *, batch_size: int) -> dict[str, float]:
    """Run the model over a split, in evaluation mode.

    Args:
        model: The model.
        split: The data.
        task: Loss and figures.
        batch_size: Samples per batch.

    Returns:
        Mean loss and figures, and ``n``, the number of samples.

    Raises:
        DataError: When the model's output is not one tensor.
    """
    sums: dict[str, float] = {"loss": 0.0}
    n = 0
    with evaluation_mode_of(model):
        for inputs, targets in batches(split, batch_size):
            outputs = outputs_of(model, inputs)
            count = len(targets)
            sums["loss"] += float(task.loss(outputs, targets)) * count
            for name, value in task.figures(outputs, targets).items():
                sums[name] = sums.get(name, 0.0) + value
            n += count
    return {name: value / n for name, value in sums.items()} | {"n": n}
