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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.checkpoint import (
    capture_rng,
    load_tree,
    load_weights,
    restore_rng,
    save_model,
    save_tree,
    with_versions,
)
from secateur.errors import DataError, RecipeError
from secateur.export import check_formats
from secateur.masks import apply_masks_, clear_optimizer_state_
from secateur.patterns import Channel
from secateur.pipeline.ablate import check_smaller
from secateur.pipeline.data import (
    Data,
    Split,
    batches,
    derive_seed,
    length,
    order_of,
    sample_inputs,
    score_batches,
    seed_everything,
)
from secateur.pipeline.directory import CHECKPOINT, DENSE, REWIND, check_directory, claim
from secateur.pipeline.distill import Distiller
from secateur.pipeline.events import EventLog, Listener, Silent
from secateur.pipeline.factories import make_data, make_model
from secateur.pipeline.finish import finish
from secateur.pipeline.optim import build_optimizer
from secateur.pipeline.plan import Stage, plan_of
from secateur.pipeline.position import Position
from secateur.pipeline.press import Press
from secateur.pipeline.repair import repair_batch_norm, repairs_batch_norm
from secateur.pipeline.tasks import TASKS, Task, evaluate, loss_of
from secateur.pruner import Pruner
from secateur.recipe import Recipe
from secateur.scores import watches_training, with_path
from secateur.stats import PathIntegral
from secateur.types import Masks, PruneReport, Statistic


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
    return RunResult(directory, model, runner.pruner.masks, result)


