"""Channels that training itself makes superfluous, cut out for real: widths, MACs, accuracy, measured latency."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from fashion_mnist_cells import Run
from secateur import Method, Target
from secateur.metrics import count_macs, measure_latency
from secateur.patterns import Channel
from secateur.penalties import Penalised, ScaleL1
from secateur.recover import reestimate_bn_
from secateur.scores import Coupled, Magnitude, NormScale, Random
from secateur.structure import fold_constants_, shrink_
from secateur.types import GroupScore, Score

IMAGE = (1, 1, 28, 28)
BATCHES = (1, 64)


def norm_net() -> nn.Sequential:
    """Return a small convolutional network with batch norm after every layer but the last."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@dataclass(frozen=True)
class Slimming:
    """One row: what presses during training, and what ranks the channels afterwards.

    Attributes:
        strength: Of the L1 penalty on batch-norm scales; 0 for none.
        score: Of the channels.
    """

    strength: float
    score: GroupScore | Score


ROWS = {
    "slimming": Slimming(1e-3, NormScale()),
    "norm scale, no penalty": Slimming(0.0, NormScale()),
    "filter norm": Slimming(0.0, Coupled(Magnitude(), reduce_by="sum", over="out")),
    "random": Slimming(0.0, Random(0)),
}


def train_norm_net(run: Run, strength: float) -> nn.Module:
    """Train the network, pressing on its scales."""
    torch.manual_seed(run.seed)
    model = norm_net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    p = run.protocol
    optimizer = optimizer_of(run, model)
    penalised = Penalised(model, ScaleL1(strength), optimizer=optimizer) if strength else None
    run.fit(model, optimizer, p.dense_epochs, p.lr, run.order("slimming"))
    if penalised is not None:
        penalised.detach()
    return model


def optimizer_of(run: Run, model: nn.Module) -> SGD:
    """Return an optimizer that leaves the scales to the penalty: weight decay would be a second one on them."""
    scales = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    known = {id(p) for p in scales}
    others = [p for p in model.parameters() if id(p) not in known]
    p = run.protocol
    groups = [{"params": others, "weight_decay": p.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return SGD(groups, momentum=p.momentum)


def run_slimming(run: Run, state: dict[str, Tensor], row: Slimming, target: float) -> dict[str, Any]:
    """Cut channels out of a trained network down to a part of its MACs; fold, repair, retrain, measure.

    Args:
        run: Network, seed, data and settings.
        state: The network trained without a penalty; one with a penalty is trained here.
        row: What presses, and what ranks.
        target: Part of the MACs that stays.
    """
    dense = train_norm_net(run, row.strength) if row.strength else norm_net()
    if not row.strength:
        dense.load_state_dict(state)
    whole = run.score(dense)["accuracy"]
    small = copy.deepcopy(dense)
    p = run.protocol
    images = run.data.train_images[:512]
    report = shrink_(small, Method(target=Target("macs", target), pattern=Channel(), score=row.score), images[:2])
    cut = run.score(small)["accuracy"]
    fold_constants_(small, dense, report, [images])
    folded = run.score(small)["accuracy"]
    reestimate_bn_(small, [images])
    run.fit(small, optimizer_of(run, small), p.cell_epochs, p.retrain_lr, run.order("slimmed"))
    return (
        run.score(small)
        | {"dense": whole, "cut": cut, "folded": folded, "target": target, "epochs": p.dense_epochs + p.cell_epochs}
        | physical(dense, small)
        | {"proof": report.proof.to_dict()}
    )


def physical(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Return widths, MACs, parameters and measured latency of two networks, side by side."""
    x = torch.zeros(IMAGE)
    out: dict[str, Any] = {
        "widths": {n: m.weight.shape[0] for n, m in small.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)},
        "macs": [count_macs(m, (x,)).dense for m in (dense, small)],
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (dense, small)],
        "latency_ms": {},
    }
    for batch in BATCHES:
        inputs: Tensor = torch.zeros(batch, *IMAGE[1:]).to(memory_format=torch.channels_last)
        found = measure_latency({"dense": dense, "small": small}, (inputs,), runs=100, warmup=20, threads=1)
        out["latency_ms"][str(batch)] = {name: latency.median_ms for name, latency in found.items()}
    return out
