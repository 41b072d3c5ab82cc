"""Which indices of which parameters must go together: coupled groups, read off a recorded forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from secateur.errors import GraphError
from secateur.graph.axes import FIXED, Axes, Labels
from secateur.graph.changes import Drop, Kept
from secateur.graph.components import join
from secateur.graph.constraints import Constraints, SameSize, constrain, same_sizes, settle
from secateur.graph.count import Total, size_along
from secateur.graph.examples import Example
from secateur.graph.experts import Listed, Presence, listed_experts
from secateur.graph.groups import Group, Member, Places, Unit, group_name, places_by_group
from secateur.graph.labels import Ledger
from secateur.graph.record import Leaf, Op
from secateur.graph.trace import Trace

ONLY_EXPERTS = "being no expert, where only experts are pruned"


class Coupling:
    """The coupled groups of a trace under some constraints.

    Attributes:
        trace: What was recorded.
        groups: Units that can be pruned, by group.
        units: How many units there are in all groups.
        unit_of: The unit of each label, or -1.
        group_of_unit: Position of each unit's group.
        linked: Sets of groups (by position) that must shrink alike.
        lists: Lists of modules that the experts are entries of.

    Args:
        recorded: The trace.
        constraints: What has been learnt from failures.
        unit: What may go: channels (with heads and neurons), or the experts of a router.
    """

    def __init__(self, recorded: Trace, constraints: Constraints | None = None, unit: Unit = "channel") -> None:
        self.trace = recorded
        self.unit: Unit = unit
        self.lists: tuple[Listed, ...] = ()
        constraints = constraints or Constraints()
        ledger = recorded.ledger.copy()
        constrain(ledger, recorded.ops, constraints)
        if unit == "expert":
            self._only_experts(ledger)
        else:
            for labels, why in ledger.contested:
                ledger.freeze(labels, why)
        self.roots = ledger.close()
        self.frozen = ledger.frozen_roots(self.roots)
        self._ledger = ledger
        sizes = same_sizes(ledger, recorded.ops, constraints.equal) if constraints.equal else []
        settle(ledger, self.roots, self.frozen, sizes, constraints.equal)
        self.groups = self._groups()
        self.units = sum(g.units for g in self.groups)
        unit_of_root = np.full(ledger.count, -1)
        for group in self.groups:
            unit_of_root[self._root_of[group.ids]] = group.ids
        self.unit_of = unit_of_root[self.roots]
        self.unit_of[0] = -1
        self.group_of_unit = np.full(self.units + 1, -1)  # the last one for no unit
        for position, group in enumerate(self.groups):
            self.group_of_unit[group.ids] = position
        self.groups = [replace(group, owned=self._owned(group)) for group in self.groups]
        self.linked = self._linked(sizes)

    def _only_experts(self, ledger: Ledger) -> None:
        """Fix everything but the dimensions that a router chooses from, and find the lists of modules behind them."""
        roots = ledger.roots()
        found = listed_experts(self.trace, roots)
        self.lists = tuple(found.lists)
        ledger.singles = False
        for labels, why in found.refused:
            ledger.freeze(labels, why)
        experts = np.zeros(ledger.count, dtype=bool)
        for labels, _, _ in ledger.chosen:
            experts[roots[labels]] = True
        experts[FIXED] = False
        ledger.freeze(np.flatnonzero(~experts[roots]), ONLY_EXPERTS)

    def _linked(self, sizes: Sequence[SameSize]) -> list[frozenset[int]]:
        """Return sets of groups (by position) that must shrink alike, so that dimensions keep one size.

        A split dimension (heads) is linked to every other dimension of its flat size in the same module.
        """
        sets: list[set[int]] = []
        for entry in sizes:
            groups: set[int] = set()
            for labels in (*entry.plain, *entry.split):
                here = set(np.unique(self.group_of_unit[self.unit_of[labels]]).tolist())
                groups |= set() if -1 in here else here
            if len(groups) < 2:
                continue
            join(sets, groups)
        return [frozenset(s) for s in sets]

    def _groups(self) -> list[Group]:
        signature, order, dims = self._signatures()
        live = np.flatnonzero(signature)
        self._root_of: Labels = np.zeros(0, dtype=np.int64)
        if not live.size:
            return []
        live = live[np.argsort(order[live], kind="stable")]
        _, first, inverse = np.unique(signature[live], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))[inverse]  # groups in order of appearance
        live = live[np.argsort(rank, kind="stable")]
        rank = np.sort(rank, kind="stable")
        self._root_of = live
        number = np.full(self._ledger.count, -1)
        number[live] = np.arange(len(live))
        bounds = [*np.flatnonzero(np.diff(rank, prepend=-1)).tolist(), len(live)]
        members: list[list[Member]] = [[] for _ in bounds[1:]]
        group_of = np.append(rank, -1)  # the last one for indices of no unit
        known: dict[bytes, list[tuple[int, Places]]] = {}
        for leaf, dim, roots in dims:
            key = roots.tobytes()  # a norm has four vectors alike
            if key not in known:
                known[key] = list(places_by_group(np.where(roots > 0, number[roots], -1), group_of, bounds))
            for g, places in known[key]:
                members[g].append(Member(leaf.name, dim, places))
        groups, taken = [], set[str]()
        chosen = [(np.unique(self.roots[labels]), k) for labels, k, _ in self._ledger.chosen]
        for g, (low, high) in enumerate(pairwise(bounds)):
            name = group_name(members[g], taken)
            floor = max((k for roots, k in chosen if np.isin(live[low:high], roots).any()), default=1)
            groups.append(Group(name, high - low, tuple(members[g]), np.arange(low, high), floor))
        return groups

    def _owned(self, group: Group) -> tuple[tuple[str, ...], ...]:
        """Return, for every list that has an entry for each unit of a group, these entries."""
        out = []
        for some in self.lists:
            entry = dict(zip(self.unit_of[some.labels].tolist(), some.names, strict=True))
            if all(unit in entry for unit in group.ids.tolist()):
                out.append(tuple(entry[unit] for unit in group.ids.tolist()))
        return tuple(out)

    def _signatures(self) -> tuple[NDArray[np.uint64], Labels, list[tuple[Leaf, int, Labels]]]:
        """Return what tells components apart.

        Returns:
            A number per component that depends on the parameter dimensions it reaches, 0 where it reaches none; where
            it is first met; and every dimension that can shrink, with its components.
        """
        rng = np.random.default_rng(0)
        never = np.iinfo(np.int64).max
        signature = np.zeros(self._ledger.count, dtype=np.uint64)
        order = np.full(self._ledger.count, never)
        position = 0
        dims: list[tuple[Leaf, int, Labels]] = []
        for index, leaf in enumerate(self.trace.leaves):
            for part in leaf.axes.parts if index in self.trace.touched else ():
                roots = self.roots[part.labels]
                free = ~self.frozen[roots]
                if not free.any():
                    continue
                dims.append((leaf, part.dims[0], np.where(free, roots, 0)))
                mark = rng.integers(1, never, dtype=np.uint64)
                if leaf.kind == "parameter":
                    np.add.at(signature, roots[free], mark)
                    seen = roots[free]
                    fresh = seen[order[seen] == never]
                    order[fresh] = position + np.arange(len(fresh))
                    position += len(seen)
        return signature, order, dims

    # -- what a choice of units means

    def alive(self, removed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return, per label, whether it stays when the marked units go."""
        gone: NDArray[np.bool_] = np.append(removed, False)[self.unit_of]
        return ~gone

    def size(self, axes: Axes, dim: int, alive: NDArray[np.bool_]) -> int:
        """Return the size of a dimension after pruning."""
        part = axes.part(dim)
        if part is None:
            return axes.shape[dim]
        return size_along(part, part.dims.index(dim), alive)

    def shape(self, axes: Axes, alive: NDArray[np.bool_]) -> tuple[int, ...]:
        """Return the shape of a tensor after pruning."""
        return tuple(self.size(axes, d, alive) for d in range(len(axes.shape)))

    def units_by_group(self, alive: NDArray[np.bool_]) -> list[int]:
        """Return how many units of each group stay."""
        kept = alive[self._root_of]
        return [int(kept[group.ids].sum()) for group in self.groups]

    def groups_in(self, axes: Axes) -> Iterator[int]:
        """Yield positions of groups whose units take several indices of a tensor each."""
        for part in axes.parts:
            group = int(self.group_of_unit[self.unit_of[part.labels.flat[0]]])
            if group >= 0 and self.groups[group].units < part.labels.size:
                yield group

    @cached_property
    def macs(self) -> Total:
        """The multiply-accumulates of the recorded forward after pruning, given which labels stay."""
        there = Presence(self.lists)
        return Total([*factors, *there.of(op.module, dense=True)] for op in self.trace.ops for factors in op.macs)

    @cached_property
    def parameters(self) -> Total:
        """How many parameters stay, tied ones once, given which labels stay."""
        return self._elements(leaf for leaf in self.trace.leaves if leaf.kind == "parameter")

    @cached_property
    def prunable_parameters(self) -> Total:
        """How many elements stay in the parameters that some group reaches, given which labels stay."""
        reached = {m.name for g in self.groups for m in g.members}
        there = Presence(self.lists)
        parameters = (leaf for leaf in self.trace.leaves if leaf.kind == "parameter")
        return self._elements(leaf for leaf in parameters if leaf.name in reached or there.of(*leaf.names))

    def _elements(self, leaves: Iterable[Leaf]) -> Total:
        there = Presence(self.lists)
        return Total(
            [*((leaf.axes, dim) for dim in range(len(leaf.axes.shape))), *there.of(*leaf.names)] for leaf in leaves
        )

    def units_left(self, alive: NDArray[np.bool_]) -> int:
        """Return how many units stay."""
        gone = self.unit_of[~alive]
        return self.units - len(np.unique(gone[gone >= 0]))

    def alive_under(self, kept: Kept) -> NDArray[np.bool_]:
        """Return, per label, whether it stays under a plan.

        Args:
            kept: Tensor name -> dimension -> kept indices.
        """
        gone_roots = np.zeros(len(self.roots), dtype=bool)
        for labels in lost_labels(self.trace.leaves, kept):
            gone_roots[self.roots[labels]] = True
        return ~gone_roots[self.roots]

    def kept(self, alive: NDArray[np.bool_]) -> dict[str, dict[int, NDArray[np.int64]]]:
        """Return, for every tensor that shrinks, the kept indices of each of its shrinking dimensions."""
        out: dict[str, dict[int, NDArray[np.int64]]] = {}
        for index, leaf in enumerate(self.trace.leaves):
            if index not in self.trace.touched:
                continue
            for part in leaf.axes.parts:
                flags = alive[part.labels]
                if not flags.all():
                    out.setdefault(leaf.name, {})[part.dims[0]] = np.flatnonzero(flags)
        return out

    def drops(self, alive: NDArray[np.bool_]) -> tuple[Drop, ...]:
        """Return what leaves the lists of experts."""
        return tuple(drop for some in self.lists if (drop := some.drop(alive)) is not None)

    def comparable(self, example: Example) -> bool:
        """Whether an example means the same to a model that has lost entries of the lists.

        Not so where a scalar is turned round that is read in the loop over experts, or after it: which one it is
        depends on how many there are.
        """
        return not (example.turns and any(map(self.in_lists, example.reads_in)))

    def in_lists(self, module: str) -> bool:
        """Whether a module picks from lists of experts, or is part of one that does."""
        return any(_is_in(module, scope) for some in self.lists for scope in some.scopes)

    @cached_property
    def _reasons(self) -> dict[int, str]:
        return self._ledger.reasons(self.roots)

    def why_fixed(self, name: str) -> str:
        """Say why a tensor's dimensions cannot be pruned; positions of a kernel, which never can, are left out.

        Args:
            name: Qualified name of a parameter, or of a module with a ``weight``.
        """
        for index, leaf in enumerate(self.trace.leaves):
            if name in leaf.names or f"{name}.weight" in leaf.names:
                if index not in self.trace.touched:
                    return f"{name}: the recorded forward does not use it"
                lines = []
                for part in leaf.axes.parts:
                    roots = np.unique(self.roots[part.labels])
                    fixed = [r for r in roots.tolist() if self.frozen[r]]
                    if fixed:
                        why = self._reasons.get(fixed[0], "it meets a fixed dimension")
                        if part.dims[0] > 1 and why.endswith("aten::convolution"):
                            continue
                        lines.append(f"dimension {part.dims[0]}: fixed by {why}")
                    else:
                        lines.append(f"dimension {part.dims[0]}: can be pruned")
                return f"{name}: " + "; ".join(lines or ["no dimension counts features"])
        raise GraphError(f"{name!r} is neither a parameter nor a module with a weight of this model")


def _is_in(module: str, scope: str) -> bool:
    return not scope or module == scope or module.startswith(f"{scope}.")


def lost_labels(leaves: Iterable[Leaf], kept: Kept) -> Iterator[Labels]:
    """Yield, for every dimension that shrinks, the labels that it loses.

    Args:
        leaves: Tensors with their labels.
        kept: Tensor name -> dimension -> kept indices.

    Yields:
        Labels, as they stand in the leaves.
    """
    for leaf in leaves:
        for dim, indices in kept.get(leaf.name, {}).items():
            part = leaf.axes.part(dim)
            if part is not None:
                gone = np.ones(leaf.axes.shape[dim], dtype=bool)
                gone[indices] = False
                yield part.labels[gone]


def iter_parts(ops: Iterable[Op]) -> Iterator[tuple[Op, Axes]]:
    """Yield every tensor of every operator."""
    for op in ops:
        for axes in (*op.inputs, *op.outputs):
            yield op, axes
