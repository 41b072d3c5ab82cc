"""Counts of a pruned model against a plain walk over every operator, and tensors known while they live."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.trace import trace
from secateur.graph.weak import ByTensor


class Heads(nn.Module):
    """Attention over split heads, a concatenation, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, 24) for _ in range(3))
        self.out, self.twice = nn.Linear(24, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (4, 6)).transpose(1, 2) for m in (self.query, self.key, self.value))
        mixed = (torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(2)
        y = torch.relu(self.twice(self.out(mixed)))
        return self.twice(torch.cat([y[..., :6], y[..., 6:]], -1)).sum(-1)


def test_totals_are_what_a_walk_over_all_operators_counts() -> None:
    torch.manual_seed(0)
    coupling = Coupling(trace(Heads(), [Example((torch.randn(2, 5, 12),), {})]))
    assert coupling.units
    rng = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.7, 1.0):
        alive = coupling.alive(rng.random(coupling.units) < share)
        macs = sum(
            math.prod(coupling.size(axes, dim, alive) for axes, dim in factors)
            for op in coupling.trace.ops
            for factors in op.macs
        )
        parameters = sum(
            math.prod(coupling.shape(leaf.axes, alive)) for leaf in coupling.trace.leaves if leaf.kind == "parameter"
        )
        assert coupling.macs(alive) == macs
        assert coupling.parameters(alive) == parameters


def test_a_dense_model_costs_what_its_layers_cost() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(16 * 36, 5))
    coupling = Coupling(trace(model, [Example((torch.randn(2, 3, 8, 8),), {})]))
    everything = coupling.alive(np.zeros(coupling.units, dtype=bool))
    assert coupling.macs(everything) == 2 * (36 * 27 * 8 + 36 * 8 * 16 + 16 * 36 * 5)
    assert coupling.parameters(everything) == sum(p.numel() for p in model.parameters())


def test_tensors_are_known_by_identity_while_they_live() -> None:
    known = ByTensor[str]()
    a, b = torch.zeros(2), torch.zeros(2)
    known[a], known[b] = "a", "b"
    known[a] = "again"
    assert (known.get(a), known.get(b), len(known)) == ("again", "b", 2)
    assert a in known
    assert torch.zeros(2) not in known
    holder = nn.Parameter(a)
    del a
    assert len(known) == 1
    assert known.get(holder) is None
