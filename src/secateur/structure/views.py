"""Coupled groups as scores see them: what every unit owns, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Owned:
    """One parameter of the modules that go with units, unit by unit.

    Attributes:
        key: What scores and statistics know it by, ``"mixture.experts.*.up.weight"``.
        role: What it is to the units.
        names: Its name in the module of each unit; ``None`` where that has none.
    """

    key: str
    role: str
    names: tuple[str | None, ...]

    def rows(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Return (units, elements per unit), zeros where a module has fewer elements or none; ``None`` without any."""
        flat = [None if n is None or n not in values else values[n].detach().flatten() for n in self.names]
        known = [f for f in flat if f is not None]
        if not known:
            return None
        out = known[0].new_zeros(len(flat), max(len(f) for f in known))
        for row, own in zip(out, flat, strict=True):
            if own is not None:
                row[: len(own)] = own
        return out


def owned_by(model: nn.Module, group: Group) -> list[Owned]:
    """Return the parameters of the modules that go with a group's units.

    Args:
        model: The model.
        group: The group.
    """
    out = []
    for entries in group.owned:
        modules = [model.get_submodule(entry) for entry in entries]
        found: dict[str, dict[int, str]] = {}
        for unit, (entry, module) in enumerate(zip(entries, modules, strict=True)):
            for path, _ in module.named_parameters(remove_duplicate=False):
                found.setdefault(path, {})[unit] = f"{entry}.{path}"
        for path, by_unit in found.items():
            module = modules[next(iter(by_unit))]
            role = role_of(module, path, 0, tuple(module.get_parameter(path).shape))
            names = tuple(by_unit.get(unit) for unit in range(len(entries)))
            out.append(Owned(f"{_container(entries)}.*.{path}", role, names))
    return out


def _container(entries: Sequence[str]) -> str:
    return entries[0].rpartition(".")[0]


def names_reached(model: nn.Module, groups: Sequence[Group]) -> set[str]:
    """Return the tensors that some group has a place in, and the parameters of the modules that go with its units."""
    members = {m.name for group in groups for m in group.members}
    return members | {n for group in groups for own in owned_by(model, group) for n in own.names if n is not None}


def group_view(model: nn.Module, coupling: Coupling, group: Group, values: Mapping[str, Tensor]) -> GroupView:
    """Return a group with its members' values and those of the modules that go with it, buffers left out.

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
    owned = [(own, own.rows(values)) for own in owned_by(model, group)]
    views = tuple(MemberView(own.key, own.role, rows) for own, rows in owned if rows is not None)
    return GroupView(group.name, group.units, members + views)
