"""Scores of whole units against numbers that come from somewhere else: gates, loops, a search, closed forms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.trace import trace
from secateur.scores import Coupled, GeometricMedian, Magnitude, NormScale, Taylor
from secateur.stats.quadratic import eliminate, group_losses
from secateur.structure.scoring import unit_scores
from secateur.types import GroupScore, GroupView, MemberView


class Normed(nn.Module):
    """Units made by a convolution, normed and read by another; a gate on everything that makes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.read, self.head = nn.Conv2d(5, 4, 3, padding=1), nn.Linear(4, 3)
        nn.init.uniform_(self.norm.weight, -1.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.5, 0.5)
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        made = self.make(x)
        if gate is not None:  # on every parameter that makes a unit: filter, bias, scale and shift
            plain, norm = gate[:, None, None], self.norm
            x_hat = (made * plain - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[
                :, None, None
            ]
            normed = (x_hat * norm.weight[:, None, None] + norm.bias[:, None, None]) * plain
        else:
            normed = self.norm(made)
        return self.head(torch.relu(self.read(torch.relu(normed))).mean((2, 3)))


BATCHES = [
    (
        torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        torch.randint(3, (4,), generator=torch.Generator().manual_seed(seed)),
    )
    for seed in range(3)
]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def scores_of(model: nn.Module, score: GroupScore) -> Tensor:
    coupling = Coupling(trace(model, [Example((BATCHES[0][0],), {})]))
    group = next(g for g in coupling.groups if any(m.name == "make.weight" for m in g.members))
    scores, _ = unit_scores(model, coupling, score, loss_fn=loss_fn, batches=BATCHES)
    return torch.from_numpy(scores[group.ids])


def derivatives(model: Normed) -> Tensor:
    """The loss by a gate on each unit, central differences, (batches, units)."""
    out = torch.zeros(len(BATCHES), 5, dtype=torch.float64)
    with torch.no_grad():
        for (b, (x, y)), u in itertools.product(enumerate(BATCHES), range(5)):
            ends = []
            for at in (1 + 1e-5, 1 - 1e-5):
                gate = torch.ones(5, dtype=torch.float64)
                gate[u] = at
                ends.append(float(nn.functional.cross_entropy(model(x, gate), y)))
            out[b, u] = (ends[0] - ends[1]) / 2e-5
    return out


@pytest.mark.parametrize("form", ["square", "absolute", "signed"])
def test_taylor_is_the_numeric_derivative_by_a_gate_on_all_that_makes_a_unit(form: Any) -> None:
    model = Normed().double().eval()
    by_gate = derivatives(model)
    wanted = {
        "square": by_gate.square().mean(0),
        "absolute": by_gate.abs().mean(0),
        "signed": by_gate.mean(0).abs(),
    }[form]
    torch.testing.assert_close(scores_of(model, Taylor(form)), wanted, rtol=1e-6, atol=1e-12)


def view(rows: Tensor) -> GroupView:
    return GroupView("conv", len(rows), (MemberView("conv.weight", "out", rows),))


def test_geometric_median_by_loops() -> None:
    model = Normed().double().eval()
    rows = torch.cat([model.make.weight.detach().flatten(1)], 1)
    wanted = [
        sum(float(sum((a - b) ** 2 for a, b in zip(rows[u], rows[v], strict=True))) ** 0.5 for v in range(5))
        for u in range(5)
    ]
    torch.testing.assert_close(scores_of(model, GeometricMedian()), torch.tensor(wanted, dtype=torch.float64))


def test_the_filter_that_goes_first_is_the_nearest_to_the_geometric_median() -> None:
    """Weiszfeld's iteration finds the median itself; the crowd's own middle filter is the closest to it."""
    generator = torch.Generator().manual_seed(3)
    crowd = torch.randn(12, 6, generator=generator, dtype=torch.float64) + 2.0
    rows = torch.cat([crowd, crowd.mean(0, keepdim=True), 9 * torch.eye(6, dtype=torch.float64)[:2]])
    median = rows.mean(0)
    for _ in range(500):
        weights = 1 / (rows - median).norm(dim=1).clamp_min(1e-12)
        median = (weights[:, None] * rows).sum(0) / weights.sum()
    got = GeometricMedian().units(view(rows), {})
    assert got is not None
    assert int(got.argmin()) == int((rows - median).norm(dim=1).argmin()) == 12
    assert int(got.argmax()) in (13, 14)


def test_signs_count_in_distances() -> None:
    """Distances of absolute values are another order: the published mistake."""
    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.1, 1.0], [3.0, 0.0]], dtype=torch.float64)
    raw, folded = (GeometricMedian().units(view(r), {}) for r in (rows, rows.abs()))
    assert raw is not None
    assert folded is not None
    assert raw.argsort().tolist() == [2, 0, 3, 1]
    assert folded.argsort().tolist() == [0, 1, 2, 3]  # the second falls upon the first
    root = 2**0.5
    d = {(0, 1): 2 * root, (0, 2): 0.1, (0, 3): 5**0.5, (1, 2): (2.1**2 + 4) ** 0.5, (1, 3): 17**0.5}
    d[2, 3] = (1.9**2 + 1) ** 0.5
    sums = [sum(v for pair, v in d.items() if u in pair) for u in range(4)]
    torch.testing.assert_close(raw, torch.tensor(sums, dtype=torch.float64))


