"""Models fed by keyword are pruned as their twins that are fed by position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.method import Method
from secateur.patterns import Channel
from secateur.pruner import Pruner, prune_
from secateur.schedules import iterative
from secateur.scores import Coupled, Magnitude, Synflow
from secateur.structure import shrink_
from secateur.targets import Target
from secateur.training import RigL, SparseTraining

A = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
B = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
HALF = Target("macs", 0.5)


class Positional(nn.Module):
    """Two inputs of different widths, so that mixing them up cannot go unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 24), nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.left(a).relu() + self.right(b).relu())


class Keywords(Positional):
    def forward(self, *, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(a, b)


class Mixed(Positional):
    def forward(self, a: Tensor, *, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(a, b)


FORMS: dict[str, tuple[type[Positional], Any]] = {
    "keywords": (Keywords, {"b": B, "a": A}),
    "both": (Mixed, ((A,), {"b": B})),
}

COUPLED = Channel(coupled=True, align=4)


def shrunk(model: nn.Module, inputs: Any) -> None:
    shrink_(model, Method(target=HALF, pattern=Channel(), score=Coupled(Synflow())), inputs, align=4)


def masked_units(model: nn.Module, inputs: Any) -> None:
    prune_(
        model,
        Method(target=HALF, pattern=COUPLED, score=Synflow(), schedule=iterative(rounds=3)),
        example_inputs=inputs,
    )


def masked_weights(model: nn.Module, inputs: Any) -> None:
    prune_(model, Method(target=Target("sparsity", 0.7), score=Synflow()), example_inputs=inputs)


def masked_by_macs(model: nn.Module, inputs: Any) -> None:
    prune_(model, Method(target=HALF, score=Magnitude()), example_inputs=inputs)


def masked_filters(model: nn.Module, inputs: Any) -> None:
    prune_(model, Method(target=HALF, pattern=Channel(), score=Synflow()), example_inputs=inputs)


def step_by_step(model: nn.Module, inputs: Any) -> None:
    pruner = Pruner(model, Method(target=HALF, score=Synflow(), schedule=iterative(rounds=2)), example_inputs=inputs)
    pruner.prune()
    pruner.prune()


def sparse(model: nn.Module, inputs: Any) -> None:
    SparseTraining(model, Method(target=HALF, score=Synflow()), RigL(end=10, every=2), example_inputs=inputs).start()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "act", [shrunk, masked_units, masked_weights, masked_by_macs, masked_filters, step_by_step, sparse]
)
def test_keywords_prune_as_positions_do(act: Callable[[nn.Module, Any], None], form: str) -> None:
    build, inputs = FORMS[form]
    torch.manual_seed(0)
    want = Positional()
    dense = {name: value.clone() for name, value in want.state_dict().items()}
    got = build()
    got.load_state_dict(dense)
    act(want, (A, B))
    act(got, inputs)
    left = want.state_dict()
    assert any(v.shape != dense[n].shape or not torch.equal(v, dense[n]) for n, v in left.items()), "nothing went"
    for name, value in got.state_dict().items():
        assert torch.equal(value, left[name]), name
