"""What the founding benchmark measures on Fashion-MNIST: one function for each kind of cell.

Every cell starts from the dense network of its seed or from the weights it started with, and gets the same number of
epochs as its neighbours in the table; what takes more (rounds of rewinding) says how many.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from models import NETS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from fashion_mnist_cells import Protocol, Run, cubic_over, outcome
from fashion_mnist_cells import run_dense as dense_cell
from founding_physical import ROWS, run_slimming, train_norm_net
from founding_ranks import ranks
from founding_training import FOUND, left, point, run_found, run_movement
from secateur import Method, Pruner, Target
from secateur.allocate import ErdosRenyiKernel, Layerwise
from secateur.masks import MaskHook, apply_masks_
from secateur.recover import Rewind
from secateur.schedules import Schedule, iterative, one_shot
from secateur.scores import (
    Grasp,
    Lamp,
    Magnitude,
    OptimalBrainDamage,
    OptimalBrainSurgeon,
    Random,
    Snip,
    Synflow,
    WeightGradient,
)
from secateur.solvers import OptimalBrainSurgeon as Survivors
from secateur.training import SET, RigL, SparseTraining, Static
from secateur.types import Allocation, Dynamics, Score, Solver

Cell = Callable[[], dict[str, Any]]
CLOSE = 0.12
"""Halving the weights does not quite halve the parameters: a point stands for a ratio that it is this near to."""


@dataclass(frozen=True)
class Founding(Protocol):
    """Settings beyond those of the other benchmark.

    Attributes:
        late: Steps of training that late rewinding goes back to.
    """

    late: int = 100


@dataclass(frozen=True)
class OneShot:
    """A score that prunes the dense network at once, or a new one before it is trained."""

    score: Callable[[int], Score]
    allocate: Allocation | None = None
    solver: Solver | None = None
    schedule: Schedule = field(default_factory=one_shot)


OBS: dict[str, Any] = {"block": 64, "damping": 1e-2}
"""Of both halves of Optimal Brain Surgeon: its score and what it does to the weights that stay."""

AFTER = {
    "random": OneShot(Random, Layerwise()),
    "magnitude": OneShot(lambda seed: Magnitude()),
    "lamp": OneShot(lambda seed: Lamp()),
    "weight gradient": OneShot(lambda seed: WeightGradient("absolute")),
    "optimal brain damage": OneShot(lambda seed: OptimalBrainDamage()),
    "optimal brain surgeon": OneShot(lambda seed: OptimalBrainSurgeon(**OBS), None, Survivors(**OBS)),
}
"""Pruned after training, then retrained."""

BEFORE = {
    "random": OneShot(Random, Layerwise()),
    "magnitude": OneShot(lambda seed: Magnitude()),
    "snip": OneShot(lambda seed: Snip()),
    "grasp": OneShot(lambda seed: Grasp()),
    "synflow": OneShot(lambda seed: Synflow(), schedule=iterative(rounds=100)),
}
"""Pruned before training."""

COLLAPSING = BEFORE | {"synflow at once": OneShot(lambda seed: Synflow())}
"""Of which layers are looked at, with no training at all."""


def method_of(part: OneShot, ratio: float, seed: int) -> Method:
    """Return the method of one cell."""
    return Method(
        target=Target("compression_ratio", ratio),
        score=part.score(seed),
        allocate=part.allocate,
        solver=part.solver,
        schedule=part.schedule,
    )


def prune_fully(pruner: Pruner) -> None:
    """Carry out every round of the schedule, with no training in between."""
    while not pruner.finished:
        pruner.prune()


def run_after(run: Run, state: dict[str, Tensor], part: OneShot, ratio: float) -> dict[str, Any]:
    """Prune the dense network, then retrain it."""
    model, optimizer = run.build(state)
    p = run.protocol
    pruner = run.pruner(model, optimizer, method_of(part, ratio, run.seed))
    prune_fully(pruner)
    before = run.score(model)["accuracy"]
    run.fit(model, optimizer, p.cell_epochs, p.retrain_lr, run.order("after"))
    return point(run, model, ratio, p.cell_epochs) | {"before_retraining": before} | outcome(model, pruner)


def run_before(run: Run, part: OneShot, ratio: float) -> dict[str, Any]:
    """Prune the network as it starts, then train it."""
    model, optimizer = run.build(None)
    p = run.protocol
    pruner = run.pruner(model, optimizer, method_of(part, ratio, run.seed))
    prune_fully(pruner)
    run.fit(model, optimizer, p.dense_epochs, p.lr, run.order("dense"))
    return point(run, model, ratio, p.dense_epochs) | outcome(model, pruner)


def run_gradual(run: Run, state: dict[str, Tensor], ratio: float) -> dict[str, Any]:
    """Prune little by little while the dense network trains on."""
    model, optimizer = run.build(state)
    p = run.protocol
    steps = p.cell_epochs * (len(run.data.train_labels) // p.batch_size)
    method = Method(target=Target("compression_ratio", ratio), schedule=cubic_over(steps), when="during")
    pruner = run.pruner(model, optimizer, method)
    run.fit(model, optimizer, p.cell_epochs, p.retrain_lr, run.order("after"), pruner)
    return point(run, model, ratio, p.cell_epochs) | outcome(model, pruner)


def run_rounds(run: Run, state: dict[str, Tensor]) -> dict[str, Any]:
    """Halve the weights and retrain, again and again: one path through all ratios."""
    model, optimizer = run.build(state)
    p, order = run.protocol, run.order("after")
    pruner = run.pruner(model, optimizer, halving(p.ratios))
    path = []
    while not pruner.finished:
        report = pruner.prune()
        run.fit(model, optimizer, p.cell_epochs, p.retrain_lr, order)
        path.append(point(run, model, report.achieved, len(path) * p.cell_epochs + p.cell_epochs))
    return path[-1] | {"path": path} | outcome(model, pruner)


def halving(ratios: Sequence[float]) -> Method:
    """Return a method that halves the parameters up to the largest ratio."""
    rounds = max(round(math.log2(max(ratios))), 1)
    return Method(target=Target("compression_ratio", max(ratios)), schedule=iterative(rounds=rounds))


def run_tickets(run: Run) -> dict[str, Any]:
    """Train, halve, rewind to an early step, train again: lottery tickets; beside each the same mask on new weights."""
    model, optimizer = run.build(None)
    p = run.protocol
    rewind = Rewind(model, optimizer)
    for batch, _ in islice(steps_of(run, 1, run.order("early")), p.late):
        step_on(run, model, optimizer, batch, p.lr)
    rewind.save(step=p.late)
    run.fit(model, optimizer, p.dense_epochs, p.lr, run.order("dense"))
    pruner = run.pruner(model, optimizer, halving(p.ratios))
    path, fresh = [point(run, model, 1.0, p.dense_epochs)], []
    while not pruner.finished:
        report = pruner.prune()
        rewind.rewind_(pruner.masks)
        run.fit(model, optimizer, p.dense_epochs, p.lr, run.order("dense"))
        path.append(point(run, model, report.achieved, (len(path) + 1) * p.dense_epochs))
        if any(abs(report.achieved / ratio - 1) <= CLOSE for ratio in p.ratios):
            fresh.append(on_new_weights(run, pruner, report.achieved))
    return path[-1] | {"path": path, "reinitialised": fresh} | outcome(model, pruner)


def on_new_weights(run: Run, pruner: Pruner, ratio: float) -> dict[str, Any]:
    """Train other new weights under the masks of a ticket."""
    torch.manual_seed(1000 + run.seed)
    model = NETS[run.net]()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    p = run.protocol
    optimizer = SGD(model.parameters(), momentum=p.momentum, weight_decay=p.weight_decay)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    apply_masks_(model, masks)
    MaskHook(model, masks).attach(optimizer)
    run.fit(model, optimizer, p.dense_epochs, p.lr, run.order("dense"))
    return point(run, model, ratio, p.dense_epochs)


DYNAMICS: dict[str, Callable[[int, int], Dynamics]] = {
    "static": lambda steps, seed: Static(),
    "set": lambda steps, seed: SET(end=int(0.75 * steps), every=every(steps), unit="steps", seed=seed),
    "rigl": lambda steps, seed: RigL(end=int(0.75 * steps), every=every(steps)),
}
"""Sparse from the start, with random masks whose layers have Erdős-Rényi-kernel densities."""


def every(steps: int) -> int:
    """Steps between two moves: a hundred, as published, or fewer where the training is as short as a smoke test."""
    return min(100, max(steps // 8, 1))


def run_dynamics(run: Run, name: str, ratio: float) -> dict[str, Any]:
    """Train a network that is sparse from its first step to its last."""
    model, optimizer = run.build(None)
    p = run.protocol
    steps = p.dense_epochs * (len(run.data.train_labels) // p.batch_size)
    method = Method(target=Target("compression_ratio", ratio), score=Random(run.seed), allocate=ErdosRenyiKernel())
    trainer = SparseTraining(model, method, DYNAMICS[name](steps, run.seed), optimizer=optimizer)
    trainer.start()
    for batch, share in steps_of(run, p.dense_epochs, run.order("dense")):
        # As published, an update takes the place of a step.
        step_on(run, model, optimizer, batch, p.lr * share, lambda: trainer.step() is None)
    trainer.detach()
    return point(run, model, ratio, p.dense_epochs) | left(model, trainer.masks)


def steps_of(run: Run, epochs: int, order: torch.Generator) -> Iterator[tuple[Tensor, float]]:
    """Yield the batches of some epochs, and how much of the learning rate is left at each, as ``Run.fit`` has them."""
    size, count = run.protocol.batch_size, len(run.data.train_labels)
    steps = epochs * (count // size)
    for step in range(steps):
        if step % (count // size) == 0:
            shuffled = torch.randperm(count, generator=order)
        start = step % (count // size) * size
        yield shuffled[start : start + size], 1 - step / steps


def step_on(
    run: Run,
    model: nn.Module,
    optimizer: SGD,
    batch: Tensor,
    lr: float,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Take one step of training, unless something else takes its place."""
    images, labels = run.train
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
    if wanted():
        optimizer.step()