def test_scale_of_a_norm_is_its_size() -> None:
    model = Normed().double().eval()
    torch.testing.assert_close(scores_of(model, NormScale()), model.norm.weight.detach().abs())


@pytest.mark.parametrize("normalise", ["none", "mean", "max", "l2"])
@pytest.mark.parametrize("reduce_by", ["sum", "mean", "max", "l2"])
def test_coupled_magnitudes_by_python_numbers(reduce_by: Any, normalise: Any) -> None:
    """Everything that the unit owns, makers, norm and readers, in lists of floats."""
    model = Normed().double().eval()
    owned = []
    for u in range(5):
        tensors = (model.make.weight[u], model.make.bias[u], model.norm.weight[u], model.norm.bias[u])
        owned.append([abs(v) for t in (*tensors, model.read.weight[:, u]) for v in t.detach().flatten().tolist()])
    values = [
        {
            "sum": sum(own),
            "mean": sum(own) / len(own),
            "max": max(own),
            "l2": (sum(v * v for v in own) / len(own)) ** 0.5,
        }[reduce_by]
        for own in owned
    ]
    scale = {
        "none": 1.0,
        "mean": sum(values) / 5,
        "max": max(values),
        "l2": sum(v * v for v in values) ** 0.5,
    }[normalise]
    got = scores_of(model, Coupled(Magnitude(), reduce_by, normalise=normalise))
    assert got.tolist() == pytest.approx([v / scale for v in values], rel=1e-12)


@pytest.mark.parametrize("correlation", [0.5, 0.9, 0.999])
def test_each_of_two_like_features_looks_free_and_the_pair_is_not(correlation: float) -> None:
    """Two weights of one on features with H = [[1, r], [r, 1]]: alone (1 - r^2) / 2, together 1 + r."""
    hessian = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    inverse, ones = torch.linalg.inv(hessian)[None], torch.ones(1, 2, dtype=torch.float64)
    single, pair = (group_losses(inverse, ones, size)[0] for size in (1, 2))
    assert single.tolist() == pytest.approx([(1 - correlation**2) / 2] * 2, rel=1e-9)
    assert pair.tolist() == pytest.approx([1 + correlation], rel=1e-9)
    steps = eliminate(inverse, ones)
    assert float(steps.losses.sum()) == pytest.approx(1 + correlation, rel=1e-9)
    assert float(steps.losses[0, 1]) == pytest.approx(
        (1 + correlation) ** 2 / 2, rel=1e-9
    )  # one weight does both's work
