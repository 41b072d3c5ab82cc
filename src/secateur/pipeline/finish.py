"""The end of a run: evaluate, measure side by side, export, write result.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.checkpoint import load_weights, save_masks, save_model, write_atomic
from secateur.errors import GraphError
from secateur.forward import evaluation_mode_of
from secateur.metrics import measure_latency, profile
from secateur.patterns import Channel
from secateur.pipeline.ablate import train_smaller
from secateur.pipeline.data import first_inputs
from secateur.pipeline.directory import DENSE
from secateur.pipeline.engines import engines
from secateur.pipeline.environment import machine, versions
from secateur.pipeline.tasks import evaluate
from secateur.types import Tensors

if TYPE_CHECKING:
    from secateur.pipeline.run import Runner

HISTOGRAM_BINS = 60
_ROUNDING = 1e-3


def finish(runner: Runner, *, seconds: float, command: str) -> dict[str, Any]:
    """Measure the dense and the pruned network on the same inputs, export, and write everything down.

    Args:
        runner: The run, its stages done.
        seconds: How long it took, over all its sittings.
        command: The command line.

    Returns:
        The content of ``result.json``.
    """
    recipe, model, masks = runner.recipe, runner.model, runner.thinning.masks
    notes: list[str] = []
    runner.listener.progress(runner.total_steps, runner.total_steps, "measuring")
    dense = copy.deepcopy(model)
    load_weights(dense, runner.directory / DENSE)
    quality: dict[str, Any] = {}
    if not runner.plan.during or recipe.model.weights is not None:
        quality["dense"] = _quality(dense, runner)
    else:
        notes.append("no dense network was trained in this run: pruning went on during the only training there was")
    if not runner.plan.in_rounds and any(isinstance(m, _BatchNorm) for m in model.modules()):
        notes.append("batch norms were not repaired after pruning: it went on inside training, which adapts them")
    if recipe.recover.distill is not None:
        notes.append(f"retraining learnt from the dense network, too: {recipe.recover.build_distillation()}")
    small = _shrunk(runner, notes)
    quality["pruned"] = _quality(small or model, runner)
    save_model(runner.directory / "model.safetensors", model, masks=masks)
    save_masks(runner.directory / "masks.safetensors", masks)
    ablation = train_smaller(runner, small, _inputs(runner), notes)
    exports = _exports(runner, small, notes)
    result = {
        "schema": 1,
        "name": recipe.name,
        "task": recipe.task,
        "higher_is_better": runner.task.higher_is_better,
        "recipe": recipe.to_dict(),
        "recipe_text": recipe.to_toml(),
        "seed": recipe.seed,
        "command": command,
        "started": runner.position.started,
        "seconds": seconds,
        "versions": versions(),
        "machine": machine(),
        "quality": quality,
        "ablation": ablation,
        "prune": runner.thinning.report().to_dict(),
        "profile": _profiles(runner, dense, small),
        "realised": "mask" if small is None else "slice",
        "histograms": {n: _histogram(n, dense, model, masks) for n in runner.thinning.found.weights},
        "exports": exports,
        "engines": _engines(runner, exports, {"dense": dense, "pruned": small or model}),
        "notes": notes,
    }
    write_atomic(runner.directory / "result.json", json.dumps(result, indent=1, allow_nan=True).encode())
    return result


def _shrunk(runner: Runner, notes: list[str]) -> nn.Module | None:
    """Cut emptied units out of a copy of the network and write it with its plan; say why where that cannot be done."""
    pattern = runner.plan.pattern
    if not isinstance(pattern, Channel):
        return None
    if all(bool(mask.all()) for mask in runner.thinning.masks.values()):
        notes.append("no unit is pruned, so nothing was cut out")
        return None
    from secateur.structure import save_pruned, shrink_

    small = copy.deepcopy(runner.model)
    try:
        report = shrink_(small, runner.thinning.masks, _inputs(runner))
    except GraphError as error:
        notes.append(f"the network was not cut down, its pruned units stay as zeros: {error}")
        return None
    masked = sum(int((~mask).sum()) for mask in runner.thinning.masks.values())
    cut = report.parameters[0] - report.parameters[1]
    if pattern.coupled and cut != masked:
        notes.append(f"not every masked unit could be cut out: {masked} parameters are masked, {cut} were cut")
    save_pruned(runner.directory / "pruned", small, report)
    notes.append(f"the cut-down network is {report.proof}")
    difference = _difference(runner, small)
    if difference > _ROUNDING:
        notes.append(
            "units that were cut out had put out a constant, which went with them: outputs differ from those of "
            f"model.safetensors by up to {difference:.2g} of the largest"
        )
    return small


@torch.no_grad()
def _difference(runner: Runner, small: nn.Module) -> float:
    """Return how far the outputs of the cut-down network are from those of the masked one, of the largest."""
    args, kwargs = _inputs(runner)
    outputs = []
    for model in (runner.model, small):
        with evaluation_mode_of(model):
            outputs.append(model(*args, **kwargs))
    if not all(isinstance(one, Tensor) for one in outputs):
        return 0.0
    masked, cut = (one.double() for one in outputs)
    return float((masked - cut).abs().max() / masked.abs().max().clamp_min(1e-12))


def _quality(model: nn.Module, runner: Runner) -> dict[str, float]:
    return evaluate(model, runner.data.test, runner.task, batch_size=runner.recipe.data.eval_batch_size)


def _inputs(runner: Runner) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return one batch of the measured size, as positional and keyword arguments."""
    inputs = first_inputs(runner.data.test, runner.recipe.measure.batch)
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _profiles(runner: Runner, dense: nn.Module, small: nn.Module | None) -> dict[str, Any]:
    pruned, masks = (runner.model, runner.thinning.masks) if small is None else (small, None)
    measure = runner.recipe.measure
    args, kwargs = _inputs(runner)
    latency: dict[str, Any] = {}
    if measure.latency:
        latency = dict(
            measure_latency(
                {"dense": dense, "pruned": pruned},
                args,
                kwargs,
                runs=measure.runs,
                warmup=measure.warmup,
                threads=measure.threads,
            )
        )
    prunable = list(runner.thinning.found.weights)
    both = {"dense": (dense, None), "pruned": (pruned, masks)}
    return {
        name: profile(
            model, args, kwargs, masks=masks, prunable=prunable, latency=latency.get(name), energy=measure.energy
        ).to_dict()
        for name, (model, masks) in both.items()
    }


