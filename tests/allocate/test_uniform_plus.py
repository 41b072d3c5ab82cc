"""Uniform+ against seats handed out one by one, against the same rule in overrides, and where it must refuse."""

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.allocate import Layerwise, UniformPlus
from secateur.errors import TargetError
from secateur.method import Method, Override, edges_of
from secateur.patterns import Channel
from secateur.prunable import find_prunable
from secateur.pruner import Pruner, prune_
from secateur.schedules import cubic, iterative
from secateur.scores import Random
from secateur.targets import Target
from secateur.types import Units

SIZES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 60), min_size=2, max_size=5)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 50))


def one_by_one(sizes: dict[str, int], floors: dict[str, int], kept: int) -> dict[str, int]:
    """Webster's apportionment in exact fractions, from the floors up, ties by name."""
    counts = dict(floors)
    for _ in range(kept - sum(floors.values())):
        due = min(
            (n for n in sizes if counts[n] < sizes[n]), key=lambda n: (Fraction(2 * counts[n] + 1, 2 * sizes[n]), n)
        )
        counts[due] += 1
    return counts


@settings(max_examples=150, deadline=None, database=None)
@given(SIZES, st.data())
def test_seats_one_by_one(sizes: dict[str, int], data: st.DataObject) -> None:
    first, last = data.draw(st.permutations(sorted(sizes)))[:2]
    floors = dict.fromkeys(sizes, 1) | {first: sizes[first], last: max(1, math.ceil(Fraction(sizes[last], 5)))}
    edges = {first: "first", last: "last"}
    units = {n: Units(torch.zeros(size), 1.0, 1, edge=edges.get(n, "")) for n, size in sizes.items()}  # type: ignore[arg-type]
    least = sum(floors.values())
    kept = data.draw(st.integers(least, sum(sizes.values())))
    assert UniformPlus()(units, kept) == one_by_one(sizes, floors, kept)
    with pytest.raises(TargetError, match=f"costs {least}, and only {least - 1} may stay"):
        UniformPlus()(units, least - 1)


def test_it_is_layerwise_with_two_overrides() -> None:
    """Where the last layer would get less than a fifth; at low sparsity it gets what all get."""
    target = Target("sparsity", 0.9)
    ours = prune_(net(), Method(target=target, score=Random(0), allocate=UniformPlus())).report
    overrides = (Override("0", 0.0), Override("4", 0.8))
    theirs = prune_(net(), Method(target=target, score=Random(0), allocate=Layerwise(), overrides=overrides)).report
    assert ours.layers == theirs.layers
    assert [row.kept for row in ours.layers][::3] == [216, 640]
    half = {
        r.name: r for r in prune_(net(), Method(target=Target("sparsity", 0.5), allocate=UniformPlus())).report.layers
    }
    assert half["0.weight"].sparsity == 0.0
    assert half["4.weight"].sparsity == pytest.approx(half["2.weight"].sparsity, abs=1e-3)
    assert sum(r.kept for r in half.values()) * 2 == sum(r.total for r in half.values())


@pytest.mark.parametrize("schedule", [iterative(rounds=6), cubic(begin=0, end=6)], ids=["rounds", "steps"])
def test_every_round_spares_them(schedule: object) -> None:
    target = Target("sparsity", 0.95)
    pruner = Pruner(net(), Method(target=target, allocate=UniformPlus(), schedule=schedule))  # type: ignore[arg-type]
    before: dict[str, torch.Tensor] = {}
    while not pruner.finished:
        report = pruner.prune()
        rows = {row.name: row for row in report.layers}
        total = sum(row.total for row in rows.values())
        assert sum(row.kept for row in rows.values()) == total - round(report.asked * total)
        assert rows["0.weight"].sparsity == 0.0
        assert rows["4.weight"].kept >= 640
        assert all(not bool((mask & ~before[name]).any()) for name, mask in pruner.masks.items() if before)
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
    assert rows["4.weight"].kept == 640
    assert rows["1.weight"].sparsity == pytest.approx(rows["2.weight"].sparsity, abs=1e-3)


@pytest.mark.parametrize("kind", ["sparsity", "compression_ratio", "kept_parameters", "macs"])
def test_out_of_reach_is_refused_at_once_and_the_named_limit_is_not(kind: str) -> None:
    beyond = {"sparsity": 0.99, "compression_ratio": 80, "kept_parameters": 700, "macs": 0.05}[kind]
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    given = {"example_inputs": (torch.randn(1, 3, 7, 7),)}
    method = Method(target=Target(kind, beyond), allocate=UniformPlus(), schedule=cubic(begin=5, end=50))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="cannot be reached") as refusal:
        Pruner(model, method, **given)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    limit = float(re.search(r"allow is ([\d.]+)\.", str(refusal.value)).group(1))  # type: ignore[union-attr]
    report = prune_(model, Method(target=Target(kind, limit), allocate=UniformPlus()), **given).report  # type: ignore[arg-type]
    assert [row.kept for row in report.layers] == [216, 1, 1, 640]


def test_an_override_says_otherwise() -> None:
    method = Method(target=Target("sparsity", 0.9), allocate=UniformPlus(), overrides=(Override("0", 0.5),))
    rows = prune_(net(), method).report.layers
    assert rows[0].sparsity == 0.5
    assert rows[1].sparsity > 0.8  # the second convolution does not become the first
    assert rows[3].kept == 640


def test_what_is_first_and_last() -> None:
    def edges(model: nn.Module, **filters: tuple[str, ...]) -> dict[str, str]:
        return dict(edges_of(find_prunable(model, **filters).weights))

    assert edges(net()) == {"0.weight": "first", "4.weight": "last"}
    assert edges(net(), exclude=("0", "4")) == {"1.weight": "first", "2.weight": "last"}
    assert edges(nn.Sequential(nn.Linear(3, 4), nn.Bilinear(2, 3, 4), nn.Linear(4, 2))) == {"2.weight": "last"}
    assert edges(nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 4, 3))) == {"1.weight": "last"}
    assert edges(nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)))["1.weight"] == "first"


def test_channels_in_macs() -> None:
    """Whole filters: those of the first convolution all stay."""
    method = Method(target=Target("macs", 0.4), pattern=Channel(), allocate=UniformPlus())
    model = net()
    pruned = prune_(model, method, example_inputs=(torch.randn(1, 3, 7, 7),))
    assert bool(pruned.masks["0.weight"].all())
    assert int(pruned.masks["4.weight"].any(1).sum()) >= 10
    assert pruned.report.achieved <= 0.4
    assert not bool(pruned.masks["1.weight"].all())
