"""Moves by themselves: counts that never change, the published update in NumPy, phases, and refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import RecipeError, UnknownNameError
from secateur.testing import check_dynamics
from secateur.training import ACDC, SET, GraNet, RigL, SoftFilter, Static
from secateur.types import Connections, Move, Turn

FAST = settings(max_examples=100, deadline=None, database=None)


def turn(units: dict[str, Connections], time: int) -> Turn:
    def same(flags: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(flags)

    return Turn(time, 0.5, units, lambda level: {n: u.active for n, u in units.items()}, same, same)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Connections]:
    """Layers of any size, one element too; values full of ties, all zero at times; any number active, all too."""
    out = {}
    for i in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 30))
        values = st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.5]), min_size=n, max_size=n)
        zeros = st.just([0.0] * n)
        flags = st.lists(st.booleans(), min_size=n, max_size=n) | st.just([True] * n)
        active = torch.tensor(draw(flags))
        sizes, gradients = (torch.tensor(draw(values | zeros)) for _ in range(2))
        out[f"w{i}"] = Connections(sizes * active, active, gradients)
    return out


@FAST
@given(layers(), st.floats(0.0, 1.0), st.integers(1, 99))
def test_no_layer_gains_or_loses_a_unit(units: dict[str, Connections], fraction: float, time: int) -> None:
    for dynamics in (RigL(end=100, every=1, fraction=fraction), SET(3, fraction, unit="steps")):
        move = dynamics.update(turn(units, time))
        for name, unit in units.items():
            active, had = move.masks[name], unit.active
            assert int(active.sum()) == int(had.sum())
            gone, new = had & ~active, active & ~had
            assert torch.equal(move.zero[name], new)
            assert torch.equal(move.clear[name], new)
            now = dynamics.fraction_at(time) if isinstance(dynamics, RigL) else fraction
            assert int(gone.sum()) <= now * int(had.sum()) + 1e-9
            if bool(gone.any()):  # nothing that stays is smaller than what goes, unless it was dropped and grew again
                dropped = math.floor(now * int(had.sum()) + 1e-9)
                assert float(unit.sizes[gone].max()) <= float(unit.sizes[had].sort().values[dropped - 1])


def literal_update(w: np.ndarray, mask: np.ndarray, g: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The paper's update of one layer, flat: which weights are active afterwards, and which of them are new."""
    active = np.flatnonzero(mask)
    k = int(fraction * active.size + 1e-9)
    smallest = active[np.argsort(np.abs(w[active]), kind="stable")[:k]]
    stay = np.setdiff1d(active, smallest)
    others = np.setdiff1d(np.arange(w.size), stay)
    grow = others[np.argsort(np.abs(g[others]), kind="stable")[others.size - k :]]
    after = np.zeros(w.size, dtype=bool)
    after[stay] = after[grow] = True
    return after, after & ~mask


@FAST
@given(st.integers(1, 60), st.integers(0, 2**20), st.integers(1, 99), st.floats(0.0, 1.0), st.booleans())
def test_rigl_is_the_published_update(n: int, seed: int, time: int, fraction: float, ties: bool) -> None:
    random = np.random.default_rng(seed)
    mask = random.random(n) < random.random()
    w, g = random.normal(size=(2, n))
    if ties:
        w, g = w.round(), g.round()
    w = w * mask
    units = {"w": Connections(torch.tensor(w).abs(), torch.tensor(mask), torch.tensor(g).abs())}
    rigl = RigL(end=100, every=1, fraction=fraction)
    move = rigl.update(turn(units, time))
    now = fraction / 2 * (1 + math.cos(time * math.pi / 100))
    after, new = literal_update(w, mask, g, now)
    assert move.masks["w"].tolist() == after.tolist()
    assert move.zero["w"].tolist() == new.tolist()


def test_the_fraction_falls_along_a_cosine() -> None:
    rigl = RigL(end=1000, fraction=0.3)
    assert rigl.fraction_at(0) == pytest.approx(0.3)
    assert rigl.fraction_at(500) == pytest.approx(0.15)
    assert rigl.fraction_at(1000) == pytest.approx(0.0, abs=1e-15)
    assert rigl.fraction_at(250) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    late = RigL(end=1200, begin=200, fraction=0.3)  # measured from its own beginning
    assert [late.fraction_at(t + 200) for t in (0, 250, 500)] == [rigl.fraction_at(t) for t in (0, 250, 500)]


def test_when_rigl_moves() -> None:
    assert [t for t in range(1000) if RigL(end=400).due(t)] == [100, 200, 300]
    assert [t for t in range(1000) if RigL(end=401).due(t)] == [100, 200, 300, 400]
    assert [t for t in range(1000) if RigL(end=400, begin=150).due(t)] == [150, 250, 350]
    assert RigL(end=400, begin=150).last == 350