def _exports(runner: Runner, small: nn.Module | None, notes: list[str]) -> list[dict[str, Any]]:
    if not runner.recipe.export:
        return []
    from secateur.export import export_model

    args, kwargs = _inputs(runner)
    runner.listener.progress(runner.total_steps, runner.total_steps, "exporting")
    done = export_model(
        small or runner.model,
        args,
        kwargs,
        out_dir=runner.directory / "exports",
        formats=runner.recipe.export,
        masks=runner.thinning.masks if small is None else None,
    )
    rows = []
    for item in done:
        row = item.to_dict()
        row["path"] = str(Path(row["path"]).relative_to(runner.directory))
        notes.extend(row.pop("notes", ()))
        rows.append(row)
    return rows


def _engines(runner: Runner, exports: list[dict[str, Any]], models: dict[str, nn.Module]) -> list[dict[str, Any]]:
    measure = runner.recipe.measure
    if not measure.latency:
        return []
    runs, warmup, threads = measure.runs, measure.warmup, measure.threads
    return engines(runner.directory, exports, models, _inputs(runner), runs=runs, warmup=warmup, threads=threads)


def _histogram(name: str, dense: nn.Module, pruned: nn.Module, masks: Tensors) -> dict[str, list[float]]:
    """Count the weights before and the kept weights after, in the same bins."""
    before = dense.get_parameter(name).detach().float().flatten()
    after = pruned.get_parameter(name).detach().float()[masks[name]].flatten()
    both = torch.cat([before, after])
    low, high = float(both.min()), float(both.max())
    if low == high:
        low, high = low - 0.5, high + 0.5

    def counts(values: Tensor) -> list[int]:
        return [int(c) for c in torch.histc(values, HISTOGRAM_BINS, low, high)]

    edges = [low + (high - low) * i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1)]
    return {"edges": edges, "dense": counts(before), "pruned": counts(after)}  # type: ignore[dict-item]
