"""How much each layer can lose alone: pruned by itself at each level, evaluated, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate import Layerwise
from secateur.errors import MissingStatsError, RecipeError, TargetError, WeightError, nearest
from secateur.masks import apply_masks_, parameters_of
from secateur.method import Infeasible, Method, make_masks
from secateur.prunable import Found, find_prunable, matches
from secateur.schedules import one_shot
from secateur.targets import ModelFacts, Target
from secateur.types import Masks, Stats, Weight

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``."""


@dataclass(frozen=True)
class Figure:
    """What is measured after each pruning.

    Attributes:
        name: ``"accuracy"``, ``"loss"``, ...
        higher_is_better: Its direction.
        measure: Returns it for a model; must leave the model as it was.
        on: On which data.
    """

    name: str
    higher_is_better: bool
    measure: Callable[[nn.Module], float]
    on: str = ""


@dataclass(frozen=True)
class Point:
    """One layer at one level: the sparsity asked for, the one achieved, what stayed, and the figure."""

    asked: float
    achieved: float
    kept: int
    value: float


@dataclass(frozen=True)
class Curve:
    """One layer alone, at every level."""

    name: str
    shape: tuple[int, ...]
    total: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class SensitivityResult:
    """Curves of all layers, and the conditions they hold under.

    Attributes:
        metric: Name of the figure.
        higher_is_better: Its direction.
        dense: The figure before pruning.
        evaluated_on: On which data.
        score: What ranked the weights.
        pattern: What was removed together.
        levels: Sparsities asked for, rising.
        curves: One per weight, in the model's order.
        skipped: Weights left alone, and why.
        repaired: Whether batch norms were matched to the dense model's after each pruning.
    """

    metric: str
    higher_is_better: bool
    dense: float
    evaluated_on: str
    score: str
    pattern: str
    levels: tuple[float, ...]
    curves: tuple[Curve, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    repaired: bool = False

    def loss_of(self, point: Point) -> float:
        """Return how much worse than dense a point is: absolute where higher is better, else a fraction of dense.

        An accuracy lies between 0 and 1, so 0.01 of it is one point; an error or a loss has a scale of its own.
        """
        if self.higher_is_better:
            return self.dense - point.value
        return (point.value - self.dense) / abs(self.dense) if self.dense else point.value

    def highest(self, curve: Curve, tolerance: float = 0.01) -> Point | None:
        """Return the highest level up to which every level loses less than ``tolerance``.

        Levels beyond one that loses more do not count, even if chance lets one of them lose less. A figure that is
        not a number loses everything.

        Args:
            curve: One of :attr:`curves`.
            tolerance: As measured by :meth:`loss_of`.

        Returns:
            The point, or ``None`` when already the lowest level loses more.
        """
        best = None
        for point in curve.points:
            if not self.loss_of(point) < tolerance:
                break
            best = point
        return best

    def to_dict(self, tolerance: float = 0.01) -> dict[str, Any]:
        """Return plain values, for JSON."""
        layers = []
        for curve in self.curves:
            best = self.highest(curve, tolerance)
            points = [{**vars(point), "loses": self.loss_of(point)} for point in curve.points]
            layers.append(
                {
                    "name": curve.name,
                    "shape": list(curve.shape),
                    "total": curve.total,
                    "highest": None if best is None else best.asked,
                    "points": points,
                }
            )
        plain = {name: value for name, value in vars(self).items() if name not in ("curves", "skipped", "levels")}
        return {
            "schema": 1,
            **plain,
            "levels": list(self.levels),
            "tolerance": tolerance,
            "layers": layers,
            "skipped": dict(self.skipped),
        }


def sensitivity(
    model: nn.Module,
    method: Method,
    figure: Figure,
    *,
    levels: Sequence[float] | None = None,
    layers: Sequence[str] = (),
    stats: Stats | None = None,
    repair: Callable[[nn.Module], object] | None = None,
    progress: Progress | None = None,
) -> SensitivityResult:
    r"""Prune each weight alone, at each level, and measure; the weights are put back bit for bit.

    .. math:: a_l(s) = \text{figure}(f(x; M_l(s) \odot W)), \qquad 1 - |M_l(s)| / n_l \approx s

    with :math:`M_l(s)` removing the fraction :math:`s` of weight :math:`l` and nothing elsewhere. Score and pattern
    are the method's; its target, allocation, schedule and overrides say how much where, which is what is varied here.
    At least one unit stays unless the method allows empty layers: ``achieved`` says what that made of a level. The
    curves see no interaction: layers that can each lose much alone need not be able to together.

    Args:
        model: The trained model; unchanged afterwards, also when this is interrupted.
        method: Score, pattern and filters.
        figure: What to measure.
        levels: Sparsities; 0.1 to 0.99 by default, or the pattern's own where it has one density.
        layers: Shell patterns of the weights to look at; all prunable ones by default.
        stats: What the score needs, collected on the dense model.
        repair: Called after each pruning, to mend the model without training, such as by
            :func:`~secateur.recover.rematch_bn_`. Whatever it changes is put back too.
        progress: Told how far this is.

    Returns:
        The curves.

    Raises:
        RecipeError: When levels are asked of a pattern that has one density.
        TargetError: When a level is not in [0, 1].
        WeightError: When nothing is left to look at.
        PatternError: When the pattern does not fit a weight.
        MissingStatsError: When the score needs statistics that were not given.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> left = Figure("weights left", True, lambda m: float(m.weight.count_nonzero()))
        >>> result = sensitivity(layer, Method(target=Target("sparsity", 0.5)), left, levels=[0.5, 0.75])
        >>> [p.value for p in result.curves[0].points], int(layer.weight.count_nonzero())
        ([2.0, 1.0], 4)

    References:
        Hao Li, Asim Kadav, Igor Durdanovic, Hanan Samet, Hans Peter Graf, Pruning Filters for Efficient ConvNets,
        2017 (layer-wise sensitivity, on filters); Song Han, Jeff Pool, John Tran, William J. Dally, Learning both
        Weights and Connections for Efficient Neural Networks, 2015 (on weights).
    """
    found = find_prunable(model, include=method.include, exclude=method.exclude, types=method.types)
    weights = _chosen(found, layers)
    chosen = _levels(method, levels)
    missing = method.score.needs - (stats or {}).keys()
    if missing:
        raise MissingStatsError(
            f"{method.score} needs {sorted(map(str, missing))}; collect them on the dense model and pass stats"
        )
    for weight in weights.values():
        method.masking.check(weight)
    report = progress or _nobody
    total = len(weights) * len(chosen)
    report(0, total, "dense")
    dense = figure.measure(model)
    before = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()} if repair else {}
    curves = []
    for number, (name, weight) in enumerate(weights.items()):
        points = []
        for step, level in enumerate(chosen):
            report(number * len(chosen) + step, total, name)
            masks = _masks(weight, parameters_of(model, {name: weight})[name].detach(), method, level, stats)
            points.append(_point(model, masks, weight, level, _Trial(figure, repair, before)))
        curves.append(Curve(name, weight.shape, weight.numel, tuple(points)))
    report(total, total, "done")
    return SensitivityResult(
        figure.name,
        figure.higher_is_better,
        dense,
        figure.on,
        str(method.score),
        str(method.pattern),
        chosen,
        tuple(curves),
        found.skipped,
        repair is not None,
    )


