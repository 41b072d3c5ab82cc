"""Sensitivity curves against pruning done by hand, and the promise that nothing is left changed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.bench import Curve, Figure, Point, SensitivityResult, sensitivity
from secateur.bench.of_recipe import _splits
from secateur.errors import MissingStatsError, RecipeError, TargetError, WeightError
from secateur.method import Method, Override
from secateur.patterns import NM, Channel
from secateur.pipeline.data import Data
from secateur.recover import rematch_bn_
from secateur.schedules import cubic, iterative
from secateur.scores import WeightGradient
from secateur.targets import Target

METHOD = Method(target=Target("sparsity", 0.5))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)
    ).eval()


def inputs() -> torch.Tensor:
    return torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def total(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(inputs()).double().sum())


def figure() -> Figure:
    return Figure("total", True, total)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) and torch.equal(torch.signbit(x), torch.signbit(y)) for x, y in pairs)


def test_each_point_is_what_pruning_that_layer_by_hand_gives():
    model = network()
    result = sensitivity(model, METHOD, figure(), levels=[0.25, 0.5, 0.9])
    assert [curve.name for curve in result.curves] == ["0.weight", "4.weight", "6.weight"]
    assert result.dense == total(model)
    for curve in result.curves:
        for point in curve.points:
            twin = copy.deepcopy(model)
            weight = twin.get_parameter(curve.name)
            remove = round(point.asked * weight.numel())
            smallest = weight.detach().abs().flatten().argsort(stable=True)[:remove]
            weight.data.view(-1)[smallest] = 0.0
            assert point.value == total(twin)
            assert point.kept == weight.numel() - remove
            assert point.achieved == pytest.approx(remove / weight.numel())


def test_the_model_is_put_back_bit_for_bit():
    model = network()
    model[4].weight.data[0, 0] = -0.0  # a sign that multiplying by a mask would lose
    before = copy.deepcopy(model)
    dense = copy.deepcopy(model)
    sensitivity(model, METHOD, figure(), levels=[0.5], repair=lambda pruned: rematch_bn_(pruned, dense, inputs()))
    assert same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interruption_leaves_the_model_as_it_was(at):
    model = network()
    before, calls = copy.deepcopy(model), [0]

    def interrupted(model: nn.Module) -> float:
        calls[0] += 1
        if calls[0] == at + 1:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, METHOD, Figure("x", True, interrupted), levels=[0.5, 0.9])
    assert same(model, before)


def test_repair_is_in_the_figure():
    model = network()
    dense = copy.deepcopy(model)
    kwargs = {"levels": [0.7], "layers": ["0"]}
    plain = sensitivity(model, METHOD, figure(), **kwargs)
    mended = sensitivity(model, METHOD, figure(), repair=lambda p: rematch_bn_(p, dense, inputs()), **kwargs)
    assert (plain.repaired, mended.repaired) == (False, True)
    assert plain.curves[0].points[0].value != mended.curves[0].points[0].value

    def mean_of_norm(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model[:2](inputs()) - dense[:2](inputs())).mean((0, 2, 3)).abs().max())

    matched = sensitivity(
        model, METHOD, Figure("x", False, mean_of_norm), repair=lambda p: rematch_bn_(p, dense, inputs()), **kwargs
    )
    assert matched.curves[0].points[0].value < 1e-6


def test_target_schedule_allocation_and_overrides_play_no_part():
    others = [
        Method(target=Target("kept_parameters", 150)),
        Method(target=Target("sparsity", 0.99), schedule=iterative(rounds=4)),
        Method(target=Target("sparsity", 0.2), schedule=cubic(begin=0, end=4), when="during"),
        Method(target=Target("sparsity", 0.6), overrides=(Override("4", 0.9),)),
    ]
    expected = sensitivity(network(), METHOD, figure(), levels=[0.3, 0.8])
    for method in others:
        assert sensitivity(network(), method, figure(), levels=[0.3, 0.8]) == expected


def test_a_floor_of_one_unit_and_without_it():
    method = Method(target=Target("sparsity", 0.5), pattern=Channel())
    curve = sensitivity(network(), method, figure(), levels=[0.99], layers=["6"]).curves[0]
    assert (curve.points[0].kept, curve.total) == (6, 18)
    assert curve.points[0].asked == 0.99
    assert curve.points[0].achieved == pytest.approx(2 / 3)
    bare = Method(target=Target("sparsity", 0.5), pattern=Channel(), allow_empty=True)
    assert sensitivity(network(), bare, figure(), levels=[0.99], layers=["6"]).curves[0].points[0].kept == 0


def test_channel_takes_the_bias_along_and_brings_it_back():
    model = network()
    model[6].bias.data[:] = 5.0
    seen = []

    def look(model: nn.Module) -> float:
        seen.append(int((model[6].bias == 0).sum()))
        return 0.0

    method = Method(target=Target("sparsity", 0.5), pattern=Channel())
    sensitivity(model, method, Figure("x", True, look), levels=[1 / 3], layers=["6.weight"])
    assert seen == [0, 1]
    assert model[6].bias.tolist() == [5.0, 5.0, 5.0]


def test_nm_has_one_level():
    method = Method(pattern=NM(1, 4), exclude=("0", "6"))
    result = sensitivity(network(), method, figure())
    assert result.levels == (0.75,)
    assert result.curves[0].points[0].achieved == 0.75
    assert sensitivity(network(), method, figure(), levels=[0.75]) == result
    with pytest.raises(RecipeError, match=r"one density, 0\.25, so sparsity 0\.75 is the one level"):
        sensitivity(network(), method, figure(), levels=[0.5])


def test_scores_that_need_statistics():
    method = Method(target=Target("sparsity", 0.5), score=WeightGradient(), include=("6",))
    with pytest.raises(MissingStatsError, match="absolute_gradient"):
        sensitivity(network(), method, figure())
    gradient = torch.zeros(3, 6)
    gradient[:, :2] = 1.0
    stats = {"absolute_gradient": {"6.weight": gradient}}
    seen = []

    def look(model: nn.Module) -> float:
        seen.append((model[6].weight != 0).any(0).tolist())
        return 0.0

    sensitivity(network(), method, Figure("x", True, look), levels=[4 / 6], stats=stats)
    assert seen[1] == [True, True, False, False, False, False]


def test_refusals():
    with pytest.raises(WeightError, match=r"'head' matches no prunable weight; valid: '0', '4', '6'"):
        sensitivity(network(), METHOD, figure(), layers=["head"])
    for levels in ([1.5], [-0.1], [float("nan")], []):
        with pytest.raises(TargetError):
            sensitivity(network(), METHOD, figure(), levels=levels)


def test_progress_ends_at_its_total():
    steps = []
    sensitivity(network(), METHOD, figure(), levels=[0.5, 0.7], progress=lambda *step: steps.append(step))
    assert steps[0][:2] == (0, 6)
    assert steps[-1][:2] == (6, 6)
    assert [s[0] for s in steps] == sorted(s[0] for s in steps)


def result_of(values: list[float], *, dense: float, higher: bool) -> SensitivityResult:
    levels = tuple((i + 1) / (len(values) + 1) for i in range(len(values)))
    points = tuple(Point(level, level, 1, value) for level, value in zip(levels, values, strict=True))
    return SensitivityResult("m", higher, dense, "", "s", "p", levels, (Curve("w", (4,), 4, points),))


def test_the_highest_level_ends_at_the_first_that_loses_more():
    result = result_of([0.90, 0.895, 0.85, 0.899], dense=0.9, higher=True)
    assert result.highest(result.curves[0]).asked == pytest.approx(0.4)
    assert result.highest(result.curves[0], tolerance=0.06).asked == pytest.approx(0.8)
    assert result_of([0.5], dense=0.9, higher=True).highest(result_of([0.5], dense=0.9, higher=True).curves[0]) is None


def test_a_loss_is_judged_by_its_own_scale_and_nan_loses_everything():
    result = result_of([200.0, 201.0, 203.0], dense=200.0, higher=False)
    assert result.highest(result.curves[0]).value == 201.0
    lost = result_of([200.0, float("nan"), 200.0], dense=200.0, higher=False)
    assert lost.highest(lost.curves[0]).value == 200.0
    assert lost.to_dict()["layers"][0]["highest"] == pytest.approx(0.25)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 200), seed=st.integers(0, 5))
def test_what_is_held_out_is_not_looked_at(n, seed):
    rows = torch.arange(n)
    train, held_out, on = _splits(Data(train=(rows, rows), test=(rows + 1000, rows)), seed)
    seen, kept_back = set(train[0].tolist()), set(held_out[0].tolist())
    assert seen | kept_back == set(range(n))
    assert not seen & kept_back
    assert len(kept_back) == max(1, round(n * 0.2))
    assert f"{len(kept_back)} of {n} samples of data.train" in on
