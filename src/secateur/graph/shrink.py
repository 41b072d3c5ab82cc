"""Record, plan, slice, repair, verify; or put everything back and say why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.errors import GraphError, PlanError
from secateur.graph.changes import Drop, Edit, Undo, class_name, drop_all_, edit_, slice_
from secateur.graph.constraints import Constraints
from secateur.graph.coupling import ONLY_EXPERTS, Coupling
from secateur.graph.examples import Example
from secateur.graph.experts import count_edits
from secateur.graph.groups import Unit
from secateur.graph.ladder import Ladder
from secateur.graph.native import native_edits
from secateur.graph.plan import Plan, digest
from secateur.graph.prove import prove
from secateur.graph.repair import Repair
from secateur.graph.rules import RULES, Rules
from secateur.graph.trace import Trace, trace
from secateur.graph.unsupported import refuse_unsupported
from secateur.graph.valueless import all_have_values
from secateur.graph.verify import Proof

Choice = Callable[[Coupling], NDArray[np.bool_]]
"""Marks the units to remove."""

_MOST_ATTEMPTS = 24


@dataclass(frozen=True)
class Shrunk:
    """A model that has been shrunk, and the proof.

    Attributes:
        plan: Replays on a fresh instance.
        proof: The comparison with the masked dense model.
        coupling: The groups it was chosen from.
        undo: The way back.
        frozen: What trial and error had to fix, module by module, and why.
        attempts: How many plans were tried.
    """

    plan: Plan
    proof: Proof
    coupling: Coupling
    undo: Undo
    frozen: Mapping[str, str]
    attempts: int


def shrink(  # noqa: PLR0913
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    choose: Choice,
    *,
    exact: bool = False,
    rules: Rules = RULES,
    recorded: Trace | None = None,
    verify: bool = True,
    weights: bool = True,
    linked: bool = False,
    unit: Unit = "channel",
) -> Shrunk:
    """Remove the chosen units from a model, in place, and prove the result.

    Args:
        model: Any module whose forward runs; left bit for bit as it was when anything fails.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        choose: Marks units to remove; called again when a constraint had to be added.
        exact: Never prune a dimension that a normalisation runs over.
        rules: Rules for labels.
        recorded: A trace made earlier.
        verify: Compare values. Without it only shapes are checked.
        weights: Put a digest of the weights into the plan.
        linked: Keep heads × head size = width wherever it holds, also where the forward does not ask for it.
        unit: What may go.

    Raises:
        GraphError: When no plan could be proven; names the module, the operator and the way out.
    """
    refuse_unsupported(model)
    first = Example(args, kwargs)
    recorded = recorded or trace(model, [first], exact=exact, rules=rules)
    meta = not all_have_values(leaf.tensor for leaf in recorded.leaves)
    mark = digest(model) if weights else ""
    ladder = Ladder(model)
    if linked:
        splitting = {where.partition(": ")[0] for _, where in recorded.ledger.blocks}
        ladder.constraints.equal.update(dict.fromkeys(sorted(splitting), "widths are kept uniform"))
    for attempt in range(1, _MOST_ATTEMPTS + 1):
        coupling = Coupling(recorded, ladder.constraints, unit)
        removed = choose(coupling)
        if not removed.any():
            raise GraphError(nothing_to_prune(coupling, ladder.constraints))
        alive = coupling.alive(removed)
        undo = Undo()
        try:
            plan = _slice(model, coupling, alive, first, undo, ladder)
            if plan is None:
                undo.revert()
                continue
            plan = replace(plan, weights=mark)
            if meta or not verify:
                proof = Proof.of_shapes()
            else:
                proof, culprit, again = prove(model, recorded, coupling, alive, plan, undo, first, rules, exact)
                if again is not None:
                    recorded = again
                    undo.revert()
                    continue
                if culprit is not None:
                    undo.revert()
                    ladder.climb(culprit, f"its pruned result differs by {proof.difference:.1e}")
                    continue
            return Shrunk(plan, proof, coupling, undo, dict(ladder.reasons), attempt)
        except BaseException:
            undo.revert()
            raise
    raise GraphError(
        f"no plan for {class_name(model)} could be proven in {_MOST_ATTEMPTS} attempts; the last obstacle: "
        f"{ladder.last}. Leave that module out with exclude = [...]"
    )


def _slice(
    model: nn.Module, coupling: Coupling, alive: NDArray[np.bool_], first: Example, undo: Undo, ladder: Ladder
) -> Plan | None:
    """Cut out what goes and mend what trips over it; return the plan, ``None`` where the forward does not run.

    What was in the way is noted in the ladder.
    """
    kept = coupling.kept(alive)
    undo.add(slice_(model, kept).revert)
    edits = _follow(model, coupling, alive, undo)
    names, drops = {id(m): n for n, m in model.named_modules()}, coupling.drops(alive)
    counts = [] if ladder.counts is False else count_edits(model, coupling.lists, drops)
    ladder.counts = bool(counts) or ladder.counts
    for edit in counts:
        edit_(model, edit, undo)
    drop_all_(model, drops, undo)
    repair = Repair(model, coupling, alive, first.args, first.kwargs, undo, names)
    failure = repair.mend()
    if failure is not None:
        undo.revert()
        ladder.climb_from(failure, repair)
        return None
    shapes = {leaf.name: tuple(leaf.axes.shape) for leaf in coupling.trace.leaves if leaf.name in kept}
    every = tuple(merge([*edits, *counts, *repair.edits]))
    return Plan(class_name(model), shapes, kept, every, drops=drops)


def replay(model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], rules: Rules = RULES) -> Shrunk:
    """Shrink a model as planned, in place, and prove the result.

    Args:
        model: The model that the plan was made for, weights included.
        plan: The plan.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        rules: Rules for labels.

    Raises:
        PlanError: When the plan is not this model's, or tears coupled indices apart.
        GraphError: When the result cannot be proven.
    """
    plan.check(model, weights=True)
    recorded = trace(model, [Example(args, kwargs)], rules=rules)
    coupling = Coupling(recorded, unit="expert" if plan.drops else "channel")
    alive = coupling.alive_under(plan.kept)
    if _places(coupling.drops(alive)) != _places(plan.drops):
        raise PlanError(
            f"the plan takes {_places(plan.drops)} out of lists of modules, and the experts that its routers lose are "
            f"{_places(coupling.drops(alive))}"
        )
    whole = coupling.kept(alive)
    for name in whole.keys() | plan.kept.keys():
        ours, theirs = whole.get(name, {}), plan.kept.get(name, {})
        if ours.keys() != theirs.keys() or any(not np.array_equal(ours[d], theirs[d]) for d in ours):
            raise PlanError(f"the plan keeps indices of {name} that are coupled to others that it removes")
    undo = Undo()
    try:
        undo.add(plan.apply_(model).revert)
        if not all_have_values(leaf.tensor for leaf in recorded.leaves):
            proof = Proof.of_shapes()
        else:
            proof, culprit, again = prove(
                model, recorded, coupling, alive, plan, undo, Example(args, kwargs), rules, False
            )
            if culprit is not None or again is not None:
                raise GraphError(
                    f"the planned result differs from the masked dense model by {proof.difference:.1e}, first at "
                    f"{culprit or 'a branch that the example inputs do not take'}; plan again with these inputs"
                )
    except BaseException:
        undo.revert()
        raise
    return Shrunk(plan, proof, coupling, undo, {}, 1)


def _places(drops: Sequence[Drop]) -> dict[str, tuple[int, ...]]:
    return {drop.container: drop.places for drop in drops}


def merge(edits: Sequence[Edit]) -> list[Edit]:
    """Join successive edits of one attribute."""
    out: dict[tuple[str, str], Edit] = {}
    for edit in edits:
        key = edit.module, edit.attribute
        out[key] = replace(edit, old=out[key].old) if key in out else edit
    return [e for e in out.values() if e.old != e.new]


def _conv_inputs(coupling: Coupling, alive: NDArray[np.bool_]) -> dict[str, int]:
    """Return the channels that each module's first operator sees after pruning."""
    out: dict[str, int] = {}
    for op in coupling.trace.ops:
        if op.module in out or not op.inputs or len(op.inputs[0].shape) < 2:
            continue
        if op.name == "aten::convolution" or "norm" in op.name:
            dim = len(op.inputs[0].shape) - 1 if "layer_norm" in op.name or "rms" in op.name else 1
            out[op.module] = coupling.size(op.inputs[0], dim, alive)
    return out


