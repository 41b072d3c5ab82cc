"""Allocations by hand, and against exhaustive apportionment in exact fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate import Global, Isomorphic, Layerwise
from secateur.testing import select_k
from secateur.types import Units

FAST = settings(max_examples=100, deadline=None, database=None)


def units(sizes: dict[str, int], *, floor: int = 0, cost: float = 1.0) -> dict[str, Units]:
    return {name: Units(torch.zeros(n), cost, floor) for name, n in sizes.items()}


def largest_remainders(sizes: dict[str, int], kept: int) -> dict[str, int]:
    """Hamilton's apportionment in exact fractions: floors first, then one each by largest remainder, ties by name."""
    total = sum(sizes.values())
    shares = {name: Fraction(kept * n, total) for name, n in sizes.items()}
    counts = {name: math.floor(share) for name, share in shares.items()}
    order = sorted(sizes, key=lambda name: (counts[name] - shares[name], name))
    for name in order[: kept - sum(counts.values())]:
        counts[name] += 1
    return counts


def webster(sizes: dict[str, int], kept: int) -> dict[str, int]:
    """Webster's apportionment in exact fractions: one seat at a time, to the smallest (k + 1/2) / n, ties by name."""
    counts = dict.fromkeys(sizes, 0)
    for _ in range(kept):
        due = min(
            (n for n in sizes if counts[n] < sizes[n]), key=lambda n: (Fraction(2 * counts[n] + 1, 2 * sizes[n]), n)
        )
        counts[due] += 1
    return counts


@FAST
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 60), min_size=1, max_size=5), st.data())
def test_layerwise_is_webster_apportionment(sizes: dict[str, int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, sum(sizes.values())))
    assert Layerwise()(units(sizes), kept) == webster(sizes, kept)


@FAST
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 60), min_size=1, max_size=5), st.data())
def test_layerwise_never_gives_back(sizes: dict[str, int], data: st.DataObject) -> None:
    more = data.draw(st.integers(1, sum(sizes.values())))
    before, after = Layerwise()(units(sizes), more), Layerwise()(units(sizes), more - 1)
    assert sum(before.values()) - sum(after.values()) == 1
    assert all(after[name] <= before[name] for name in sizes)


def test_layerwise_ties_go_by_name() -> None:
    assert Layerwise()(units({"c": 2, "a": 2, "b": 2}), 4) == {"c": 1, "a": 2, "b": 1}


def test_layerwise_floor_is_paid_by_the_others() -> None:
    sizes = {"tiny": 1, "small": 3, "big": 1000}
    counts = Layerwise()(units(sizes, floor=1), 20)
    assert counts == {"tiny": 1, "small": 1, "big": 18}


@pytest.mark.parametrize(("kept", "want"), [(0, 0), (1, 1), (29, 29), (57, 57), (100, 100)])
def test_layerwise_shares_lose_nothing_to_floats(kept: int, want: int) -> None:
    assert Layerwise()(units({"a": 100, "b": 100}), 2 * kept) == {"a": want, "b": want}


def test_layerwise_with_costs() -> None:
    """Density 1/2 of 10 units at 1 and 10 units at 5: 30 of 60."""
    problem = {"cheap": Units(torch.zeros(10), 1.0, 0), "dear": Units(torch.zeros(10), 5.0, 0)}
    assert Layerwise()(problem, 30.0) == {"cheap": 5, "dear": 5}
    assert Layerwise()(problem, 33.0) == {"cheap": 6, "dear": 5}  # 5.5 each: only the cheap one still fits


@pytest.mark.parametrize(
    ("sizes", "costs", "kept"),
    [
        ((6, 1, 9), (0.7, 0.3, 0.3), 4.319999999999999),
        ((9, 5, 1, 9, 1, 2), (1.1, 0.1, 2.2, 1.1, 0.7, 0.3), 11.9),
        ((7, 7, 1, 3, 3, 4), (0.7, 0.7, 0.1, 0.1, 1.1, 1.1), 4.475),
    ],
)
def test_layerwise_does_not_depend_on_the_hash_seed(
    sizes: tuple[int, ...], costs: tuple[float, ...], kept: float
) -> None:
    """Names that sort alike must give the same counts: sums over a set run in the order of the strings' hashes."""
    answers = set()
    for prefix in ("a", "b", "fc", "conv", "layer", "block.", "x", "yz", "features.", "q", "r", "s"):
        rows = enumerate(zip(sizes, costs, strict=True))
        problem = {f"{prefix}{i}": Units(torch.zeros(n), cost, 0) for i, (n, cost) in rows}
        answers.add(tuple(Layerwise()(problem, kept).values()))
    assert len(answers) == 1


@pytest.mark.parametrize("kept", [9_999_999.0, 19_999_999.5])
def test_layerwise_does_not_round_a_dear_unit_up(kept: float) -> None:
    """One output channel of a convolution is millions of MACs; a share of 0.9999999 is not one channel."""
    counts = Layerwise()({"conv": Units(torch.zeros(2), 1e7, 0)}, kept)
    assert counts["conv"] * 1e7 <= kept


