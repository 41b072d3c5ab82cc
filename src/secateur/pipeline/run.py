"""The founding algorithm as a run that can be killed at any instant: train, then rounds of score, prune, retrain.

A run is a list of stages worked off in order. Its whole state is one tree, written atomically after every epoch and
every pruning step; whatever a step needs besides (data order, dropout) is a function of the seed and of where in the
run the step stands. So a run that is taken up again does the same floating-point operations as one that was not.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.checkpoint import load_weights, save_model
from secateur.errors import DataError
from secateur.export import check_formats
from secateur.masks import apply_masks_
from secateur.pipeline import saved
from secateur.pipeline.ablate import check_smaller
from secateur.pipeline.data import (
    Data,
    Split,
    batches,
    check_last_batch,
    derive_seed,
    length,
    order_of,
    sample_inputs,
    score_batches,
    seed_everything,
)
from secateur.pipeline.directory import CHECKPOINT, DENSE, check_directory, claim
from secateur.pipeline.distill import Distiller
from secateur.pipeline.events import EventLog, Listener, Silent
from secateur.pipeline.factories import make_data, make_model
from secateur.pipeline.finish import finish
from secateur.pipeline.plan import Stage, plan_of
from secateur.pipeline.position import Position
from secateur.pipeline.press import Press
from secateur.pipeline.repair import repair_batch_norm, repairs_batch_norm
from secateur.pipeline.tasks import TASKS, Task, evaluate, loss_of
from secateur.pipeline.thinning import Scheduled, ThinningReport, thinning_of
from secateur.recipe import Recipe
from secateur.types import Masks


@dataclass(frozen=True)
class RunResult:
    """What a run leaves in memory.

    Attributes:
        directory: Where everything was written.
        model: The pruned network.
        masks: Its masks, ``True`` = keep.
        result: The content of ``result.json``.
    """

    directory: Path
    model: nn.Module
    masks: Masks
    result: dict[str, Any]


def run(  # noqa: PLR0913 - the recipe, and what a caller may bring instead of what it names
    recipe: Recipe,
    directory: str | Path,
    *,
    base: str | Path = ".",
    resume: bool = False,
    listener: Listener | None = None,
    model: nn.Module | None = None,
    data: Data | None = None,
    command: str = "",
    report: bool = True,
) -> RunResult:
    """Carry out a recipe and write its run directory.

    Args:
        recipe: The recipe.
        directory: Where to write; must be new, or hold this recipe's unfinished run when ``resume`` is set.
        base: Folder that the recipe's relative paths start from.
        resume: Go on from the last checkpoint.
        listener: Told of progress and events.
        model: Use this model instead of calling the recipe's factory; it is pruned in place.
        data: Use this data instead of calling the recipe's factory.
        command: The command line, for the report.
        report: Whether to write ``report.html``.

    Returns:
        Model, masks and the result.

    Raises:
        RecipeError: When the recipe cannot be carried out on this model and data; nothing was trained.
        CheckpointError: When the directory holds another run, or a checkpoint cannot be read or written.
    """
    directory = Path(directory)
    check_directory(directory, recipe, resume=resume)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    seed_everything(derive_seed(recipe.seed, "init"))
    if model is None:
        model = make_model(recipe.model.factory, recipe.model.args, base=Path(base))
    if recipe.model.weights is not None:
        load_weights(model, Path(base) / recipe.model.weights)
    if data is None:
        seed_everything(derive_seed(recipe.seed, "data"))
        data = make_data(recipe.data.factory, recipe.data.args, base=Path(base))
    runner = Runner(recipe, directory, model, data, listener or Silent())
    claim(directory, recipe)  # only now: a recipe that cannot be carried out must not leave a run behind
    result = runner.run(resume=resume, command=command)
    if report:
        from secateur.report import load_run, write_report

        write_report([load_run(directory)], directory / "report.html")
    return RunResult(directory, model, runner.thinning.masks, result)


class Runner:
    """The state of one run and the stages that change it."""

    def __init__(self, recipe: Recipe, directory: Path, model: nn.Module, data: Data, listener: Listener) -> None:
        self.recipe, self.directory, self.model, self.data, self.listener = recipe, directory, model, data, listener
        self.task: Task = TASKS[recipe.task]()
        self.plan = plan_of(recipe, steps_per_epoch=math.ceil(length(data.train) / recipe.data.batch_size))
        self.stages = self.plan.stages
        self.total_steps = self.plan.steps
        if self.total_steps:
            check_last_batch(model, data, recipe.data.batch_size)
        check_formats(recipe.export)
        check_smaller(recipe, self.plan, model, lambda: (self.sample("macs", 1),))
        part = recipe.recover.build_distillation()
        self.distiller = None if part is None else Distiller(part, self.task, directory / DENSE)
        self.position = Position()
        self.optimizer: Optimizer | None = None
        self.press = Press(recipe, model, lambda: self.sample("penalty", 1))
        self.thinning, self.trajectory = thinning_of(self)

    # What a step looks at

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the task's mean loss on a batch."""
        return loss_of(self.task, model, batch)

    def _training_loss(self, stage: Stage, batch: Any) -> Tensor:
        if self.distiller is not None and self.plan.distils(stage):
            return self.distiller.loss(self.model, batch, network=self.thinning.network)
        return self.loss(self.thinning.network, batch)

    def score_batches(self) -> Iterator[Any]:
        """Yield the batches that scores look at."""
        recipe = self.recipe
        return score_batches(
            self.data.train, recipe.seed, size=recipe.data.batch_size, count=recipe.prune.score_batches
        )

    def sample(self, purpose: str, count: int) -> Any:
        """Return inputs of the training data, the same in every call for a purpose."""
        return sample_inputs(self.data.train, self.recipe.seed, purpose, count)

    # The run

    def run(self, *, resume: bool, command: str) -> dict[str, Any]:
        """Work off the stages that are left, then measure and write the result."""
        goes_on = resume and (self.directory / CHECKPOINT).exists()
        if goes_on:
            saved.restore(self)
        log = EventLog(self.directory / "metrics.jsonl", size=self.position.log_size)
        self.log = log
        self.began = time.monotonic() - self.position.seconds
        self.position.started = self.position.started or datetime.now(UTC).isoformat(timespec="seconds")
        if self.plan.during and not (self.directory / DENSE).exists():
            self._save_dense()
        if not goes_on:
            self._pruned(self.thinning.start(), self.stages[0] if self.stages else Stage("train"))
        while self.position.stage < len(self.stages):
            self.run_stage(self.stages[self.position.stage])
            self.position.stage, self.position.epoch, self.position.batch = self.position.stage + 1, 0, 0
            self.optimizer = None
            self._detach()  # or every round's optimizer would live on in the pruner
            saved.save(self)
        if not self.thinning.finished:
            raise AssertionError("Plan.check lets no unfinished schedule through")
        self._detach()
        apply_masks_(self.model, self.thinning.masks)
        return finish(self, seconds=time.monotonic() - self.began, command=command)

    def run_stage(self, stage: Stage) -> None:
        """Work off one stage from where the position stands."""
        if stage.kind == "prune":
            self._prune(stage)
        else:
            self._train(stage)

    def _prune(self, stage: Stage) -> None:
        if not (self.directory / DENSE).exists():
            self._save_dense()  # nothing was trained: the network that came is the dense one
        if not isinstance(self.thinning, Scheduled):
            raise AssertionError("Plan.stages has rounds for nothing else")
        pruner = self.thinning.pruner
        self._announce(f"pruning, round {stage.round}")
        before = copy.deepcopy(self.model) if repairs_batch_norm(self) else None
        self._pruned(pruner.prune(), stage)
        if before is not None and not (pruner.finished and pruner.method.restarts):
            moved, kind = repair_batch_norm(self, before), self.recipe.recover.batch_norm
            self._event(
                "recalibrate", stage, kind=kind, layers=moved.layers, moved=moved.moved, skipped=dict(moved.skipped)
            )
            apply_masks_(self.model, pruner.masks)  # a masked channel has no mean to bring back

    def _train(self, stage: Stage) -> None:
        position = self.position
        if stage.kind == "retrain" and not (self.directory / DENSE).exists():
            self._save_dense()
        if self.optimizer is None:
            self.start(stage)
        while position.epoch < stage.epochs:
            saved.keep_for_rewinding(self, stage)
            self._epoch(stage)
            position.epoch, position.batch = position.epoch + 1, 0
            if position.epoch < stage.epochs and position.epoch % self.recipe.checkpoint.every_epochs == 0:
                saved.save(self)
        if self.plan.prunes_inside(stage):
            self._pruned(self.thinning.end(), stage)
        elif stage.kind == "train":
            self._save_dense()

    def start(self, stage: Stage) -> None:
        """Begin a stage of training with a fresh optimizer, or with the one that rewinding brings back."""
        self.optimizer = saved.fresh_optimizer(self)
        first = self.plan.rewind_to
        if stage.kind == "retrain" and first is not None:
            saved.rewind(self, first.batch)
        self.attach(stage)
        if stage.kind == "retrain":
            self.thinning.restart()  # where an ablation asks: rewinding has just brought the old weights back

    def attach(self, stage: Stage) -> None:
        """Hang penalty, path and masks on the optimizer."""
        optimizer = self.live_optimizer()
        self.press.begin(stage.kind, optimizer)
        if self.trajectory is not None:
            self.trajectory.attach(optimizer)
        self.thinning.attach(optimizer)  # after the penalty: the masks have the last word

    def _detach(self) -> None:
        self.press.end()
        if self.trajectory is not None:
            self.trajectory.detach()
        self.thinning.detach()

    def _epoch(self, stage: Stage) -> None:
        position, optimizer = self.position, self.live_optimizer()
        key = self.plan.seed_of(stage, position.epoch)
        inside = self.plan.prunes_inside(stage)
        if position.batch == 0:
            seed_everything(derive_seed(self.recipe.seed, "noise", *key))
            position.loss_sum, position.seen = 0.0, 0
        order = order_of(self.data.train, self.recipe.seed, *key)
        began = time.monotonic()
        self.thinning.network.train()
        for batch in batches(self.data.train, self.recipe.data.batch_size, order=order, start=position.batch):
            self._set_lr(stage)
            loss = self._training_loss(stage, batch)
            loss = self.thinning.loss(loss) if inside else loss
            self.press.loss(loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            report = self.thinning.step() if inside else None  # while the gradients are there: masks may grow by them
            optimizer.zero_grad()
            position.loss_sum += float(loss.detach()) * len(batch[1])
            position.seen += len(batch[1])
            position.batch, position.steps_done = position.batch + 1, position.steps_done + 1
            self._pruned(report, stage)
            if position.batch < self.plan.steps_per_epoch:  # or else it is the next epoch's beginning
                saved.keep_for_rewinding(self, stage)
            self._announce(f"{stage.kind}, epoch {position.epoch + 1}/{stage.epochs}")
            every = self.recipe.checkpoint.every_steps
            if every and position.steps_done % every == 0:
                saved.save(self)
        position.epochs_done += 1
        if not math.isfinite(position.loss_sum):
            raise DataError(
                f"the training loss became {position.loss_sum} in epoch {position.epochs_done}; "
                "lower train.optimizer.lr"
            )
        self._log_epoch(stage, time.monotonic() - began)

    def _log_epoch(self, stage: Stage, seconds: float) -> None:
        shown: Split = self.data.validation or self.data.test
        pressure = self.press.figures()
        figures = evaluate(self.thinning.network, shown, self.task, batch_size=self.recipe.data.eval_batch_size)
        loss, n = figures.pop("loss"), figures.pop("n")
        self._event(
            "epoch",
            stage,
            lr=self.live_optimizer().param_groups[0]["lr"],
            train_loss=self.position.loss_sum / self.position.seen,
            loss=loss,
            metrics=figures,
            n=n,
            sparsity=self.thinning.sparsity,
            seconds=seconds,
            **pressure,
        )

    def live_optimizer(self) -> Optimizer:
        """Return the optimizer of the stage that runs."""
        if self.optimizer is None:
            raise AssertionError("set by _start or _restore")
        return self.optimizer

    def _set_lr(self, stage: Stage) -> None:
        lr = self.plan.lr(stage, self.position.epoch, self.position.batch)
        for group in self.live_optimizer().param_groups:
            group["lr"] = lr
            if "initial_lr" in group:  # latents have a learning rate of their own
                group["lr"] = group["initial_lr"] * self.plan.factor(stage, self.position.epoch, self.position.batch)

    def _pruned(self, report: ThinningReport | None, stage: Stage) -> None:
        if report is None:
            return
        kept, total = sum(r.kept for r in report.layers), sum(r.total for r in report.layers)
        values = report.to_dict()
        said = {key: values[key] for key in ("target", "asked", "achieved", "sparsity")}
        self._event("prune", stage, **said, kept=kept, total=total)

    def _save_dense(self) -> None:
        save_model(self.directory / DENSE, self.model)

    def _event(self, kind: str, stage: Stage, /, **fields: Any) -> None:
        place = {"phase": stage.kind if stage.kind == "train" else "retrain", "round": stage.round}
        counts = {"epoch": self.position.epochs_done, "step": self.position.steps_done}
        self.listener.event(self.log.write({"event": kind, **place, **counts, **fields}))

    def _announce(self, text: str) -> None:
        self.listener.progress(self.position.steps_done, self.total_steps, text)