def test_by_hand() -> None:
    """Of four active weights the smallest goes; the largest gradient is at one that was never active."""
    sizes = torch.tensor([5.0, 1.0, 3.0, 4.0, 0.0, 0.0])
    active = torch.tensor([True, True, True, True, False, False])
    units = {"w": Connections(sizes, active, torch.tensor([9.0, 0.1, 9.0, 9.0, 0.2, 0.3]))}
    move = RigL(end=2, every=1, fraction=0.5).update(turn(units, 1))
    assert move.masks["w"].tolist() == [True, False, True, True, False, True]
    assert move.zero["w"].tolist() == [False, False, False, False, False, True]
    back = {"w": replace(units["w"], gradients=torch.tensor([0.0, 0.9, 0.0, 0.0, 0.2, 0.3]))}
    move = RigL(end=2, every=1, fraction=0.5).update(turn(back, 1))
    assert torch.equal(move.masks["w"], active), "dropped, and grown again"
    assert not bool(move.zero["w"].any()), "so it has never left"


def test_set_draws_evenly_and_depends_on_seed_time_and_name() -> None:
    n = 40
    active = torch.arange(n) < 20
    units = {"w": Connections(torch.arange(n) * active * 1.0, active, torch.empty(0))}
    drawn = torch.zeros(n)
    for time in range(1, 2001):
        drawn += SET(0, unit="steps").update(turn(units, time)).masks["w"]
    # 6 of the 26 that do not stay, 2000 times: 461.5 on average, standard deviation 18.8
    assert bool((drawn[6:20] == 2000).all())
    assert float((torch.cat([drawn[:6], drawn[20:]]) - 2000 * 6 / 26).abs().max()) < 5 * 18.8
    move = SET(0).update(turn(units, 1)).masks["w"]
    assert torch.equal(move, SET(0).update(turn(units, 1)).masks["w"])
    assert not torch.equal(move, SET(1).update(turn(units, 1)).masks["w"])
    assert not torch.equal(move, SET(0).update(turn(units, 2)).masks["w"])
    assert not torch.equal(move, SET(0).update(turn({"v": units["w"]}, 1)).masks["v"])


def test_the_phases_of_the_paper() -> None:
    sparse = [time for time, kind in ACDC().phases if kind == "sparse"]
    dense = [time for time, kind in ACDC().phases if kind == "dense"]
    assert sparse == [10, 20, 30, 40, 50, 60, 70, 85]
    assert dense == [15, 25, 35, 45, 55, 65, 75]
    assert [t for t in range(200) if ACDC().due(t)] == sorted(sparse + dense)


@pytest.mark.parametrize(
    ("plan", "sparse", "dense"),
    [
        (ACDC(total=150), [*range(10, 121, 10), 135], [*range(15, 116, 10), 125]),
        (ACDC(total=200), [*range(10, 171, 10), 185], [*range(15, 166, 10), 175]),
        (ACDC(200, 10, 20, 20, 20, 30), [10, 50, 90, 130, 170], [30, 70, 110, 150]),
    ],
    ids=["ImageNet, 150", "ImageNet, 200", "CIFAR-100"],
)
def test_the_longer_trainings_of_the_authors(plan: ACDC, sparse: list[int], dense: list[int]) -> None:
    assert [time for time, kind in plan.phases if kind == "sparse"] == sparse
    assert [time for time, kind in plan.phases if kind == "dense"] == dense


@FAST
@given(*(st.integers(1, 6) for _ in range(5)), st.integers(0, 4))
def test_phases_fill_the_total_and_nothing_else_does(
    warm_up: int, sparse: int, dense: int, last_dense: int, last_sparse: int, pairs: int
) -> None:
    lengths = [("dense", warm_up), *[("sparse", sparse), ("dense", dense)] * pairs]
    lengths += [("sparse", sparse), ("dense", last_dense), ("sparse", last_sparse)]
    days = [kind for kind, length in lengths for _ in range(length)]
    plan = ACDC(len(days), warm_up, sparse, dense, last_dense, last_sparse)
    begins = [(day, kind) for day, kind in enumerate(days) if day and kind != days[day - 1]]
    assert list(plan.phases) == begins
    with pytest.raises(RecipeError, match=rf"do not fill total={len(days) + 1}.* fit {len(days)} or "):
        ACDC(len(days) + 1, warm_up, sparse, dense, last_dense, last_sparse)


