"""What of a run survives a kill, and what rounds go back to: one tree each, written atomically."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from secateur.checkpoint import capture_rng, load_tree, restore_rng, save_tree, with_versions
from secateur.masks import apply_masks_, clear_optimizer_state_
from secateur.pipeline.directory import CHECKPOINT, REWIND
from secateur.pipeline.optim import build_optimizer
from secateur.pipeline.position import Position

if TYPE_CHECKING:
    from secateur.pipeline.plan import Stage
    from secateur.pipeline.run import Runner


def fresh_optimizer(runner: Runner) -> Optimizer:
    """Return a new optimizer over all that is trained now."""
    options, latents = runner.recipe.train.optimizer, runner.recipe.train.latents
    own = {"weight_decay": 0.0} if latents is None else {"weight_decay": latents.weight_decay}
    if latents is not None and latents.lr is not None:
        own["lr"] = latents.lr
    return build_optimizer(runner.model, options.name, options.options, latents=runner.thinning.latents, **own)


def save(runner: Runner) -> None:
    """Write everything that the run needs to go on from here."""
    runner.position.log_size = runner.log.size
    runner.position.seconds = time.monotonic() - runner.began
    tree = {
        "position": vars(runner.position).copy(),
        "model": runner.model.state_dict(),
        "optimizer": None if runner.optimizer is None else runner.optimizer.state_dict(),
        "pruner": runner.thinning.state_dict(),
        "penalty": runner.press.state_dict(),
        "rng": capture_rng(),
        "threads": torch.get_num_threads(),
    }
    if runner.trajectory is not None:
        tree["trajectory"] = runner.trajectory.state_dict()
    save_tree(runner.directory / CHECKPOINT, tree)


def restore(runner: Runner) -> None:
    """Put a run back to where :func:`save` was called."""
    tree = load_tree(runner.directory / CHECKPOINT)
    if tree["threads"] != torch.get_num_threads() and runner.recipe.threads is None:
        torch.set_num_threads(tree["threads"])  # another number of threads sums in another order
    runner.position = Position(**tree["position"])
    runner.model.load_state_dict(with_versions(runner.model, tree["model"]))
    runner.thinning.load_state_dict(tree["pruner"])
    runner.press.load_state_dict(tree.get("penalty"))
    if runner.trajectory is not None:
        runner.trajectory.load_state_dict(tree["trajectory"])
    if tree["optimizer"] is not None:
        runner.optimizer = fresh_optimizer(runner)
        runner.optimizer.load_state_dict(tree["optimizer"])
        runner.attach(runner.stages[runner.position.stage])
    restore_rng(tree["rng"])


def keep_for_rewinding(runner: Runner, stage: Stage) -> None:
    """Keep weights and optimizer if this is the point of the training that rounds go back to."""
    position = runner.position
    if stage.kind != "train" or runner.plan.rewind_to != (position.epoch, position.batch):
        return
    tree = {
        "model": runner.model.state_dict(),
        "optimizer": runner.live_optimizer().state_dict(),
        "penalty": runner.press.state_dict(),
        "rng": capture_rng(),
        "sums": (position.loss_sum, position.seen),
    }
    save_tree(runner.directory / REWIND, tree)


def rewind(runner: Runner, batch: int) -> None:
    """Go back to the point that was kept, with the masks of now.

    Args:
        runner: The run, its optimizer fresh.
        batch: How far into its epoch the point lies.
    """
    optimizer, masks = runner.live_optimizer(), runner.thinning.masks
    saved = load_tree(runner.directory / REWIND)
    runner.model.load_state_dict(with_versions(runner.model, saved["model"]))
    optimizer.load_state_dict(saved["optimizer"])
    apply_masks_(runner.model, masks)
    clear_optimizer_state_(optimizer, runner.model, masks)
    runner.press.load_state_dict(saved["penalty"])
    if runner.trajectory is not None:
        runner.trajectory.restart()  # the way from here on is another one
    if batch:  # in the middle of an epoch: its dropout and its mean loss go on, too
        restore_rng(saved["rng"])
        runner.position.batch = batch
        runner.position.loss_sum, runner.position.seen = saved["sums"]
