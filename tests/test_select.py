"""Exact selection against a sort in pure Python, with ties on purpose, on both sides of the switch of algorithms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import select
from secateur.errors import SelectionError
from secateur.select import check_scores, global_counts, keep_budget, keep_global, keep_in_groups, keep_top_k
from secateur.testing import rank, remove_to_budget, select_k
from secateur.types import Units

SWITCH = 1 << 16  # problems above it go through histograms, where they are not copied
WAYS = pytest.mark.parametrize("copies", [True, False], ids=["copied", "not copied"])
FAST = settings(max_examples=80, deadline=None, database=None)

few = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, math.inf, -math.inf])
tied = st.lists(few, min_size=1, max_size=30)
names = st.lists(st.text("abB.19_", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


@contextmanager
def choosing(copies: bool) -> Iterator[None]:
    """Let scores be partitioned as a copy, or ranked as on other devices: quickselect, above the switch histograms."""
    before = select._COPIED
    select._COPIED = before if copies else 0
    try:
        yield
    finally:
        select._COPIED = before


def lists(masks: dict[str, torch.Tensor]) -> dict[str, list[bool]]:
    return {name: mask.flatten().tolist() for name, mask in masks.items()}


def padded(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    """The values followed by enough zeros for the histograms to be used."""
    return torch.cat([torch.tensor(values, dtype=dtype), torch.zeros(SWITCH + 1, dtype=dtype)])


# --- top k -----------------------------------------------------------------------------------------------------------


@WAYS
@FAST
@given(tied, st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_top_k_is_the_sort(copies: bool, values: list[float], data: st.DataObject, dtype: torch.dtype) -> None:
    k = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=dtype)
    with choosing(copies):
        kept = keep_top_k(scores, k)
    assert kept.tolist() == select_k({"": scores.tolist()}, k)[""]


@WAYS
@settings(max_examples=25, deadline=None, database=None)
@given(tied, st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_top_k_is_the_sort_above_the_switch(
    copies: bool, values: list[float], data: st.DataObject, dtype: torch.dtype
) -> None:
    scores = padded(values, dtype)
    k = data.draw(st.sampled_from([0, 1, len(values), len(values) + 1, SWITCH // 2, scores.numel() - 1]))
    order = rank({"": scores.tolist()})
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[[index for _, index in order[len(order) - k :]]] = True
    with choosing(copies):
        assert torch.equal(keep_top_k(scores, k), kept)


@WAYS
@pytest.mark.parametrize("size", [5, SWITCH, SWITCH + 1, 3 * SWITCH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_and_size_keeps_exactly_k(size: int, dtype: torch.dtype, copies: bool) -> None:
    scores = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)  # 16 bit: many ties
    for k in (0, 1, size // 3, size - 1, size):
        with choosing(copies):
            kept = keep_top_k(scores, k)
        assert int(kept.sum()) == k
        if 0 < k < size:
            assert scores[kept].min() >= scores[~kept].max()


@WAYS
@pytest.mark.parametrize("size", [4, SWITCH + 4])
def test_minus_zero_is_zero(size: int, copies: bool) -> None:
    scores = torch.zeros(size)
    scores[::2] = -0.0
    with choosing(copies):
        assert keep_top_k(scores, 2).nonzero().flatten().tolist() == [size - 2, size - 1]


def test_shape_and_strides_are_kept() -> None:
    scores = torch.arange(12.0).view(3, 4).t()  # not contiguous
    kept = keep_top_k(scores, 5)
    assert kept.shape == scores.shape
    assert torch.equal(kept, scores >= 7)
    large = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(keep_top_k(large, 1000), large >= large.flatten().sort().values[-1000])


def test_scores_are_left_alone() -> None:
    for size, copies in ((10, True), (10, False), (SWITCH + 10, True), (SWITCH + 10, False)):
        scores = torch.randn(size)
        before = scores.clone()
        with choosing(copies):
            keep_top_k(scores, 5)
        keep_budget({"a": scores}, {"a": 2.0}, 7.0)
        assert torch.equal(scores, before)


@pytest.mark.parametrize("k", [-1, 6, 10**9])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(SelectionError, match=rf"{k} of 5.*0\.\.5"):
        keep_top_k(torch.arange(5.0), k)


def test_nothing_to_rank() -> None:
    assert keep_top_k(torch.zeros(0), 0).shape == (0,)
    assert keep_global({}, 0) == {}
    kept = keep_global({"empty": torch.zeros(0, 3), "full": torch.arange(3.0)}, 2)
    assert kept["empty"].shape == (0, 3)
    assert kept["full"].tolist() == [False, True, True]


def test_integer_scores_above_2_to_24_are_told_apart() -> None:
    scores = torch.tensor([2**24 + 1, 2**24, 2**24 + 2, 2**31 + 1], dtype=torch.int64)
    assert keep_top_k(scores, 2).tolist() == [False, False, True, True]
    assert keep_top_k(scores, 3).tolist() == [True, False, True, True]
    assert keep_top_k(torch.tensor([3, 1, 2], dtype=torch.uint8), 1).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_subnormals_are_ranked(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    scores = torch.tensor([2 * tiny, tiny, 0.0, 3 * tiny], dtype=dtype)
    assert keep_top_k(scores, 2).tolist() == [True, False, False, True]
    assert keep_top_k(scores, 3).tolist() == [True, True, False, True]


def test_float32_scores_below_float16_are_not_ties() -> None:
    scores = torch.tensor([3e-8, 1e-8, 2e-8])
    assert scores.half().unique().numel() < 3, "these merge in float16"
    assert keep_top_k(scores, 1).tolist() == [True, False, False]


@WAYS
def test_twenty_million_tied_scores(copies: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (20_500_000,), generator=generator, dtype=torch.uint8).float()
    with choosing(copies):
        kept = keep_top_k(scores, 7_000_001)
    assert int(kept.sum()) == 7_000_001
    counts = torch.bincount(scores.int())  # 3 stays, 2 in part, 0 and 1 go
    assert int(kept[scores == 3].sum()) == int(counts[3])
    assert not kept[scores < 2].any()
    ties = kept[scores == 2]
    gone = int((~ties).sum())
    assert gone > 0
    assert not ties[:gone].any(), "ties lose the lowest index first"


@WAYS
def test_more_than_2_to_24_units_are_counted_exactly(copies: bool) -> None:
    size = 2**24 + 3
    with choosing(copies):
        kept = keep_top_k(torch.zeros(size), 2**24 + 1)
    assert int(kept.sum()) == 2**24 + 1
    assert kept.to(torch.uint8).argmax() == 2


# --- several tensors -------------------------------------------------------------------------------------------------


@FAST
@given(names, st.data())
def test_global_is_the_sort(keys: list[str], data: st.DataObject) -> None:
    values = {key: data.draw(st.lists(few, max_size=8)) for key in keys}
    scores = {key: torch.tensor(v, dtype=torch.float32) for key, v in values.items()}
    k = data.draw(st.integers(0, sum(map(len, values.values()))))
    exact = {key: s.tolist() for key, s in scores.items()}  # as rounded to float32
    assert lists(keep_global(scores, k)) == select_k(exact, k)
    assert lists(keep_global(dict(reversed(scores.items())), k)) == select_k(exact, k)


def test_ties_lose_by_name_then_index() -> None:
    scores = {"b": torch.zeros(3), "a": torch.zeros(2), "B": torch.zeros(1)}
    kept = keep_global(scores, 2)
    assert lists(kept) == {"B": [False], "a": [False, False], "b": [False, True, True]}


def test_mixed_dtypes_rank_together() -> None:
    scores = {"single": torch.tensor([1.0, 3.0]), "double": torch.tensor([1.0 + 1e-12, 2.0], dtype=torch.float64)}
    assert lists(keep_global(scores, 3)) == {"single": [False, True], "double": [True, True]}


@WAYS
def test_global_above_the_switch(copies: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {
        f"w{i}": torch.randint(-3, 4, (n,), generator=generator).float() for i, n in enumerate((50_000, 7, 40_000))
    }
    exact = {name: s.tolist() for name, s in scores.items()}
    for k in (1, 30_000, 90_006):
        with choosing(copies):
            assert lists(keep_global(scores, k)) == select_k(exact, k)


# --- budgets ---------------------------------------------------------------------------------------------------------

prices = st.sampled_from([1.0, 2.0, 0.5, 3.0, 64.0, 12544.0])


@FAST
@given(names, st.data())
def test_budget_is_the_sort(keys: list[str], data: st.DataObject) -> None:
    scores, costs, exact = {}, {}, {}
    for key in keys:
        values = data.draw(st.lists(few, max_size=8))
        scores[key] = torch.tensor(values, dtype=torch.float32)
        if data.draw(st.booleans()):
            each = data.draw(st.lists(prices, min_size=len(values), max_size=len(values)))
            costs[key], exact[key] = torch.tensor(each), each
        else:
            costs[key] = data.draw(prices)
            exact[key] = [costs[key]] * len(values)
    total = sum(sum(v) for v in exact.values())
    kept = data.draw(st.one_of(st.floats(0, max(total, 1.0)), st.integers(0, int(total)).map(float)))
    got = lists(keep_budget(scores, costs, kept))
    assert got == remove_to_budget({key: s.tolist() for key, s in scores.items()}, exact, kept)
    spent = sum(Fraction(c) for key in keys for c, keep in zip(exact[key], got[key], strict=True) if keep)
    assert spent <= Fraction(kept)


@WAYS
@pytest.mark.parametrize("size", [9, SWITCH + 9])
@pytest.mark.parametrize("cost", [1.0, 2.0])
@pytest.mark.parametrize("kept", [4.0, 4.25, 4.5, 4.999])
def test_a_budget_between_two_counts_is_not_exceeded(size: int, cost: float, kept: float, copies: bool) -> None:
    with choosing(copies):
        mask = keep_budget({"a": torch.arange(float(size))}, {"a": cost}, kept)["a"]
    assert int(mask.sum()) == kept // cost


def test_budget_with_one_cost_per_unit_above_the_switch() -> None:
    generator = torch.Generator().manual_seed(2)
    scores = {
        "a": torch.randint(0, 5, (70_000,), generator=generator).float(),
        "b": torch.rand(50, generator=generator),
    }
    costs = {"a": torch.randint(1, 4, (70_000,), generator=generator), "b": 100.0}
    exact = {"a": costs["a"].tolist(), "b": [100.0] * 50}
    for kept in (12_345.5, 100_000.0):
        want = remove_to_budget({name: s.tolist() for name, s in scores.items()}, exact, kept)
        assert lists(keep_budget(scores, costs, kept)) == want


def test_units_that_cost_nothing() -> None:
    """A layer that the forward never runs has no MACs; its units are in the ranking all the same."""
    scores = {"unused": torch.zeros(3), "used": torch.zeros(3)}
    kept = keep_budget(scores, {"unused": 0.0, "used": 2.0}, 4.0)
    assert int(kept["used"].sum()) == 2


def test_negative_budget() -> None:
    with pytest.raises(SelectionError, match="-1"):
        keep_budget({"a": torch.zeros(2)}, {"a": 1.0}, -1.0)


@FAST
@given(names, st.data())
def test_global_counts_guard_the_floors(keys: list[str], data: st.DataObject) -> None:
    """The best ``floor`` units of each name stay; the rest is one ranking."""
    live = st.sampled_from([0.0, 1.0, 2.0, -1.0, -math.inf])
    units, guarded = {}, {}
    for key in keys:
        values = data.draw(st.lists(live, min_size=1, max_size=6))
        floor = data.draw(st.integers(0, 2))
        units[key] = Units(torch.tensor(values), 1.0, floor)
        best = select_k({"": values}, min(floor, len(values)))[""]
        guarded[key] = [math.inf if b else v for v, b in zip(values, best, strict=True)]
    lowest = sum(min(u.floor, u.scores.numel()) for u in units.values())
    kept = data.draw(st.integers(lowest, sum(u.scores.numel() for u in units.values())))
    want = {key: sum(flags) for key, flags in select_k(guarded, kept).items()}
    assert global_counts(units, kept) == want
    masks = {key: select_k({"": units[key].scores.tolist()}, n)[""] for key, n in want.items()}
    assert masks == select_k(guarded, kept), "selecting that many per name is the global ranking"


# --- groups ----------------------------------------------------------------------------------------------------------


@FAST
@given(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 20]), st.data())  # pairs up to 16, sorts above
def test_groups_are_sorts(m: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(few, min_size=m, max_size=m), min_size=1, max_size=5))
    n = data.draw(st.integers(0, m))
    scores = torch.tensor(rows, dtype=torch.float32)
    kept = keep_in_groups(scores, n)
    assert kept.tolist() == [select_k({"": row}, n)[""] for row in scores.tolist()]


def test_groups_out_of_range_and_nan() -> None:
    with pytest.raises(SelectionError, match="keep 5 of every 4"):
        keep_in_groups(torch.zeros(2, 4), 5)
    with pytest.raises(SelectionError, match="NaN"):
        keep_in_groups(torch.tensor([[0.0, math.nan]]), 1)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, SWITCH + 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_is_refused_by_name_and_index(size: int, dtype: torch.dtype) -> None:
    scores = torch.zeros(size, dtype=dtype)
    scores[7] = math.nan
    scores[3] = math.inf
    with pytest.raises(SelectionError, match=r"fc1\.weight: .*NaN"):
        keep_global({"fc0.weight": torch.zeros(3), "fc1.weight": scores}, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_scores_refuses_what_has_no_rank(bad: float) -> None:
    with pytest.raises(SelectionError, match=rf"w: 1 of 6 .*flat index 4: {bad}"):
        check_scores("w", torch.tensor([[0.0, 1.0, 2.0], [3.0, bad, 5.0]]))


def test_check_scores_accepts_a_sum_that_overflows() -> None:
    scores = torch.full((10,), 3e38)
    assert check_scores("w", scores) is scores


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float64),
        (torch.int32, torch.float64),
        (torch.int8, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_check_scores_widens(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert check_scores("w", torch.ones(3, dtype=dtype)).dtype == wide
