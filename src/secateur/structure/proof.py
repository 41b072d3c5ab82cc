"""The proof for two models at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from secateur.errors import GraphError, PlanError
from secateur.graph.axes import Axes
from secateur.graph.changes import class_name
from secateur.graph.compare import compare
from secateur.graph.coupling import Coupling, lost_labels
from secateur.graph.examples import Example, unseen
from secateur.graph.model import owned_tensors, quiet_forward
from secateur.graph.outputs import fixed_outputs
from secateur.graph.plan import Plan
from secateur.graph.record import Leaf
from secateur.graph.rules import RULES
from secateur.graph.shorten import blocks_of, prove_bypassed
from secateur.graph.state import preserved
from secateur.graph.trace import trace
from secateur.graph.trees import tensors
from secateur.graph.valueless import all_have_values, outside_fake_mode
from secateur.graph.values import Probe
from secateur.graph.verify import Proof, run_reference, run_small
from secateur.inputs import split_inputs
from secateur.structure.remembered import plans_of
from secateur.structure.report import ShrinkReport


def verify(dense: nn.Module, small: nn.Module, example_inputs: Any, plan: Plan | ShrinkReport | None = None) -> Proof:
    """Compare a shrunk model with the dense one whose pruned weights are zero, in float64, on two inputs.

    Where whole blocks are gone, the dense model bypasses them. Statistics of normalisation layers run over the kept
    channels in both. The second input has the shapes of the first and other values; it is left out where the dense
    model refuses it. Models without values (on the meta device, and fake ones) are compared by shapes.

    Args:
        dense: The model as it was before.
        small: The shrunk model, not trained further.
        example_inputs: A tensor, a tuple, a dict, or ``(tuple, dict)``.
        plan: What was removed. Not needed for the very object that was shrunk, or loaded by ``load_pruned``.

    Returns:
        The proof; ``print`` it, or look at ``proof.equal``.

    Raises:
        PlanError: When the plan fits neither model, none is known, or the model was shrunk in several rounds.
        GraphError: When a forward fails.
    """
    if plan is None:
        plan = _only(plans_of(small, "verify(dense, small, inputs, report)"))
    plan = plan.plan if isinstance(plan, ShrinkReport) else plan
    plan.check(dense)
    if class_name(small) != class_name(dense):
        raise PlanError(f"the shrunk model is a {class_name(small)}, the dense one a {class_name(dense)}")
    args, kwargs = split_inputs(example_inputs)
    example = Example(args, kwargs)
    with outside_fake_mode():
        if not all_have_values([*dense.parameters(), *small.parameters()]):
            return _by_shapes(dense, small, example, plan)
        if plan.drops and not plan.kept:
            return prove_bypassed(dense, small, example, blocks_of(dense, plan, example))
        return _by_values(dense, small, example, plan)


def _by_values(dense: nn.Module, small: nn.Module, example: Example, plan: Plan) -> Proof:
    """Compare outputs on the example, the branches that it does not take, and an input of other values."""
    recorded = trace(dense, [example])
    removed = np.zeros(recorded.ledger.count, dtype=bool)
    for labels in lost_labels(recorded.leaves, plan.kept):
        removed[labels] = True
    probe = Probe([leaf.tensor.detach() for leaf in recorded.leaves], distinct=False)
    examples: list[Example] = []
    reference: list[list[Any]] = []
    normalised: dict[str, int] = {}
    made_up = unseen(example)
    known = list(recorded.examples)
    if plan.drops:
        coupling = Coupling(recorded, unit="expert")
        known = [seen for seen in known if coupling.comparable(seen)]
    for tried in (*known, made_up):
        try:
            (outputs,), counts, _ = run_reference(dense, [tried], recorded.leaves, removed, probe, RULES)
        except GraphError:
            if tried is not made_up and not tried.turns and not tried.spread:
                raise
            continue  # a guard that raises is no branch, and some models refuse made-up inputs
        examples.append(tried)
        reference.append(outputs)
        normalised = {name: normalised.get(name, 0) + counts.get(name, 0) for name in normalised | counts}
    leaves = [Leaf(tuple(names), tensor, Axes(tensor.shape), kind) for names, tensor, kind in owned_tensors(small)]
    own = Probe([leaf.tensor.detach() for leaf in leaves], distinct=False)
    difference, scale = compare(reference, run_small(small, examples, leaves, {}, own), plan.resized)
    return Proof(difference, scale, len(examples), normalised)


def _by_shapes(dense: nn.Module, small: nn.Module, example: Example, plan: Plan) -> Proof:
    """Compare what can be compared of models without values.

    Raises:
        PlanError: When a tensor of the small model has not the shape that the plan gives it.
        GraphError: When the outputs have other shapes.
    """
    own = {n: tuple(t.shape) for names, t, _ in owned_tensors(small) for n in names}
    for name, dims in plan.kept.items():
        wanted = tuple(len(dims[d]) if d in dims else size for d, size in enumerate(plan.shapes[name]))
        if own.get(name) != wanted:
            raise PlanError(f"{name} of the shrunk model has shape {own.get(name)}, the plan leaves {wanted}")
    shapes = []
    for model in (dense, small):
        with preserved(model), quiet_forward(model):
            shapes.append([tuple(t.shape) for t in tensors(fixed_outputs(example.run(model)))])
    if shapes[0] != shapes[1]:
        raise GraphError(f"the shrunk model gives outputs of shapes {shapes[1]}, the dense one {shapes[0]}")
    return Proof.of_shapes()


def _only(plans: tuple[Plan, ...]) -> Plan:
    if len(plans) > 1:
        raise PlanError(
            f"the model was shrunk in {len(plans)} rounds, with training in between perhaps: each was proven when it "
            "was made. Give the dense model of the last round, and its plan"
        )
    return plans[0]
