"""The proof of a plan: the comparison over the recorded examples and over inputs that the recording has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import GraphError
from secateur.graph.changes import Undo
from secateur.graph.compare import compare, says_nothing, tolerated
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example, other_batches, unseen
from secateur.graph.model import quiet_forward
from secateur.graph.plan import Plan, silence
from secateur.graph.rules import Rules
from secateur.graph.state import preserved
from secateur.graph.trace import Trace, trace
from secateur.graph.values import Probe
from secateur.graph.verify import Proof, run_reference, run_small
from secateur.graph.where import first_difference

_AMPLIFIED = 1e-5
"""In training mode, norms over values that are nearly alike enlarge rounding: to this part of an output at most."""

_NOISE = 16
"""A difference up to this many times what a rounding of the inputs makes in the same model is rounding."""


def prove(  # noqa: PLR0913
    model: nn.Module,
    recorded: Trace,
    coupling: Coupling,
    alive: NDArray[np.bool_],
    plan: Plan,
    undo: Undo,
    first: Example,
    rules: Rules,
    exact: bool,
) -> tuple[Proof, str | None, Trace | None]:
    """Compare with the masked dense model on the example and on unseen inputs.

    Args:
        model: The pruned model; it is put back and pruned again on the way.
        recorded: The trace that the plan was made from.
        coupling: Its groups.
        alive: Per label, whether it stays.
        plan: What was done.
        undo: The way back.
        first: The example inputs, from which unseen ones are made.
        rules: Rules for labels.
        exact: Whether a better trace is to forbid normalisation over pruned dimensions.

    Returns:
        The proof; the module where they part, if they do; a better trace where unseen inputs took another way.

    Raises:
        GraphError: When all outputs are zero, NaN or nothing, on which any two models would agree.
    """
    removed = ~alive
    ready = {leaf.name: leaf.tensor.data for leaf in recorded.leaves if leaf.name in plan.kept}
    undo.revert()
    probe = Probe([leaf.tensor.detach() for leaf in recorded.leaves])
    made_up = unseen(first)
    training = [recorded.training] if recorded.training is not None else []
    extras = [*other_batches(made_up), made_up, *training]
    known = [example for example in recorded.examples if coupling.comparable(example)]
    examples = list(known)
    normalised: dict[str, int] = {}
    difference, scale, silent = 0.0, 0.0, True
    for number, example in enumerate([*extras, *known]):  # one at a time: outputs can be large
        extra = number < len(extras)
        if example is made_up and len(examples) > len(known):
            continue
        undo.revert()
        found = _reference(model, example, extra, recorded, removed, probe, rules)
        if found is None:
            examples = [e for e in examples if e is not example]
            continue
        reference, counts, used = found
        if extra:
            examples.append(example)
            counts = {}
        silent &= example.training or says_nothing(reference)
        if not used <= recorded.touched:
            again = trace(model, [e for e in examples if not (e.turns or e.training)], exact=exact, rules=rules)
            return Proof(float("inf"), 0.0, 0, {}), None, again
        normalised = {name: normalised.get(name, 0) + counts.get(name, 0) for name in normalised | counts}
        _cut(model, plan, ready, undo)
        gap, size = _gap(model, example, recorded, plan, probe, reference)
        if example.training and tolerated(size) < gap <= _AMPLIFIED * size:
            undo.revert()
            shaken = run_reference(model, [example.shaken()], recorded.leaves, removed, probe, rules)[0]
            gap = 0.0 if gap <= _NOISE * compare(reference, shaken)[0] else gap
            del shaken
        del reference
        if (gap / tolerated(size), size) > (difference / tolerated(scale), scale):
            difference, scale = gap, size
    _cut(model, plan, ready, undo)  # the last example was refused, or ran in the dense model once more
    if silent:
        raise GraphError(silence(model))
    proof = Proof(difference, scale, sum(not e.training for e in examples), normalised)
    if proof.equal:
        return proof, None, None
    culprit = first_difference(model, examples, recorded.leaves, removed, plan, probe, rules, undo)
    return proof, culprit, None


def _cut(model: nn.Module, plan: Plan, ready: dict[str, Tensor], undo: Undo) -> None:
    """Prune the model as planned, unless it is pruned now."""
    if not undo.count:
        undo.add(plan.apply_(model, ready).revert)


def _reference(
    model: nn.Module,
    example: Example,
    extra: bool,
    recorded: Trace,
    removed: NDArray[np.bool_],
    probe: Probe,
    rules: Rules,
) -> tuple[list[list[Any]], dict[str, int], set[int]] | None:
    """Run the masked dense model on one example.

    Some models refuse made-up inputs (another batch size, a missing end-of-sentence token), and a truth value that
    opened a branch may be a guard where other experts are chosen, or these chosen in turn: ``None`` then.
    """
    try:
        if extra and example is not recorded.training:  # what a forward caches for good must not be in float64
            with preserved(model), quiet_forward(model, training=example.training):
                example.run(model)
        return run_reference(model, [example], recorded.leaves, removed, probe, rules)
    except GraphError:
        if not extra and not example.turns and not example.spread:
            raise
    return None


def _gap(
    model: nn.Module, example: Example, recorded: Trace, plan: Plan, probe: Probe, reference: list[list[Any]]
) -> tuple[float, float]:
    """Run the pruned model on one example; return the worst difference and the scale of what differs."""
    try:
        return compare(reference, run_small(model, [example], recorded.leaves, plan.kept, probe), plan.resized)
    except Exception:  # noqa: BLE001  # the pruned forward stopped, in the user's code; where, is found later
        return float("inf"), 0.0