def _nobody(done: int, total: int, text: str) -> None:
    """Watch nothing."""


def _chosen(found: Found, layers: Sequence[str]) -> dict[str, Weight]:
    for pattern in layers:
        if not any(matches(name, [pattern]) for name in found.weights):
            names = [name.rpartition(".")[0] or name for name in found.weights]
            raise WeightError(f"--layers {pattern!r} matches no prunable weight; {nearest(pattern, names)}")
    return {name: w for name, w in found.weights.items() if not layers or matches(name, layers)}


def _levels(method: Method, levels: Sequence[float] | None) -> tuple[float, ...]:
    density = method.masking.density
    if density is not None:
        if levels is not None and set(levels) != {1.0 - density}:
            raise RecipeError(
                f"prune.pattern {method.pattern} and levels exclude each other: the pattern has one density, "
                f"{density:g}, so sparsity {1 - density:g} is the one level there is. Leave levels out"
            )
        return (1.0 - density,)
    wanted = tuple(LEVELS if levels is None else sorted(set(levels)))
    for level in wanted:
        if not 0.0 <= level <= 1.0:
            raise TargetError(f"a level is a sparsity in [0, 1], got {level!r}")
    if not wanted:
        raise TargetError("no levels were given; expected sparsities such as 0.5, 0.9")
    return wanted


def _masks(weight: Weight, value: Tensor, method: Method, level: float, stats: Stats | None) -> Masks:
    """Return masks that take one level from one weight."""
    one = replace(
        method,
        target=Target("sparsity", level),
        allocate=Layerwise(),
        schedule=one_shot(),
        when="after",
        overrides=(),
    )
    named, values = {weight.name: weight}, {weight.name: value}
    budget = Target("sparsity", level).budget(ModelFacts({weight.name: weight.numel}, weight.numel))
    try:
        return make_masks(named, values, one, budget, kept=budget.kept, stats=stats)
    except Infeasible as refusal:  # the floor: one unit stays, and the point says how much that is
        return make_masks(named, values, one, budget, kept=refusal.least, stats=stats)


@dataclass(frozen=True)
class _Trial:
    """What happens to a pruned model, and what brings it back."""

    figure: Figure
    repair: Callable[[nn.Module], object] | None
    before: Mapping[str, Tensor]


def _point(model: nn.Module, masks: Masks, weight: Weight, level: float, trial: _Trial) -> Point:
    """Prune, mend, measure, put back."""
    saved = {name: p.detach().clone() for name, p in parameters_of(model, masks).items()}
    try:
        apply_masks_(model, masks)
        if trial.repair is not None:
            trial.repair(model)
        value = trial.figure.measure(model)
    finally:
        state = model.state_dict()
        with torch.no_grad():
            for name, original in {**trial.before, **saved}.items():
                state[name].copy_(original)
    kept = int(masks[weight.name].sum())
    return Point(level, 1.0 - kept / weight.numel, kept, value)
