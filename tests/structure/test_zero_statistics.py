"""Statistics that are zero for every unit rank nothing, and are refused; one dead unit or layer is like any other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError
from secateur.method import Method
from secateur.patterns import Channel, Layer
from secateur.pruner import Pruner, prune_
from secateur.scores import (
    ActivationStatistic,
    ActivationTaylor,
    BlockInfluence,
    Coupled,
    Sensitivity,
    Snip,
    Taylor,
    WeightGradient,
    skeletonization,
)
from secateur.structure import make_plan
from secateur.targets import Target
from secateur.types import GroupScore

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
HALF = Target("macs", 0.5)


class Net(nn.Module):
    """Zero in, zero out, but for the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.side, self.head = nn.Linear(8, 16, bias=False), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.second(self.first(x).relu()), self.side(x)], 1).relu())


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


BY_LOSS: list[GroupScore] = [
    skeletonization(),
    *(ActivationTaylor(form) for form in ("absolute", "square", "signed", "descent")),
    *(Taylor(form) for form in ("square", "absolute", "signed")),
    Coupled(WeightGradient()),
    Coupled(WeightGradient("signed")),
    Coupled(Snip()),
]
BY_ACTIVITY: list[GroupScore] = [
    *(ActivationStatistic(statistic) for statistic in ("absolute", "rms", "deviation", "nonzero")),
    *(Sensitivity(centred=centred, per_mac=per_mac) for centred in (True, False) for per_mac in (True, False)),
]


def nothing_in(model: nn.Module) -> Tensor:
    return torch.zeros_like(X)


def dead(model: nn.Module) -> Tensor:
    with torch.no_grad():
        for layer in (model.first, model.second, model.side):
            layer.weight.zero_()
    return X


def silent_head(model: nn.Module) -> Tensor:
    nn.init.zeros_(model.head.weight)
    return X


ZEROS: dict[str, tuple[list[GroupScore], Callable[[nn.Module], Tensor]]] = {
    "batches of zeros": (BY_LOSS + BY_ACTIVITY, nothing_in),
    "a dead network": (BY_LOSS + BY_ACTIVITY, dead),
    # All activity and all gradients stop at the head; its own columns still have a gradient.
    "nothing goes out": ([s for s in BY_LOSS if not isinstance(s, Coupled)] + BY_ACTIVITY[4:], silent_head),
}
CASES = [pytest.param(s, z, id=f"{name}-{s}") for name, (scores, z) in ZEROS.items() for s in scores]


def given(score: GroupScore, batch: Tensor) -> dict[str, Any]:
    return {"batches": [batch]} | ({"loss_fn": loss_fn} if score in BY_LOSS else {})


@pytest.mark.parametrize(("score", "zero"), CASES)
def test_zero_for_every_unit_is_refused(score: GroupScore, zero: Callable[[nn.Module], Tensor]) -> None:
    model = Net()
    data = given(score, zero(model))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(MissingStatsError, match=r"is zero for every (unit|weight), which ranks nothing: "):
        make_plan(model, Method(target=HALF, pattern=Channel(), score=score), X, align=4, **data)
    pruner = Pruner(
        model, Method(target=HALF, pattern=Channel(coupled=True, align=4), score=score), example_inputs=X, **data
    )
    with pytest.raises(MissingStatsError, match="which ranks nothing"):
        pruner.prune()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert pruner.masks == {}
    assert pruner.updates == 0


def test_element_scores_say_the_same() -> None:
    model = Net()
    with pytest.raises(MissingStatsError, match=r"is zero for every weight, which ranks nothing: "):
        prune_(
            model,
            Method(target=Target("sparsity", 0.5), score=WeightGradient(), exclude=("head.weight",)),
            loss_fn=loss_fn,
            batches=[torch.zeros_like(X)],
        )


@pytest.mark.parametrize("score", BY_LOSS + BY_ACTIVITY, ids=str)
def test_dead_units_and_a_dead_layer_are_ranked(score: GroupScore) -> None:
    """Half of the first layer's units are dead: exactly those go. With all of them dead, other layers still count."""
    for gone in (8, 16):
        model = Net()
        model.second.bias = nn.Parameter(torch.full((16,), 0.5))
        with torch.no_grad():
            model.first.weight[:gone] = 0
            model.second.weight[:, :gone] = 0
        method = Method(target=Target("channels", 5 / 6), pattern=Channel(), score=score, include=("first.weight",))
        report = make_plan(model, method, X, align=4, **given(score, X))
        kept = report.plan.kept["first.weight"][0]
        assert len(kept) == 8
        if gone == 8 and getattr(score, "form", "") != "descent":  # where a sign is kept, worse than dead goes first
            assert kept.tolist() == list(range(8, 16))


class Stack(nn.Module):
    """Blocks that add a layer's output to their stream."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.line(x)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(self.Block() for _ in range(4)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


@pytest.mark.parametrize("score", [Taylor(), Taylor("signed"), BlockInfluence()], ids=str)
def test_whole_blocks_too(score: GroupScore) -> None:
    model = Stack()
    method = Method(target=Target("channels", 0.75), pattern=Layer(), score=score)
    batches = [torch.eye(8)]
    with torch.no_grad():
        for block in model.blocks[:3]:
            block.line.weight.zero_()
            block.line.bias.zero_()
    report = make_plan(model, method, X, batches=batches, loss_fn=loss_fn)
    assert [drop.places for drop in report.plan.drops] == [(0,)]  # three blocks do nothing, the first of them goes
    with torch.no_grad():
        model.blocks[3].line.weight.zero_()
        model.blocks[3].line.bias.zero_()
    with pytest.raises(MissingStatsError, match="is zero for every unit, which ranks nothing"):
        make_plan(model, method, X, batches=batches, loss_fn=loss_fn)
