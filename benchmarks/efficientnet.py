"""EfficientNet-Lite0 with its real weights, made physically smaller without a label: criteria, repairs, latency.

    apt install tuxpaint-stamps-default
    make bench-efficientnet                (or: python benchmarks/efficientnet.py)
    python benchmarks/efficientnet.py --only prune/0.75
    python benchmarks/efficientnet.py --list
    python benchmarks/efficientnet.py --render

Channels are pruned to 0.75 and 0.5 of the MACs at 224 px, in multiples of 8. Scores, repairs and distillation see
unlabelled photographs only; choices between settings are made on 64 of these that are held out. Every cell is written
when it is done, and is not made again. Writes benchmarks/results/efficientnet.json and efficientnet.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from batch_norm import network
from efficientnet_page import page
from efficientnet_parts import (
    Dense,
    Distillation,
    Kept,
    compose,
    distil_,
    divergence,
    repair_,
    reset_,
)
from photos.data import hits, load_images, names
from secateur import Method, Target, export_model, shrink_
from secateur.allocate import Global, Isomorphic, Layerwise
from secateur.errors import SecateurWarning
from secateur.metrics import count_macs, measure_latency
from secateur.patterns import Channel
from secateur.pipeline.environment import machine, versions
from secateur.scores import Coupled, Lamp, Magnitude, NormScale, Random, Sensitivity, Taylor
from secateur.structure import ShrinkReport
from secateur.types import Allocation, GroupScore

RESULTS = Path(__file__).parent / "results"
TARGETS = (0.75, 0.5)
SCORED = 128
"""Photographs that scores look at, the first of the shuffled calibration photographs."""
REPAIRED = 128
"""Photographs that a repair looks at, the same ones. One batch of 256 takes twice the memory and the time."""
HELD_OUT = 64
"""The last of the shuffled calibration photographs: seen by no score and no repair, for choices between settings."""

Cell = dict[str, Any]


class Bench:
    """Photographs, the dense network, and what is computed from them once."""

    def __init__(self) -> None:
        self.split = names()
        photos = {name: last(load_images(self.split[name])) for name in self.split}
        self.test, self.agreement = photos["test"], photos["agreement"]
        order = torch.randperm(len(photos["calibration"]), generator=torch.Generator().manual_seed(0))
        self.calibration = last(photos["calibration"][order])
        self.held_out = self.calibration[-HELD_OUT:]
        self.dense = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.example = self.test[:1]
        self.reference = {
            name: logits(self.dense, images)
            for name, images in (("agreement", self.agreement), ("held_out", self.held_out))
        }
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Make something when it is first needed."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def moments(self) -> Dense:
        """The dense model's moments on the repair's photographs."""
        found: Dense = self.once("moments", lambda: Dense(self.dense, self.calibration[:REPAIRED]))
        return found

    def quality(self, model: nn.Module, *, held_out: bool = True) -> dict[str, float]:
        """Judge a model on all photographs that it may be judged on."""
        out: dict[str, float] = hits(logits(model, self.test), self.split["test"])
        return out | self._beside("agreement", model, self.agreement) | (self.held(model) if held_out else {})

    def held(self, model: nn.Module) -> dict[str, float]:
        """Judge a model on the held-out photographs, which settings may be chosen by."""
        return self._beside("held_out", model, self.held_out)

    def _beside(self, name: str, model: nn.Module, images: Tensor) -> dict[str, float]:
        given, dense = logits(model, images), self.reference[name]
        same = float((given.argmax(1) == dense.argmax(1)).float().mean())
        return {f"kl_{name}": divergence(dense, given), f"same_{name}": same}


def last(images: Tensor) -> Tensor:
    """Lay images out channels last, which the CPU's convolutions are faster on."""
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in torch.split(images, 8)])


# -- criteria


@dataclass(frozen=True)
class Criterion:
    """What is pruned by what.

    Attributes:
        title: For the table.
        score: Made for a seed.
        allocate: How much where.
        loss: Gives the loss for scores that need gradients.
        seeds: Seeds.
        steps: How many shrinkings with a repair between them.
        refit: Whether the least-squares repair is measured, too.
    """

    title: str
    score: Callable[[int], GroupScore]
    allocate: Allocation
    loss: Callable[[Bench], Callable[[nn.Module, Any], Tensor]] | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int = 1
    refit: bool = False


def plain(score: GroupScore) -> Callable[[int], GroupScore]:
    return lambda seed: score