def test_layerwise_with_unequal_units_stays_within_the_budget() -> None:
    """Edge blocks are smaller: the cost of the kept units counts, not that of an average one."""
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
    cost = torch.tensor([4.0, 4.0, 4.0, 1.0])
    for kept in (4.0, 7.0, 8.0, 12.0, 12.9):
        count = Layerwise()({"w": Units(scores, cost, 1)}, kept)["w"]
        spent = float(cost[torch.tensor(select_k({"": scores.tolist()}, count)[""])].sum())
        assert spent <= kept


def test_layerwise_does_not_count_pruned_units() -> None:
    """Hamilton's method is not monotone (the Alabama paradox): 11 of 14 gives (5, 5, 1), 10 of 14 gives (4, 4, 2).

    With one of ``c`` pruned already, its second unit is gone and the other layers must keep it instead.
    """
    before = largest_remainders({"a": 6, "b": 6, "c": 2}, 11)
    assert before == {"a": 5, "b": 5, "c": 1}
    assert largest_remainders({"a": 6, "b": 6, "c": 2}, 10) == {"a": 4, "b": 4, "c": 2}
    problem = {}
    for name, n in {"a": 6, "b": 6, "c": 2}.items():
        scores = torch.arange(float(n))
        scores[: n - before[name]] = -torch.inf
        problem[name] = Units(scores, 1.0, 1)
    counts = Layerwise()(problem, 10)
    assert sum(counts.values()) == 10
    assert all(counts[name] <= before[name] for name in before)


def test_global_by_hand() -> None:
    problem = {
        "a": Units(torch.tensor([9.0, 8.0, 7.0]), 1.0, 1),
        "b": Units(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1.0, 1),
    }
    assert Global()(problem, 7) == {"a": 3, "b": 4}
    assert Global()(problem, 5) == {"a": 3, "b": 2}
    assert Global()(problem, 3) == {"a": 2, "b": 1}
    assert Global()(problem, 2) == {"a": 1, "b": 1}


def test_global_without_floors_may_empty_a_layer() -> None:
    problem = {"a": Units(torch.tensor([9.0, 8.0]), 1.0, 0), "b": Units(torch.tensor([1.0, 2.0]), 1.0, 0)}
    assert Global()(problem, 2) == {"a": 2, "b": 0}
    assert Global()(problem, 0) == {"a": 0, "b": 0}


def test_global_counts_what_the_ranking_removes_at_a_price() -> None:
    """Prices decide when to stop, not who goes: units leave in the order of the score."""
    problem = {"dear": Units(torch.tensor([1.0, 4.0]), 10.0, 0), "cheap": Units(torch.tensor([2.0, 3.0]), 1.0, 0)}
    assert Global()(problem, 21.0) == {"dear": 1, "cheap": 2}
    assert Global()(problem, 12.0) == {"dear": 1, "cheap": 2}
    assert Global()(problem, 11.0) == {"dear": 1, "cheap": 1}


@pytest.mark.parametrize("allocate", [Global(), Layerwise()], ids=str)
def test_all_or_the_floors(allocate: Global | Layerwise) -> None:
    problem = units({"a": 3, "b": 1, "c": 9}, floor=1)
    assert allocate(problem, 13) == {"a": 3, "b": 1, "c": 9}
    assert allocate(problem, 3) == {"a": 1, "b": 1, "c": 1}


@FAST
@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=2),
        st.tuples(st.sampled_from(["head", "mlp", "conv"]), st.lists(st.integers(0, 5), min_size=1, max_size=9)),
        min_size=1,
        max_size=5,
    ),
    st.data(),
)
def test_isomorphic_is_one_ranking_per_kind_each_of_the_same_share(
    layers: dict[str, tuple[str, list[int]]], data: st.DataObject
) -> None:
    """Shares in exact fractions, whole units below them; within a kind, the plain ranking of everything together."""
    total = sum(len(scores) for _, scores in layers.values())
    kept = data.draw(st.integers(0, total))
    made = {n: Units(torch.tensor(s, dtype=torch.float64), 1.0, 0, kind=kind) for n, (kind, s) in layers.items()}
    got = Isomorphic()(made, kept)
    assert list(got) == list(layers)
    for kind in {kind for kind, _ in layers.values()}:
        members = {n: scores for n, (own, scores) in layers.items() if own == kind}
        size = sum(map(len, members.values()))
        stay = math.floor(Fraction(kept * size, total))
        chosen = select_k({n: [float(v) for v in s] for n, s in members.items()}, stay)
        assert {n: got[n] for n in members} == {n: sum(flags) for n, flags in chosen.items()}


def test_isomorphic_pays_for_floors_from_all_shares() -> None:
    """One of two heads must stay, more than three eighths of them; the neurons have the rest."""
    heads, neurons = torch.tensor([1.0, 2.0]), torch.arange(6.0)
    made = {"h": Units(heads, 1.0, 1, kind="head"), "n": Units(neurons, 1.0, 1, kind="mlp")}
    assert Isomorphic()(made, 3) == {"h": 1, "n": 2}
    assert Isomorphic()(made, 2) == {"h": 1, "n": 1}
