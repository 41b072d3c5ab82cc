"""The dense network as a teacher, in a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoint import load_weights
from secateur.errors import RecipeError
from secateur.forward import evaluation_mode_of
from secateur.pipeline.tasks import Task, outputs_of
from secateur.recover.distill import Distillation
from secateur.recover.retrain import Nothing, Recovery


class Distiller:
    """Mixes the task's loss with one that compares outputs with the dense network's.

    The teacher is read from the run's own file of the dense network when it is first needed, so that a run that is
    taken up again learns from the same bits. It runs in evaluation mode, without gradients.

    Args:
        part: What is compared, and how much it weighs.
        task: The task's own loss.
        dense: File of the dense network.
    """

    def __init__(self, part: Distillation, task: Task, dense: Path) -> None:
        self._part, self._task, self._file = part, task, dense
        self._teacher: nn.Module | None = None

    def loss(self, model: nn.Module, batch: Any, *, network: nn.Module | None = None) -> Tensor:
        """Return the mean loss on one batch of (inputs, targets).

        Args:
            model: The model, whose copy the teacher becomes.
            batch: The batch.
            network: What is trained, where that is not the model itself.
        """
        outputs = outputs_of(network or model, batch[0])
        teacher = self._dense(model)
        with torch.no_grad(), evaluation_mode_of(teacher):
            answers = outputs_of(teacher, batch[0])
        weight = self._part.weight
        return (1.0 - weight) * self._task.loss(outputs, batch[1]) + weight * self._part(outputs, answers)

    def _dense(self, model: nn.Module) -> nn.Module:
        if self._teacher is None:
            teacher = copy.deepcopy(model).requires_grad_(False)
            for parameter in teacher.parameters():
                parameter.grad = None
            load_weights(teacher, self._file)
            self._teacher = teacher
        return self._teacher


def check_distillation(
    part: Distillation | None, recovery: Recovery, *, task: str, when: str, weights: str | None
) -> None:
    """Refuse a teacher that there is not, or that nobody learns from.

    Args:
        part: What the recipe asks for.
        recovery: Its retraining.
        task: Its task.
        when: Whether it prunes during or after training.
        weights: Trained weights that it starts from, if any.

    Raises:
        RecipeError: Says what is missing.
    """
    if part is None:
        return
    if task not in part.tasks:
        raise RecipeError(
            f"recover.distill {part} compares the outputs of {', '.join(sorted(part.tasks))}, and task = {task!r}; use "
            "{name = 'outputs'}"
        )
    if when == "during" and weights is None:
        raise RecipeError(
            "recover.distill learns from a dense network, and there is none: with prune.when = 'during' nothing is "
            "trained before pruning begins. Give model.weights, or use when = 'after'"
        )
    if when == "after" and isinstance(recovery, Nothing):
        raise RecipeError(
            "recover.distill acts while the network is retrained, and recover.retrain is 'nothing'; choose one, such "
            "as {name = 'learning_rate_rewinding', epochs = 5}"
        )
