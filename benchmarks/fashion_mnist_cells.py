"""What the Fashion-MNIST benchmark measures: one function for each kind of cell."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from data import Data
from models import NETS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from train import evaluate, fit

from secateur import Method, Pruner, Target
from secateur.allocate import Global, Layerwise
from secateur.metrics.macs import count_macs
from secateur.schedules import Schedule, cubic, iterative, one_shot
from secateur.scores import Magnitude, Random, WeightGradient
from secateur.types import Allocation, Score

CRITERIA = (
    "random_layerwise",
    "random_global",
    "magnitude_layerwise",
    "magnitude_global",
    "weight_gradient_layerwise",
    "weight_gradient_global",
)


@dataclass(frozen=True)
class Protocol:
    """What one network's measurements take. Nothing in here depends on the test set."""

    dense_epochs: int
    cell_epochs: int
    rounds: int
    round_epochs: int
    gradual_epochs: int
    lr: float
    retrain_lr: float
    ratios: tuple[float, ...] = (2, 4, 8, 16, 32)
    founding_ratio: float = 12
    gradual_sparsity: float = 0.9
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gradient_batches: int = 8
    images: int | None = None


def parts_of(criterion: str, seed: int) -> tuple[Score, Allocation]:
    """Return the score and the allocation that a row of table (b) stands for."""
    name, _, scope = criterion.rpartition("_")
    scores: dict[str, Score] = {
        "random": Random(seed),
        "magnitude": Magnitude(),
        "weight_gradient": WeightGradient("absolute"),
    }
    return scores[name], Global() if scope == "global" else Layerwise()


def cubic_over(steps: int) -> Schedule:
    """Cubic pruning that ends at 60 % of the steps, leaving the rest to recover; at most 20 updates."""
    span = max(int(0.6 * steps), 1)
    updates = min(20, span)
    every = span // updates
    return cubic(begin=0, end=updates * every, every=every, unit="steps")


@dataclass
class Run:
    """One network under training, with the data it sees."""

    net: str
    seed: int
    protocol: Protocol
    data: Data

    def build(self, state: dict[str, Tensor] | None) -> tuple[nn.Module, SGD]:
        """Return a model, fresh or with given weights, and an optimizer without momentum yet."""
        torch.manual_seed(self.seed)
        model: nn.Module = NETS[self.net]()
        if state is not None:
            model.load_state_dict(state)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        p = self.protocol
        return model, SGD(model.parameters(), momentum=p.momentum, weight_decay=p.weight_decay)

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Training images and labels."""
        return self.data.train_images, self.data.train_labels

    def order(self, part: str) -> torch.Generator:
        """Order of the batches: the same for all cells of a part, so that they differ by their method alone."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{part}".encode()))

    def fit(
        self,
        model: nn.Module,
        optimizer: SGD,
        epochs: int,
        lr: float,
        order: torch.Generator,
        pruner: Pruner | None = None,
    ) -> None:
        """Train on the training set, in the protocol's batches."""
        fit(
            model,
            optimizer,
            self.train,
            epochs=epochs,
            lr=lr,
            generator=order,
            batch_size=self.protocol.batch_size,
            pruner=pruner,
        )

    def score(self, model: nn.Module) -> dict[str, Any]:
        """Return accuracy and loss on the data's test set."""
        accuracy, loss = evaluate(model, self.data.test_images, self.data.test_labels)
        return {"accuracy": accuracy, "loss": loss if math.isfinite(loss) else None}  # JSON has no NaN

    def pruner(self, model: nn.Module, optimizer: SGD, method: Method) -> Pruner:
        """Return a pruner that takes gradients, where needed, on a fixed sample of training batches."""
        images, labels = self.train
        n = self.protocol.gradient_batches * self.protocol.batch_size
        sample = torch.split(
            torch.randperm(len(labels), generator=self.order("gradient"))[:n], self.protocol.batch_size
        )
        return Pruner(
            model,
            method,
            optimizer=optimizer,
            loss_fn=lambda m, index: F.cross_entropy(m(images[index]), labels[index]),
            batches=sample,
            example_inputs=(images[:1],),
        )


