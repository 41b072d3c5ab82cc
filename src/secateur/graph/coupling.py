"""Which indices of which parameters must go together: coupled groups, read off a recorded forward."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import GraphError
from secateur.graph.changes import Kept
from secateur.graph.count import Total, size_along
from secateur.graph.examples import MOST_WAYS, Example, ScalarReads, other_batches, other_ways
from secateur.graph.labels import FIXED, Axes, Labels, Ledger, reshape_cells
from secateur.graph.outputs import fixed_outputs
from secateur.graph.record import Leaf, Op, Recorder, module_stack, quiet_forward
from secateur.graph.rules import RULES, Rules
from secateur.graph.state import preserved

_MOST_SEARCHES = 64
"""Recordings of branches, those in search of unused parameters included."""


@dataclass(frozen=True)
class Places:
    """Where the units of a group are in a dimension: shared by all tensors that have them in the same places.

    Attributes:
        size: Size of the dimension.
        indices: Indices that belong to the group's units, ascending.
        owners: The unit of each of them.
    """

    size: int
    indices: NDArray[np.int32]
    owners: NDArray[np.int32]

    @cached_property
    def width(self) -> int:
        """Most indices that one unit takes."""
        return int(np.bincount(self.owners).max()) if self.owners.size else 0

    @cached_property
    def by_unit(self) -> NDArray[np.int64]:
        """The indices, those of the first unit first."""
        return self.indices[np.argsort(self.owners, kind="stable")].astype(np.int64)


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group reaches.

    Attributes:
        name: Qualified name of the parameter or buffer.
        dim: The dimension.
        places: Where the group's units are in it.
    """

    name: str
    dim: int
    places: Places

    @property
    def width(self) -> int:
        """Most indices that one unit takes."""
        return self.places.width

    @property
    def unit(self) -> NDArray[np.int64]:
        """For every index of the dimension, the group's unit that it belongs to, or -1."""
        out = np.full(self.places.size, -1)
        out[self.places.indices] = self.places.owners
        return out


Unit = Literal["channel", "expert"]

ONLY_EXPERTS = "being no expert, where only experts are pruned"


