"""Options that are no numbers, or out of range, are refused by name before anything runs: no bare TypeError, no NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from secateur import Pruner, Target
from secateur.ablations import RandomMasks, Reinitialise, Shuffle, SmallerDense
from secateur.errors import CheckpointError, RecipeError, SecateurError, TargetError, WeightError, check_number
from secateur.penalties import L1, Chauvin, GroupNorm, Growing, Penalised, PenalisedActivity, ScaleL1, WeightElimination
from secateur.recover import FineTune, LearningRateRewinding, SoftTargets, WeightRewinding
from secateur.schedules import cubic, iterative, one_shot
from secateur.training import (
    L0,
    SET,
    GraNet,
    Movement,
    Reparametrised,
    RigL,
    SoftFilter,
    SoftMovement,
    SparseTraining,
    VariationalDropout,
)

NUMBERS: dict[str, Callable[[Any], object]] = {
    "scale_l1: strength": lambda v: ScaleL1(v),
    "recover.lr": lambda v: FineTune(2, lr=v),
    "distill: weight": lambda v: SoftTargets(v),
    "distill: temperature": lambda v: SoftTargets(temperature=v),
    "l0: dropped": lambda v: L0(dropped=v),
    "soft_movement: threshold": lambda v: SoftMovement(threshold=v),
    "movement: sparsity": lambda v: Movement(v),
    "variational_dropout: threshold": lambda v: VariationalDropout(threshold=v),
    "variational_dropout: limit": lambda v: VariationalDropout(limit=v),
    "rigl: fraction": lambda v: RigL(end=1000, fraction=v),
    "schedule: begin": lambda v: one_shot(at=v),
    "schedule: end": lambda v: cubic(begin=0, end=v),
}
WHOLE: dict[str, Callable[[Any], object]] = {
    "recover.epochs": lambda v: FineTune(v),
    "recover.epochs ": lambda v: LearningRateRewinding(v),
    "recover.rewind_to": lambda v: WeightRewinding(rewind_to=v),
    "smaller_dense: align": lambda v: SmallerDense(align=v),
    "smaller_dense: seed": lambda v: SmallerDense(seed=v),
    "shuffle: seed": lambda v: Shuffle(v),
    "random_masks: seed": lambda v: RandomMasks(v),
    "reinitialise: seed": lambda v: Reinitialise(v),
    "schedule: the number of updates": lambda v: iterative(rounds=v),
    "group_norm: every": lambda v: GroupNorm(every=v),
    "growing: every": lambda v: Growing(every=v),
    "weight_elimination: every": lambda v: WeightElimination(every=v),
    "variational_dropout: warm_up": lambda v: VariationalDropout(warm_up=v),
    "set: seed": lambda v: SET(v),
    "soft_filter: end": lambda v: SoftFilter(end=v),
    "granet: every": lambda v: GraNet(end=12, every=v),
}


@pytest.mark.parametrize("value", ["1", True, math.nan, math.inf, [1]], ids=repr)
@pytest.mark.parametrize("what", [*NUMBERS, *WHOLE])
def test_what_is_no_number_is_refused_by_name(what: str, value: Any) -> None:
    with pytest.raises(SecateurError, match=f"{what.strip()}.* must be a .*number.*got "):
        (NUMBERS | WHOLE)[what](value)


@pytest.mark.parametrize("what", WHOLE)
def test_a_half_is_no_whole_number(what: str) -> None:
    with pytest.raises(SecateurError, match=f"{what.strip()}.* must be a whole number of at least [01], got 1.5"):
        WHOLE[what](1.5)


def test_the_range_is_said() -> None:
    for options, inside, outside, words in (
        ({}, (0, 0.0, 5), (-1e-9, -1), "of at least 0, got"),
        ({"above": True}, (1e-9,), (0, -1), "above 0, got"),
        ({"most": 1.0}, (0, 1), (1.1, -1), "of at least 0 and at most 1, got"),
        ({"above": True, "most": 1.0, "below": True}, (0.5,), (0, 1), "above 0 and below 1, got"),
        ({"least": -math.inf, "most": 0.0, "below": True}, (-7,), (0, 1), "must be a number below 0, got"),
        ({"least": -math.inf}, (-7, 7), (-math.inf,), "must be a finite number, got"),
    ):
        for value in inside:
            check_number("x", value, **options)
        for value in outside:
            with pytest.raises(RecipeError, match=words):
                check_number("x", value, **options)
    with pytest.raises(TargetError):
        check_number("x", -1, error=TargetError)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_a_class_is_no_part() -> None:
    for build, word in (
        (lambda: Penalised(net(), L1), "a Penalty such as"),
        (lambda: Penalised(net(), Chauvin), "a Penalty such as"),
        (lambda: PenalisedActivity(net(), Chauvin), "an ActivityPenalty such as"),
        (lambda: Reparametrised(net(), L0), "a Parametrisation such as"),
    ):
        with pytest.raises(RecipeError, match=f"expected {word}"):
            build()


def test_a_pattern_that_is_a_text_or_matches_nothing() -> None:
    with pytest.raises(RecipeError, match=r"include must be a list, got '0.weight'; write \['0.weight'\]"):
        L1(include="0.weight")
    with pytest.raises(WeightError, match="'norms' of a penalty matches no parameter"):
        Penalised(net(), ScaleL1(exclude=("norms",)))
    with pytest.raises(WeightError, match="leave no parameter"):
        Penalised(net(), ScaleL1(exclude=("1",)))


@pytest.mark.parametrize("bad", [None, 3, {"masks": None}, {"steps": "3"}, {"steps": -1}], ids=repr)
@pytest.mark.parametrize("make", [Pruner, lambda *a: SparseTraining(*a, RigL(end=1000))], ids=["pruner", "training"])
def test_states_that_are_none_are_refused(make: Any, bad: Any) -> None:
    model = net()
    loop = make(model, Target("sparsity", 0.5))
    state = loop.state_dict() | bad if isinstance(bad, dict) else bad
    with pytest.raises(CheckpointError):
        loop.load_state_dict(state)
    assert not loop.masks
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
