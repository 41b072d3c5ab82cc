"""What a run will do, decided before it starts: its stages, and for every epoch its seed and its learning rate.

Everything here is a function of the recipe and of where the run stands, never of what happened on the way; that is
what lets a killed run go on bit for bit, and a rewound one repeat an earlier epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from secateur.errors import RecipeError
from secateur.method import Method
from secateur.pipeline.optim import LEARNING_RATES, LearningRate, build_optimizer
from secateur.recipe import Recipe
from secateur.recipe_parts import build_part
from secateur.recover import FineTune
from secateur.recover.retrain import Recovery, Start


@dataclass(frozen=True)
class Stage:
    """One piece of a run: training, one pruning step, or one round of retraining."""

    kind: Literal["train", "prune", "retrain"]
    epochs: int = 0
    round: int | None = None


@dataclass(frozen=True)
class Plan:
    """The recipe, resolved.

    Attributes:
        method: What to prune, how much, when.
        recovery: What follows each pruning step.
        trained: Epochs of the training.
        curve: Factor on the learning rate over the training.
        base_lr: The optimizer's own learning rate.
        steps_per_epoch: Optimizer steps per epoch.
    """

    method: Method
    recovery: Recovery
    trained: int
    curve: LearningRate
    base_lr: float
    steps_per_epoch: int

    @property
    def stages(self) -> list[Stage]:
        """The stages, in order."""
        stages = [Stage("train", self.trained)] if self.trained else []
        retrain = self.recovery.length(self.trained, self.steps_per_epoch)
        if self.method.schedule.unit == "rounds":
            for number in range(self.method.schedule.updates):
                stages.append(Stage("prune", round=number))
                if retrain:
                    stages.append(Stage("retrain", retrain, number))
        elif retrain:
            stages.append(Stage("retrain", retrain, 0))
        return stages

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages together."""
        steps = 0
        for stage in self.stages:
            first = self.start(stage)
            steps += stage.epochs * self.steps_per_epoch - (0 if first is None else first.batch)
        return steps

    def start(self, stage: Stage) -> Start | None:
        """Return where in the training a stage starts, with its learning rate; ``None``: nowhere, constant."""
        if stage.kind != "retrain":
            return Start(0)
        return self.recovery.start(self.trained, self.steps_per_epoch)

    @property
    def rewind_to(self) -> Start | None:
        """Point of the training whose weights and optimizer are kept for rewinding."""
        return self.recovery.start(self.trained, self.steps_per_epoch) if self.recovery.rewinds_weights else None

    def prunes_inside(self, stage: Stage) -> bool:
        """Tell whether the schedule's clock runs in this stage."""
        if self.method.schedule.unit == "rounds" or stage.kind == "prune":
            return False
        return (self.method.when == "after") == (stage.kind == "retrain")

    def distils(self, stage: Stage) -> bool:
        """Tell whether a stage learns from the dense network, where the recipe asks for that."""
        return stage.kind == "retrain" or self.prunes_inside(stage)

    def seed_of(self, stage: Stage, epoch: int) -> tuple[object, ...]:
        """Name an epoch for the seeds: a rewound one repeats the original's order and noise."""
        if stage.kind == "train":
            return ("train", epoch)
        if self.rewind_to is not None:
            return ("train", self.rewind_to.epoch + epoch)
        return ("retrain", stage.round, epoch)

    def lr(self, stage: Stage, epoch: int, batch: int) -> float:
        """Return the learning rate at a batch of a stage."""
        first = self.start(stage)
        if first is None:
            return self.fine_tuning_lr
        # Whole epochs are added up first: the sum must not depend, by a rounding, on where the stage starts.
        return self.base_lr * self.curve((first.epoch + epoch) + batch / self.steps_per_epoch, self.trained)

    @property
    def fine_tuning_lr(self) -> float:
        """The one given, or the last one of the training."""
        if isinstance(self.recovery, FineTune) and self.recovery.lr is not None:
            return self.recovery.lr
        return self.base_lr * self.curve(max(self.trained - 1e-9, 0.0), self.trained)

    def check(self) -> None:
        """Refuse a schedule that outlasts its clock, rewinding past the end, and fine-tuning at no learning rate.

        Raises:
            RecipeError: Before anything was trained.
        """
        schedule = self.method.schedule
        self.recovery.start(self.trained, self.steps_per_epoch)  # refuses a point that the training does not reach
        if schedule.unit != "rounds":
            during = self.method.when == "during"
            length = self.recovery.length(self.trained, self.steps_per_epoch)
            where, epochs = ("train.epochs", self.trained) if during else ("recover.retrain", length)
            last, steps = schedule.step(schedule.updates - 1, self.steps_per_epoch), epochs * self.steps_per_epoch
            if last > steps or not steps:
                raise RecipeError(
                    f"prune.schedule ends at step {last}, but {where} has {epochs} epochs of {self.steps_per_epoch} "
                    f"steps, {steps} in all: the target would never be reached"
                )
        if isinstance(self.recovery, FineTune) and self.fine_tuning_lr < 1e-6 * self.base_lr:
            raise RecipeError(
                "recover.retrain: fine_tune goes on at the last learning rate of the training, and train.lr_schedule "
                "ends at 0; say recover.retrain.lr, or use learning_rate_rewinding"
            )


def plan_of(recipe: Recipe, *, steps_per_epoch: int) -> Plan:
    """Resolve a recipe, once its data is known.

    Args:
        recipe: The recipe.
        steps_per_epoch: Batches in the training split.

    Returns:
        The plan, checked.

    Raises:
        RecipeError: When the recipe cannot be carried out.
    """
    options = recipe.train.optimizer
    plan = Plan(
        method=recipe.prune.build(),
        recovery=recipe.recover.build(),
        trained=recipe.train.epochs,
        curve=build_part(LEARNING_RATES, recipe.train.lr_schedule, "train.lr_schedule"),
        base_lr=float(build_optimizer(nn.Linear(1, 1), options.name, options.options).defaults["lr"]),
        steps_per_epoch=steps_per_epoch,
    )
    plan.check()
    return plan
