"""Vectors that die with a layer's units: the scale and shift of the norm behind it, so that a masked unit is silent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.groups import Member
from secateur.graph.trace import trace
from secateur.inputs import split_inputs
from secateur.prunable import Found
from secateur.structure.views import role_of


def with_companions(model: nn.Module, found: Found, example_inputs: Any) -> Found:
    """Name, for every weight whose units no other layer makes, the biases and norm parameters that belong to them.

    A masked filter in front of a batch norm still puts out the norm's shift. With the norm's parameters masked along,
    the unit's activation is zero, and cutting the unit out changes nothing.

    Args:
        model: The model.
        found: Its prunable weights.
        example_inputs: What the forward takes.

    Returns:
        The weights with their ``companions``; those in residual sums, whose units several layers make, as they were.

    Raises:
        GraphError: When the forward cannot be recorded.
    """
    args, kwargs = split_inputs(example_inputs)
    coupling = Coupling(trace(model, [Example(args, kwargs)]))
    shapes = {leaf.name: leaf.axes.shape for leaf in coupling.trace.leaves}
    first = {name: leaf.name for leaf in coupling.trace.leaves for name in leaf.names}
    parameters = {leaf.name for leaf in coupling.trace.leaves if leaf.kind == "parameter"}
    weights = dict(found.weights)
    for group in coupling.groups:
        roles = [(m, role_of(model, m.name, m.dim, shapes[m.name])) for m in group.members if m.name in parameters]
        makers = [m for m, role in roles if role == "out"]
        if len(makers) != 1:
            continue
        maker = makers[0]
        for name, weight in found.weights.items():
            if first.get(name) == maker.name and weight.out_dim == maker.dim and _covers(maker):
                own = [m.name for m, role in roles if role in ("bias", "norm") and np.array_equal(m.unit, maker.unit)]
                weights[name] = replace(weight, companions=tuple(n for n in own if n != weight.bias))
    return replace(found, weights=weights)


def _covers(member: Member) -> bool:
    """Whether every index is a unit of its own, in order."""
    return bool((member.unit == np.arange(len(member.unit))).all())
