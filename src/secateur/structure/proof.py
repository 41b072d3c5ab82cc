"""The proof for two models at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from secateur.errors import PlanError
from secateur.graph.changes import class_name
from secateur.graph.compare import compare
from secateur.graph.coupling import trace
from secateur.graph.examples import Example, unseen
from secateur.graph.labels import Axes
from secateur.graph.plan import Plan
from secateur.graph.record import Leaf, owned_tensors
from secateur.graph.rules import RULES
from secateur.graph.shorten import blocks_of, prove_bypassed
from secateur.graph.values import Probe
from secateur.graph.verify import Proof, run_reference, run_small
from secateur.structure.inputs import split_inputs
from secateur.structure.remembered import plans_of
from secateur.structure.report import ShrinkReport


def verify(dense: nn.Module, small: nn.Module, example_inputs: Any, plan: Plan | ShrinkReport | None = None) -> Proof:
    """Compare a shrunk model with the dense one whose pruned weights are zero, in float64, on two inputs.

    Where whole blocks are gone, the dense model bypasses them. Statistics of normalisation layers run over the kept
    channels in both. The second input has the shapes of the
    first and other values.

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
    if plan.drops:
        return prove_bypassed(dense, small, example, blocks_of(dense, plan, example))
    recorded = trace(dense, [example])
    removed = np.zeros(recorded.ledger.count, dtype=bool)
    for leaf in recorded.leaves:
        for dim, kept in plan.kept.get(leaf.name, {}).items():
            part = leaf.axes.part(dim)
            if part is not None:
                gone = np.ones(leaf.axes.shape[dim], dtype=bool)
                gone[kept] = False
                removed[part.labels[gone]] = True
    examples = [*recorded.examples, unseen(example)]
    probe = Probe([leaf.tensor.detach() for leaf in recorded.leaves], distinct=False)
    reference, normalised, _ = run_reference(dense, examples, recorded.leaves, removed, probe, RULES)
    leaves = [Leaf(tuple(names), tensor, Axes(tensor.shape), kind) for names, tensor, kind in owned_tensors(small)]
    own = Probe([leaf.tensor.detach() for leaf in leaves], distinct=False)
    difference, scale = compare(reference, run_small(small, examples, leaves, {}, own), plan.resized)
    return Proof(difference, scale, len(examples), normalised)


def _only(plans: tuple[Plan, ...]) -> Plan:
    if len(plans) > 1:
        raise PlanError(
            f"the model was shrunk in {len(plans)} rounds, with training in between perhaps: each was proven when it "
            "was made. Give the dense model of the last round, and its plan"
        )
    return plans[0]