def run_dense(run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train the network that the cells start from."""
    if run.net == "norm_net":
        model = train_norm_net(run, 0.0)
        return run.score(model), {n: v.detach().contiguous().clone() for n, v in model.state_dict().items()}
    if run.net in ("ranks", "collapse"):
        return {"accuracy": None}, {}
    return dense_cell(run)


def cells_of(run: Run, state: dict[str, Tensor]) -> Iterator[tuple[str, Cell]]:
    """Yield the key of every cell, and what computes it."""
    if run.net == "norm_net":
        for target in run.protocol.ratios:
            for name, row in ROWS.items():
                yield f"slimming/{name}/{target:g}", partial(run_slimming, run, state, row, target)
    elif run.net == "ranks":
        for data in ("breast cancer", "diabetes"):
            yield f"ranks/{data}", partial(ranks, data, run.seed)
    elif run.net == "collapse":
        for net in NETS:
            yield f"collapse/{net}", partial(collapse, run, net)
    else:
        yield from _compressed(run, state)


def _compressed(run: Run, state: dict[str, Tensor]) -> Iterator[tuple[str, Cell]]:
    yield "rounds/magnitude", partial(run_rounds, run, state)
    yield "tickets", partial(run_tickets, run)
    for ratio in run.protocol.ratios:
        for name, part in AFTER.items():
            yield f"after/{name}/{ratio:g}", partial(run_after, run, state, part, ratio)
        yield f"during/gradual/{ratio:g}", partial(run_gradual, run, state, ratio)
        yield f"during/movement/{ratio:g}", partial(run_movement, run, state, ratio)
        for name, part in BEFORE.items():
            yield f"before/{name}/{ratio:g}", partial(run_before, run, part, ratio)
        for name in DYNAMICS:
            yield f"sparse/{name}/{ratio:g}", partial(run_dynamics, run, name, ratio)
    for name, how in FOUND.items():
        for strength in how.strengths[run.net]:
            yield f"found/{name}/{strength:g}", partial(run_found, run, name, strength)


COLLAPSE = tuple(10 ** (k / 4) for k in range(1, 15))
"""Compression ratios at which layers are looked at; the last ones leave fewer weights than there are layers."""


def collapse(run: Run, net: str) -> dict[str, Any]:
    """Prune a new network ever further with every score made before training; look at its thinnest layer."""
    rows: dict[str, list[dict[str, float]]] = {}
    for name, part in COLLAPSING.items():
        for ratio in COLLAPSE:
            here = replace(run, net=net)
            model, optimizer = here.build(None)
            layers = sum(q.numel() for q in model.parameters() if q.dim() > 1)
            kept = max(round(layers / ratio), 1)
            method = replace(
                method_of(part, 2, run.seed), target=Target("sparsity", 1 - kept / layers), allow_empty=True
            )
            pruner = here.pruner(model, optimizer, method)
            prune_fully(pruner)
            least = min(int(m.sum()) for m in pruner.masks.values())
            alive = bool(path_left(model))
            rows.setdefault(name, []).append({"ratio": layers / kept, "least": least, "connected": alive})
    return {"accuracy": None, "collapse": rows, "layers": layers}


@torch.no_grad()
def path_left(model: nn.Module) -> bool:
    """Whether any input still reaches any output: with all weights positive and biases gone, is the output not zero?"""
    twin = copy.deepcopy(model).double().eval()
    for parameter in twin.parameters():
        parameter.copy_(parameter.abs() if parameter.dim() > 1 else torch.zeros_like(parameter))
    return bool(twin(torch.ones(1, 1, 28, 28, dtype=torch.float64)).any())
