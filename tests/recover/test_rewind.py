"""Rewinding in one's own loop: the checkpoint times the mask, and with nothing pruned the same training again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from secateur import Method, Pruner, Target
from secateur.allocate import PerRound
from secateur.checkpoint import load_tree, save_tree
from secateur.errors import CheckpointError, TargetError, WeightError
from secateur.recover import Rewind
from secateur.schedules import iterative

STEPS, POINT = 9, 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 3))


def train(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, steps: range, rewind: Rewind | None) -> None:
    """Noise of dropout comes from the global generator; data from the step alone."""
    model.train()
    for step in steps:
        if rewind is not None and step == POINT:
            rewind.save(step=step)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda m: Adam(m.parameters(), 0.01, amsgrad=True),
}
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "cosine": lambda o: CosineAnnealingLR(o, STEPS),
    "steps": lambda o: MultiStepLR(o, [3, 6, 6]),
    "one cycle": lambda o: OneCycleLR(o, 0.1, total_steps=STEPS + 1),
}


def trained(optimizer: str = "sgd", scheduler: str = "cosine") -> tuple[nn.Module, Optimizer, LRScheduler, Rewind]:
    model = net()
    inner = OPTIMIZERS[optimizer](model)
    schedule = SCHEDULERS[scheduler](inner)
    rewind = Rewind(model, inner, scheduler=schedule)
    train(model, inner, schedule, range(STEPS), rewind)
    return model, inner, schedule, rewind


def everything(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> list[Any]:
    state = optimizer.state_dict()
    moments = [state["state"][i][k] for i in sorted(state["state"]) for k in sorted(state["state"][i])]
    return [*copy.deepcopy(list(model.state_dict().values())), *copy.deepcopy(moments), scheduler.get_last_lr()]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_with_nothing_pruned_the_training_repeats_itself(
    optimizer: str, scheduler: str, through_a_file: bool, tmp_path: Path
) -> None:
    model, inner, schedule, rewind = trained(optimizer, scheduler)
    expected = everything(model, inner, schedule)
    if through_a_file:
        save_tree(tmp_path / "point.safetensors", rewind.state_dict())
        rewind = Rewind(model, inner, scheduler=schedule)
        rewind.load_state_dict(load_tree(tmp_path / "point.safetensors"))
    ones = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for masks in (None, ones):  # twice: the kept point itself must not train along
        first = rewind.rewind_(masks)
        assert first == rewind.step == POINT
        assert not same(everything(model, inner, schedule), expected)
        train(model, inner, schedule, range(first, STEPS), None)
        assert same(everything(model, inner, schedule), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rewound_is_the_point_times_the_mask(optimizer: str) -> None:
    reference = net()
    inner = OPTIMIZERS[optimizer](reference)
    train(reference, inner, SCHEDULERS["cosine"](inner), range(POINT), None)
    model, ours, _, rewind = trained(optimizer)
    parameters = list(model.parameters())
    pruner = Pruner(model, Target("sparsity", 0.7), optimizer=ours)
    pruner.prune()
    rewind.rewind_(pruner.masks)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for name, value in model.state_dict().items():
        expected = reference.state_dict()[name]
        assert torch.equal(value, expected * pruner.masks[name] if name in pruner.masks else expected), name
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        for key, value in ours.state[p].items():
            expected = inner.state[q][key]
            if name in pruner.masks and value.shape == p.shape:
                expected = expected * pruner.masks[name]
            assert torch.equal(value, expected), (name, key)
    train(model, ours, SCHEDULERS["cosine"](ours), range(POINT, STEPS), None)
    assert all(int(model.get_parameter(n)[~m].count_nonzero()) == 0 for n, m in pruner.masks.items())


def test_the_learning_rate_alone_goes_back() -> None:
    model, inner, schedule, rewind = trained()
    weights = everything(model, inner, schedule)[:-1]
    assert schedule.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)
    assert rewind.rewind_learning_rate_() == POINT
    reference = SCHEDULERS["cosine"](OPTIMIZERS["sgd"](net()))
    for _ in range(POINT):
        reference.optimizer.step()
        reference.step()
    assert schedule.get_last_lr() == reference.get_last_lr()
    assert inner.param_groups[0]["lr"] == reference.optimizer.param_groups[0]["lr"]
    assert same(everything(model, inner, schedule)[:-1], weights)


def test_what_cannot_be_rewound_is_refused() -> None:
    model, inner, schedule, rewind = trained()
    before = everything(model, inner, schedule)
    fresh = Rewind(model, inner)
    for use in (fresh.rewind_, fresh.rewind_learning_rate_, fresh.state_dict, lambda: fresh.step):
        with pytest.raises(CheckpointError, match=r"call save\(\)"):
            use()
    with pytest.raises(WeightError, match="no parameter '7"):
        rewind.rewind_({"7.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(WeightError, match="mask of shape"):
        rewind.rewind_({"0.weight": torch.ones(1, dtype=torch.bool)})
    state = rewind.state_dict()
    for change, words in (
        ({"version": 2}, "has version 2"),
        ({"model": {"0.weight": torch.ones(1)}}, "another model"),
        ({"optimizer": None}, "without the optimizer"),
    ):
        with pytest.raises(CheckpointError, match=words):
            rewind.load_state_dict(state | change)
    with pytest.raises(CheckpointError, match="lacks"):
        rewind.load_state_dict({})
    for change, words in (
        ({"step": "x"}, "step must be a whole number of at least 0, got 'x'"),
        ({"model": dict.fromkeys(state["model"], 1)}, "another model"),
        ({"optimizer": {"state": {}}}, "holds no optimizer's state: KeyError"),
        ({"rng": {"torch": torch.zeros(3)}}, "not a state of the random generators"),
    ):

        def take(change: dict[str, Any] = change) -> None:
            rewind.load_state_dict(state | change)
            rewind.rewind_()  # a generator's state shows when it is set

        with pytest.raises(CheckpointError, match=words):
            take()
    for masks in ([1], {"0.weight": None}, {"0.weight": [True]}):
        with pytest.raises(WeightError, match="expected"):
            rewind.rewind_(masks)  # type: ignore[arg-type]
    assert same(everything(model, inner, schedule), before)


@pytest.mark.parametrize("what", ["cut", "gone", "new", "another optimizer"])
def test_a_model_that_has_changed_since_is_not_half_rewound(what: str) -> None:
    model, inner, _, rewind = trained()
    if what == "cut":
        model[4].weight = nn.Parameter(torch.zeros(3, 8))
    elif what == "gone":
        model[4] = nn.Identity()
    elif what == "new":
        model.register_buffer("more", torch.zeros(2))
    else:
        inner.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    before = copy.deepcopy(model.state_dict())
    words = r"held \[6\] parameters, and hold \[6, 1\]" if what == "another optimizer" else "is of another model"
    with pytest.raises(CheckpointError, match=words):
        rewind.rewind_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if what == "another optimizer":
        rate = inner.param_groups[0]["lr"]
        with pytest.raises(CheckpointError, match=words):
            rewind.rewind_learning_rate_()
        assert inner.param_groups[0]["lr"] == rate


@pytest.mark.parametrize(
    "make",
    [lambda: Rewind(3), lambda: Rewind(net(), 3), lambda: Rewind(net(), scheduler=3)],
    ids=["model", "optimizer", "schedule"],
)
def test_what_is_no_training(make: Callable[[], Rewind]) -> None:
    with pytest.raises(WeightError, match=r"expected a .*, got int"):
        make()
    with pytest.raises(CheckpointError, match="whole number of at least 0, got -3"):
        Rewind(net()).save(step=-3)


def test_the_founding_rates_layer_by_layer() -> None:
    """LeNet-300-100: 20 % per round and 10 % in the output layer, as (1 - p) to the number of rounds."""
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    rounds, allocate = 15, PerRound(rate=0.2, slower=("4",))
    sparsity = allocate.sparsity(sizes, rounds)
    left = (784 * 300 + 300 * 100) * 0.8**rounds + 1000 * 0.9**rounds
    assert sparsity == pytest.approx(1 - left / sum(sizes.values()), abs=1e-12)
    method = Method(target=Target("sparsity", sparsity), allocate=allocate, schedule=iterative(rounds=rounds))
    pruner = Pruner(model, method)
    for done in range(1, rounds + 1):
        report = pruner.prune()
        for row in report.layers:
            expected = row.total * (0.9 if row.name == "4.weight" else 0.8) ** done
            assert abs(row.kept - expected) <= 1 + 0.004 * expected, (done, row)
    for row in report.layers:
        assert abs(row.kept - row.total * (0.9 if row.name == "4.weight" else 0.8) ** rounds) <= 1


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 1.0}, {"factor": 0.0}, {"factor": 1.0}, {"slower": "fc3"}])
def test_rates_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="per_round"):
        PerRound(**options)


def test_a_slower_layer_that_is_not_there() -> None:
    method = Method(target=Target("sparsity", 0.5), allocate=PerRound(slower=("fc3",)))
    with pytest.raises(WeightError, match="'fc3' matches none of the layers"):
        Pruner(net(), method).prune()


def test_random_generators_are_left_alone_where_nobody_asked_for_them(tmp_path: Path) -> None:
    model = net()
    with_them = Rewind(model)
    with_them.save()
    save_tree(tmp_path / "point", with_them.state_dict())
    without = Rewind(model, rng=False)
    without.load_state_dict(load_tree(tmp_path / "point"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    without.rewind_()
    assert torch.equal(torch.get_rng_state(), before)

    without.save()
    with pytest.raises(CheckpointError, match="without the random generators: say rng=False"):
        Rewind(model).load_state_dict(without.state_dict())


@pytest.mark.parametrize("state", [None, 3, {"model": None}])
def test_what_is_no_point_at_all(state: Any) -> None:
    with pytest.raises(CheckpointError, match="expected the state of a Rewind"):
        Rewind(net()).load_state_dict(state)
