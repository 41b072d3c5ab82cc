"""Targets by hand: rounding, infeasible ones with the reachable limit (which is then really asked for)."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import TargetError
from secateur.targets import ModelFacts, Target

FACTS = ModelFacts({"a": 600, "b": 300}, parameters=1000)
MACS = ModelFacts({"conv": 100, "fc": 50}, parameters=170, macs={"conv": 6400, "fc": 50}, other_macs=550)


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("sparsity", 0.0, 900),
        ("sparsity", 0.9, 90),
        ("sparsity", 1.0, 0),
        ("sparsity", 1 / 3, 600),
        ("compression_ratio", 1.0, 900),
        ("compression_ratio", 2.0, 400),  # 500 parameters stay, 100 of them not prunable
        ("compression_ratio", 3.0, 233),  # 333.3 may stay: 333 do
        ("compression_ratio", 10.0, 0),
        ("kept_parameters", 1000, 900),
        ("kept_parameters", 999.5, 899),
        ("kept_parameters", 100, 0),
    ],
)
def test_budgets_by_hand(kind: str, value: float, kept: int) -> None:
    budget = Target(kind, value).budget(FACTS)
    assert (budget.kept, budget.total, budget.currency) == (kept, 900, "weights")
    assert budget.cost == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(("value", "removed"), [(0.5, 2), (0.3, 2), (0.7, 4), (0.1, 0), (0.15, 1)])
def test_sparsity_rounds_half_to_even(value: float, removed: int) -> None:
    """5 weights: 2.5 -> 2, 1.5 -> 2, 3.5 -> 4, 0.5 -> 0."""
    assert Target("sparsity", value).budget(ModelFacts({"w": 5}, 5)).kept == 5 - removed


def test_macs_budget_by_hand() -> None:
    budget = Target("macs", 0.5).budget(MACS)
    assert budget.total == 6450
    assert budget.kept == pytest.approx(3500 - 550)
    assert budget.cost == {"conv": 64.0, "fc": 1.0}
    assert budget.currency == "macs"
    assert Target("macs", 0.5).measure(MACS, budget.kept) == pytest.approx(0.5)


def test_macs_must_be_counted() -> None:
    with pytest.raises(TargetError, match="example_inputs"):
        Target("macs", 0.5).budget(FACTS)


@pytest.mark.parametrize(
    ("kind", "kept", "value"),
    [
        ("sparsity", 90, 0.9),
        ("kept_parameters", 90, 190),
        ("compression_ratio", 150, 4.0),
        ("sparsity", 900, 0.0),
        ("compression_ratio", 900, 1.0),
    ],
)
def test_measures_by_hand(kind: str, kept: float, value: float) -> None:
    assert Target(kind, 1.0 if kind != "sparsity" else 0.5).measure(FACTS, kept) == pytest.approx(value)


def test_compression_of_nothing_left_is_infinite() -> None:
    assert Target("compression_ratio", 2.0).measure(ModelFacts({"w": 10}, 10), 0) == math.inf


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(1, 10**9), st.integers(0, 10**6), st.data())
def test_achieved_values_can_be_asked_for(prunable: int, fixed: int, data: st.DataObject) -> None:
    """What a report says was achieved is a target that removes exactly as much, at every size."""
    facts = ModelFacts({"w": prunable}, prunable + fixed)
    kept = data.draw(st.integers(0, prunable))
    for kind in ("sparsity", "kept_parameters", "compression_ratio"):
        value = Target(kind, 1.0).measure(facts, kept)
        if math.isfinite(value):
            assert Target(kind, value).budget(facts).kept == kept


@pytest.mark.parametrize(
    ("prunable", "fixed", "kept"),
    [
        (9_903_317, 3_039_539, 8_774_817),
        (90_366_682, 21_284_054, 81_018_679),
        (3_862_103_443, 364_441_230, 3_586_173_192),
    ],
)
def test_large_models_lose_no_weight_to_floats(prunable: int, fixed: int, kept: int) -> None:
    """P - P/c carries an error of P's last bit, far above any fixed tolerance once P has eight digits."""
    facts = ModelFacts({"w": prunable}, prunable + fixed)
    ratio = Target("compression_ratio", 1.0).measure(facts, kept)
    assert Target("compression_ratio", ratio).budget(facts).kept == kept


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(0, 10**6))
def test_the_smallest_macs_can_be_asked_for(prunable: int, positions: int, other: int) -> None:
    """Floating-point noise must not refuse the limit itself."""
    facts = ModelFacts({"w": prunable}, prunable, {"w": prunable * positions}, other)
    limit = Target("macs", 0.5).measure(facts, 0)
    assert Target("macs", limit).budget(facts).kept == pytest.approx(0.0, abs=1e-6 * facts.macs["w"])


# --- what cannot be reached ------------------------------------------------------------------------------------------

NUMBER = re.compile(r"allow is ([0-9.e+-]+?)\.? Ask")


def limit_of(error: TargetError) -> float:
    found = NUMBER.search(str(error))
    assert found, str(error)
    return float(found.group(1))


@pytest.mark.parametrize("parameters", [1000, 1357, 98_765, 25_557_032])
@pytest.mark.parametrize(("kind", "value"), [("compression_ratio", 1e9), ("kept_parameters", 0)])
def test_the_limit_in_the_message_is_reachable(kind: str, value: float, parameters: int) -> None:
    facts = ModelFacts({"w": parameters - 337}, parameters)
    with pytest.raises(TargetError, match=kind) as refusal:
        Target(kind, value).budget(facts)
    budget = Target(kind, limit_of(refusal.value)).budget(facts)
    assert budget.kept <= 1e-3 * parameters, "and it is the limit: next to nothing is left"


@pytest.mark.parametrize("other", [1, 337, 123_457, 98_765_431])
def test_the_smallest_macs_in_the_message_are_reachable(other: int) -> None:
    facts = ModelFacts({"w": 999}, 999, {"w": 999_000_001}, other)
    with pytest.raises(TargetError, match="macs") as refusal:
        Target("macs", 0.0).budget(facts)
    assert Target("macs", limit_of(refusal.value)).budget(facts).kept >= 0


def test_more_parameters_than_there_are() -> None:
    with pytest.raises(TargetError, match="only 1000 parameters"):
        Target("kept_parameters", 1001).budget(FACTS)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1])
@pytest.mark.parametrize("kind", ["sparsity", "kept_parameters", "compression_ratio", "macs"])
def test_values_that_are_no_target(kind: str, value: float) -> None:
    with pytest.raises(TargetError, match=rf"{kind} must lie in \["):
        Target(kind, value)


@pytest.mark.parametrize(("kind", "value"), [("sparsity", 1.1), ("macs", 1.5), ("compression_ratio", 0.5)])
def test_values_out_of_range(kind: str, value: float) -> None:
    with pytest.raises(TargetError, match=str(value)):
        Target(kind, value)


def test_unknown_kinds_name_the_nearest() -> None:
    with pytest.raises(TargetError, match="did you mean 'sparsity'"):
        Target("sparcity", 0.5)
    with pytest.raises(TargetError, match=r"valid: .*'kept_parameters'"):
        Target("x", 0.5)