def dense_labels(bench: Bench) -> Callable[[nn.Module, Any], Tensor]:
    """Cross-entropy against what the dense model takes each photograph for."""

    def loss(model: nn.Module, photo: Tensor) -> Tensor:
        given: Tensor = model(photo)
        with torch.no_grad():
            label = bench.dense(photo).argmax(1)
        return F.cross_entropy(given, label)

    return loss


def fisher_loss(bench: Bench) -> Callable[[nn.Module, Any], Tensor]:
    """A random direction of the softmax's Fisher matrix: the square of its derivative is the second order of the KL."""
    generator, fisher = torch.Generator().manual_seed(0), Sensitivity(temperature=4.0)

    def loss(model: nn.Module, photo: Tensor) -> Tensor:
        given: Tensor = model(photo)
        return (given * fisher.directions(given, generator)).sum()

    return loss


def sensitivity(*, per_mac: bool, centred: bool = True, temperature: float = 4.0) -> Any:
    return lambda seed: Sensitivity(temperature=temperature, centred=centred, per_mac=per_mac, seed=seed)


FILTERS = Coupled(Magnitude(), "sum", "out")
GROUP_NORM = Coupled(Magnitude(p=2), "mean", "all", "mean")
CRITERIA = {
    "random": Criterion(
        "random, layerwise", lambda seed: Coupled(Random(seed)), Layerwise(), seeds=(0, 1, 2)
    ),
    "l1_filters_layerwise": Criterion("L1 of the producing filters, layerwise", plain(FILTERS), Layerwise()),
    "l1_filters_global": Criterion("L1 of the producing filters, global", plain(FILTERS), Global()),
    "magnitude_coupled": Criterion("mean magnitude of everything coupled, global", plain(Coupled()), Global()),
    "norm_scale": Criterion("batch-norm scale, global", plain(NormScale()), Global()),
    "lamp": Criterion("LAMP on everything coupled, global", plain(Lamp()), Global()),
    "group_norm": Criterion("group norm (DepGraph), global", plain(GROUP_NORM), Global()),
    "taylor": Criterion("Taylor, the dense model's labels, global", plain(Taylor()), Global(), dense_labels),
    "taylor_layerwise": Criterion(
        "Taylor, the dense model's labels, layerwise", plain(Taylor()), Layerwise(), dense_labels
    ),
    "group_norm_isomorphic": Criterion("group norm (DepGraph), isomorphic", plain(GROUP_NORM), Isomorphic()),
    "taylor_fisher": Criterion("Taylor, Fisher probes, global", plain(Taylor()), Global(), fisher_loss),
    "sensitivity_isomorphic": Criterion("sensitivity, isomorphic", sensitivity(per_mac=False), Isomorphic()),
    "sensitivity": Criterion("sensitivity, global", sensitivity(per_mac=False), Global()),
    "sensitivity_per_mac": Criterion("sensitivity per MAC, global", sensitivity(per_mac=True), Global(), refit=True),
    "sensitivity_zero_per_mac": Criterion(
        "sensitivity per MAC, to zero instead of the mean", sensitivity(per_mac=True, centred=False), Global()
    ),
    "sensitivity_three_steps": Criterion(
        "sensitivity per MAC, in three steps", sensitivity(per_mac=True), Global(), steps=3, refit=True
    ),
}  # fmt: skip
CLASSIC = (
    "random", "l1_filters_layerwise", "l1_filters_global", "magnitude_coupled", "norm_scale", "lamp", "group_norm",
    "taylor",
)  # fmt: skip
RECOMMENDED = "sensitivity_per_mac"


def pruned(
    bench: Bench, criterion: Criterion, target: float, seed: int = 0, align: int = 8
) -> tuple[nn.Module, Kept, ShrinkReport, dict[str, float]]:
    """Prune a copy of the dense model; returns it, what stayed, the last report, and sizes."""
    model: nn.Module = copy.deepcopy(bench.dense)
    kept: Kept = {}
    left = 1.0
    first: ShrinkReport | None = None
    report: ShrinkReport | None = None
    for step in range(criterion.steps):
        goal = target ** ((step + 1) / criterion.steps)
        method = Method(
            target=Target("macs", goal / left),
            score=criterion.score(seed + step),
            pattern=Channel(),
            allocate=criterion.allocate,
        )
        # One photograph at a time where the loss is differentiated by weights, for squares of single samples.
        batches = torch.split(bench.calibration[:SCORED], 1 if criterion.loss else 8)
        loss = criterion.loss(bench) if criterion.loss else None
        report = shrink_(model, method, bench.example, loss_fn=loss, batches=batches, align=align)
        first = first or report
        left = report.macs[1] / first.macs[0]
        kept = compose(kept, report)
        if step < criterion.steps - 1:
            repair_(model, kept, bench.moments, refit=False)
    if report is None or first is None:
        raise AssertionError("a criterion has at least one step")
    sizes = {"macs": left, "parameters": report.parameters[1] / first.parameters[0]}
    return model, kept, report, sizes


