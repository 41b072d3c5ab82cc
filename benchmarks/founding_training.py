"""Sparsity that training finds by itself, over strengths instead of ratios; and scores that training moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from fashion_mnist_cells import Run, cubic_over
from founding_physical import physical
from secateur.metrics.macs import count_macs
from secateur.structure import shrink_
from secateur.training import L0, Movement, Reparametrised, SoftThreshold, VariationalDropout
from secateur.types import Parametrisation

IMAGE = (1, 1, 28, 28)


@dataclass(frozen=True)
class Rates:
    """Learning rates of weights and latents, and whose."""

    lr: float
    latent_lr: float
    by: type[torch.optim.Optimizer] = torch.optim.Adam

    def optimizer(self, wrapped: Reparametrised, model: nn.Module, momentum: float) -> torch.optim.Optimizer:
        """Return an optimizer over weights and latents; momentum is for SGD."""
        groups = [
            {"params": list(model.parameters()), "lr": self.lr},
            {"params": list(wrapped.latents.parameters()), "lr": self.latent_lr},
        ]
        more = {"momentum": momentum} if self.by is SGD else {}
        return self.by([g for g in groups if g["params"]], **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Found:
    """A parametrisation whose sparsity follows from a strength.

    Attributes:
        part: Makes it, from the strength and the number of training images.
        rates: By network.
        strengths: By network.
        cut: Whether closed units are cut out for real.
    """

    part: Callable[[float, int], Parametrisation]
    rates: dict[str, Rates]
    strengths: dict[str, tuple[float, ...]]
    cut: bool = False


FOUND = {
    "l0": Found(
        lambda strength, n: L0(strength / n),
        {"lenet_300_100": Rates(3e-3, 5e-2), "lenet_5_caffe": Rates(3e-3, 5e-2)},
        {"lenet_300_100": (0.03, 0.1, 0.3, 1.0), "lenet_5_caffe": (0.1, 0.3, 1.0)},
        cut=True,
    ),
    "variational dropout": Found(
        lambda strength, n: VariationalDropout(strength / n),
        {"lenet_300_100": Rates(3e-3, 3e-2), "lenet_5_caffe": Rates(3e-3, 3e-2)},
        {"lenet_300_100": (0.3, 1.0, 3.0), "lenet_5_caffe": (0.3, 1.0)},
    ),
    "soft threshold": Found(
        lambda strength, n: SoftThreshold(decay=strength),
        {"lenet_300_100": Rates(0.1, 1e-2, SGD), "lenet_5_caffe": Rates(3e-3, 1e-2)},
        {"lenet_300_100": (0.001, 0.01, 0.03, 0.1), "lenet_5_caffe": (0.03, 0.1, 0.3)},
    ),
}
MOVEMENT = {"lenet_300_100": Rates(0.05, 1.0, SGD), "lenet_5_caffe": Rates(3e-3, 3e-3)}
"""Strengths, optimizers and rates were chosen on the last 10,000 training images, after training on the others."""


def fit_wrapped(
    wrapped: Reparametrised, run: Run, optimizer: torch.optim.Optimizer, epochs: int, order: torch.Generator
) -> None:
    """Train with the penalty, learning rates falling in a straight line to zero."""
    images, labels = run.train
    size = run.protocol.batch_size
    steps = len(images) // size
    rates = [group["lr"] for group in optimizer.param_groups]
    wrapped.train()
    for epoch in range(epochs):
        shuffled = torch.randperm(len(images), generator=order)
        for step in range(steps):
            batch = shuffled[step * size : (step + 1) * size]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - (epoch * steps + step) / (epochs * steps))
            optimizer.zero_grad()
            loss = F.cross_entropy(wrapped(images[batch]), labels[batch]) + wrapped.penalty()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            wrapped.step()


def run_found(run: Run, name: str, strength: float) -> dict[str, Any]:
    """Train a new network under a parametrisation; cut out what it has closed, if it closes units."""
    model, _ = run.build(None)
    how, p = FOUND[name], run.protocol
    wrapped = Reparametrised(model, how.part(strength, len(run.data.train_labels)), seed=run.seed)
    optimizer = how.rates[run.net].optimizer(wrapped, model, p.momentum)
    fit_wrapped(wrapped, run, optimizer, p.dense_epochs, run.order("dense"))
    finished = wrapped.finish_()
    out = run.score(model) | {"strength": strength, "epochs": p.dense_epochs} | left(model, finished.masks)
    if how.cut and any(bool((~m).any()) for m in finished.masks.values()):
        dense = run.build(None)[0]
        small = copy.deepcopy(model)
        report = shrink_(small, finished.masks, run.data.train_images[:2])
        out |= {"cut": run.score(small)["accuracy"]} | physical(dense, small) | {"proof": report.proof.to_dict()}
    return out


def run_movement(run: Run, state: dict[str, Tensor], ratio: float) -> dict[str, Any]:
    """Prune the dense network by where training moves its weights, in the epochs of the other cells."""
    model, _ = run.build(state)
    p = run.protocol
    total = sum(q.numel() for q in model.parameters())
    prunable = sum(q.numel() for q in model.parameters() if q.dim() > 1)
    sparsity = 1 - (total / ratio - (total - prunable)) / prunable  # of every layer: the score knows no other scope
    steps = p.cell_epochs * (len(run.data.train_labels) // p.batch_size)
    wrapped = Reparametrised(model, Movement(sparsity, cubic_over(steps)), seed=run.seed)
    optimizer = MOVEMENT[run.net].optimizer(wrapped, model, p.momentum)
    fit_wrapped(wrapped, run, optimizer, p.cell_epochs, run.order("after"))
    finished = wrapped.finish_()
    return point(run, model, ratio, p.cell_epochs) | left(model, finished.masks)


def point(run: Run, model: nn.Module, ratio: float, epochs: int) -> dict[str, Any]:
    """Return one point of accuracy against compression: what a network scores at a ratio, after some epochs."""
    return run.score(model) | {"epochs": epochs, "ratio": ratio}


def left(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the masks keep, after checking that nothing else is there."""
    named = dict(model.named_parameters())
    for name, mask in masks.items():
        if bool(named[name][~mask].count_nonzero()):
            raise RuntimeError(f"{name}: a weight that should be gone is not")
    total = sum(q.numel() for q in named.values())
    gone = sum(int((~m).sum()) for m in masks.values())
    macs = count_macs(model, (torch.zeros(IMAGE),), masks=masks)
    return {
        "achieved_ratio": total / max(total - gone, 1),
        "live": {n: [int(m.flatten(1).any(d).sum()) for d in (1, 0)] for n, m in masks.items() if m.dim() > 1},
        "kept": {n: [int(m.sum()), m.numel()] for n, m in masks.items()},
        "macs_left": macs.density_weighted / macs.dense,
    }


__all__ = ["FOUND", "left", "point", "run_found", "run_movement"]