@dataclass(frozen=True)
class Group:
    """Units that are alike: removing one means removing its indices from every member.

    Attributes:
        name: The first module whose outputs the units are.
        units: How many there are.
        members: Every dimension of every tensor that shrinks with them.
        ids: Global number of each unit.
        floor: Fewest that must stay: as many experts as a router chooses at a time.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    ids: NDArray[np.int64]
    floor: int = 1

    @property
    def size(self) -> int:
        """Indices that all units take where they are made."""
        made = [m for m in self.members if m.dim == 0] or self.members
        return self.units * max(m.width for m in made)

    def step(self, align: int) -> int:
        """Fewest units that may go at a time so that channel counts stay multiples of ``align``.

        Counted where the channels are made: the input side of a grouped convolution counts per group.
        """
        made = [m for m in self.members if m.dim == 0] or self.members
        made = [m for m in made if m.places.size > 2 * align] or made  # not where heads are mixed, say
        step = 1
        for member in made:
            step = math.lcm(step, align // math.gcd(align, max(member.width, 1)))
        return step


@dataclass
class Constraints:
    """What trial and error has added to a trace: modules whose splits, or all of whose tensors, are fixed.

    Attributes:
        splits: Modules (by name) where no split dimension may be pruned.
        whole: Modules where nothing may be pruned, with the reason.
        equal: Modules where dimensions of one size must keep one size: heads × head size = width.
    """

    splits: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    equal: dict[str, str] = field(default_factory=dict)


@dataclass
class _Sizes:
    """Dimensions of one size in one module.

    Attributes:
        module: The module.
        size: The size.
        plain: Labels of the dimensions of that size.
        split: Labels of those that a reshape there splits or joins (channels into heads).
    """

    module: str
    size: int
    plain: list[Labels] = field(default_factory=list)
    split: list[Labels] = field(default_factory=list)


@dataclass
class Trace:
    """A recorded forward.

    Attributes:
        ledger: All labels and ties.
        leaves: The tensors that the model owns.
        touched: Indices of the leaves that the forward used.
        ops: Operators of the first forward, in order.
        unknown: Operators without a rule, and the modules that call them.
        examples: What was recorded in evaluation mode: the examples, and branches that they do not take themselves.
        training: What was recorded in training mode; ``None`` where that fails.
    """

    ledger: Ledger
    leaves: list[Leaf]
    touched: set[int]
    ops: list[Op]
    unknown: dict[str, set[str]]
    examples: tuple[Example, ...] = ()
    training: Example | None = None


def trace(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    exact: bool = False,
    rules: Rules = RULES,
) -> Trace:
    """Record the forward on each of the examples; all of them constrain what can be pruned.

    Where Python reads truth values or numbers from tensors, the forward may have branches: each is recorded too, with
    the answer turned round, unless it raises an error; and as long as there are parameters that no recording has used,
    several answers at a time. One more recording is made in training mode, for what only
    that does (auxiliary classifiers).

    Args:
        model: Runs in evaluation mode, without gradients; left as it was.
        examples: Inputs.
        exact: Never prune a dimension that a normalisation runs over.
        rules: What each operator does to labels.

    Raises:
        GraphError: When the forward fails, or changes a parameter in place.
    """
    if not examples:
        raise GraphError("no example inputs were given, so the forward cannot be recorded")
    ledger = Ledger()
    first = Recorder(ledger, rules, exact=exact)
    first.add_leaves(model)
    taken: list[Example] = []

    def another() -> Recorder:
        mode = Recorder(ledger, rules, exact=exact, keep_ops=False)
        mode.adopt(first.leaves)
        return mode

    def record(mode: Recorder, example: Example) -> list[Any]:
        reads = _record(model, mode, example)
        first.note(mode)
        taken.append(example)
        return reads

    ways: deque[Example] = deque()
    later: deque[Example] = deque()
    for number, example in enumerate(examples):
        reads = record(first if number == 0 else another(), example)
        near = other_ways(example, reads)
        ways += near[:MOST_WAYS]
        later += near[MOST_WAYS:] + other_ways(example, reads, far=True)
    for _ in range(_MOST_SEARCHES):
        if not ways and later and _untouched(first):
            ways.append(later.popleft())
        if not ways:
            break
        way = ways.popleft()
        with suppress(GraphError):  # a guard that raises is no branch
            later += other_ways(way, record(another(), way))
    training = _record_training(model, examples[0], first, another)
    return Trace(ledger, first.leaves, first.touched, first.ops, first.unknown, tuple(taken), training)


def _record_training(
    model: nn.Module, example: Example, first: Recorder, another: Callable[[], Recorder]
) -> Example | None:
    """Record a forward in training mode, which may take other ways, and use parameters that evaluation leaves unused.

    Batch norms need several samples. Some models want more inputs than they do in evaluation (targets): such a
    recording is left out, and parameters that it would use are fixed.
    """
    tried = set[int]()
    why = ""
    for inputs in (example, *other_batches(example)):
        mode = another()
        way = replace(inputs, training=True)
        try:
            _record(model, mode, way)
        except GraphError as error:
            tried |= mode.touched
            why = why or f"training mode, where {error}"
        else:
            first.note(mode)
            return way
    for i in tried - first.touched:  # nobody knows what they would have to follow
        first.ledger.freeze_all(Axes((), first.leaves[i].axes.parts), why)
    return None


def _untouched(mode: Recorder) -> bool:
    """Whether there are parameters that no recording has used."""
    return any(leaf.kind == "parameter" and i not in mode.touched for i, leaf in enumerate(mode.leaves))


def _record(model: nn.Module, mode: Recorder, example: Example) -> list[Any]:
    """Record one forward; return the scalars that Python read from tensors."""
    reads = ScalarReads()
    quiet = quiet_forward(model, training=example.training)
    with preserved(model), quiet, module_stack(model, mode.stack), mode, reads:
        out = example.run(model)
        mode.ledger.where = "an output of the model"
        results = [leaf for leaf in fixed_outputs(out) if isinstance(leaf, Tensor)]
        for tensor in results:
            mode.ledger.freeze_all(mode.axes(tensor))
    if not results and not example.training:
        raise GraphError(
            f"the forward returns {type(out).__name__} without a tensor in it, so nothing of it could be compared; "
            "return the results as tensors, in any container or object"
        )
    return reads.reads


class Coupling:
    """The coupled groups of a trace under some constraints.

    Attributes:
        trace: What was recorded.
        groups: Units that can be pruned, by group.
        units: How many units there are in all groups.
        unit_of: The unit of each label, or -1.
        group_of_unit: Position of each unit's group.
        linked: Sets of groups (by position) that must shrink alike.

    Args:
        recorded: The trace.
        constraints: What has been learnt from failures.
        unit: What may go: channels (with heads and neurons), or the experts of a router.
    """

    def __init__(self, recorded: Trace, constraints: Constraints | None = None, unit: Unit = "channel") -> None:
        self.trace = recorded
        self.unit: Unit = unit
        constraints = constraints or Constraints()
        ledger = recorded.ledger.copy()
        self._constrain(ledger, constraints)
        if unit == "expert":
            self._only_experts(ledger)
        else:
            for labels, why in ledger.contested:
                ledger.freeze(labels, why)
        self.roots = ledger.close()
        self.frozen = ledger.frozen_roots(self.roots)
        self._ledger = ledger
        sizes = self._sizes_of(constraints.equal) if constraints.equal else []
        self._settle(ledger, sizes, constraints.equal)
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
        self.linked = self._linked(sizes)

    def _constrain(self, ledger: Ledger, constraints: Constraints) -> None:
        if constraints.splits:
            for block, where in ledger.blocks:
                module = where.split(": ")[0]
                if module in constraints.splits:
                    ledger.freeze(block, constraints.splits[module])
        if constraints.whole:
            for op in self.trace.ops:
                why = covering(op.module, constraints.whole)
                if why is not None:
                    for axes in (*op.inputs, *op.outputs):
                        for part in axes.parts:
                            ledger.freeze(part.labels, why)

    def _only_experts(self, ledger: Ledger) -> None:
        """Fix everything but the dimensions that a router chooses from."""
        roots = ledger.roots()
        experts = np.zeros(ledger.count, dtype=bool)
        for labels, _, _ in ledger.chosen:
            experts[roots[labels]] = True
        experts[FIXED] = False
        ledger.freeze(np.flatnonzero(~experts[roots]), ONLY_EXPERTS)

    def _sizes_of(self, modules: Mapping[str, str]) -> list[_Sizes]:
        """Return, module by module, the dimensions of each size, and which of them are split or joined there."""
        found: dict[tuple[str, int], _Sizes] = {}
        ledger = self._ledger
        for op in self.trace.ops:
            where = next((m for m in (op.module, *_parents(op.module)) if m in modules), None)
            if where is None:
                continue
            for axes in (*op.inputs, *op.outputs):
                for part in axes.parts:
                    if len(part.dims) == 1 and part.labels.size > 1 and not ledger.is_made(part.labels):
                        entry = found.setdefault((where, part.labels.size), _Sizes(where, part.labels.size))
                        entry.plain.append(part.labels)
            if op.name in SPLITS and len(op.inputs) == len(op.outputs) == 1:
                for size, labels in split_sizes(op.inputs[0], op.outputs[0]):
                    if not ledger.is_made(labels):
                        found.setdefault((where, size), _Sizes(where, size)).split.append(labels)
        return [entry for entry in found.values() if entry.split]

    def _settle(self, ledger: Ledger, sizes: Sequence[_Sizes], modules: Mapping[str, str]) -> None:
        """Fix, in the given modules, dimensions that have the size of a split dimension that is fixed."""
        changed = True
        while changed:
            changed = False
            for entry in sizes:
                if any(self.frozen[self.roots[labels]].any() for labels in entry.split):
                    for labels in (*entry.plain, *entry.split):
                        if not self.frozen[self.roots[labels]].all():
                            ledger.freeze(labels, modules[entry.module])
                            self.frozen[self.roots[labels]] = True
                            changed = True

    def _linked(self, sizes: Sequence[_Sizes]) -> list[frozenset[int]]:
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
            for other in [s for s in sets if s & groups]:
                groups |= other
                sets.remove(other)
            sets.append(groups)
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
                known[key] = list(_places(np.where(roots > 0, number[roots], -1), group_of, bounds))
            for g, places in known[key]:
                members[g].append(Member(leaf.name, dim, places))
        groups, taken = [], set[str]()
        chosen = [(np.unique(self.roots[labels]), k) for labels, k, _ in self._ledger.chosen]
        for g, (low, high) in enumerate(pairwise(bounds)):
            name = _group_name(members[g], taken)
            floor = max((k for roots, k in chosen if np.isin(live[low:high], roots).any()), default=1)
            groups.append(Group(name, high - low, tuple(members[g]), np.arange(low, high), floor))
        return groups

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
        return Total(factors for op in self.trace.ops for factors in op.macs)

    @cached_property
    def parameters(self) -> Total:
        """How many parameters stay, tied ones once, given which labels stay."""
        return _elements(leaf for leaf in self.trace.leaves if leaf.kind == "parameter")

    @cached_property
    def prunable_parameters(self) -> Total:
        """How many elements stay in the parameters that some group reaches, given which labels stay."""
        reached = {m.name for g in self.groups for m in g.members}
        return _elements(leaf for leaf in self.trace.leaves if leaf.kind == "parameter" and leaf.name in reached)

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
        for leaf in self.trace.leaves:
            for dim, indices in kept.get(leaf.name, {}).items():
                part = leaf.axes.part(dim)
                if part is not None:
                    gone = np.ones(leaf.axes.shape[dim], dtype=bool)
                    gone[indices] = False
                    gone_roots[self.roots[part.labels[gone]]] = True
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


def _elements(leaves: Iterable[Leaf]) -> Total:
    return Total([(leaf.axes, dim) for dim in range(len(leaf.axes.shape))] for leaf in leaves)


def _places(
    unit: NDArray[np.int64], group_of: NDArray[np.int64], bounds: Sequence[int]
) -> Iterator[tuple[int, Places]]:
    """Yield the groups whose units are in a dimension, by position, and where these are.

    Args:
        unit: The unit of every index, or -1.
        group_of: The group of every unit, the last one for none.
        bounds: The first unit of every group.
    """
    owner = group_of[unit]
    order = np.argsort(owner, kind="stable")
    starts = np.flatnonzero(np.diff(owner[order], prepend=-2))
    for low, high in pairwise([*starts.tolist(), len(order)]):
        g, run = int(owner[order[low]]), order[low:high]
        if g >= 0:
            yield g, Places(len(unit), run.astype(np.int32), (unit[run] - bounds[g]).astype(np.int32))


def covering(module: str, modules: Mapping[str, str]) -> str | None:
    """Return the reason given for a module or for one that contains it."""
    while module:
        if module in modules:
            return modules[module]
        module = module.rpartition(".")[0]
    return modules.get("")


SPLITS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias"})


def split_sizes(before: Axes, after: Axes) -> Iterator[tuple[int, Labels]]:
    """Yield the flat size of every labelled dimension that a reshape splits or joins, with its labels.

    One that is split into a leading count, such as (3, heads, head size), also counts without it.
    """
    for old, new in reshape_cells(before.shape, after.shape):
        if len(old) == len(new) == 1:
            continue
        for flat, flat_dims, many, dims in ((before, old, after, new), (after, new, before, old)):
            for dim in flat_dims:
                labels = flat.labels(dim)
                if labels is not None:
                    yield flat.shape[dim], labels
                    for start in range(1, len(dims) - 1) if len(flat_dims) == 1 else ():
                        yield math.prod(many.shape[d] for d in dims[start:]), labels


def _parents(module: str) -> Iterator[str]:
    while module:
        module = module.rpartition(".")[0]
        yield module


def _group_name(members: Iterable[Member], taken: set[str]) -> str:
    ranked = sorted(members, key=lambda m: (m.dim != 0, not m.name.endswith("weight")))
    base = next((m.name.removesuffix(".weight") for m in ranked), "group")
    name, n = base, 2
    while name in taken:
        name, n = f"{base}#{n}", n + 1
    taken.add(name)
    return name


def iter_parts(ops: Iterable[Op]) -> Iterator[tuple[Op, Axes]]:
    """Yield every tensor of every operator."""
    for op in ops:
        for axes in (*op.inputs, *op.outputs):
            yield op, axes
