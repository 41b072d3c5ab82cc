"""Labels: one number for every index of every parameter dimension, and which of them must live or die together.

A tensor's :class:`Axes` say, for each of its dimensions, which label every index carries. Operators pass labels on
(a permutation moves them, a concatenation joins them) and tie them (an addition makes two indices one). A dimension
that was split, such as 768 channels viewed as 12 heads of 64, carries its labels as a *joint part* over both new
dimensions until an operator shows which of the two can be pruned.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.graph.axes import FIXED, Axes, Labels, Part
from secateur.graph.components import components, components_of_rows, reshape_cells
from secateur.graph.mentions import Mentions


class Ledger:
    """Hands out labels and keeps the ties between them.

    Attributes:
        where: What is being recorded, for the reasons given later: ``"layer1.0.conv1: aten::softmax"``.
        blocks: Labels of every joint part met; each must keep a product of its dimensions.
        spans: A joint part, some of its axes, and labels over only these that met it: a scale per head dimension,
            say. Where the part is pruned along them, they follow; otherwise they are fixed.
        contested: Labels whose places, or whose joint values, count: the inputs of a softmax, of a choice, of a running
            sum. They are fixed, unless they are experts: a router that never chooses an expert gives it no share.
        chosen: Labels that ``topk``, ``argmax`` or ``max`` choose from, how many at a time, and where: experts, if
            their numbers are used to look things up.
        mentions: Where code speaks of experts by number, and which entries of lists run.
        singles: Whether slices of one index count among the equal slices of a tensor, which must stay equal; not where
            a loop takes experts one by one.
    """

    def __init__(self) -> None:
        self.count = 1
        self.where = ""
        self.blocks: list[tuple[Labels, str]] = []
        self.spans: list[tuple[Labels, tuple[int, ...], Labels, str]] = []
        self.contested: list[tuple[Labels, str]] = []
        self.chosen: list[tuple[Labels, int, str]] = []
        self.mentions = Mentions()
        self.singles = True
        self._left: list[Labels] = []
        self._right: list[Labels] = []
        self._frozen: list[tuple[Labels, str]] = []
        self._made: list[int] = []  # bounds of ranges of labels that belong to no parameter
        self._slices: dict[int, tuple[Labels, set[tuple[int, int]], str]] = {}

    def copy(self) -> Ledger:
        """Return a ledger that can be constrained further without changing this one."""
        out = Ledger()
        out.count, out.blocks, out.spans = self.count, list(self.blocks), self.spans
        out.contested, out.chosen, out.mentions = self.contested, self.chosen, self.mentions
        out._left, out._right, out._frozen = list(self._left), list(self._right), list(self._frozen)
        out._made, out._slices = self._made, self._slices
        return out

    # -- making and tying labels

    def fresh(self, size: int, *, made: bool = False) -> Labels:
        """Return ``size`` new labels; ``made`` for the indices of a constant that the forward creates."""
        if made:
            self._made += [self.count, self.count + size]
        first = self.count
        self.count += size
        return np.arange(first, self.count)

    def is_made(self, labels: Labels) -> bool:
        """Whether the labels were created for a constant, so that freezing them costs nothing."""
        return bool(labels.size) and bisect_right(self._made, int(labels.flat[0])) % 2 == 1

    def leaf(self, shape: Sequence[int]) -> Axes:
        """Return the axes of a parameter: fresh labels everywhere; a dimension of size 1 is fixed."""
        return Axes(shape, [Part([d], self.fresh(s)) for d, s in enumerate(shape) if s > 1])

    def made(self, shape: Sequence[int], dims: Iterable[int] | None = None) -> Axes:
        """Return the axes of a constant that is the same at every index: any part of it would do."""
        wanted = range(len(shape)) if dims is None else dims
        return Axes(shape, [Part([d], self.fresh(shape[d], made=True)) for d in wanted if shape[d] > 1])

    def tie(self, a: Labels, b: Labels) -> None:
        """Make labels live and die together, elementwise after broadcasting."""
        if a is b:
            return
        a, b = np.broadcast_arrays(a, b)
        fixed_a, fixed_b = a == FIXED, b == FIXED
        if fixed_a.any():
            self.freeze(b[fixed_a])
        if fixed_b.any():
            self.freeze(a[fixed_b])
        self._left.append(a.ravel())
        self._right.append(b.ravel())

    def freeze(self, labels: Labels, why: str | None = None) -> None:
        """Say that these indices cannot be removed, and why."""
        if labels.size:
            self._frozen.append((labels.ravel(), self.where if why is None else why))

    # -- changing the axes of a tensor

    def drop(self, axes: Axes, dim: int, why: str | None = None) -> None:
        """Fix one dimension: a plain one is frozen; in a joint part the others stay prunable."""
        part = axes.part(dim)
        if part is None:
            return
        if len(part.dims) == 1:
            self.freeze(part.labels, why)
            axes.parts.remove(part)
            return
        axis = part.dims.index(dim)
        first = part.labels.take([0], axis)
        self.tie(first, part.labels)
        rest = Part([d for d in part.dims if d != dim], first.squeeze(axis))
        axes.parts[axes.parts.index(part)] = rest

    def only(self, axes: Axes, dim: int) -> Labels | None:
        """Make a dimension plain by fixing those that share its part; return its labels."""
        part = axes.part(dim)
        while part is not None and len(part.dims) > 1:
            self.drop(axes, next(d for d in part.dims if d != dim))
            part = axes.part(dim)
        return None if part is None else part.labels

    def plain(self, axes: Axes, dim: int) -> Labels | None:
        """Return the labels of a feature dimension; where it is the inner half of a joint part, fix it.

        Heads rather than head dimensions: the size of a head is often read as a value (the scale of attention).
        """
        part = axes.part(dim)
        if part is not None and len(part.dims) > 1:
            self.drop(axes, dim)
            return None
        return None if part is None else part.labels

    def freeze_all(self, axes: Axes, why: str | None = None) -> None:
        """Fix every dimension of a tensor."""
        self.settle(axes)
        for part in axes.parts:
            self.freeze(part.labels, why)
        axes.parts = []

    def settle(self, axes: Axes) -> None:
        """Fix what a tensor owes, now that its values are used."""
        self.contested += axes.owed
        axes.owed = []

    def contest(self, axes: Axes, dim: int) -> Labels | None:
        """Fix one dimension unless it turns out to count experts; return its labels, which the tensor keeps."""
        labels = axes.labels(dim)
        if labels is None:
            self.drop(axes, dim)
        else:
            self.contested.append((labels, self.where))
        return labels

    def joint(self, dims: Sequence[int], labels: Labels) -> Part | None:
        """Return a part over some dimensions, without those along which the labels do not change."""
        kept = list(dims)
        for dim in dims:
            axis = kept.index(dim)
            if len(kept) > 1 and (labels == labels.take([0], axis)).all():
                labels = labels.take([0], axis).squeeze(axis)
                kept.remove(dim)
        if len(kept) == 1 and labels.size > 1 and (labels == labels[0]).all():
            self.freeze(labels[:1])
            return None
        if len(kept) > 1:
            self.blocks.append((labels, self.where))
        return Part(kept, labels)

    # -- labels of combined tensors

    def same(self, a: Axes, dim_a: int, b: Axes, dim_b: int) -> Labels | None:
        """Tie two feature dimensions index by index and return their labels, ``None`` where fixed."""
        left, right = self.plain(a, dim_a), self.plain(b, dim_b)
        if left is None or right is None:
            self.drop(a, dim_a)
            self.drop(b, dim_b)
            return None
        self.tie(left, right)
        return left

    def combine(self, operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
        """Return the axes of an elementwise result: broadcast to the right, indices that meet are tied."""
        rank = len(shape)
        placed = [(axes, rank - len(axes.shape)) for axes in operands]
        self._drop_fixed(placed, shape)
        while (clash := self._clash(placed)) is not None:
            for axes, offset in placed:
                if clash >= offset:
                    self.only(axes, clash - offset)
            self._drop_fixed(placed, shape)
        out: dict[tuple[int, ...], Labels] = {}
        parts = [
            (p.moved(offset).dims, p.labels, all(a.shape[d] == shape[d + offset] for d in p.dims))
            for a, offset in placed
            for p in a.parts
        ]
        parts.sort(key=lambda part: -len(part[0]))
        for dims, labels, whole in parts:
            wider = next((d for d in out if set(dims) < set(d)), None)
            if not whole:
                self.freeze(labels)
            elif dims in out:
                self.tie(out[dims], labels)
            elif wider is not None:
                self.spans.append((out[wider], tuple(wider.index(d) for d in dims), labels, self.where))
            else:
                out[dims] = labels
        return Axes(shape, [Part(dims, labels) for dims, labels in out.items()])

    def _drop_fixed(self, placed: Sequence[tuple[Axes, int]], shape: Sequence[int]) -> None:
        """Fix each dimension, in all operands that span it, where it is fixed in one of them."""
        for dim, size in enumerate(shape):
            spans = [(a, dim - o) for a, o in placed if dim >= o and a.shape[dim - o] == size and size > 1]
            if any(a.part(d) is None for a, d in spans):
                for axes, d in spans:
                    self.drop(axes, d)

    @staticmethod
    def _clash(placed: Sequence[tuple[Axes, int]]) -> int | None:
        """Return a dimension that two parts share, neither of them inside the other; ``None`` when there is none."""
        groups = {part.moved(offset).dims for axes, offset in placed for part in axes.parts}
        for one in groups:
            for other in groups:
                if set(one) & set(other) and not (set(one) <= set(other) or set(one) > set(other)):
                    shared = sorted(set(one) & set(other))
                    singles = [d for d in shared if (d,) in groups]
                    return (singles or shared)[0]
        return None

    def reshape(self, axes: Axes, shape: Sequence[int]) -> Axes:
        """Return the axes after a reshape: labels follow their elements."""
        shape = tuple(shape)
        if axes.shape == shape or not axes.parts:
            return Axes(shape, axes.parts)
        if 0 in shape:
            self.freeze_all(axes)
            return Axes(shape)
        cells = reshape_cells(axes.shape, shape)
        home = {dim: i for i, (before, _) in enumerate(cells) for dim in before}
        clusters: list[tuple[set[int], list[Part]]] = []
        for part in axes.parts:
            touched, members = {home[d] for d in part.dims}, [part]
            for other in [c for c in clusters if c[0] & touched]:
                touched |= other[0]
                members += other[1]
                clusters.remove(other)
            clusters.append((touched, members))
        out: list[Part] = []
        for touched, members in clusters:
            members.sort(key=lambda p: (self.is_made(p.labels), p.dims))
            for lost in members[1:]:  # one element cannot obey two labels: the outermost real one stays
                self.freeze(lost.labels)
            before = sorted(d for i in touched for d in cells[i][0])
            after = sorted(d for i in touched for d in cells[i][1])
            kept = members[0]
            spread = kept.labels.reshape([axes.shape[d] if d in kept.dims else 1 for d in before])
            labels = np.broadcast_to(spread, [axes.shape[d] for d in before]).reshape([shape[d] for d in after])
            joined = self.joint(after, labels)
            if joined is not None:
                out.append(joined)
        return Axes(shape, out)

    def permute(self, axes: Axes, order: Sequence[int]) -> Axes:
        """Return the axes after ``permute(order)``."""
        place = {old: new for new, old in enumerate(order)}
        parts = []
        for part in axes.parts:
            dims = [place[d] for d in part.dims]
            turn = sorted(range(len(dims)), key=dims.__getitem__)
            parts.append(Part([dims[i] for i in turn], part.labels.transpose(turn)))
        return Axes([axes.shape[d] for d in order], parts)

    def slice(self, labels: Labels, start: int, stop: int, step: int = 1) -> Labels:
        """Return the labels of a slice, and remember it: equal slices of one tensor must stay equal."""
        if step == 1 and 0 < stop - start < labels.size:
            entry = self._slices.setdefault(id(labels), (labels, set(), self.where))
            entry[1].add((start, stop))
        return labels[start:stop:step]

    def equal_parts(self, labels: Labels, pieces: int) -> Labels:
        """Tie ``pieces`` equal runs of a dimension to one another, index by index; return one run."""
        rows = labels.reshape(pieces, -1)
        self.tie(rows[:1], rows)
        return rows[:1].ravel()

    # -- what follows from all ties

    def roots(self) -> Labels:
        """Return each label's component: the smallest label it is tied to."""
        return components(self.count, self._left, self._right)

    def close(self) -> Labels:
        """Resolve what is still open, and return each label's component.

        Equal slices of one tensor are tied; every joint block is made a product of its dimensions, along the one
        that leaves most to choose from.
        """
        for labels, spans, where in self._slices.values():
            self.where = where
            self._tie_slices(labels, spans)
        self.where = "two constraints on one split dimension"
        roots = self.roots()
        for _ in range(20):
            frozen = self.frozen_roots(roots)
            changed = False
            for block, axes, labels, _ in self.spans:
                if frozen[roots[labels]].any():
                    changed |= self._fix_along(roots[block], axes)
            if changed:
                roots = self.roots()
                frozen = self.frozen_roots(roots)
            for block, _ in self.blocks:
                changed |= self._make_product(roots[block], frozen)
            if changed:
                roots = self.roots()
                continue
            for block, axes, labels, where in self.spans:
                self.where = where
                changed |= self._follow(roots[block], axes, roots[labels], frozen)
            if not changed:
                break
            roots = self.roots()
        return roots

    def _fix_along(self, block: Labels, axes: tuple[int, ...]) -> bool:
        """Tie a block along some axes, so that it can only be pruned along the others."""
        first = block
        for axis in axes:
            first = first.take([0], axis)
        if (block == first).all():
            return False
        self.tie(first, block)
        return True

    def _follow(self, block: Labels, axes: tuple[int, ...], labels: Labels, frozen: NDArray[np.bool_]) -> bool:
        """Tie labels over some axes of a block to it, where it is pruned along these; otherwise freeze them."""
        rows = np.moveaxis(block, axes, range(len(axes))).reshape(*labels.shape, -1)
        if (rows == rows[..., :1]).all():
            if (rows[..., 0] == labels).all():
                return False
            self.tie(rows[..., 0], labels)
            return True
        if frozen[labels].all():
            return False
        self.freeze(labels)
        return True

    def frozen_roots(self, roots: Labels) -> NDArray[np.bool_]:
        """Return, per label, whether it is the root of a component that cannot be removed."""
        frozen = np.zeros(self.count, dtype=bool)
        frozen[FIXED] = True
        for labels, _ in self._frozen:
            frozen[roots[labels]] = True
        return frozen

    def reasons(self, roots: Labels) -> dict[int, str]:
        """Return the first reason given for each frozen component."""
        out: dict[int, str] = {}
        for labels, why in self._frozen:
            for root in np.unique(roots[labels]).tolist():
                out.setdefault(root, why)
        return out

    def _tie_slices(self, labels: Labels, spans: set[tuple[int, int]]) -> None:
        widths = {stop - start for start, stop in spans}
        if len(widths) == 1 and (self.singles or widths != {1}):
            width = widths.pop()
            starts = sorted(start for start, _ in spans)
            if labels.size % width == 0 and len(starts) * width == labels.size and starts[0] == 0:
                self.equal_parts(labels, len(starts))

    def _make_product(self, block: Labels, frozen: NDArray[np.bool_]) -> bool:
        """Tie a block along all dimensions but one, unless its kept indices are a product anyway."""
        best, most = -1, -1
        for axis in range(block.ndim):
            rows = np.moveaxis(block, axis, 0).reshape(block.shape[axis], -1)
            if (rows == rows[:, :1]).all():
                return False
            fixed = frozen[rows].any(axis=1)
            free = components_of_rows(rows[~fixed])
            if free > most:
                best, most = axis, free
        if frozen[block].all():
            return False
        rows = np.moveaxis(block, best, 0).reshape(block.shape[best], -1)
        self.tie(rows[:, :1], rows)
        fixed = frozen[rows].any(axis=1)
        if fixed.any():
            self.freeze(rows[fixed])
        return True
