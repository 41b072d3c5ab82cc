"""Coupled groups as scores see them: what every unit owns, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.graph.coupling import Coupling
from secateur.graph.groups import Group, Member
from secateur.types import GroupView, MemberView

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def role_of(model: nn.Module, name: str, dim: int, shape: tuple[int, ...]) -> str:
    """Say what a dimension of a parameter is to the units that live there.

    Args:
        model: The model.
        name: Qualified parameter name.
        dim: The dimension.
        shape: Shape of the parameter.

    Returns:
        ``"out"``, ``"in"``, ``"norm"``, ``"bias"`` or ``"other"``.
    """
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return "other"
    kind = type(module).__name__
    if len(shape) == 1:
        if "bias" in attribute:
            return "bias"
        return "norm" if isinstance(module, _NORMS) or "Norm" in kind else "other"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "out" if dim == 1 else "other"
    if isinstance(module, _ConvNd):
        out = 1 if isinstance(module, _ConvTransposeNd) else 0
        if module.groups > 1 and shape[1] == 1:
            return "other"  # a depthwise filter passes a channel on; it does not make one
        return {out: "out", 1 - out: "in"}.get(dim, "other")
    if kind == "Conv1D" and attribute == "weight":  # stored (in, out) in some libraries
        return {1: "out", 0: "in"}[dim]
    if attribute.startswith("weight_hh"):
        return {0: "out", 1: "in"}[dim]
    return {0: "out", 1: "in"}.get(dim, "other") if len(shape) < 3 else "other"


def rows_of(values: Tensor, member: Member, units: int) -> Tensor:
    """Return a member's values as (units, elements per unit)."""
    picked = values.detach().index_select(member.dim, torch.from_numpy(member.places.by_unit).to(values.device))
    return picked.movedim(member.dim, 0).reshape(units, -1)


def group_view(model: nn.Module, coupling: Coupling, group: Group, values: Mapping[str, Tensor]) -> GroupView:
    """Return a group with its members' values, buffers left out.

    Args:
        model: The model.
        coupling: The coupling that the group belongs to.
        group: The group.
        values: Tensors of the parameters' shapes, by name.
    """
    shapes = {leaf.name: leaf.axes.shape for leaf in coupling.trace.leaves}
    members = tuple(
        MemberView(
            f"{m.name}@{m.dim}", role_of(model, m.name, m.dim, shapes[m.name]), rows_of(values[m.name], m, group.units)
        )
        for m in group.members
        if m.name in values
    )
    return GroupView(group.name, group.units, members)
