"""Schedules by hand: values, the first and the last update, the clocks, refusals."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError, TargetError
from secateur.schedules import Schedule, cubic, exponential, iterative, linear, one_shot
from secateur.testing import check_schedule


def levels(schedule: Schedule, final: float) -> list[float]:
    return [schedule.level(i, final) for i in range(schedule.updates)]


def test_cubic_by_hand() -> None:
    """0.8 - 0.8 (1 - u)^3 at u = 0, 1/4, 1/2, 3/4, 1."""
    got = levels(cubic(begin=0, end=4), 0.8)
    assert got == pytest.approx([0.0, 0.8 * 37 / 64, 0.8 * 7 / 8, 0.8 * 63 / 64, 0.8], abs=1e-15)


@pytest.mark.parametrize("final", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("intervals", [2, 10, 1000])
def test_cubic_half_way_is_seven_eighths(intervals: int, final: float) -> None:
    assert cubic(begin=100, end=100 + intervals).level(intervals // 2, final) == pytest.approx(final * 7 / 8, rel=1e-12)


def test_cubic_starts_at_the_initial_sparsity() -> None:
    got = levels(cubic(begin=0, end=2, initial=0.4), 0.8)
    assert got == pytest.approx([0.4, 0.75, 0.8])


def test_the_first_and_the_last_update_are_pinned() -> None:
    """Libraries differ by one here: ours has its first update at ``begin`` and its last at ``end``."""
    for make in (linear, exponential, cubic):
        schedule = make(begin=10, end=50, every=10)
        assert schedule.updates == 5
        assert [schedule.step(i, None) for i in range(5)] == [10, 20, 30, 40, 50]
        assert schedule.level(0, 0.9) == 0.0
        assert schedule.level(3, 0.9) < 0.9
        assert schedule.level(4, 0.9) == 0.9


def test_linear_by_hand() -> None:
    assert levels(linear(begin=0, end=4, initial=0.2), 0.6) == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])


def test_exponential_has_equal_factors_of_density() -> None:
    got = levels(exponential(begin=0, end=3), 1 - 0.5**3)
    assert [1 - s for s in got] == pytest.approx([1.0, 0.5, 0.25, 0.125])


def test_exponential_to_everything_jumps_at_the_end() -> None:
    assert levels(exponential(begin=0, end=2, initial=0.5), 1.0) == [0.5, 0.5, 1.0]


def test_iterative_removes_the_same_fraction_of_the_survivors() -> None:
    got = levels(iterative(rounds=5), 1 - 0.8**5)
    assert [1 - s for s in got] == pytest.approx([0.8, 0.8**2, 0.8**3, 0.8**4, 0.8**5])


def test_one_shot() -> None:
    assert levels(one_shot(), 0.9) == [0.9]
    assert one_shot(at=7, unit="steps").step(0, None) == 7


def test_an_initial_sparsity_above_the_final_one_is_not_kept() -> None:
    for make in (linear, exponential, cubic):
        assert levels(make(begin=0, end=3, initial=0.5), 0.3) == pytest.approx([0.3] * 4)


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.sampled_from([linear, exponential, cubic]),
    st.integers(1, 40),
    st.one_of(st.none(), st.floats(0, 0.99)),
    st.floats(0, 1),
)
def test_never_beyond_the_target_and_never_back(make, intervals: int, initial: float | None, final: float) -> None:
    schedule = make(begin=0, end=intervals) if initial is None else make(begin=0, end=intervals, initial=initial)
    got = levels(schedule, final)
    assert got[-1] == final
    assert max(got) <= final
    assert all(b >= a - 1e-12 for a, b in pairwise(got))


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(1, 40), st.floats(0, 1))
def test_iterative_never_beyond_the_target(rounds: int, final: float) -> None:
    got = levels(iterative(rounds=rounds), final)
    assert got[-1] == final
    assert max(got) <= final


# --- clocks ----------------------------------------------------------------------------------------------------------


def test_epochs_become_steps() -> None:
    schedule = linear(begin=1, end=2, every=0.5, unit="epochs")
    assert [schedule.step(i, 20) for i in range(3)] == [20, 30, 40]
    with pytest.raises(TargetError, match="steps_per_epoch"):
        schedule.step(0, None)


def test_rounds_have_no_step() -> None:
    with pytest.raises(TargetError, match="rounds"):
        iterative(rounds=2).step(0, 10)


@pytest.mark.parametrize(("begin", "end", "every", "updates"), [(0, 1, 0.1, 11), (0, 3, 0.3, 11), (5, 6, 1, 2)])
def test_every_divides_the_span_in_floats(begin: float, end: float, every: float, updates: int) -> None:
    check_schedule(linear(begin=begin, end=end, every=every, unit="epochs"), updates=updates, last=end)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"begin": 0, "end": 10, "every": 3}, "divide"),
        ({"begin": 0, "end": 2, "every": 5}, "divide"),
        ({"begin": 5, "end": 5}, "end"),
        ({"begin": 5, "end": 4}, "end"),
        ({"begin": 0, "end": 4, "every": 0}, "every"),
        ({"begin": 0, "end": 4, "every": -1}, "every"),
        ({"begin": 0, "end": 4, "every": math.nan}, "every"),
        ({"begin": -1, "end": 4}, "begin"),
        ({"begin": math.nan, "end": 4}, "begin"),
        ({"begin": 0, "end": math.nan}, "end"),
        ({"begin": 0, "end": math.inf}, "end"),
        ({"begin": 0, "end": 4, "every": math.inf}, "every"),
        ({"begin": 0, "end": 4, "initial": 1.0}, "initial"),
        ({"begin": 0, "end": 4, "initial": -0.1}, "initial"),
        ({"begin": 0, "end": 4, "initial": math.nan}, "initial"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [linear, exponential, cubic])
def test_bad_spans(make, arguments: dict[str, float], field: str) -> None:
    with pytest.raises(TargetError, match=field):
        make(**arguments)


def test_bad_counts() -> None:
    for make in (lambda: iterative(rounds=0), lambda: iterative(rounds=-1), lambda: Schedule("linear", 0)):
        with pytest.raises(TargetError, match="updates must be a whole number of at least 1"):
            make()
    for at in (-1, math.nan, math.inf):
        with pytest.raises(TargetError, match="begin"):
            one_shot(at=at)


def test_unknown_names_are_refused() -> None:
    """A misspelt clock must not silently count steps."""
    with pytest.raises(SecateurError, match="weeks"):
        one_shot(unit="weeks")
    with pytest.raises(SecateurError, match="quartic"):
        Schedule("quartic", 3)