def test_phases_that_cannot_fit() -> None:
    with pytest.raises(RecipeError, match=r"fit 40; change total"):
        ACDC(total=30)
    for field in ("warm_up", "sparse", "dense", "last_dense", "last_sparse"):
        with pytest.raises(RecipeError, match=f"{field} must be a whole number of at least 1"):
            ACDC(**{field: 0})


def test_when_soft_filters_are_zeroed() -> None:
    assert [t for t in range(99) if SoftFilter(end=7, every=3).due(t)] == [3, 6, 7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RigL(end=1000, fraction=1.5), "rigl: fraction must be a number of at least 0 and at most 1, got 1.5"),
        (lambda: RigL(end=1000, fraction=-0.1), "rigl: fraction must be a number of at least 0 and at most 1"),
        (lambda: RigL(end=1000, fraction=math.nan), "rigl: fraction must be a number of at least 0 and at most 1"),
        (lambda: RigL(end=1000, every=0), "every must be a whole number of at least 1, got 0"),
        (lambda: RigL(end=1000, every=2.5), "every must be a whole number of at least 1, got 2.5"),
        (lambda: RigL(end=100), "every=100 no move falls before end=100"),
        (lambda: RigL(end=100, begin=100, every=1), "begin=100 .* no move falls before end=100"),
        (lambda: RigL(end=100, begin=-1), "begin must be a whole number of at least 0"),
        (lambda: SET(0, fraction=2.0), "fraction must be a number of at least 0 and at most 1"),
        (lambda: SET(0, every=0), "every must be"),
        (lambda: SET(0, every=5, end=4), "no interval of every=5 ends by end=4"),
        (lambda: SET(-1), "seed must be"),
        (lambda: GraNet(end=10, every=3), "does not divide"),
        (lambda: GraNet(end=0), "end must be"),
        (lambda: GraNet(end=10, fraction=7), "fraction must be a number of at least 0 and at most 1"),
        (lambda: SoftFilter(end=1), "no interval of every=1 ends before end=1"),
        (lambda: SoftFilter(end=4, every=0), "every must be"),
    ],
)
def test_options_that_make_no_sense(make: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize("make", [RigL, SoftFilter, GraNet], ids=lambda m: m.__name__)
def test_an_unknown_clock(make: type) -> None:
    with pytest.raises((UnknownNameError, RecipeError), match="unit"):
        make(end=500, unit="rounds" if make is not GraNet else "hours")


# --- the laws catch --------------------------------------------------------------------------------------------------


class Bad(RigL):
    """RigL with one thing changed by a test."""


def spoiled(change: object) -> Bad:
    bad = Bad(end=4, every=1)
    object.__setattr__(bad, "update", lambda m: change(RigL(end=4, every=1).update(m), m))
    return bad


LAWS = {
    "old momentum": lambda move, m: replace(move, clear={}),
    "keeps 1 units|keeps .* level": lambda move, m: replace(move, masks={**move.masks, "a": ~move.masks["a"]}),
    "beyond the target": lambda move, m: replace(move, level=0.9),
    "fit no weight": lambda move, m: replace(move, zero={"nobody": torch.ones(3, dtype=torch.bool)}),
    "changes its turn": lambda move, m: (m.units["a"].sizes.add_(1), move)[1],
    "another move": lambda move, m: replace(move, zero={n: torch.rand(t.shape) < 0.5 for n, t in move.zero.items()}),
    "units and had": lambda move, m: Move(_shifted(move.masks), move.level, clear=_all(move.masks)),
}


def _shifted(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """One unit fewer in one layer and one more in another."""
    out = {n: m.clone() for n, m in masks.items()}
    out["a"].view(-1)[int(out["a"].flatten().nonzero()[0])] = False
    other = next(n for n in ("b", "zero") if not bool(out[n].all()))
    out[other].view(-1)[int((~out[other]).flatten().nonzero()[0])] = True
    return out


def _all(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.ones_like(m) for n, m in masks.items()}


@pytest.mark.parametrize("law", LAWS)
def test_a_broken_law_is_found(law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_dynamics(spoiled(LAWS[law]))


def test_times_that_contradict_each_other_are_found() -> None:
    late, short, early = Bad(end=4, every=1), Bad(end=4, every=1), Bad(end=4, every=1)
    never = SET(0, unit="steps")
    object.__setattr__(late, "due", lambda time: time > 0)
    object.__setattr__(short, "due", lambda time: False)
    object.__setattr__(early, "due", lambda time: True)
    object.__setattr__(never, "due", lambda time: False)
    messages = {"is due after 3": late, "is not due at 3": short, "is due at 0": early, "is never due": never}
    for message, bad in messages.items():
        with pytest.raises(AssertionError, match=message):
            check_dynamics(bad)
    check_dynamics(Static())
