"""The laws of each axis, over every registered part."""

import pytest

import cases
from secateur.ablations import ABLATIONS
from secateur.allocate import ALLOCATIONS
from secateur.errors import RecipeError
from secateur.method import Method
from secateur.patterns import PATTERNS, UNIT_PATTERNS
from secateur.penalties import PENALTIES
from secateur.recover import DISTILLATIONS
from secateur.registry import Registry
from secateur.schedules import SCHEDULES
from secateur.scores import GROUP_SCORES, SCORES
from secateur.solvers import SOLVERS
from secateur.targets import Target
from secateur.testing import (
    check_ablation,
    check_activity_penalty,
    check_allocation,
    check_dynamics,
    check_group_score,
    check_parametrisation,
    check_pattern,
    check_penalty,
    check_schedule,
    check_score,
    check_solver,
)
from secateur.training import DYNAMICS, PARAMETRISATIONS
from secateur.types import (
    Ablation,
    ActivityPenalty,
    Allocation,
    Dynamics,
    GroupScore,
    Parametrisation,
    Pattern,
    Penalty,
    Score,
    Solver,
    UnitPattern,
)

REGISTRIES: dict[str, Registry] = {
    "ablation": ABLATIONS,
    "distill": DISTILLATIONS,
    "score": SCORES,
    "group score": GROUP_SCORES,
    "penalty": PENALTIES,
    "parametrisation": PARAMETRISATIONS,
    "dynamics": DYNAMICS,
    "pattern": PATTERNS,
    "unit pattern": UNIT_PATTERNS,
    "solver": SOLVERS,
    "allocate": ALLOCATIONS,
    "schedule": SCHEDULES,
}


@pytest.mark.parametrize("axis", REGISTRIES)
def test_registry_and_table_name_the_same_parts(axis: str) -> None:
    registered, listed = set(REGISTRIES[axis]), {case.name for case in cases.CASES[axis]}
    assert not registered - listed, "registered without a row in tests/cases.py"
    assert not listed - registered, "rows in tests/cases.py that nothing is registered for"


def test_every_axis_has_a_table() -> None:
    assert cases.CASES.keys() == REGISTRIES.keys()
    assert {axis: registry.axis for axis, registry in REGISTRIES.items()} == {axis: axis for axis in REGISTRIES}


@pytest.mark.parametrize("case", cases.SCORES, ids=str)
def test_score(case: cases.Case) -> None:
    score = SCORES[case.name](**case.kwargs)
    assert isinstance(score, Score)
    check_score(score, **case.notes)


@pytest.mark.parametrize("case", cases.GROUP_SCORES, ids=str)
def test_group_score(case: cases.Case) -> None:
    score = GROUP_SCORES[case.name](**case.kwargs)
    assert isinstance(score, GroupScore)
    check_group_score(score)


@pytest.mark.parametrize("case", cases.PATTERNS, ids=str)
def test_pattern(case: cases.Case) -> None:
    pattern = PATTERNS[case.name](**case.kwargs)
    assert isinstance(pattern, Pattern)
    check_pattern(pattern)


@pytest.mark.parametrize("case", cases.PENALTIES, ids=str)
def test_penalty(case: cases.Case) -> None:
    penalty = PENALTIES[case.name](**case.kwargs)
    assert isinstance(penalty, Penalty) != isinstance(penalty, ActivityPenalty)
    if isinstance(penalty, ActivityPenalty):
        check_activity_penalty(penalty)
    else:
        check_penalty(penalty)


@pytest.mark.parametrize("case", cases.PARAMETRISATIONS, ids=str)
def test_parametrisation(case: cases.Case) -> None:
    parametrisation = PARAMETRISATIONS[case.name](**case.kwargs)
    assert isinstance(parametrisation, Parametrisation)
    check_parametrisation(parametrisation)


@pytest.mark.parametrize("case", cases.ABLATIONS, ids=str)
def test_ablation(case: cases.Case) -> None:
    ablation = ABLATIONS[case.name](**case.kwargs)
    assert isinstance(ablation, Ablation) is not case.notes.get("trains_apart", False)
    if isinstance(ablation, Ablation):
        check_ablation(ablation)


@pytest.mark.parametrize("case", cases.SOLVERS, ids=str)
def test_solver(case: cases.Case) -> None:
    solver = SOLVERS[case.name](**case.kwargs)
    assert isinstance(solver, Solver)
    check_solver(solver)


@pytest.mark.parametrize("case", cases.UNIT_PATTERNS, ids=str)
def test_unit_pattern(case: cases.Case) -> None:
    pattern = UNIT_PATTERNS[case.name](**case.kwargs)
    assert isinstance(pattern, UnitPattern)
    assert not isinstance(pattern, Pattern)
    assert pattern.unit == case.name
    with pytest.raises(RecipeError, match="masks do not know"):
        _ = Method(target=Target("sparsity", 0.5), pattern=pattern).masking


@pytest.mark.parametrize("case", cases.ALLOCATIONS, ids=str)
def test_allocation(case: cases.Case) -> None:
    allocation = ALLOCATIONS[case.name](**case.kwargs)
    assert isinstance(allocation, Allocation)
    check_allocation(allocation)


@pytest.mark.parametrize("case", cases.DYNAMICS, ids=str)
def test_dynamics(case: cases.Case) -> None:
    dynamics = DYNAMICS[case.name](**case.kwargs)
    assert isinstance(dynamics, Dynamics)
    check_dynamics(dynamics)


@pytest.mark.parametrize("case", cases.SCHEDULES, ids=str)
def test_schedule(case: cases.Case) -> None:
    check_schedule(SCHEDULES[case.name](**case.kwargs), **case.notes)


@pytest.mark.parametrize("axis", REGISTRIES)
def test_parts_are_values(axis: str) -> None:
    """Built twice alike, equal and hashable, and shown with their arguments: a recipe and a report rely on it."""
    for case in cases.CASES[axis]:
        one, two = (REGISTRIES[axis][case.name](**case.kwargs) for _ in range(2))
        assert one == two
        assert hash(one) == hash(two)
        assert type(one).__name__ in repr(one)