class Runner:
    """The state of one run and the stages that change it."""

    def __init__(self, recipe: Recipe, directory: Path, model: nn.Module, data: Data, listener: Listener) -> None:
        self.recipe, self.directory, self.model, self.data, self.listener = recipe, directory, model, data, listener
        self.task: Task = TASKS[recipe.task]()
        self.plan = plan_of(recipe, steps_per_epoch=math.ceil(length(data.train) / recipe.data.batch_size))
        self.method = self.plan.method
        self.stages = self.plan.stages
        self.total_steps = self.plan.steps
        self._check_last_batch()
        check_formats(recipe.export)
        check_smaller(recipe, self.plan, model, lambda: (self._sample("macs", 1),))
        part = recipe.recover.build_distillation()
        self.distiller = None if part is None else Distiller(part, self.task, directory / DENSE)
        self.position = Position()
        self.optimizer: Optimizer | None = None
        self.press = Press(recipe, model, lambda: self._sample("penalty", 1))
        self.trajectory = PathIntegral(model) if watches_training(self.method.score) else None
        if self.trajectory is not None:
            self.method = replace(self.method, score=with_path(self.method.score, self.trajectory))
        self.pruner = Pruner(
            model,
            self.method,
            loss_fn=self._loss,
            batches=self._score_batches,
            example_inputs=self._example_inputs(),
            steps_per_epoch=self.plan.steps_per_epoch,
        )

    def _example_inputs(self) -> tuple[Any, ...] | None:
        """Return one sample where the target, the pattern or the score must see a forward pass."""
        wanted = self.method.goal.kind == "macs" or isinstance(self.method.pattern, Channel)
        wanted |= any(isinstance(n, Statistic) and "example_inputs" in n.uses for n in self.method.score.needs)
        return (self._sample("macs", 1),) if wanted else None

    def _check_last_batch(self) -> None:
        """A batch norm over features alone has no statistics on one sample, and says so only at the epoch's end."""
        if length(self.data.train) % self.recipe.data.batch_size != 1 or not self.total_steps:
            return
        if any(isinstance(m, nn.BatchNorm1d) for m in self.model.modules()):
            raise RecipeError(
                f"data.batch_size = {self.recipe.data.batch_size} leaves a last batch of one sample, which BatchNorm1d "
                "cannot be trained on; choose another"
            )

    # What a step looks at

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        return loss_of(self.task, model, batch)

    def _training_loss(self, stage: Stage, batch: Any) -> Tensor:
        if self.distiller is not None and self.plan.distils(stage):
            return self.distiller.loss(self.model, batch)
        return self._loss(self.model, batch)

    def _score_batches(self) -> Iterator[Any]:
        recipe = self.recipe
        return score_batches(
            self.data.train, recipe.seed, size=recipe.data.batch_size, count=recipe.prune.score_batches
        )

    def _sample(self, purpose: str, count: int) -> Any:
        return sample_inputs(self.data.train, self.recipe.seed, purpose, count)

    # The run

    def run(self, *, resume: bool, command: str) -> dict[str, Any]:
        """Work off the stages that are left, then measure and write the result."""
        if resume and (self.directory / CHECKPOINT).exists():
            self._restore()
        log = EventLog(self.directory / "metrics.jsonl", size=self.position.log_size)
        self.log = log
        self.began = time.monotonic() - self.position.seconds
        self.position.started = self.position.started or datetime.now(UTC).isoformat(timespec="seconds")
        if self.method.when == "during" and not (self.directory / DENSE).exists():
            self._save_dense()
        while self.position.stage < len(self.stages):
            self.run_stage(self.stages[self.position.stage])
            self.position.stage, self.position.epoch, self.position.batch = self.position.stage + 1, 0, 0
            self.optimizer = None
            self._detach()  # or every round's optimizer would live on in the pruner
            self._checkpoint()
        if not self.pruner.finished:
            raise AssertionError("Plan.check lets no unfinished schedule through")
        self._detach()
        apply_masks_(self.model, self.pruner.masks)
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
        self._announce(f"pruning, round {stage.round}")
        before = copy.deepcopy(self.model) if repairs_batch_norm(self) else None
        self._pruned(self.pruner.prune(), stage)
        if before is not None and not (self.pruner.finished and self.method.restarts):
            moved, kind = repair_batch_norm(self, before), self.recipe.recover.batch_norm
            self._event(
                "recalibrate", stage, kind=kind, layers=moved.layers, moved=moved.moved, skipped=dict(moved.skipped)
            )
            apply_masks_(self.model, self.pruner.masks)  # a masked channel has no mean to bring back

    def _train(self, stage: Stage) -> None:
        position = self.position
        if stage.kind == "retrain" and not (self.directory / DENSE).exists():
            self._save_dense()
        if self.optimizer is None:
            self.start(stage)
        while position.epoch < stage.epochs:
            self._keep_for_rewinding(stage)
            self._epoch(stage)
            position.epoch, position.batch = position.epoch + 1, 0
            if position.epoch < stage.epochs and position.epoch % self.recipe.checkpoint.every_epochs == 0:
                self._checkpoint()
        if stage.kind == "train" and self.method.when == "after":
            self._save_dense()

    def start(self, stage: Stage) -> None:
        """Begin a stage of training with a fresh optimizer, or with the one that rewinding brings back."""
        options = self.recipe.train.optimizer
        self.optimizer = build_optimizer(self.model, options.name, options.options)
        first = self.plan.rewind_to
        if stage.kind == "retrain" and first is not None:
            saved = load_tree(self.directory / REWIND)
            self.model.load_state_dict(with_versions(self.model, saved["model"]))
            self.optimizer.load_state_dict(saved["optimizer"])
            apply_masks_(self.model, self.pruner.masks)
            clear_optimizer_state_(self.optimizer, self.model, self.pruner.masks)
            self.press.load_state_dict(saved["penalty"])
            if self.trajectory is not None:
                self.trajectory.restart()  # the way from here on is another one
            if first.batch:  # in the middle of an epoch: its dropout and its mean loss go on, too
                restore_rng(saved["rng"])
                self.position.batch = first.batch
                self.position.loss_sum, self.position.seen = saved["sums"]
        self._attach(stage)
        if stage.kind == "retrain" and self.pruner.finished:
            self.pruner.restart()  # where an ablation asks: rewinding has just brought the old weights back

    def _attach(self, stage: Stage) -> None:
        optimizer = self._live_optimizer()
        self.press.begin(stage.kind, optimizer)
        if self.trajectory is not None:
            self.trajectory.attach(optimizer)
        self.pruner.attach(optimizer)  # after the penalty: the masks have the last word

    def _detach(self) -> None:
        self.press.end()
        if self.trajectory is not None:
            self.trajectory.detach()
        self.pruner.detach()

    def _epoch(self, stage: Stage) -> None:
        position, optimizer = self.position, self._live_optimizer()
        key = self.plan.seed_of(stage, position.epoch)
        in_loop = self.plan.prunes_inside(stage)
        if position.batch == 0:
            seed_everything(derive_seed(self.recipe.seed, "noise", *key))
            position.loss_sum, position.seen = 0.0, 0
        order = order_of(self.data.train, self.recipe.seed, *key)
        began = time.monotonic()
        self.model.train()
        for batch in batches(self.data.train, self.recipe.data.batch_size, order=order, start=position.batch):
            self._set_lr(stage)
            loss = self._training_loss(stage, batch)
            self.press.loss(loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            position.loss_sum += float(loss.detach()) * len(batch[1])
            position.seen += len(batch[1])
            position.batch, position.steps_done = position.batch + 1, position.steps_done + 1
            if in_loop:
                report = self.pruner.step()
                if report is not None:
                    self._pruned(report, stage)
            if position.batch < self.plan.steps_per_epoch:  # or else it is the next epoch's beginning
                self._keep_for_rewinding(stage)
            self._announce(f"{stage.kind}, epoch {position.epoch + 1}/{stage.epochs}")
            every = self.recipe.checkpoint.every_steps
            if every and position.steps_done % every == 0:
                self._checkpoint()
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
        figures = evaluate(self.model, shown, self.task, batch_size=self.recipe.data.eval_batch_size)
        loss, n = figures.pop("loss"), figures.pop("n")
        self._event(
            "epoch",
            stage,
            lr=self._live_optimizer().param_groups[0]["lr"],
            train_loss=self.position.loss_sum / self.position.seen,
            loss=loss,
            metrics=figures,
            n=n,
            sparsity=self.pruner.sparsity,
            seconds=seconds,
            **pressure,
        )

    def _live_optimizer(self) -> Optimizer:
        if self.optimizer is None:
            raise AssertionError("set by _start or _restore")
        return self.optimizer

    def _set_lr(self, stage: Stage) -> None:
        lr = self.plan.lr(stage, self.position.epoch, self.position.batch)
        for group in self._live_optimizer().param_groups:
            group["lr"] = lr

    def _pruned(self, report: PruneReport, stage: Stage) -> None:
        kept, total = sum(r.kept for r in report.layers), sum(r.total for r in report.layers)
        self._event(
            "prune",
            stage,
            target=report.target,
            asked=report.asked,
            achieved=report.achieved,
            sparsity=report.sparsity,
            kept=kept,
            total=total,
        )

    # What survives

    def _keep_for_rewinding(self, stage: Stage) -> None:
        """Keep weights and optimizer if this is the point of the training that rounds go back to."""
        position = self.position
        if stage.kind != "train" or self.plan.rewind_to != (position.epoch, position.batch):
            return
        tree = {
            "model": self.model.state_dict(),
            "optimizer": self._live_optimizer().state_dict(),
            "penalty": self.press.state_dict(),
            "rng": capture_rng(),
            "sums": (position.loss_sum, position.seen),
        }
        save_tree(self.directory / REWIND, tree)

    def _save_dense(self) -> None:
        save_model(self.directory / DENSE, self.model)

    def _checkpoint(self) -> None:
        self.position.log_size = self.log.size
        self.position.seconds = time.monotonic() - self.began
        tree = {
            "position": vars(self.position).copy(),
            "model": self.model.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict(),
            "penalty": self.press.state_dict(),
            "rng": capture_rng(),
            "threads": torch.get_num_threads(),
        }
        if self.trajectory is not None:
            tree["trajectory"] = self.trajectory.state_dict()
        save_tree(self.directory / CHECKPOINT, tree)

    def _restore(self) -> None:
        path = self.directory / CHECKPOINT
        tree = load_tree(path)
        if tree["threads"] != torch.get_num_threads() and self.recipe.threads is None:
            torch.set_num_threads(tree["threads"])  # another number of threads sums in another order
        self.position = Position(**tree["position"])
        self.model.load_state_dict(with_versions(self.model, tree["model"]))
        self.pruner.load_state_dict(tree["pruner"])
        self.press.load_state_dict(tree.get("penalty"))
        if self.trajectory is not None:
            self.trajectory.load_state_dict(tree["trajectory"])
        if tree["optimizer"] is not None:
            options = self.recipe.train.optimizer
            self.optimizer = build_optimizer(self.model, options.name, options.options)
            self.optimizer.load_state_dict(tree["optimizer"])
            self._attach(self.stages[self.position.stage])
        restore_rng(tree["rng"])

    def _event(self, kind: str, stage: Stage, /, **fields: Any) -> None:
        place = {"phase": stage.kind if stage.kind == "train" else "retrain", "round": stage.round}
        counts = {"epoch": self.position.epochs_done, "step": self.position.steps_done}
        self.listener.event(self.log.write({"event": kind, **place, **counts, **fields}))

    def _announce(self, text: str) -> None:
        self.listener.progress(self.position.steps_done, self.total_steps, text)