def prune_cell(bench: Bench, target: float, name: str, seed: int) -> Cell:
    """Prune; judge before any repair, after re-matching, and after the least-squares repair."""
    criterion = CRITERIA[name]
    began = time.perf_counter()
    model, kept, report, sizes = pruned(bench, criterion, target, seed)
    seconds = {"prune": time.perf_counter() - began}
    out: Cell = {"target": target, "criterion": name, "seed": seed, **sizes, "proof": report.proof.to_dict()}
    out["none"] = bench.quality(model, held_out=False)
    for repair in ("rematch", "refit") if criterion.refit else ("rematch",):
        copied = copy.deepcopy(model)
        dense = bench.moments
        began = time.perf_counter()
        repair_(copied, kept, dense, refit=repair == "refit")
        seconds[repair] = time.perf_counter() - began
        out[repair] = bench.quality(copied)
    return out | {"seconds": seconds, "widths": {g.name: g.kept for g in report.groups}}


# -- distillation


DISTILLATION = Distillation()
SCRATCH = replace(DISTILLATION, lr=1e-3, train_norms=True)
"""New weights have no statistics to keep, and far to go."""
TRIALS = {
    f"{'training' if train else 'evaluation'} mode, lr {lr:g}": replace(
        DISTILLATION, steps=40, lr=lr, train_norms=train
    )
    for lr, train in ((5e-4, False), (1e-4, False), (3e-5, False), (1e-4, True))
}
"""Settings compared on the held-out photographs, in few steps."""
START = {0.75: "rematch", 0.5: "refit"}
"""The repair before distillation: the one with the smaller KL on the held-out photographs."""


def distil_cell(
    bench: Bench, target: float, name: str, how: Distillation, *, scratch: bool = False, trial: bool = False
) -> Cell:
    """Teach the dense model's logits to a pruned model, or to the same architecture from new weights."""
    model, kept, _, sizes = pruned(bench, CRITERIA[name], target)
    if scratch:
        reset_(model)
    else:
        repair_(model, kept, bench.moments, refit=START[target] == "refit")
    began = time.perf_counter()
    losses = distil_(model, bench.dense, bench.calibration[:-HELD_OUT], how)
    seconds = time.perf_counter() - began
    return {
        "target": target,
        "criterion": name,
        "start": "new weights" if scratch else START[target],
        **sizes,
        "distillation": asdict(how),
        "losses": [round(loss, 4) for loss in losses],
        "seconds": seconds,
        **(bench.held(model) if trial else bench.quality(model)),
    }


# -- latency


def latency_cell(bench: Bench, target: float, name: str) -> Cell:
    """Time the dense model and the pruned one, in multiples of 8 and of 1, interleaved."""
    models: dict[str, nn.Module] = {"dense": bench.dense}
    sizes = {}
    for align in (8, 1):
        model, kept, _, sizes[f"align {align}"] = pruned(bench, CRITERIA[name], target, align=align)
        repair_(model, kept, bench.moments, refit=False)
        models[f"align {align}"] = model
    image = bench.example.contiguous()
    runtimes = ("PyTorch", "PyTorch, channels last", "ONNX Runtime")
    runners: dict[str, dict[str, Callable[..., Any]]] = {name: {} for name in runtimes}
    gaps = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, model in models.items():
            runners["PyTorch, channels last"][key] = copy.deepcopy(model)
            plain_layout = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            runners["PyTorch"][key] = plain_layout
            made = export_model(plain_layout, image, out_dir=folder, formats=["onnx"], name=key.replace(" ", "_"))
            gaps[key] = {"max_difference": made[0].max_difference, "checked": made[0].checked}
            runners["ONNX Runtime"][key] = onnx_runner(Path(folder) / f"{key.replace(' ', '_')}.onnx")
        rows = {}
        for runtime, rivals in runners.items():
            inputs = last(image) if "last" in runtime else image
            found = measure_latency(rivals, (inputs,), runs=60, warmup=5, threads=1)
            rows[runtime] = {key: v.to_dict() for key, v in found.items()}
    return {"target": target, "criterion": name, "sizes": sizes, "export": gaps, "rows": rows}


