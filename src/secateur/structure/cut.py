"""Masked units, seen as if they were cut out: masks from units, units from masks, and what scores see of the rest."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.graph.choose import Removed
from secateur.graph.coupling import Coupling
from secateur.graph.groups import Group
from secateur.structure.views import rows_of
from secateur.types import GroupView, Masks, MemberView, Statistic, Stats, Tensors

_BY_ELEMENT = ("gradient", "absolute_gradient")


class Cut:
    """What is left of every tensor when some units have gone.

    Args:
        coupling: The groups.
        removed: The units that have gone.
    """

    def __init__(self, coupling: Coupling, removed: Removed) -> None:
        self._removed = removed
        self._kept = coupling.kept(coupling.alive(removed)) if removed.any() else {}
        self._shapes = {leaf.name: leaf.axes.shape for leaf in coupling.trace.leaves}

    def left(self, name: str) -> dict[int, Tensor]:
        """Return the indices that stay, for every dimension of a tensor that has lost some."""
        return {dim: torch.from_numpy(kept) for dim, kept in self._kept.get(name, {}).items()}

    def live(self, group: Group) -> Tensor:
        """Return which units of a group stay."""
        return torch.from_numpy(~self._removed[group.ids])

    def mask(self, name: str) -> Tensor:
        """Return a tensor's mask, ``True`` = keep: what every dimension keeps."""
        mask = torch.ones(self._shapes[name], dtype=torch.bool, device="cpu")
        for dim, kept in self.left(name).items():
            gone = torch.ones(mask.shape[dim], dtype=torch.bool, device="cpu")
            gone[kept] = False
            mask.index_fill_(dim, gone.nonzero().flatten(), False)
        return mask

    def masks(self, names: Iterable[str]) -> Masks:
        """Return the masks of some tensors."""
        return {name: self.mask(name) for name in names}

    def seen(self, group: Group, view: GroupView, stats: Stats) -> tuple[GroupView, Stats]:
        """Return a group and its statistics without the units and the elements that have gone.

        Args:
            group: The group.
            view: Everything that its units own.
            stats: What was collected.
        """
        live = self.live(group)
        places = {f"{member.name}@{member.dim}": member for member in group.members}
        columns, members = {}, []
        for member in view.members:
            own = places[member.name]
            columns[member.name] = rows_of(self.mask(own.name), own, group.units)[live][0]  # alike for all that stay
            values = member.values[live.to(member.values.device)][:, columns[member.name].to(member.values.device)]
            members.append(MemberView(member.name, member.role, values))
        narrowed: dict[str, Tensors] = {}
        for need, table in stats.items():
            own_rows = {key: rows[live] for key, rows in table.items() if key == group.name or key in columns}
            if need in _BY_ELEMENT or isinstance(need, Statistic):
                own_rows = {key: rows[:, columns[key]] for key, rows in own_rows.items()}
            narrowed[need] = own_rows
        return GroupView(view.name, int(live.sum()), tuple(members)), narrowed


def removed_by(coupling: Coupling, masks: Tensors) -> Removed:
    """Return the units of which some mask keeps nothing.

    Args:
        coupling: The groups.
        masks: Masks that remove whole units, by parameter name.
    """
    kept: dict[str, dict[int, NDArray[np.int64]]] = {}
    for leaf in coupling.trace.leaves:
        for part in leaf.axes.parts if leaf.name in masks else ():
            dim = part.dims[0]
            flags = masks[leaf.name].movedim(dim, 0).reshape(leaf.axes.shape[dim], -1).any(1).cpu().numpy()
            if not flags.all():
                kept.setdefault(leaf.name, {})[dim] = np.flatnonzero(flags)
    units = coupling.unit_of[~coupling.alive_under(kept)]
    removed = np.zeros(coupling.units, dtype=bool)
    removed[units[units >= 0]] = True
    return removed
