"""Coupled channels for penalties: which parts of which parameters are one unit's."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.errors import GraphError
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.trace import trace
from secateur.graph.unsupported import refuse_unsupported
from secateur.inputs import split_inputs
from secateur.structure.views import role_of
from secateur.types import CoupledGroup, CoupledSlices


def coupled_groups(model: nn.Module, example_inputs: Any, *, readers: bool = False) -> tuple[CoupledGroup, ...]:
    """Find the channels that can only go together, for penalties that press on all of a channel.

    Args:
        model: The model; left as it was.
        example_inputs: A tensor, a tuple, a dict, or ``(tuple, dict)``.
        readers: Whether the columns that read a channel count as its own. Their elements are then in two groups: that
            of the channel they read, and that of the channel they make.

    Returns:
        The groups: the rows that make a channel, its biases, scales and depthwise filters, and its readers.

    Raises:
        GraphError: When the forward cannot be followed, or nothing is coupled.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> (group,) = coupled_groups(net, torch.randn(3, 4))
        >>> group.units, [s.name for s in group.slices]
        (8, ['0.bias', '0.weight', '1.bias', '1.weight'])
    """
    refuse_unsupported(model)
    args, kwargs = split_inputs(example_inputs)
    coupling = Coupling(trace(model, [Example(args, kwargs)]))
    shapes = {leaf.name: leaf.axes.shape for leaf in coupling.trace.leaves if leaf.kind == "parameter"}
    out = []
    for group in coupling.groups:
        slices = [
            CoupledSlices(m.name, m.dim, tuple(m.unit.tolist()))
            for m in group.members
            if m.name in shapes and (readers or role_of(model, m.name, m.dim, shapes[m.name]) != "in")
        ]
        if slices:
            slices.sort(key=lambda s: (s.name, s.dim))
            out.append(CoupledGroup(group.name, group.units, tuple(slices)))
    if not out:
        raise GraphError("no channels of this model are coupled, so a penalty has no groups to press on")
    return tuple(out)