def onnx_runner(path: Path) -> Callable[[Tensor], Any]:
    """Open a file in ONNX Runtime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return lambda image: session.run(None, {name: image.numpy()})


# -- all cells


def dense_cell(bench: Bench) -> Cell:
    macs = count_macs(bench.dense, (bench.example,)).dense
    parameters = sum(p.numel() for p in bench.dense.parameters())
    return {"macs": macs, "parameters": parameters, **bench.quality(bench.dense)}


def cells() -> dict[str, Callable[[Bench], Cell]]:
    """Return every cell by name, in the order of importance."""
    out: dict[str, Callable[[Bench], Cell]] = {"dense": dense_cell}
    names_of = {n: [n] if len(c.seeds) == 1 else [f"{n}/{s}" for s in c.seeds] for n, c in CRITERIA.items()}

    def prune(target: float, name: str) -> None:
        for key, seed in zip(names_of[name], CRITERIA[name].seeds, strict=True):
            out[f"prune/{target}/{key}"] = partial(prune_cell, target=target, name=name, seed=seed)

    for target in TARGETS:
        for name in ("sensitivity_per_mac", "sensitivity_three_steps", "taylor", "group_norm", *CLASSIC):
            prune(target, name)
    out["latency/0.75"] = partial(latency_cell, target=0.75, name="sensitivity_per_mac")
    for key, how in TRIALS.items():
        out[f"trial/0.75/{key}"] = partial(distil_cell, target=0.75, name=RECOMMENDED, how=how, trial=True)
    for target in TARGETS:
        for name, scratch in ((RECOMMENDED, False), (RECOMMENDED, True), ("lamp", False), ("group_norm", False)):
            key = f"distil/{target}/{name}{'/scratch' if scratch else ''}"
            how = SCRATCH if scratch else DISTILLATION
            out[key] = partial(distil_cell, target=target, name=name, how=how, scratch=scratch)
    out["latency/0.5"] = partial(latency_cell, target=0.5, name="sensitivity_per_mac")
    for target in TARGETS:
        for name in CRITERIA:
            prune(target, name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="cells whose names begin like this")
    parser.add_argument("--again", action="store_true", help="make cells again that are done")
    parser.add_argument("--list", action="store_true", help="name the cells and say which are done")
    parser.add_argument("--render", action="store_true", help="write the page from the results, measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / "efficientnet.json"
    done: dict[str, Cell] = json.loads(path.read_text())["cells"] if path.exists() else {}
    everything = cells()
    if arguments.list:
        print("\n".join(f"{'done   ' if name in done else 'missing'} {name}" for name in everything))
        return
    bench: Bench | None = None
    wanted = [n for n in everything if n.startswith(arguments.only) and (arguments.again or n not in done)]
    for name in [] if arguments.render else wanted:
        bench = bench or Bench()
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecateurWarning)
            done[name] = everything[name](bench) | {"date": time.strftime("%Y-%m-%d")}
        print(f"{name} ({time.perf_counter() - began:.0f} s)", short(done[name]), flush=True)
        write(path, done, list(everything))
    write(path, done, list(everything))


def short(cell: Cell) -> str:
    """One line about a cell."""
    parts = {k: v for k, v in cell.items() if isinstance(v, dict) and "top1" in v} or {"": cell}
    return "; ".join(
        f"{k} {v['top1']:.1%} {v['top5']:.1%} KL {v['kl_agreement']:.3f}" for k, v in parts.items() if "top1" in v
    )


def write(path: Path, done: dict[str, Cell], order: list[str]) -> None:
    """Write the results and the page."""
    result = {
        "command": "make bench-efficientnet",
        "machine": machine(),
        "versions": versions(),
        "threads": 1,
        "photographs": {"scored": SCORED, "repaired": REPAIRED, "held_out": HELD_OUT},
        "titles": {name: criterion.title for name, criterion in CRITERIA.items()},
        "recommended": RECOMMENDED,
        "missing": [name for name in order if name not in done],
        "cells": {name: done[name] for name in [*order, *done] if name in done},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
