"""From a method to a plan: which units of which groups go, so that the pruned model meets the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.allocate import Layerwise
from secateur.errors import GraphError, PatternError, RecipeError, TargetError
from secateur.graph.choose import Removed, Unreachable, bundles, meet
from secateur.graph.coupling import Coupling
from secateur.graph.groups import Unit
from secateur.graph.plan import Plan
from secateur.graph.shrink import Shrunk, shrink
from secateur.graph.unsupported import refuse_unsupported
from secateur.graph.valueless import outside_fake_mode
from secateur.inputs import Inputs, split_inputs
from secateur.method import Method, as_method
from secateur.patterns import Channel, Expert, Layer
from secateur.prunable import check_patterns, matches
from secateur.stats import check_data
from secateur.stats.gradients import LossFn
from secateur.structure.collect import Batches
from secateur.structure.config import update_config
from secateur.structure.layers import Shortened, plan_and_shorten
from secateur.structure.report import ShrinkReport, members_of
from secateur.structure.scoring import as_group_score, unit_scores
from secateur.structure.views import owned_by, role_of
from secateur.targets import Target
from secateur.types import GroupReport


@dataclass(frozen=True)
class Structural:
    """What structural pruning can be asked beyond a method.

    Attributes:
        align: Channel counts stay multiples of it; kernels for odd widths are slow. 1 switches it off.
        uniform: Dimensions of one size keep one size, so that a configuration can express the result.
        exact: Never prune a dimension that a normalisation runs over; the result then equals the dense model with
            zeros in the pruned places, to rounding.
    """

    align: int = 8
    uniform: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.align, bool) or not isinstance(self.align, int) or self.align < 1:
            raise TargetError(f"align must be a whole number of at least 1, got {self.align!r}")

    @classmethod
    def of(cls, pattern: Channel) -> Structural:
        """Return what a pattern of coupled channels asks."""
        return cls(pattern.align, pattern.uniform, pattern.exact)


def make_plan(
    model: nn.Module,
    method: Method | Target,
    example_inputs: Any,
    *,
    loss_fn: LossFn | None = None,
    batches: Batches | None = None,
    align: int = 8,
    uniform: bool = False,
    exact: bool = False,
) -> ShrinkReport:
    """Plan the removal of channels, heads and neurons, and prove the plan, without changing the model.

    The model is recorded, shrunk, verified and put back, so that a plan that is returned is known to work.

    Args:
        model: Any module whose forward runs on the inputs.
        method: Score, target, allocation and filters; the pattern is ``Channel``. A bare target stands for the mean
            magnitude over everything coupled, ranked globally.
        example_inputs: A tensor, a tuple, a dict, or ``(tuple, dict)``.
        loss_fn: ``loss_fn(model, batch)`` runs the model on one batch. Scores that need gradients take its value, the
            mean loss over the batch. Statistics of activations only watch, and ``Sensitivity`` takes the tensor of
            outputs that it returns; for both, left out, the model is called with the batch itself.
        batches: The batches, for scores that need data; several passes are taken.
        align: Channel counts stay multiples of it; 1 switches it off.
        uniform: Dimensions of one size keep one size.
        exact: Never prune a dimension that a normalisation runs over.

    Returns:
        The report; its ``plan`` can be saved, replayed, and given to :func:`shrink_`.

    Raises:
        GraphError: When nothing can be pruned, or no plan could be proven.
        MissingStatsError: When the score needs data or a loss, and there are none.
        TargetError: When the target is out of reach; gives the limit.
        WeightError: When a filter matches nothing, or a weight is not finite.
    """
    how = Structural(align, uniform, exact)
    with outside_fake_mode():
        shrunk, report = plan_and_shrink(model, method, example_inputs, how, loss_fn=loss_fn, batches=batches)
    shrunk.undo.revert()
    return report


def plan_and_shrink(
    model: nn.Module,
    method: Method | Target,
    example_inputs: Any,
    how: Structural,
    *,
    loss_fn: LossFn | None = None,
    batches: Batches | None = None,
) -> tuple[Shrunk | Shortened, ShrinkReport]:
    """Shrink a model by a method; see :func:`make_plan`. ``Shrunk.undo`` puts it back."""
    if isinstance(method, Target):
        method = Method(target=method, pattern=Channel())
    method = as_method(method)
    check_method(method)
    check_data(loss_fn, batches)
    if method.ablate is not None:
        raise RecipeError(
            f"{method.ablate} is about masks, and cutting out leaves none: score with Random(seed) instead, or give "
            "the smaller network new weights with secateur.ablations.reinitialise_"
        )
    if isinstance(method.pattern, Layer):
        if how.uniform or how.exact:
            raise PatternError(
                "uniform and exact are about widths and the norms over them, which taking out whole layers leaves "
                "alone: leave them out"
            )
        return plan_and_shorten(model, method, example_inputs, loss_fn=loss_fn, batches=batches)
    if isinstance(method.pattern, Channel) and method.pattern.coupled:  # the pattern says it all
        how = Structural.of(method.pattern)
    if isinstance(method.pattern, Expert):
        how = replace(how, align=1)  # how many experts there are is no width of any product
    refuse_unsupported(model)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    check_patterns((*method.include, *method.exclude), names, "parameter")
    args, kwargs = split_inputs(example_inputs)
    chooser = Chooser(model, method, how, loss_fn, batches)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    unit: Unit = "expert" if isinstance(method.pattern, Expert) else "channel"
    shrunk = shrink(model, args, kwargs, chooser, exact=how.exact, linked=how.uniform, unit=unit)
    shrunk, obstacle = with_config(model, before, (args, kwargs), shrunk)
    report = report_of(shrunk, chooser.skipped)
    achieved = chooser.value(shrunk.coupling, shrunk.coupling.alive(chooser.removed))
    goal = method.goal
    plan = replace(
        report.plan, info={"target": {goal.kind: goal.value}, "score": str(method.score), "align": how.align}
    )
    return shrunk, replace(report, plan=plan, target=goal.kind, asked=goal.value, achieved=achieved, config=obstacle)


def with_config(
    model: nn.Module, before: Mapping[str, tuple[int, ...]], inputs: Inputs, shrunk: Shrunk
) -> tuple[Shrunk, str]:
    """Bring a shrunk model's configuration object in line.

    Args:
        model: The shrunk model.
        before: Shapes of its parameters before.
        inputs: Example inputs.
        shrunk: What was done.

    Returns:
        The same with the edits of the configuration in its plan; why it cannot express the result, if so.
    """
    anew = tuple(f"{drop.container}." for drop in shrunk.plan.drops)  # names there are others' now
    stable = {name: shape for name, shape in before.items() if not name.startswith(anew)}
    edits, obstacle = update_config(model, stable, inputs, shrunk.undo)
    return replace(shrunk, plan=replace(shrunk.plan, edits=(*shrunk.plan.edits, *edits))), obstacle


def check_method(method: Method) -> None:
    """Refuse what structural pruning cannot take from a method.

    Raises:
        PatternError: For patterns of single weights.
        RecipeError: For overrides, and solvers.
    """
    if not isinstance(method.pattern, Channel | Expert | Layer):
        raise PatternError(
            "structural pruning removes whole units: the pattern must be Channel, Expert or Layer, got "
            f"{method.pattern}"
        )
    if method.solver is not None:
        raise RecipeError(
            f"prune.solver {method.solver} moves single weights that stay beside others that go, and knows nothing of "
            "units that are cut out: leave it out"
        )
    if method.overrides:
        raise RecipeError(
            "overrides are sparsities of single weights, which coupled units do not have: leave layers alone with "
            "exclude = [...], or prune them in a call of their own with include = [...]"
        )


def report_of(shrunk: Shrunk, skipped: dict[str, str]) -> ShrinkReport:
    """Count what a shrunk model lost."""
    coupling, plan = shrunk.coupling, shrunk.plan
    everything = np.ones(coupling.alive(np.zeros(coupling.units, dtype=bool)).shape, dtype=bool)
    alive = coupling.alive_under(plan.kept)
    removed = np.zeros(coupling.units, dtype=bool)
    removed[coupling.unit_of[~alive & (coupling.unit_of >= 0)]] = True
    return ShrinkReport(
        plan,
        shrunk.proof,
        (coupling.parameters(everything), coupling.parameters(alive)),
        (coupling.macs(everything), coupling.macs(alive)),
        groups_left(coupling, removed),
        skipped,
        shrunk.frozen,
        {name: tuple(sorted(modules)) for name, modules in coupling.trace.unknown.items()},
    )


def groups_left(coupling: Coupling, removed: Removed) -> tuple[GroupReport, ...]:
    """Return, group by group, how many units stay."""
    return tuple(GroupReport(g.name, g.units, int((~removed[g.ids]).sum()), members_of(g)) for g in coupling.groups)


class Chooser:
    """Marks the units that go, for any coupling of one model.

    Attributes:
        skipped: Groups left whole on purpose, and why.
        removed: The units that go.
    """

    def __init__(
        self, model: nn.Module, method: Method, how: Structural, loss_fn: LossFn | None, batches: Batches | None
    ) -> None:
        self._model, self._method, self._how = model, method, how
        self._loss_fn, self._batches = loss_fn, batches
        self._score = as_group_score(method.score, method.pattern)
        self.skipped: dict[str, str] = {}
        self.removed: Removed = np.zeros(0, dtype=bool)

    def __call__(self, coupling: Coupling) -> Removed:
        """Choose."""
        return self.choose(coupling, *self.scores(coupling))

    def scores(self, coupling: Coupling, removed: Removed | None = None) -> tuple[NDArray[np.float64], dict[str, str]]:
        """Score every unit; see :func:`~secateur.structure.scoring.unit_scores`."""
        return unit_scores(
            self._model, coupling, self._score, loss_fn=self._loss_fn, batches=self._batches, removed=removed
        )

    def choose(
        self,
        coupling: Coupling,
        scores: NDArray[np.float64],
        whole: dict[str, str],
        *,
        limit: float | None = None,
        gone: Removed | None = None,
    ) -> Removed:
        """Choose by scores.

        Args:
            coupling: The groups.
            scores: One score per unit.
            whole: Groups that must stay whole, and why; those that the filters leave alone are added.
            limit: Largest size allowed, in the target's measure; the target's own if left out.
            gone: Units that have gone before.

        Returns:
            One flag per unit.

        Raises:
            GraphError: When nothing can be pruned.
            TargetError: When the target is out of reach; gives the limit.
        """
        self.skipped = self._filtered(coupling) | whole
        decisions = bundles(coupling, self._how.align, frozenset(self.skipped), uniform=self._how.uniform)
        for bundle in decisions:
            if bundle.parts == 1:
                for group in bundle.groups:
                    self.skipped[group.name] = (
                        f"its {group.units} units are no more than one step of {group.step(self._how.align)}, the "
                        f"fewest that keep channels a multiple of {self._how.align}"
                    )
        if not any(b.parts > 1 for b in decisions):
            if coupling.units:
                reasons = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:4])
                raise GraphError(f"nothing can be pruned: because {reasons}")
            return np.zeros(0, dtype=bool)
        measure, goal = self.goal(coupling)
        goal = goal if limit is None else limit
        allocation = self._method.allocate or Layerwise()
        if measure(coupling.alive(np.zeros(coupling.units, dtype=bool))) <= goal:
            target = self._method.goal
            raise GraphError(
                f"nothing can be pruned: because nothing needs to go, target {target.kind}={target.value:g} is met by "
                "the model as it is"
            )
        try:
            self.removed = meet(coupling, scores, decisions, allocation, measure, goal, gone)
        except Unreachable as refusal:
            raise self._unreachable(coupling, refusal.least) from None
        return self.removed

    def _filtered(self, coupling: Coupling) -> dict[str, str]:
        """Return the groups that the filters leave alone."""
        method, out = self._method, dict[str, str]()
        if not (method.include or method.exclude or method.types):
            return out
        shapes = {leaf.name: leaf.axes.shape for leaf in coupling.trace.leaves}
        for group in coupling.groups:
            roles = [(m.name, role_of(self._model, m.name, m.dim, shapes[m.name])) for m in group.members]
            own = [name for owned in owned_by(self._model, group) for name in owned.names if name is not None]
            names = [name for name, role in roles if role == "out"] or [name for name, _ in roles]
            names += own
            # A norm or a bias that is to stay keeps its channels, too; a layer that only reads them does not.
            kept = {*names, *(name for name, role in roles if role in ("norm", "bias"))}
            if method.include and not any(matches(n, method.include) for n in names):
                out[group.name] = "not in include"
            elif any(matches(n, method.exclude) for n in kept):
                out[group.name] = "excluded"
            elif method.types and not any(self._is_type(n, method.types) for n in names):
                out[group.name] = "not of the given types"
        return out

    def _is_type(self, name: str, types: tuple[str, ...]) -> bool:
        module = self._model.get_submodule(name.rpartition(".")[0])
        return any(kind.__name__ in types for kind in type(module).__mro__)

    # -- the target

    def goal(self, coupling: Coupling) -> tuple[Callable[[NDArray[np.bool_]], float], float]:
        """Return a size that must not exceed a goal."""
        target = self._method.goal
        everything = coupling.alive(np.zeros(coupling.units, dtype=bool))
        parameters = coupling.parameters(everything)
        if target.kind == "macs":
            return lambda alive: float(coupling.macs(alive)), target.value * coupling.macs(everything)
        if target.kind == "channels":
            return lambda alive: float(coupling.units_left(alive)), target.value * coupling.units
        if target.kind == "sparsity":
            prunable = coupling.prunable_parameters(everything)
            return lambda alive: float(coupling.prunable_parameters(alive)), (1 - target.value) * prunable
        limit = parameters / target.value if target.kind == "compression_ratio" else target.value
        return lambda alive: float(coupling.parameters(alive)), limit

    def value(self, coupling: Coupling, alive: NDArray[np.bool_]) -> float:
        """Return the target's quantity of the pruned model."""
        measure, _ = self.goal(coupling)
        return self.in_words_of_target(coupling, measure(alive))

    def in_words_of_target(self, coupling: Coupling, size: float) -> float:
        """Turn a size into the target's quantity."""
        everything = coupling.alive(np.zeros(coupling.units, dtype=bool))
        measure, _ = self.goal(coupling)
        dense, kind = measure(everything), self._method.goal.kind
        return {
            "macs": lambda: size / dense,
            "channels": lambda: size / dense,
            "sparsity": lambda: 1 - size / dense,
            "compression_ratio": lambda: dense / size,
            "kept_parameters": lambda: size,
        }[kind]()

    def _unreachable(self, coupling: Coupling, least: float) -> TargetError:
        goal = self._method.goal
        limit = self.in_words_of_target(coupling, least)
        whole = f"; {len(self.skipped)} groups stay whole ({next(iter(self.skipped.values()))})" if self.skipped else ""
        return TargetError(
            f"target {goal.kind}={goal.value:g} cannot be reached: with one step left in every group it is {limit:.6g}"
            f"{whole}. Ask for less, or lower align"
        )


__all__ = ["Chooser", "Plan", "Structural", "check_method", "groups_left", "make_plan", "report_of", "with_config"]