def run_dense(run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model, optimizer = run.build(None)
    p = run.protocol
    run.fit(model, optimizer, p.dense_epochs, p.lr, run.order("dense"))
    macs = count_macs(model, (torch.zeros(1, 1, 28, 28),)).dense
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    return run.score(model) | {"epochs": p.dense_epochs, "macs": {"dense": macs}}, state


def run_longer(run: Run, state: dict[str, Tensor]) -> dict[str, Any]:
    """Train the dense network on, with the restarts and epochs of (a) and no pruning."""
    model, optimizer = run.build(state)
    p, order = run.protocol, run.order("founding")
    for _ in range(p.rounds):
        run.fit(model, optimizer, p.round_epochs, p.retrain_lr, order)
    return run.score(model) | {"epochs": p.rounds * p.round_epochs}


def run_founding(run: Run, state: dict[str, Tensor]) -> dict[str, Any]:
    model, optimizer = run.build(state)
    p, order = run.protocol, run.order("founding")
    method = Method(target=Target("compression_ratio", p.founding_ratio), schedule=iterative(rounds=p.rounds))
    pruner = run.pruner(model, optimizer, method)
    path = []
    while not pruner.finished:
        report = pruner.prune()
        run.fit(model, optimizer, p.round_epochs, p.retrain_lr, order)
        path.append({"ratio": report.achieved, "sparsity": report.sparsity})
    return run.score(model) | {"epochs": p.rounds * p.round_epochs, "rounds": path} | outcome(model, pruner)


def run_cell(run: Run, state: dict[str, Tensor], criterion: str, ratio: float) -> dict[str, Any]:
    model, optimizer = run.build(state)
    p = run.protocol
    score, allocate = parts_of(criterion, run.seed)
    method = Method(target=Target("compression_ratio", ratio), score=score, allocate=allocate, schedule=one_shot())
    pruner = run.pruner(model, optimizer, method)
    pruner.prune()
    before = run.score(model)["accuracy"]
    run.fit(model, optimizer, p.cell_epochs, p.retrain_lr, run.order("table"))
    return (
        run.score(model)
        | {"before_retraining": before, "epochs": p.cell_epochs, "ratio": ratio}
        | outcome(model, pruner)
    )


def run_gradual(run: Run, state: dict[str, Tensor], *, gradual: bool) -> dict[str, Any]:
    model, optimizer = run.build(state)
    p = run.protocol
    steps = p.gradual_epochs * (len(run.data.train_labels) // p.batch_size)
    method = Method(
        target=Target("sparsity", p.gradual_sparsity),
        schedule=cubic_over(steps) if gradual else one_shot(),
        when="during" if gradual else "after",
    )
    pruner = run.pruner(model, optimizer, method)
    if not gradual:
        pruner.prune()
    run.fit(model, optimizer, p.gradual_epochs, p.retrain_lr, run.order("gradual"), pruner if gradual else None)
    return run.score(model) | {"epochs": p.gradual_epochs, "updates": len(pruner.history)} | outcome(model, pruner)


def outcome(model: nn.Module, pruner: Pruner) -> dict[str, Any]:
    """Return what the masks keep, after checking that training brought no pruned weight back.

    ``cut`` counts each layer's output units that have no weight left; in the last layer these are classes.
    """
    parameters = dict(model.named_parameters())
    for name, mask in pruner.masks.items():
        pruned = parameters[name][~mask]
        pruned = pruned[~pruned.isnan()]  # a training that diverged, not a mask that failed: NaN times zero is NaN
        if bool(pruned.count_nonzero()) or not pruner.finished:
            raise RuntimeError(f"{name}: a pruned weight came back, or the schedule did not finish")
    macs = count_macs(model, (torch.zeros(1, 1, 28, 28),), masks=pruner.masks)
    report = pruner.history[-1]
    total = sum(p.numel() for p in parameters.values())
    left = total - sum(row.total - row.kept for row in report.layers)
    return {
        "achieved_ratio": total / left,
        "diverged": not all(bool(p.isfinite().all()) for p in parameters.values()),
        "sparsity": report.sparsity,
        "cut": {name: int((~mask.flatten(1).any(1)).sum()) for name, mask in pruner.masks.items() if mask.dim() > 1},
        "kept": {row.name: [row.kept, row.total] for row in report.layers},
        "macs": {"dense": macs.dense, "density_weighted": macs.density_weighted},
    }


def cells_of(run: Run, state: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Yield the key of every cell that starts from the dense weights, and what computes it."""
    p = run.protocol
    yield "founding/iterative", lambda: run_founding(run, state)
    yield "founding/dense_longer", lambda: run_longer(run, state)
    yield "gradual/one_shot", lambda: run_gradual(run, state, gradual=False)
    yield "gradual/cubic", lambda: run_gradual(run, state, gradual=True)
    for ratio in p.ratios:
        for criterion in CRITERIA:
            yield f"table/{criterion}/{ratio:g}", lambda c=criterion, r=ratio: run_cell(run, state, c, r)