def _follow(model: nn.Module, coupling: Coupling, alive: NDArray[np.bool_], undo: Undo) -> list[Edit]:
    """Change the attributes whose new values are known without a trial, and return what was changed."""
    edits = [*native_edits(model, _conv_inputs(coupling, alive)), *repetition_edits(model, coupling, alive)]
    for edit in edits:
        edit_(model, edit, undo)
    return edits


def repetition_edits(model: nn.Module, coupling: Coupling, alive: NDArray[np.bool_]) -> list[Edit]:
    """Return changes of how often a key head is repeated for its query heads.

    Fused attention reads that from shapes, and other implementations of the same module from an attribute: the one that
    is not running would break unseen.
    """
    edits = []
    for op in coupling.trace.ops:
        if "scaled_dot_product" not in op.name or len(op.inputs[0].shape) < 4:
            continue
        (q_old, q_new), (k_old, k_new) = (
            (a.shape[-3], coupling.size(a, len(a.shape) - 3, alive)) for a in op.inputs[:2]
        )
        if q_old // k_old == q_new // k_new:
            continue
        for name, value in vars(model.get_submodule(op.module)).items():
            if type(value) is int and value == q_old // k_old and ("group" in name or "rep" in name):
                edits.append(Edit(op.module, name, value, q_new // k_new))
    return edits


def nothing_to_prune(coupling: Coupling, constraints: Constraints) -> str:
    """Say why no unit can go."""
    if coupling.units:
        sizes = ", ".join(f"{g.name} ({g.units} units)" for g in coupling.groups[:5])
        return f"nothing can be pruned: every group is smaller than its rounding, or the ratio is too small: {sizes}"
    if coupling.unit == "expert" and not coupling.trace.ledger.chosen:
        return (
            "nothing can be pruned: because no router (topk, argmax, max) of this model chooses among the outputs of a "
            "parameter"
        )
    if constraints.whole:
        return "nothing can be pruned: because " + "; ".join(list(dict.fromkeys(constraints.whole.values()))[:3])
    rows = [coupling.why_fixed(leaf.name) for leaf in coupling.trace.leaves if leaf.kind == "parameter"]
    if coupling.unit == "expert":
        rows = [row for row in map(_about_experts, rows) if row] or rows
    lines = rows[:3]
    unknown = ", ".join(sorted(coupling.trace.unknown))
    return (
        "nothing can be pruned: because "
        + "; ".join(lines or ["the model has no parameters"])
        + (f". Operators without a rule: {unknown}" if unknown else "")
    )


def _about_experts(row: str) -> str:
    """Return what a row says about experts: not about the many dimensions that are fixed because they count none."""
    name, _, dims = row.partition(": ")
    said = [dim for dim in dims.split("; ") if "expert" in dim and ONLY_EXPERTS not in dim]
    return f"{name}: {'; '.join(said)}" if said else ""


__all__ = ["Choice", "Shrunk", "replay", "shrink"]
