"""How well each saliency ranks the weights of a small trained network, against what really happens without them.

Two answers count as the truth: the loss after a weight is set to zero, everything else as it was; and the loss after it
is set to zero and all other weights are trained to a minimum again. Both are computed weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.prunable import find_prunable
from secateur.scores import (
    Grasp,
    Karnin,
    Lamp,
    Magnitude,
    Movement,
    OptimalBrainDamage,
    OptimalBrainSurgeon,
    Random,
    Snip,
    Synflow,
    WeightGradient,
)
from secateur.stats import PathIntegral, collect
from secateur.types import Score, Source

HIDDEN = 6
DECAY = 1e-3
STEPS = 500


def problem(name: str) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Return inputs, labels and the loss of one data set, standardised, in float64."""
    bunch = load_breast_cancer() if name == "breast cancer" else load_diabetes()
    x, y = torch.tensor(bunch.data, dtype=torch.float64), torch.tensor(bunch.target, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0)
    if name == "breast cancer":
        return x, y.long(), F.cross_entropy
    return x, ((y - y.mean()) / y.std())[:, None], F.mse_loss


def network(inputs: int, outputs: int, seed: int) -> nn.Module:
    """Return a network with one hidden layer, smooth, so that second derivatives say something."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs)).double()


def settle(
    model: nn.Module, objective: Callable[[], Tensor], masks: Mapping[str, Tensor] | None = None, steps: int = 400
) -> float:
    """Train to a minimum, full batch; masked weights stay zero. Return the objective."""
    masks = masks or {}
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )
    named = dict(model.named_parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()  # type: ignore[no-untyped-call]
        for name, mask in masks.items():
            gradient = named[name].grad
            assert gradient is not None
            gradient.mul_(mask)
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(objective())


def scores_of(path: PathIntegral, seed: int) -> dict[str, Score]:
    """Return every saliency of single weights, by the name that the page prints."""
    surgeon = {"damping": DECAY, "relative": False}
    return {
        "random": Random(seed),
        "magnitude": Magnitude(),
        "lamp": Lamp(),
        "weight gradient": WeightGradient("absolute"),
        "snip": Snip(),
        "grasp": Grasp(temperature=1.0),
        "synflow": Synflow(),
        "karnin": Karnin(path),
        "movement": Movement(path),
        "optimal brain damage, fisher": OptimalBrainDamage(),
        "optimal brain damage, gauss_newton": OptimalBrainDamage("gauss_newton"),
        "optimal brain damage, hutchinson": OptimalBrainDamage("hutchinson", samples=64),
        "optimal brain surgeon, blocks of 16": OptimalBrainSurgeon("single", block=16, **surgeon),
        "optimal brain surgeon, single": OptimalBrainSurgeon("single", block=0, **surgeon),
        "optimal brain surgeon, greedy": OptimalBrainSurgeon("greedy", block=0, **surgeon),
    }


def ranks(name: str, seed: int) -> dict[str, Any]:
    """Return the rank correlation of every score with both truths on one data set.

    The network is trained with Adam on the whole set, watched, and then brought to a minimum, where the saliencies
    assume that it is.

    Args:
        name: The data set.
        seed: Seed of the network.
    """
    x, y, loss = problem(name)
    model = network(x.shape[1], int(y.max()) + 1 if name == "breast cancer" else 1, seed)

    def objective() -> Tensor:
        decay = sum((p.square().sum() for p in model.parameters()), torch.zeros((), dtype=torch.float64))
        return loss(model(x), y) + 0.5 * DECAY * decay

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    path = PathIntegral(model, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        objective().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    path.detach()
    dense = settle(model, objective)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n in find_prunable(model).weights}
    alone, again = truths(model, objective, weights)
    parameters = {n: p for n, p in model.named_parameters() if n in weights}
    source = Source(model, parameters, lambda m, batch: loss(m(batch[0]), batch[1]), lambda: [(x, y)], (x[:1],))
    rows = {}
    for title, score in scores_of(path, seed).items():
        values = score(weights, collect(score.needs, source))
        flat = torch.cat([values[n].flatten().double() for n in weights])
        rows[title] = {"alone": spearman(flat, alone - dense), "again": spearman(flat, again - dense)}
    return {"accuracy": None, "data": name, "objective": dense, "weights": len(alone), "correlation": rows}


def truths(model: nn.Module, objective: Callable[[], Tensor], weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the objective without each weight: as it is then, and at the nearest minimum."""
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    alone, again = [], []
    for name, weight in weights.items():
        for index in range(weight.numel()):
            mask = torch.ones_like(weight)
            mask.view(-1)[index] = 0
            with torch.no_grad():
                dict(model.named_parameters())[name].mul_(mask)
                alone.append(float(objective()))
            again.append(settle(model, objective, {name: mask}, steps=60))
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(trained[n])
    return torch.tensor(alone, dtype=torch.float64), torch.tensor(again, dtype=torch.float64)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; tied values share their mean rank."""
    ra, rb = (_ranked(v) for v in (a, b))
    return float(torch.corrcoef(torch.stack([ra, rb]))[0, 1])


def _ranked(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]
