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
from secateur.patterns import Unstructured
from secateur.pipeline.optim import LEARNING_RATES, LearningRate, build_optimizer
from secateur.recipe import Recipe
from secateur.recipe_checks import pattern_of
from secateur.recipe_parts import build_part
from secateur.recover import FineTune
from secateur.recover.retrain import Recovery, Start
from secateur.schedules import Schedule
from secateur.types import Dynamics, Parametrisation, Pattern, UnitPattern


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
        method: What to prune, how much, when; none where a parametrisation decides that.
        recovery: What follows each pruning step.
        trained: Epochs of the training.
        curve: Factor on the learning rate over the training.
        base_lr: The optimizer's own learning rate.
        steps_per_epoch: Optimizer steps per epoch.
        dynamics: How masks move during training, if they do.
        parametrisation: How weights are made anew during training, if they are.
    """

    method: Method | None
    recovery: Recovery
    trained: int
    curve: LearningRate
    base_lr: float
    steps_per_epoch: int
    dynamics: Dynamics | None = None
    parametrisation: Parametrisation | None = None

    @property
    def schedule(self) -> Schedule | None:
        """When a pruner prunes; nothing where training itself makes the masks."""
        return None if self.method is None or self.dynamics is not None else self.method.schedule

    @property
    def in_rounds(self) -> bool:
        """Whether rounds of pruning and retraining follow the training."""
        return self.schedule is not None and self.schedule.unit == "rounds"

    @property
    def during(self) -> bool:
        """Whether the training that there is makes the masks, so that no dense network is trained."""
        return self.schedule is None or self.method is None or self.method.when == "during"

    @property
    def pattern(self) -> Pattern | UnitPattern:
        """What is removed together."""
        if self.method is not None:
            return self.method.pattern
        return Unstructured() if self.parametrisation is None else pattern_of(self.parametrisation)

    @property
    def stages(self) -> list[Stage]:
        """The stages, in order."""
        stages = [Stage("train", self.trained)] if self.trained else []
        retrain = self.recovery.length(self.trained, self.steps_per_epoch)
        if self.schedule is not None and self.in_rounds:
            for number in range(self.schedule.updates):
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
        """Tell whether masks are made in this stage, step by step."""
        if self.in_rounds or stage.kind == "prune":
            return False
        return self.during == (stage.kind == "train")

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

    def factor(self, stage: Stage, epoch: int, batch: int) -> float:
        """Return the factor on learning rates at a batch of a stage."""
        first = self.start(stage)
        if first is None:
            return self.fine_tuning_lr / self.base_lr
        # Whole epochs are added up first: the sum must not depend, by a rounding, on where the stage starts.
        return self.curve((first.epoch + epoch) + batch / self.steps_per_epoch, self.trained)

    def lr(self, stage: Stage, epoch: int, batch: int) -> float:
        """Return the learning rate at a batch of a stage."""
        return self.fine_tuning_lr if self.start(stage) is None else self.base_lr * self.factor(stage, epoch, batch)

    @property
    def fine_tuning_lr(self) -> float:
        """The one given, or the last one of the training."""
        if isinstance(self.recovery, FineTune) and self.recovery.lr is not None:
            return self.recovery.lr
        return self.base_lr * self.curve(max(self.trained - 1e-9, 0.0), self.trained)

    def check(self) -> None:
        """Refuse what outlasts its clock, rewinding past the end, and fine-tuning at no learning rate.

        Raises:
            RecipeError: Before anything was trained.
        """
        self.recovery.start(self.trained, self.steps_per_epoch)  # refuses a point that the training does not reach
        self._check_schedule()
        self._check_dynamics()
        part, steps = self.parametrisation, self.trained * self.steps_per_epoch
        if part is not None and part.asked(steps) != part.asked(None):
            raise RecipeError(
                f"train.parametrisation {part} asks for sparsity {part.asked(steps)} by the end of train.epochs, "
                f"{self.trained} epochs of {self.steps_per_epoch} steps, {steps} in all: its target {part.asked(None)} "
                "would never be reached"
            )
        if isinstance(self.recovery, FineTune) and self.fine_tuning_lr < 1e-6 * self.base_lr:
            raise RecipeError(
                "recover.retrain: fine_tune goes on at the last learning rate of the training, and train.lr_schedule "
                "ends at 0; say recover.retrain.lr, or use learning_rate_rewinding"
            )

    def _check_schedule(self) -> None:
        schedule = self.schedule
        if schedule is None or schedule.unit == "rounds":
            return
        length = self.recovery.length(self.trained, self.steps_per_epoch)
        where, epochs = ("train.epochs", self.trained) if self.during else ("recover.retrain", length)
        last, steps = schedule.step(schedule.updates - 1, self.steps_per_epoch), epochs * self.steps_per_epoch
        if last > steps or not steps:
            raise RecipeError(
                f"prune.schedule ends at step {last}, but {where} has {epochs} epochs of {self.steps_per_epoch} "
                f"steps, {steps} in all: the target would never be reached"
            )

    def _check_dynamics(self) -> None:
        part = self.dynamics
        if part is None:
            return
        there = self.trained if part.unit == "epochs" else self.trained * self.steps_per_epoch
        if part.last is not None and part.last > there:
            raise RecipeError(
                f"train.dynamics {part} makes its last move after {part.last} {part.unit}, but train.epochs has "
                f"{self.trained} epochs of {self.steps_per_epoch} steps: give it an end within the training"
            )
        if part.last is None and not any(part.due(time) for time in range(1, there + 1)):
            raise RecipeError(f"train.dynamics {part} would never move: the training has {there} {part.unit}")


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
        method=recipe.build_method(),
        recovery=recipe.recover.build(),
        trained=recipe.train.epochs,
        curve=build_part(LEARNING_RATES, recipe.train.lr_schedule, "train.lr_schedule"),
        base_lr=float(build_optimizer(nn.Linear(1, 1), options.name, options.options).defaults["lr"]),
        steps_per_epoch=steps_per_epoch,
        dynamics=recipe.train.build_dynamics(),
        parametrisation=recipe.train.build_parametrisation(),
    )
    plan.check()
    return plan
