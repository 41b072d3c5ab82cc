"""One value on each axis: what a pruning method is, and the masks that it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.allocate import Global, Layerwise
from secateur.errors import RecipeError, SelectionError, TargetError, WeightError
from secateur.patterns import Unstructured
from secateur.prunable import matches
from secateur.schedules import Schedule, one_shot
from secateur.scores import Magnitude
from secateur.select import check_scores, cost_of_best, live
from secateur.targets import Target
from secateur.types import (
    Ablation,
    Allocation,
    Budget,
    Edge,
    FlooredAllocation,
    GroupScore,
    Masks,
    Pattern,
    Score,
    Solver,
    Stats,
    Tensors,
    UnitPattern,
    Units,
    Weight,
)

_OPTIONAL = ("target", "allocate", "solver", "ablate")


@dataclass(frozen=True)
class Override:
    """A sparsity of its own for the weights that a shell pattern matches.

    Attributes:
        match: Matched against the parameter's qualified name and its module's.
        sparsity: Final sparsity of each matched weight; the others make up for it, so that the target still holds.

    Raises:
        TargetError: When the sparsity is outside [0, 1].
    """

    match: str
    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise TargetError(f"override of {self.match!r}: sparsity must lie in [0, 1], got {self.sparsity!r}")


@dataclass(frozen=True)
class Method:
    """A pruning method: independent choices on independent axes.

    Attributes:
        target: How much. May be left out where the pattern has one density (N:M).
        score: Which weights matter. A group score rates whole units: for ``Channel(coupled=True)`` and physical pruning
            (``shrink_``).
        pattern: What is removed together. Experts and layers need physical pruning (``shrink_``).
        allocate: How much where; global by default, layerwise where the pattern fixes the density.
        solver: What the surviving weights become; as they are by default.
        schedule: When, and how fast.
        when: Whether a recipe's clock starts with training or after it. A :class:`~secateur.pruner.Pruner` in your
            own loop starts it with the first ``step()``.
        include: Shell patterns of the weights to prune.
        exclude: Shell patterns of the weights to leave alone.
        types: Module class names to consider.
        overrides: Sparsities of their own for some weights.
        allow_empty: Whether a layer may lose all its units.
        ablate: What the method is robbed of; see :mod:`secateur.ablations`.

    Raises:
        RecipeError: When two parts exclude each other; names both.

    Example:
        >>> Method(target=Target("sparsity", 0.9)).allocate
        Global()
    """

    target: Target | None = None
    score: Score | GroupScore = field(default_factory=Magnitude)
    pattern: Pattern | UnitPattern = field(default_factory=Unstructured)
    allocate: Allocation | None = None
    solver: Solver | None = None
    schedule: Schedule = field(default_factory=one_shot)
    when: Literal["during", "after"] = "after"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    allow_empty: bool = False
    ablate: Ablation | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.ablate is not None:
            self.ablate.check(self.pattern, rounds=self.schedule.unit == "rounds")
        density = self.pattern.density if isinstance(self.pattern, Pattern) else None
        if density is not None:
            self._check_fixed_density(density)
        elif self.target is None:
            raise RecipeError(
                f"prune.target is missing: {self.pattern} can have any density, so say how much, "
                "for example target = {sparsity = 0.9}"
            )
        if self.allocate is None:
            allocate = Global() if density is None else Layerwise()
            object.__setattr__(self, "allocate", allocate)
        if self.solver is not None and (
            not isinstance(self.pattern, Pattern) or getattr(self.pattern, "coupled", False)
        ):
            raise RecipeError(
                f"prune.solver {self.solver} and prune.pattern {self.pattern} exclude each other: the solver knows "
                "single weights, not what coupled units own. Use the pattern 'unstructured', 'nm' or 'block'"
            )
        if self.when == "during" and self.schedule.unit == "rounds":
            raise RecipeError(
                "prune.when = 'during' and a schedule in 'rounds' exclude each other: rounds of (prune, retrain) come "
                "after training. Use when = 'after', or unit = 'steps' or 'epochs'"
            )

    def _check_types(self) -> None:
        if self.when not in ("during", "after"):
            raise RecipeError(f"method: when is 'during' or 'after', got {self.when!r}")
        parts: dict[str, tuple[object, Any]] = {
            "target": (self.target, Target),
            "score": (self.score, (Score, GroupScore)),
            "pattern": (self.pattern, (Pattern, UnitPattern)),
            "solver": (self.solver, Solver),
            "allocate": (self.allocate, Allocation),
            "schedule": (self.schedule, Schedule),
            "ablate": (self.ablate, Ablation),
        }
        for name, (value, kind) in parts.items():
            if isinstance(value, type) or not (isinstance(value, kind) or (value is None and name in _OPTIONAL)):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                wanted = " or ".join(k.__name__ for k in kinds)
                raise RecipeError(f"method: {name} must be a {wanted}, got {value!r}")
        for name in ("include", "exclude", "types"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):
                raise RecipeError(f"method: {name} must be a sequence of shell patterns, got {value!r}")
            object.__setattr__(self, name, tuple(value))

    def _check_fixed_density(self, density: float) -> None:
        name = str(self.pattern)
        if self.allocate is not None and not isinstance(self.allocate, Layerwise):
            raise RecipeError(
                f"prune.pattern {name} and prune.allocate {self.allocate} exclude each other: the pattern keeps "
                f"{density:g} of every layer, so nothing is left to allocate. Leave allocate out, or use 'layerwise'"
            )
        if self.overrides:
            raise RecipeError(
                f"prune.pattern {name} and prune.overrides exclude each other: the pattern has one density, {density:g}"
            )
        if self.schedule.updates > 1:
            raise RecipeError(
                f"prune.pattern {name} and a schedule of {self.schedule.updates} updates exclude each other: the "
                f"pattern has one density, {density:g}, and no steps towards it. Use the schedule 'one_shot'"
            )
        if self.target is None:
            object.__setattr__(self, "target", Target("sparsity", 1.0 - density))
        elif self.target.kind != "sparsity" or abs(self.target.value - (1.0 - density)) > 1e-9:
            raise RecipeError(
                f"prune.pattern {name} and prune.target {self.target.kind}={self.target.value:g} exclude each other: "
                f"the pattern always has sparsity {1.0 - density:g}. Leave the target out"
            )

    @property
    def masking(self) -> Pattern:
        """The pattern, where it is one that masks can express.

        Raises:
            RecipeError: For experts and layers.
        """
        if not isinstance(self.pattern, Pattern):
            raise RecipeError(
                f"{self.pattern} removes whole modules or the experts of a router, which masks do not know: use "
                "secateur.make_plan or secateur.shrink_, or another pattern"
            )
        return self.pattern

    @property
    def restarts(self) -> bool:
        """Whether an ablation starts all weights anew after the last pruning step."""
        return self.ablate is not None and self.ablate.restarts

    @property
    def goal(self) -> Target:
        """The target, present once the method is built."""
        if self.target is None:
            raise AssertionError("set in __post_init__")
        return self.target


def as_method(method: Method | Target) -> Method:
    """Take a bare target for a method with the default parts.

    Raises:
        RecipeError: When it is neither.
    """
    if isinstance(method, Target):
        return Method(target=method)
    if not isinstance(method, Method):
        raise RecipeError(f"expected a Method or a Target such as Target('sparsity', 0.9), got {method!r}")
    return method


def make_masks(
    weights: Mapping[str, Weight],
    values: Tensors,
    method: Method,
    budget: Budget,
    *,
    kept: float,
    stats: Stats | None = None,
    previous: Tensors | None = None,
) -> Masks:
    """Compute the masks of one pruning step: score, reduce to units, allocate, select, expand. Changes nothing.

    Args:
        weights: The prunable weights.
        values: Their tensors.
        method: The parts.
        budget: Prices, and what may stay at the end.
        kept: What may stay now.
        stats: What the score needs.
        previous: Masks so far; pruned stays pruned.

    Returns:
        Masks of all weights, and of the biases that die with their units.

    Raises:
        RecipeError: When the score rates coupled units.
        WeightError: When a weight is not finite.
        SelectionError: When a score is not finite or has the wrong shape.
        Infeasible: When ``kept`` is less than the floors of the layers cost.
    """
    if not isinstance(method.score, Score):
        raise RecipeError(
            f"{method.score} rates whole units of coupled groups, which {method.pattern} does not know: use "
            "Channel(coupled=True), secateur.make_plan or secateur.shrink_, or an element score"
        )
    for name in weights:
        check_finite(name, values[name])
    scores = method.score({name: values[name].detach() for name in weights}, stats or {})
    units, edges = {}, edges_of(weights)
    for name, weight in weights.items():
        if name not in scores or scores[name].shape != values[name].shape:
            got = tuple(scores[name].shape) if name in scores else "nothing"
            raise SelectionError(f"{name}: {method.score} returned {got} for a weight of shape {weight.shape}")
        reduced = method.masking.reduce(weight, check_scores(name, scores.pop(name)))
        if reduced.numel() != weight.numel:  # a sum over a block can overflow where its elements did not
            reduced = check_scores(name, reduced)
        if previous is not None:
            reduced = reduced.masked_fill(~method.masking.reduce(weight, previous[name]), -torch.inf)
        size = method.masking.sizes(weight)
        size = size.to(reduced.device) if isinstance(size, Tensor) else size
        edge = edges.get(name, "")
        floor = _floor(method, name, reduced.numel(), edge)
        units[name] = Units(reduced, size * budget.cost[name], floor, shape=weight.sizes, edge=edge)
    counts = _counts(units, method, budget, kept)
    masks: Masks = {}
    for name, weight in weights.items():
        chosen = method.masking.select(weight, units[name].scores, counts[name])
        if previous is not None:
            chosen &= ~torch.isneginf(units[name].scores)
        masks |= method.masking.expand(weight, chosen)
    return masks if method.ablate is None else method.ablate.masks(weights, method.masking, masks, previous)


def check_finite(name: str, value: Tensor) -> None:
    """Refuse a weight with NaN or infinite elements.

    Args:
        name: What to call it.
        value: The weight.

    Raises:
        WeightError: Says how many there are.
    """
    if not bool(torch.isfinite(value.detach().float().sum())) and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise WeightError(f"{name}: {bad} of {value.numel()} weights are NaN or infinite; training has diverged")


def check_reachable(weights: Mapping[str, Weight], method: Method, budget: Budget) -> None:
    """Refuse, before anything is scored or trained, a budget that cannot pay for one unit per layer.

    Args:
        weights: The prunable weights.
        method: The parts.
        budget: What may stay at the end.

    Raises:
        Infeasible: Carries what the floors and the overrides cost at the least.
    """
    if method.masking.density is not None:
        return
    least, most, edges = 0.0, 0.0, edges_of(weights)
    for name in sorted(weights):
        size = method.masking.sizes(weights[name])
        wanted = _override(method, name)
        n = size.numel() if isinstance(size, Tensor) else weights[name].numel // size
        count, highest = _floor(method, name, n, edges.get(name, "")), n
        if wanted is not None:
            count = highest = max(n - round(n * wanted), count)
        smallest = float(size.flatten().sort().values[:count].sum()) if isinstance(size, Tensor) else size * count
        least += smallest * budget.cost[name]
        most += (float(size.max()) if isinstance(size, Tensor) else size) * highest * budget.cost[name]
    if any(_override(method, name) is not None for name in weights) and budget.kept > most + 1e-9 * budget.total:
        raise _overrun(most, budget.kept, budget)
    if budget.kept < least - 1e-9 * budget.total:
        raise Infeasible(least, budget.kept)


def _overrun(most: float, kept: float, budget: Budget) -> TargetError:
    return TargetError(
        f"the overrides remove more than the target asks: at most {most:g} of {budget.total:g} {budget.currency} stay "
        f"even with every other layer dense, but the target keeps {kept:g}. Lower the overrides or raise the target"
    )


def edges_of(weights: Mapping[str, Weight]) -> dict[str, Edge]:
    """Return the first convolution and the last layer, in the order in which the model has its weights."""
    out: dict[str, Edge] = {}
    convolutions = [name for name, w in weights.items() if len(w.shape) > 2 and w.kind != "Bilinear"]
    if convolutions:
        out[convolutions[0]] = "first"
    if weights:
        out[list(weights)[-1]] = "last"
    return out


def _floor(method: Method, name: str, units: int, edge: Edge) -> int:
    """Return the fewest units that a layer keeps; what an override says of it is settled elsewhere."""
    floor = 0 if method.allow_empty else 1
    if isinstance(method.allocate, FlooredAllocation) and _override(method, name) is None:
        floor = max(floor, method.allocate.floor(units, edge))
    return floor


def _override(method: Method, name: str) -> float | None:
    wanted = [o.sparsity for o in method.overrides if matches(name, [o.match])]
    return wanted[-1] if wanted else None


def _counts(units: Mapping[str, Units], method: Method, budget: Budget, kept: float) -> dict[str, int]:
    """Settle the overrides, then let the allocation share out the rest."""
    if method.masking.density is not None:
        density = method.masking.density
        return {name: round(u.scores.numel() * density) for name, u in units.items()}
    progress = (budget.total - kept) / (budget.total - budget.kept) if budget.total > budget.kept else 1.0
    fixed: dict[str, int] = {}
    for name, unit in units.items():
        wanted = _override(method, name)
        if wanted is not None:
            n = unit.scores.numel()
            fixed[name] = min(max(n - round(n * wanted * progress), min(unit.floor, n)), live(unit))
    free = {name: u for name, u in units.items() if name not in fixed}
    price = {name: cost_of_best(u) for name, u in units.items()}
    settled = math.fsum(price[name](count) for name, count in fixed.items())
    lowest = settled + math.fsum(price[name](min(u.floor, u.scores.numel())) for name, u in free.items())
    highest = settled + math.fsum(price[name](u.scores.numel()) for name, u in free.items())
    if kept < lowest - 1e-9 * budget.total:
        raise Infeasible(lowest, kept)
    if fixed and kept > highest + max(price[name](1) for name in fixed):
        raise _overrun(highest, kept, budget)
    if method.allocate is None:
        raise AssertionError("set when the method was built")
    # Not under the floors by a rounding error: an allocation would then have to break one.
    return fixed | (method.allocate(free, max(kept, lowest) - settled) if free else {})


class Infeasible(TargetError):
    """The floors of the layers cost more than may stay. Carries their cost to where the target is known."""

    def __init__(self, least: float, kept: float) -> None:
        super().__init__(f"keeping one unit per layer costs {least:g}, but only {kept:g} may stay")
        self.least = least
