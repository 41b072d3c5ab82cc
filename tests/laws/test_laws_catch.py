"""Broken parts must break a law: what a law lets through, a plug-in will ship."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from secateur.ablations import Shuffle
from secateur.allocate import Global
from secateur.patterns import NM, Block, Unstructured
from secateur.schedules import Schedule
from secateur.testing import (
    check_ablation,
    check_allocation,
    check_parametrisation,
    check_pattern,
    check_schedule,
    check_score,
)
from secateur.training import L0, Movement, SoftThreshold
from secateur.types import Masks, Moment, Stats, Tensors, Units, Weight


@dataclass(frozen=True)
class FakeScore:
    function: Callable[[Tensors], dict[str, Tensor]]
    needs: frozenset[str] = frozenset()

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        return self.function(weights)


BAD_SCORES = {
    "scored": lambda ws: {name: w.float() for name, w in ws.items() if name != "one.weight"},
    "shape": lambda ws: {name: w.float().flatten() for name, w in ws.items()},
    "dtype": lambda ws: {name: w.abs() for name, w in ws.items()},
    "not finite": lambda ws: {name: w.float().abs().log() for name, w in ws.items()},
    "changed the weight": lambda ws: {name: w.mul_(2).float() for name, w in ws.items()},
    "second call": lambda ws: {name: torch.rand(w.shape) for name, w in ws.items()},
    "order of the dict": lambda ws: {name: w.float() + i for i, (name, w) in enumerate(ws.items())},
    "in float32 or better": lambda ws: {name: (w * w).float() for name, w in ws.items()},
    "permuting": lambda ws: {name: w.float() * torch.arange(w.shape[-1]) for name, w in ws.items()},
}


@pytest.mark.parametrize("law", BAD_SCORES)
def test_bad_score(law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_score(FakeScore(BAD_SCORES[law]))


class OffByOne(Unstructured):
    def select(self, weight: Weight, scores: Tensor, keep: int) -> Tensor:
        return scores >= scores.sort(descending=True).values[max(keep - 1, 0)]  # the threshold of the reference code


class HighestIndexFirst(Unstructured):
    def select(self, weight: Weight, scores: Tensor, keep: int) -> Tensor:
        kept = torch.zeros(scores.numel(), dtype=torch.bool)
        kept[scores.sort(descending=True, stable=True).indices[:keep]] = True
        return kept


class WrongOrder(Unstructured):
    def expand(self, weight: Weight, kept: Tensor) -> Masks:
        return {weight.name: kept.flip(0).reshape(weight.shape)}


class ForgetsEdges(Block):
    def sizes(self, weight: Weight) -> int:
        return self.rows * self.cols


class Leaky(Unstructured):
    def reduce(self, weight: Weight, values: Tensor) -> Tensor:
        flat = values.reshape(-1)
        return flat if flat.dtype == torch.bool else flat / flat.abs().sum()


BAD_PATTERNS = {
    "select kept": OffByOne(),
    "last in the order": HighestIndexFirst(),
    "score of unit 0 depends": WrongOrder(),
    "elements, sizes says": ForgetsEdges(4, 4),
    "depends on elements outside": Leaky(),
}


@pytest.mark.parametrize("law", BAD_PATTERNS)
def test_bad_pattern(law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_pattern(BAD_PATTERNS[law])


def test_a_pattern_must_accept_something() -> None:
    with pytest.raises(AssertionError, match="refuses every layout"):
        check_pattern(NM(1, 1000))


@pytest.mark.parametrize("curve", ["overshoot", "short", "wavy"])
def test_bad_schedule(curve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {
        "overshoot": lambda i, n, final: final * 2 * (1 - i / (2 * n - 2)),  # falls to the target from twice of it
        "short": lambda i, n, final: final * i / n,
        "wavy": lambda i, n, final: final if i == n - 1 else final * (i % 2) / 2,
    }
    monkeypatch.setattr(Schedule, "level", lambda self, i, final: levels[curve](i, self.updates, final))
    with pytest.raises(AssertionError, match=r"falls|ends at"):
        check_schedule(Schedule("linear", 5))


def test_schedule_facts_are_checked() -> None:
    good = Schedule("linear", 5, begin=2)
    check_schedule(good, updates=5, last=6)
    with pytest.raises(AssertionError, match="expected 4"):
        check_schedule(good, updates=4)
    with pytest.raises(AssertionError, match="last update"):
        check_schedule(good, last=7)


def overspends(units: Mapping[str, Units], kept: float) -> dict[str, int]:
    return {name: n + (n < units[name].scores.numel()) for name, n in Global()(units, kept).items()}


def underspends(units: Mapping[str, Units], kept: float) -> dict[str, int]:
    return {name: max(min(u.floor, u.scores.numel()), n - 1) for (name, u), n in _with(units, kept)}


def no_floors(units: Mapping[str, Units], kept: float) -> dict[str, int]:
    return Global()({name: replace(u, floor=0) for name, u in units.items()}, kept)


def first_come(units: Mapping[str, Units], kept: float) -> dict[str, int]:
    """Fill the layers in the order of the dict."""
    out = {}
    reserve = sum(min(u.floor, u.scores.numel()) * float(torch.as_tensor(u.cost).max()) for u in units.values())
    spare = kept - reserve
    for name, u in units.items():
        floor, cost = min(u.floor, u.scores.numel()), float(torch.as_tensor(u.cost).max())
        out[name] = floor + min(u.scores.numel() - floor, max(int(spare // cost), 0))
        spare -= (out[name] - floor) * cost
    return out


def _with(units: Mapping[str, Units], kept: float) -> list[tuple[tuple[str, Units], int]]:
    counts = Global()(units, kept)
    return [((name, u), counts[name]) for name, u in units.items()]


BAD_ALLOCATIONS = {
    "which costs": overspends,
    "unit costs can meet it": underspends,
    "not in 1..": no_floors,
    "order of the dict": first_come,
    "counts for": lambda units, kept: {},
}


@pytest.mark.parametrize("law", BAD_ALLOCATIONS)
def test_bad_allocation(law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_allocation(BAD_ALLOCATIONS[law])


class Bad(Shuffle):
    """A shuffle that breaks one law."""

    def __init__(self, law: str) -> None:
        super().__init__()
        object.__setattr__(self, "law", law)

    def masks(self, weights, pattern, masks, previous):
        if self.law == "came back":
            return super().masks(weights, pattern, masks, None)
        if self.law == "changes its arguments":
            next(iter(masks.values())).fill_(True)
        out = super().masks(weights, pattern, masks, previous)
        if self.law == "not the same twice":
            object.__setattr__(self, "seed", self.seed + 1)
        if self.law == "keeps .*, not ":
            out = {name: torch.ones_like(mask) for name, mask in out.items()}
        if self.law == "breaks up units" and type(pattern).__name__ == "Channel":
            out = {n: m.flatten()[torch.arange(m.numel()).flip(0)].view(m.shape).roll(1, -1) for n, m in out.items()}
        if self.law == "masks .*, not ":
            out = {f"{name}x": mask for name, mask in out.items()}
        if self.law == "of every" and type(pattern).__name__ == "NM":
            out = {n: m.flatten().sort(descending=True).values.view(m.shape) for n, m in out.items()}
        return out


@pytest.mark.parametrize(
    "law",
    [
        "came back",
        "changes its arguments",
        "not the same twice",
        "keeps .*, not ",
        "breaks up units",
        "masks .*, not ",
        "of every",
    ],
)
def test_bad_ablation(law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_ablation(Bad(law))


class NearlyZero(L0):
    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        weights, masks = super().final(at)
        return {n: torch.where(masks[n], w, 1e-9) for n, w in weights.items()}, masks


class NegativeZero(Movement):
    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        masks = super().final(at)[1]
        return {n: at.weights[n] * m for n, m in masks.items()}, masks


class GlobalNoise(L0):
    def weights(self, at: Moment, noise: torch.Generator | None) -> dict[str, Tensor]:
        return {n: w + torch.rand(()).to(w) for n, w in super().weights(at, noise).items()}


class NoGradient(SoftThreshold):
    def weights(self, at: Moment, noise: torch.Generator | None) -> dict[str, Tensor]:
        return {n: at.weights[n] * (w != 0) for n, w in super().weights(at, noise).items()}

    def penalty(self, at: Moment) -> Tensor:
        return torch.zeros(())


class OtherInTheEnd(SoftThreshold):
    def asked(self, step: int | None) -> float | None:
        return 0.5


class InPlace(L0):
    def advance(self, at: Moment) -> dict[str, Tensor]:
        return {n: t.data.clamp_(-0.1, 0.1) for n, t in at.latents.items()}


class HalfLatents(Movement):
    def start(self, weights: Tensors, layouts: Mapping[str, Weight], noise: torch.Generator) -> dict[str, Tensor]:
        return {n: torch.zeros_like(weights[n], dtype=torch.bfloat16) for n in layouts}


BAD_PARAMETRISATIONS = {
    "a pruned weight is not zero": NearlyZero(),
    "-0.0": NegativeZero(),
    "not the same every time": GlobalNoise(),
    "no gradient reaches the latent": NoGradient(),
    "asked for 0.5": OtherInTheEnd(),
    "changes its arguments": InPlace(),
    "half precision rounds updates": HalfLatents(),
}


@pytest.mark.parametrize("law", BAD_PARAMETRISATIONS)
def test_bad_parametrisation(law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_parametrisation(BAD_PARAMETRISATIONS[law])
