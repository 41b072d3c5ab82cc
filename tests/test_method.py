"""What one call of pruning delivers: exact counts, floors, limits, overrides, contradictions."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.allocate import Global, Layerwise
from secateur.errors import (
    PatternError,
    RecipeError,
    SecateurError,
    TargetError,
    WeightError,
)
from secateur.method import Method, Override, make_masks
from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.pruner import Pruner, prune_
from secateur.schedules import cubic, iterative, linear
from secateur.scores import Magnitude, Random
from secateur.targets import ModelFacts, Target
from secateur.testing import select_k
from secateur.types import Weight

from .loops import HALF, leaks, mlp, one_step, sgd


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}


# --- exactly what was asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("score", [Magnitude(), Random(3)], ids=str)
def test_global_is_one_sort_over_all_weights(sparsity: float, score: Magnitude | Random) -> None:
    model = mlp()
    values = score(weights_of(model), {})
    total = sum(v.numel() for v in values.values())
    want = select_k({n: v.flatten().tolist() for n, v in values.items()}, total - round(sparsity * total))
    pruned = prune_(model, Method(target=Target("sparsity", sparsity), score=score, allow_empty=True))
    assert {n: m.flatten().tolist() for n, m in pruned.masks.items()} == want
    assert leaks(model, pruned.masks) == 0


def test_ties_are_broken_by_name_then_index() -> None:
    model = mlp(sizes=(2, 2, 2))
    for p in model.parameters():
        nn.init.ones_(p)
    masks = prune_(model, Method(target=Target("sparsity", 5 / 8))).masks
    assert masks["0.weight"].tolist() == [[False, False], [False, True]]  # the last one is the floor
    assert masks["2.weight"].tolist() == [[False, False], [True, True]]


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.floats(0, 1),
    st.sampled_from([Global(), Layerwise()]),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_shape_any_sparsity(
    sizes: list[int], sparsity: float, allocate: Global | Layerwise, allow_empty: bool, levels: int
) -> None:
    """Exactly round(s·n) weights go, or a typed refusal with the model untouched, whatever the ties."""
    model = mlp(sizes=tuple(sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * levels).round() if levels else torch.zeros_like(p))
    before = copy.deepcopy(model.state_dict())
    n = sum(w.numel() for w in weights_of(model).values())
    layers = len(sizes) - 1
    method = Method(target=Target("sparsity", sparsity), allocate=allocate, allow_empty=allow_empty)
    if not allow_empty and n - round(sparsity * n) < layers:
        with pytest.raises(TargetError, match="cannot be reached"):
            prune_(model, method)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return
    pruned = prune_(model, method)
    removed = sum(int((~mask).sum()) for mask in pruned.masks.values())
    assert removed == round(sparsity * n)
    assert leaks(model, pruned.masks) == 0
    if not allow_empty:
        assert all(bool(mask.any()) for mask in pruned.masks.values())
    for name, mask in pruned.masks.items():
        assert torch.equal(model.state_dict()[name][mask], before[name][mask]), "survivors are untouched"


def test_a_huge_layer_beside_a_single_weight() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 100_000), nn.Linear(100_000, 1))
    with torch.no_grad():
        model[0].weight.zero_()
    for allocate in (Global(), Layerwise()):
        pruned = prune_(copy.deepcopy(model), Method(target=Target("sparsity", 0.999), allocate=allocate))
        assert sum(int(m.sum()) for m in pruned.masks.values()) == 200_001 - round(0.999 * 200_001)
        assert bool(pruned.masks["0.weight"].all()), "the only weight of a layer stays"


def test_all_zero_layers_keep_their_floor() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
    masks = prune_(model, Method(target=HALF)).masks
    assert int(masks["2.weight"].sum()) == 1
    assert sum(int(m.sum()) for m in masks.values()) == 82


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_models(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=Target("sparsity", 0.75)), optimizer=optimizer)
    report = pruner.prune()
    assert report.achieved == report.asked == 0.75
    for _ in range(3):
        one_step(model, optimizer)
        pruner.step()
    assert leaks(model, pruner.masks) == 0


# --- asked and achieved ----------------------------------------------------------------------------------------------


def test_asked_is_the_targets_own_value() -> None:
    """Rounding shows: 0.5 of 3 weights removes 2, and the report must not say that 0.667 was asked for."""
    report = prune_(nn.Linear(3, 1), Method(target=HALF)).report
    assert report.asked == 0.5
    assert report.achieved == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "target",
    [HALF, Target("kept_parameters", 80), Target("compression_ratio", 2.5), Target("macs", 0.4)],
    ids=lambda t: t.kind,
)
@pytest.mark.parametrize("pattern", [Unstructured(), Channel(), Block(2, 2), Block(3, 1)], ids=str)
def test_achieved_is_counted_on_the_masks(target: Target, pattern: Unstructured | Channel | Block) -> None:
    model = mlp()
    dense = sum(p.numel() for p in model.parameters())
    method = Method(target=target, pattern=pattern)
    pruned = prune_(model, method, example_inputs=(torch.zeros(1, 6),))
    gone = sum(int((~m).sum()) for m in pruned.masks.values())
    weights = sum(int((~m).sum()) for name, m in pruned.masks.items() if name.endswith("weight"))
    n = sum(w.numel() for w in weights_of(model).values())
    want = {
        "sparsity": weights / n,
        "kept_parameters": dense - gone,
        "compression_ratio": dense / (dense - gone),
        "macs": (n - weights) / n,  # batch of one: one MAC per weight
    }[target.kind]
    assert pruned.report.achieved == pytest.approx(want)
    assert pruned.report.sparsity == pytest.approx(weights / n)


def test_the_report_counts_every_layer() -> None:
    model = mlp()
    pruned = prune_(model, Method(target=HALF, exclude=("4",)))
    rows = {row.name: row for row in pruned.report.layers}
    assert list(rows) == ["0.weight", "2.weight"]
    for name, row in rows.items():
        mask = pruned.masks[name]
        assert (row.shape, row.total, row.kept) == (tuple(mask.shape), mask.numel(), int(mask.sum()))
        assert row.sparsity == pytest.approx(1 - row.kept / row.total)
    assert pruned.report.skipped == {"4.weight": "excluded by name"}
    assert pruned.report.to_dict()["layers"][0]["shape"] == [10, 6]


@pytest.mark.parametrize("value", [0.1, 0.25, 1 / 3, 0.37, 0.5, 0.77])
@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
def test_macs_are_never_more_than_asked(value: float, allocate: Global | Layerwise) -> None:
    report = prune_(
        mlp(), Method(target=Target("macs", value), allocate=allocate), example_inputs=(torch.zeros(1, 6),)
    ).report
    assert report.achieved <= value + 1e-12
    assert report.achieved > value - 1 / 164 - 1e-12, "and no whole weight less"


def test_macs_of_a_layer_that_the_forward_never_runs() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.zeros_(self.spare.weight)
            nn.init.zeros_(self.used.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    method = Method(target=Target("macs", 0.5))
    report = prune_(Spare(), method, example_inputs=(torch.zeros(1, 4),)).report
    assert report.achieved == 0.5


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    optimizer = sgd(model)
    pruner = Pruner(model, Method(target=Target("kept_parameters", 4)), optimizer=optimizer)
    assert pruner.report().achieved == 16
    assert pruner.prune().achieved == 4
    x = torch.randn(3, 4)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    assert int(model[0].weight.count_nonzero()) == 4
    assert torch.equal(model[0].weight, model[2].weight)


# --- floors and limits -----------------------------------------------------------------------------------------------

LIMIT = re.compile(r"allow is ([0-9.e+-]+?)\.? Ask")


@pytest.mark.parametrize("pattern", [Unstructured(), Channel()], ids=str)
@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
@pytest.mark.parametrize(
    ("kind", "value"), [("sparsity", 1.0), ("kept_parameters", 22), ("compression_ratio", 8.0), ("macs", 1e-9)]
)
def test_the_limit_in_the_message_can_be_asked_for(
    pattern: Unstructured | Channel, allocate: Global | Layerwise, kind: str, value: float
) -> None:
    """A model of 185 parameters, 164 of them prunable; one unit of each of three layers must stay."""
    inputs = (torch.zeros(1, 6),)
    model = mlp()
    with pytest.raises(TargetError, match=f"{kind}.*cannot be reached") as refusal:
        prune_(model, Method(target=Target(kind, value), pattern=pattern, allocate=allocate), example_inputs=inputs)
    found = LIMIT.search(str(refusal.value))
    assert found
    limit = Target(kind, float(found.group(1)))
    pruned = prune_(model, Method(target=limit, pattern=pattern, allocate=allocate), example_inputs=inputs)
    units = {n: m.any(1) if isinstance(pattern, Channel) else m for n, m in pruned.masks.items() if m.dim() > 1}
    assert [int(u.sum()) for u in units.values()] == [1, 1, 1]


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
def test_blocks_of_unequal_size_neither_empty_a_layer_nor_exceed_the_target(
    kept: int, allocate: Global | Layerwise
) -> None:
    """A 4-block and an edge block of 1: what the one unit that must stay costs is not the mean, 2.5."""
    model = nn.Linear(1, 5, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[5.0], [5.0], [5.0], [5.0], [1.0]]))
    method = Method(target=Target("kept_parameters", kept), pattern=Block(4, 1), allocate=allocate)
    try:
        report = prune_(model, method).report
    except TargetError:
        assert kept < 4, "keeping the block of 4 is possible"
        return
    assert 0 < report.achieved <= kept


@pytest.mark.parametrize(
    ("sizes", "costs", "other"),
    [((1, 4, 2), (947, 98, 516), 139), ((8, 2, 3), (31, 127, 455), 965), ((5, 1, 3), (370, 463, 20), 922)],
)
def test_float_noise_does_not_empty_a_layer(sizes: tuple[int, ...], costs: tuple[int, ...], other: int) -> None:
    """Asking for exactly the floors in MACs: the budget falls a rounding error below what they cost."""
    weights = {name: Weight(name, (1, n)) for name, n in zip("abc", sizes, strict=True)}
    macs = {name: n * cost for name, n, cost in zip("abc", sizes, costs, strict=True)}
    facts = ModelFacts({name: w.numel for name, w in weights.items()}, 100, macs, other)
    target = Target("macs", Target("macs", 0.5).measure(facts, sum(costs)))
    budget = target.budget(facts)
    values = {name: torch.arange(1.0, w.numel + 1).view(w.shape) for name, w in weights.items()}
    masks = make_masks(weights, values, Method(target=target), budget, kept=budget.kept)
    assert [int(m.sum()) for m in masks.values()] == [1, 1, 1]


def test_allow_empty() -> None:
    pruned = prune_(mlp(), Method(target=Target("sparsity", 1.0), allow_empty=True))
    assert not any(bool(m.any()) for m in pruned.masks.values())


def test_an_unreachable_target_is_refused_before_training() -> None:
    """Not at the last of a hundred updates, days later: floors are known when the pruner is built."""
    schedule = cubic(begin=1, end=100)
    with pytest.raises(TargetError, match="cannot be reached"):
        Pruner(mlp(), Method(target=Target("sparsity", 1.0), schedule=schedule))


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
def test_overrides_are_made_up_for(allocate: Global | Layerwise) -> None:
    overrides = (Override("0", 0.1), Override("4.*", 0.25))
    report = prune_(mlp(), Method(target=HALF, allocate=allocate, overrides=overrides)).report
    rows = {row.name: row for row in report.layers}
    assert rows["0.weight"].kept == 60 - 6
    assert rows["4.weight"].kept == 24 - 6
    assert report.achieved == report.asked == 0.5
    assert rows["2.weight"].kept == 82 - 54 - 18


def test_the_last_matching_override_wins() -> None:
    overrides = (Override("*", 0.5), Override("0", 0.0))
    report = prune_(mlp(), Method(target=Target("sparsity", 52 / 164), overrides=overrides)).report
    assert [row.kept for row in report.layers] == [60, 40, 12]


def test_overrides_grow_with_the_schedule() -> None:
    method = Method(target=HALF, schedule=linear(begin=0, end=4, unit="rounds"), overrides=(Override("2", 0.8),))
    pruner = Pruner(mlp(), method)
    kept = []
    while not pruner.finished:
        report = pruner.prune()
        assert abs(report.achieved - report.asked) <= 0.5 / 164 + 1e-12
        kept.append(next(row.kept for row in report.layers if row.name == "2.weight"))
    assert kept == [80, 64, 48, 32, 16]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ((Override("zzz", 0.5),), WeightError, "'zzz' matches no prunable weight"),
        ((Override("*", 0.9),), TargetError, "overrides remove more than the target"),
        ((Override("*", 0.1),), TargetError, "cannot be reached"),
        ((Override("2", 1.0), Override("0", 1.0)), TargetError, "overrides remove more"),
    ],
)
def test_overrides_that_contradict_the_target(
    overrides: tuple[Override, ...], error: type[SecateurError], message: str
) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune_(model, Method(target=HALF, overrides=overrides))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_override_values(sparsity: float) -> None:
    with pytest.raises(TargetError, match="'fc'"):
        Override("fc", sparsity)


# --- methods that contradict themselves ------------------------------------------------------------------------------


def test_nm_prunes_exactly_its_density() -> None:
    model = mlp(sizes=(8, 12, 4))
    report = prune_(model, Method(pattern=NM(1, 4))).report
    assert report.achieved == report.asked == 0.75
    assert all((row != 0).sum() == 2 for row in model[0].weight.detach())


def test_nm_that_does_not_fit_is_refused_before_anything_changes() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PatternError, match=r"0\.weight: 2:4.*multiple of 4, got 6"):
        prune_(model, Method(pattern=NM(2, 4)))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert prune_(model, Method(pattern=NM(2, 4), include=("4",))).report.achieved == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prune.target is missing"),
        ({"pattern": NM(2, 4), "allocate": Global()}, r"NM\(n=2, m=4\).*Global"),
        ({"pattern": NM(2, 4), "overrides": (Override("*", 0.5),)}, "overrides"),
        ({"pattern": NM(2, 4), "schedule": iterative(rounds=2)}, "schedule of 2 updates"),
        ({"pattern": NM(2, 4), "target": Target("sparsity", 0.6)}, "always has sparsity 0.5"),
        ({"pattern": NM(2, 4), "target": Target("kept_parameters", 10)}, "kept_parameters"),
        ({"target": HALF, "when": "during"}, "'during' and a schedule in 'rounds'"),
        ({"target": HALF, "when": "sometime"}, "sometime"),
    ],
    ids=str,
)
def test_parts_that_exclude_each_other(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Method(**arguments)


def test_defaults_follow_the_pattern() -> None:
    assert Method(target=HALF).allocate == Global()
    assert Method(pattern=NM()).allocate == Layerwise()
    assert Method(pattern=NM()).goal == HALF
