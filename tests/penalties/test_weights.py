"""Decay, lasso and weight elimination beside answers that are known: closed forms, limits, a scripted error."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError, MissingStatsError, RecipeError, WeightError
from secateur.penalties import L1, Penalised, WeightDecay, WeightElimination

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


class Quadratic(nn.Module):
    """The loss (w - m)' H (w - m) / 2 of one weight, with its minimum and its Hessian."""

    def __init__(self, hessian: Tensor, minimum: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, len(minimum), dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.hessian, self.minimum = hessian, minimum

    def forward(self) -> Tensor:
        apart = self.weight[0] - self.minimum
        return apart @ self.hessian @ apart / 2 + (self.bias - 1).square().sum()


def quadratic(n: int = 5, *, orthogonal: bool = False) -> Quadratic:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.linspace(0.5, 3.0, n, dtype=torch.float64)
    hessian = torch.diag(eigenvalues) if orthogonal else basis @ torch.diag(eigenvalues) @ basis.T
    return Quadratic(hessian, torch.tensor([2.0, -1.0, 0.2, -0.1, 0.6], dtype=torch.float64)[:n])


def descend(model: nn.Module, optimizer: Optimizer, steps: int, penalised: Penalised | None = None) -> None:
    for step in range(steps):
        for group in optimizer.param_groups:  # Adam's steps are of one length until the rate falls
            group["lr"] = group.setdefault("first", group["lr"]) * (1 if step < steps / 2 else 2 - 2 * step / steps)
        optimizer.zero_grad()
        loss = model()
        if penalised is not None:
            penalised.observe(float(loss.detach()))
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("proximal", [False, True])
def test_decay_ends_at_the_ridge_solution(name: str, proximal: bool) -> None:
    model = quadratic()
    strength = 0.7
    optimizer = OPTIMIZERS[name](model.parameters())
    penalised = Penalised(model, WeightDecay(strength, proximal_step=proximal), optimizer=optimizer)
    assert penalised.parameters == ("weight",)
    descend(model, optimizer, 1500)
    eye = torch.eye(5, dtype=torch.float64)
    want = torch.linalg.solve(model.hessian + strength * eye, model.hessian @ model.minimum)
    torch.testing.assert_close(model.weight.detach()[0], want, rtol=0, atol=2e-3)
    assert float(model.bias.detach()) == pytest.approx(1.0, abs=1e-3), "a bias is not pressed on"


def test_decay_is_the_optimizers_own_coupled_decay() -> None:
    one, two = quadratic(), quadratic()
    ours = torch.optim.Adam(one.parameters(), lr=0.05)
    Penalised(one, WeightDecay(0.3, include=("*",)), optimizer=ours)
    theirs = torch.optim.Adam(two.parameters(), lr=0.05, weight_decay=0.3)
    for optimizer, model in ((ours, one), (theirs, two)):
        for _ in range(50):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    torch.testing.assert_close(one.weight, two.weight)
    torch.testing.assert_close(one.bias, two.bias)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lasso_on_an_orthogonal_design_is_the_soft_threshold(name: str) -> None:
    """Each weight alone: argmin h (w - m)^2 / 2 + s |w| = soft(m, s / h), by a search over a fine grid."""
    model, strength = quadratic(orthogonal=True), 0.4
    optimizer = OPTIMIZERS[name](model.parameters())
    Penalised(model, L1(strength, proximal_step=True), optimizer=optimizer)
    descend(model, optimizer, 1500)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    for w, h, m in zip(model.weight.detach()[0], model.hessian.diagonal(), model.minimum, strict=True):
        want = float(grid[(h * (grid - m).square() / 2 + strength * grid.abs()).argmin()])
        assert float(w) == pytest.approx(want, abs=3e-3)
        assert (float(w) == 0.0) == (abs(want) < 1e-9), "exact zeros, where the minimum has them"


def test_lasso_on_any_design_meets_the_conditions_of_a_minimum() -> None:
    model, strength = quadratic(), 0.4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Penalised(model, L1(strength, proximal_step=True), optimizer=optimizer)
    descend(model, optimizer, 3000)
    w = model.weight.detach()[0]
    slope = model.hessian @ (w - model.minimum)
    assert 0 < int((w == 0).sum()) < len(w)
    assert (slope[w == 0].abs() <= strength).all()
    torch.testing.assert_close(slope[w != 0], -strength * w[w != 0].sign(), rtol=0, atol=1e-6)


# Weight elimination


def test_elimination_is_decay_for_a_large_scale_and_a_count_for_a_small_one() -> None:
    w = {"w": torch.tensor([0.3, -2.0, 0.0, 7.0], dtype=torch.float64)}
    large = 1e6 * 1e6 * float(WeightElimination(1.0, scale=1e6).value(w, {}))
    assert large == pytest.approx(float(w["w"].square().sum()), rel=1e-9)
    assert float(WeightElimination(1.0, scale=1e-6).value(w, {})) == pytest.approx(3.0, abs=1e-9)
    slope = WeightElimination(1.0, scale=1e6).gradient(w, {})["w"] * 1e12
    torch.testing.assert_close(slope, 2 * w["w"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_elimination_presses_hardest_at_the_scale_over_the_root_of_three(scale: float) -> None:
    w = torch.linspace(0, 5 * scale, 500_001, dtype=torch.float64)
    slope = WeightElimination(0.5, scale=scale).gradient({"w": w}, {})["w"]
    assert float(w[slope.argmax()]) == pytest.approx(scale / math.sqrt(3), abs=2e-5 * scale)
    values = 0.5 * (w / scale).square() / (1 + (w / scale).square())
    numeric = (values[2:] - values[:-2]) / (w[2:] - w[:-2])
    torch.testing.assert_close(slope[1:-1], numeric, rtol=1e-6, atol=1e-8)


def test_elimination_drives_out_small_weights_and_spares_large_ones() -> None:
    model = quadratic(orthogonal=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    descend(model, optimizer, 500)
    Penalised(model, WeightElimination(0.3, scale=0.3), optimizer=optimizer)
    descend(model, optimizer, 3000)
    left = (model.weight.detach()[0] / model.minimum).abs()
    assert left[0] > 0.98  # 2.0
    assert left[2] < 0.35  # 0.2
    assert left[3] < 0.35  # -0.1


def test_the_strength_follows_a_scripted_error() -> None:
    """Every case of the rule by hand: D = 0.1, delta = 0.5, cut 0.8, memory 0.5."""
    penalty = WeightElimination(delta=0.5, cut=0.8, memory=0.5, wanted=0.1)
    weights = {"w": torch.ones(2)}
    state = penalty.start(weights)
    seen = []
    # Averages: 4, 3, 3, 3.5, 1.79, 0.94, 1.57, 0.885, 0.5225, 0.76125, 4.880625
    script = [4.0, 2.0, 3.0, 4.0, 0.08, 0.09, 2.2, 0.2, 0.16, 1.0, 9.0]
    for step, error in enumerate(script):
        state = penalty.advance(weights, state, step, error)
        seen.append(round(float(state["strength"]), 12))
    want = [
        0.0,  # only starts
        0.5,  # falls
        0.4,  # 3 is not below the average of 3: cut
        0.32,  # above: cut
        0.82,  # falls
        1.32,  # has risen, but is below the wanted error
        1.056,  # 2.2 is above its average: cut
        1.556,  # falls
        2.056,  # falls
        1.6448,  # 1.0 above its average: cut
        1.31584,
    ]
    assert seen == pytest.approx(want)


def test_the_strength_falls_by_delta_when_the_error_is_high_for_once() -> None:
    penalty, weights = WeightElimination(delta=0.5, memory=0.9), {"w": torch.ones(2)}
    state = penalty.start(weights)
    levels = []
    for step, error in enumerate([10.0, 1.0, 1.5, 1.6, 1.7, 1.8]):
        state = penalty.advance(weights, state, step, error)
        levels.append(float(state["strength"]))
    assert levels == [0.0, 0.5, 0.0, 0.0, 0.0, 0.0]  # the average is 8 and more; never below zero


def test_the_error_is_the_mean_over_a_stretch() -> None:
    stretched, plain = (WeightElimination(delta=0.5, every=n) for n in (3, 1))
    weights, losses = {"w": torch.ones(1)}, torch.rand(30, generator=torch.Generator().manual_seed(3)).tolist()
    one, two = stretched.start(weights), plain.start(weights)
    for step, loss in enumerate(losses):
        one = stretched.advance(weights, one, step, loss)
    for step in range(10):
        two = plain.advance(weights, two, step, sum(losses[3 * step : 3 * step + 3]) / 3)
    assert float(one["strength"]) == pytest.approx(float(two["strength"]))
    assert float(one["average"]) == pytest.approx(float(two["average"]))


def test_a_step_without_a_loss_is_refused_before_anything_moves() -> None:
    model = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalised = Penalised(model, WeightElimination(), optimizer=optimizer)
    before = copy.deepcopy(model.state_dict())
    model().backward()
    for told, words in ((None, "nobody told it"), (math.nan, "is nan"), (math.inf, "is inf")):
        if told is not None:
            penalised.observe(told)
        with pytest.raises(MissingStatsError, match=words):
            optimizer.step()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    penalised.observe(1.0)
    optimizer.step()
    assert not torch.equal(model.weight, before["weight"])
    with pytest.raises(MissingStatsError):
        WeightElimination().advance({}, WeightElimination().start({}), 0, None)
    Penalised(quadratic(), WeightElimination(0.1))  # a fixed strength needs no loss


# For all of them


PENALTIES = [
    WeightDecay(0.1),
    WeightDecay(0.1, proximal_step=True),
    L1(0.1),
    L1(0.1, proximal_step=True),
    WeightElimination(delta=0.01, every=3),
    WeightElimination(0.1),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_bit_for_bit(penalty: Any, name: str, tmp_path: Any) -> None:
    from secateur.checkpoint import load_tree, save_tree

    def fresh() -> tuple[Quadratic, Optimizer, Penalised]:
        model = quadratic()
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer, Penalised(model, penalty, optimizer=optimizer)

    def go_on(model: Quadratic, optimizer: Optimizer, penalised: Penalised, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model()
            penalised.observe(float(loss.detach()))
            loss.backward()
            optimizer.step()

    whole = fresh()
    go_on(*whole, 17)
    save_tree(tmp_path / "s", [x.state_dict() for x in whole])
    go_on(*whole, 30)
    again = fresh()
    for part, state in zip(again, load_tree(tmp_path / "s"), strict=True):
        part.load_state_dict(state)
    go_on(*again, 30)
    assert torch.equal(whole[0].weight, again[0].weight)
    one, two = whole[2].state_dict(), again[2].state_dict()
    assert one["state"].keys() == two["state"].keys()
    assert all(torch.equal(t, two["state"][n]) for n, t in one["state"].items())
    with pytest.raises(CheckpointError, match="is that of"):
        Penalised(quadratic(), L1(0.9)).load_state_dict(one)


def test_which_parameters(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    assert L1().parameters(model) == ("0.weight", "3.weight")
    assert L1(exclude=("3",)).parameters(model) == ("0.weight",)
    assert L1(include=("1", "3.bias")).parameters(model) == ("1.weight", "1.bias", "3.bias")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert WeightDecay().parameters(tied) == ("0.weight",)
    assert WeightDecay(include=("1.weight",)).parameters(tied) == ("0.weight",)
    model[0].weight.requires_grad_(False)
    assert Penalised(model, L1()).parameters == ("3.weight",)
    with pytest.raises(WeightError, match="frozen"):
        Penalised(model, L1(include=("0.weight",)))


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for make in (WeightDecay, L1, WeightElimination):
        for strength in (-1.0, math.nan, math.inf, "1", True):
            with pytest.raises(RecipeError, match=r"strength must be a number of at least 0, got"):
                make(strength)
        with pytest.raises(WeightError, match=r"'1\.\*' of a penalty matches no parameter"):
            make(0.1, include=("1.*",)).parameters(model)
        with pytest.raises(WeightError, match="'bn' of a penalty matches no parameter"):
            make(0.1, exclude=("bn",)).parameters(model)
        with pytest.raises(WeightError, match="nothing to press on"):
            make(0.1, exclude=("0",)).parameters(model)
        with pytest.raises(WeightError, match="no shape yet"):
            make(0.1).parameters(nn.LazyLinear(3))
    for options, words in (
        ({"scale": 0.0}, "scale must be a number above 0"),
        ({"scale": math.nan}, "scale"),
        ({"delta": -1.0}, "delta"),
        ({"cut": 1.5}, "cut must be a number of at least 0 and at most 1"),
        ({"memory": -0.1}, "memory"),
        ({"wanted": math.nan}, "wanted"),
        ({"every": 0}, "every must be a whole number of at least 1"),
    ):
        with pytest.raises(RecipeError, match=words):
            WeightElimination(**options)
