"""Masks of any method, read as units that are gone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import WeightError
from secateur.graph.coupling import Coupling
from secateur.graph.groups import Group
from secateur.graph.plan import Plan
from secateur.structure.views import role_of, rows_of
from secateur.types import Tensors


def dead_units(model: nn.Module, coupling: Coupling, masks: Tensors) -> NDArray[np.bool_]:
    """Mark the units that the masks have emptied.

    A unit is gone when every masked tensor that makes it has only pruned weights there, or every tensor that reads it
    is masked and reads nothing of it, or every parameter that it has a place in is masked there.

    The first of these says nothing about what the unit puts out. Where an activation of zero is not zero (a sigmoid),
    where a norm behind the layer keeps its shift, or where a tensor without a mask makes the unit too, the masked
    model still gives its readers a constant or more, and the cut one does not.

    Args:
        model: The model.
        coupling: Its groups.
        masks: Bool masks by parameter name, ``True`` = keep.

    Returns:
        One flag per unit.

    Raises:
        WeightError: When a mask fits no parameter.
    """
    known = {n: leaf for leaf in coupling.trace.leaves for n in leaf.names}
    for name, mask in masks.items():
        if name not in known or tuple(mask.shape) != tuple(known[name].axes.shape):
            raise WeightError(f"the mask of {name!r} fits no parameter of this model")
    first = {known[name].name: mask for name, mask in masks.items()}
    removed = np.zeros(coupling.units, dtype=bool)
    for group in coupling.groups:
        removed[group.ids] = _dead(model, coupling, group, first).numpy()
        if removed[group.ids].all():
            removed[group.ids[0]] = False  # a layer without units would cut the network; one stays, masked
    return removed


def _dead(model: nn.Module, coupling: Coupling, group: Group, masks: dict[str, Tensor]) -> Tensor:
    shapes = {leaf.name: leaf.axes.shape for leaf in coupling.trace.leaves}
    parameters = {leaf.name for leaf in coupling.trace.leaves if leaf.kind == "parameter"}
    out: dict[str, list[Tensor | None]] = {"out": [], "in": []}
    everywhere: list[Tensor | None] = []
    for member in group.members:
        role = role_of(model, member.name, member.dim, shapes[member.name])
        if member.name in parameters:
            mask = masks.get(member.name)
            everywhere.append(None if mask is None else ~rows_of(mask.cpu(), member, group.units).any(1))
            if role in out:
                out[role].append(everywhere[-1])
    nothing = torch.zeros(group.units, dtype=torch.bool, device="cpu")
    made = [m for m in out["out"] if m is not None]
    unmade = torch.stack(made).all(0) if made else nothing
    return unmade | _all_of(out["in"], nothing) | _all_of(everywhere, nothing)


def _all_of(flags: list[Tensor | None], nothing: Tensor) -> Tensor:
    known = [f for f in flags if f is not None]
    return torch.stack(known).all(0) if known and len(known) == len(flags) else nothing


__all__ = ["Plan", "dead_units"]
