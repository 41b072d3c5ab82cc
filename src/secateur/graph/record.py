"""One forward, recorded: every operator passes labels on, whatever Python code calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import GraphError
from secateur.graph.axes import Axes, Labels
from secateur.graph.calls import Call, Products, Rule, only_shape, op_name, written_by
from secateur.graph.composite import Decomposing
from secateur.graph.labels import Ledger
from secateur.graph.mentions import Mention
from secateur.graph.model import has_storage, owned_tensors
from secateur.graph.spread import spreading
from secateur.graph.watch import Watch
from secateur.graph.weak import ByTensor

if TYPE_CHECKING:
    from secateur.graph.rules import Rules

UNTRACED = frozenset(
    {
        *(f"aten::{name}" for name in ("detach", "alias", "lift_fresh", "is_nonzero", "_local_scalar_dense", "item")),
        "prim::device",
        "prim::layout",
    }
)
"""Operators that may come and go between two runs of one forward without meaning anything."""

_MOVE_NUMBERS = frozenset(
    f"aten::{name}"
    for name in (
        "view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "transpose", "permute", "t",
        "clone", "_to_copy", "contiguous", "alias", "detach", "lift_fresh", "slice", "select", "unbind", "split",
        "split_with_sizes", "expand", "index", "index_select", "sort", "flatten", "_unique2", "unique_consecutive",
    )
)  # fmt: skip
"""Operators whose results hold the elements of their first argument."""

_FIRST_ONLY = frozenset({"aten::sort", "aten::_unique2", "aten::unique_consecutive"})

_USE_NUMBERS = frozenset(
    f"aten::{name}"
    for name in (
        "index", "gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "histc", "bincount", "nonzero",
        "aminmax", "_local_scalar_dense", "item", "is_nonzero", "empty_like", "zeros_like", "ones_like", "full_like",
        "new_zeros", "new_ones", "new_empty", "new_full", "argsort", "equal",
    )
)  # fmt: skip
"""Operators whose rules know what to do with numbers, or that only look at shapes."""

_COMPARE = frozenset({"aten::eq", "aten::ne", "aten::lt", "aten::le", "aten::gt", "aten::ge"})

_SAME = frozenset({"aten::eq", "aten::ne"})


@dataclass(frozen=True)
class Leaf:
    """A tensor that the model owns: a parameter, a buffer, or a plain tensor attribute.

    Attributes:
        names: Every place that holds it, ``"encoder.embed.weight"``; several where it is tied.
        tensor: The tensor.
        axes: Its labels as first given, one part per dimension.
        kind: ``"parameter"``, ``"buffer"`` or ``"tensor"``.
    """

    names: tuple[str, ...]
    tensor: Tensor
    axes: Axes
    kind: str

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]


@dataclass
class Op:
    """One operator call.

    Attributes:
        name: ``"aten::convolution"``.
        module: Qualified name of the innermost module whose forward was running.
        inputs: Axes of the tensor arguments, in order.
        outputs: Axes of the results.
        leaves: Index of the leaf that each tensor argument is, or -1.
        macs: One list of dimensions for each product that is computed; the sizes' product is its cost.
        groups: Groups of a convolution.
    """

    name: str
    module: str
    inputs: list[Axes]
    outputs: list[Axes]
    leaves: list[int]
    macs: Products = ()
    groups: int = 1


class Recorder(Decomposing):
    """Watches operators and passes labels from their arguments to their results.

    Args:
        ledger: Where labels are made and tied.
        rules: What each operator does to labels, by name.
        exact: Forbid normalisation over pruned dimensions.
        keep_ops: Whether to keep the list of calls.
    """

    def __init__(self, ledger: Ledger, rules: Rules, *, exact: bool = False, keep_ops: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.rules = rules
        self.exact = exact
        self.keep_ops = keep_ops
        self.ops: list[Op] = []
        self.stack: list[str] = []
        self.unknown: dict[str, set[str]] = {}
        self.leaves: list[Leaf] = []
        self.touched: set[int] = set()
        self.number_read: tuple[int, Labels] | None = None
        self.spread = 0
        self._axes = ByTensor[Axes]()
        self._leaf_of: dict[int, int] = {}  # by identity: the leaves keep their tensors
        self._storage: dict[int, int] = {}
        self._owner: dict[int, int] = {}
        self._data: list[Tensor] = []
        self._watch: Watch | None = None

    def add_leaves(self, model: nn.Module) -> None:
        """Label every tensor the model owns."""
        self.adopt(
            [
                Leaf(tuple(names), tensor, self.ledger.leaf(tensor.shape), kind)
                for names, tensor, kind in owned_tensors(model)
            ]
        )
        self._freeze_overlapping()

    def _freeze_overlapping(self) -> None:
        """Fix tensors that share memory without being one tensor: cutting them would tear them apart."""
        homes: dict[int, list[Leaf]] = {}
        for leaf in self.leaves:
            if has_storage(leaf.tensor) and leaf.tensor.numel():
                homes.setdefault(leaf.tensor.untyped_storage()._cdata, []).append(leaf)
        for sharers in homes.values():
            for leaf in sharers if len(sharers) > 1 else ():
                other = next(s.name for s in sharers if s is not leaf)
                for part in leaf.axes.parts:
                    self.ledger.freeze(part.labels, f"memory shared with {other}")

    def adopt(self, leaves: list[Leaf]) -> None:
        """Continue with the leaves of another recording."""
        for leaf in leaves:
            self._leaf_of[id(leaf.tensor)] = len(self.leaves)
            if has_storage(leaf.tensor):
                storage = leaf.tensor.untyped_storage()._cdata
                self._storage[storage] = -1 if storage in self._storage else len(self.leaves)
                if leaf.kind != "buffer":
                    self._owner[storage] = len(self.leaves)
            self.leaves.append(leaf)
            self._data.append(leaf.tensor.detach())
            self._axes[leaf.tensor] = Axes(leaf.axes.shape, leaf.axes.parts)

    def leaf_index(self, tensor: Tensor) -> int:
        """Return which leaf a tensor is, by identity or as an alias such as ``.data``; -1 for none."""
        index = self._leaf_of.get(id(tensor))
        if index is None:
            index = self._storage.get(tensor.untyped_storage()._cdata, -1) if has_storage(tensor) else -1
            if index >= 0:
                leaf = self.leaves[index].tensor
                if leaf.shape != tensor.shape or leaf.stride() != tensor.stride() or tensor in self._axes:
                    index = -1
        return index

    def axes(self, tensor: Tensor) -> Axes:
        """Return the labels of a tensor; one that nobody has seen is fixed in every dimension."""
        found = self._axes.get(tensor)
        if found is None:
            index = self.leaf_index(tensor)
            found = self._axes.get(self.leaves[index].tensor) if index >= 0 else None
            found = Axes(tensor.shape) if found is None else found
            self._axes[tensor] = found
        return found

    def put(self, tensor: Tensor, axes: Axes) -> None:
        """Label a tensor."""
        if axes.shape != tuple(tensor.shape):
            raise AssertionError(f"labels of shape {axes.shape} for a tensor of shape {tuple(tensor.shape)}")
        for part in [p for p in axes.parts if p.labels.size == 1]:  # one index by itself, as where one is selected
            axes.parts.remove(part)
            axes.owed.append((part.labels, self.ledger.where))
        self._axes[tensor] = axes

    def note(self, other: Recorder) -> None:
        """Add what another recording of the same model met."""
        self.touched |= other.touched
        for name, modules in other.unknown.items():
            self.unknown.setdefault(name, set()).update(modules)

    def __enter__(self) -> Self:
        """Start recording."""
        self.ledger.mentions.start()
        self._watch = Watch(self.escape, self.sized)
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Stop recording; data that the forward put in place of a leaf's own is taken out again."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._watch is not None:
            self._watch.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
            self._watch = None  # it refers back; left alone, such circles keep whole models until they are collected
        for leaf, data in zip(self.leaves, self._data, strict=True):
            if has_storage(data) and leaf.tensor.untyped_storage()._cdata != data.untyped_storage()._cdata:
                leaf.tensor.data = data
                if kind is None:
                    raise GraphError(f"the forward replaces the data of {leaf.name}: it would undo any pruning of it")

    def escape(self, tensor: Tensor, how: str) -> Tensor:
        """Note that Python code reads a tensor's values, which no label can follow; return the values to read."""
        axes, why = self.axes(tensor), self._here(f"values read by {how}")
        if axes.numbers is not None:
            self.mention(axes.numbers, None)
        labels = axes.labels(0) if len(axes.shape) == 1 else None
        if labels is not None and labels.size in self.ledger.mentions.sizes:  # how many tokens each expert gets, say
            self.ledger.contested.append((labels, why))
            self.mention(labels, None)
        else:
            self.ledger.freeze_all(axes, why)
        return tensor

    def sized(self, tensor: Tensor, dim: int, why: str) -> None:
        """Note that the size of a dimension is used as a value."""
        self.ledger.drop(self.axes(tensor), dim % tensor.dim(), self._here(why))

    def _here(self, what: str) -> str:
        return f"{self.stack[-1]}: {what}" if self.stack and self.stack[-1] else what

    def mention(self, labels: Labels, number: int | None, *, compared: bool = False) -> None:
        """Note that the running module speaks of an expert by number."""
        module = self.stack[-1] if self.stack else ""
        self.ledger.mentions.add(Mention(labels, number, module, self.ledger.where, compared))

    def refuse_writes(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse an operator that would change a parameter, before it does.

        Raises:
            GraphError: Names the parameter.
        """
        for tensor in written_by(func, args, kwargs):
            index = self._owner.get(tensor.untyped_storage()._cdata, -1) if has_storage(tensor) else -1
            if index >= 0 and not only_shape(func):
                module = (self.stack and self.stack[-1]) or "the model"
                raise GraphError(
                    f"{module} changes {self.leaves[index].name} in place ({op_name(func)}) in its forward: "
                    "such a model cannot be compared with a pruned one"
                )

    def run(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the operator."""
        return spreading(func, self.spread)(*args, **kwargs)

    def act(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute, then label."""
        self.refuse_writes(func, args, kwargs)
        out = self.run(func, args, kwargs)
        self.label(func, args, kwargs, out)
        return out

    def label(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Apply the operator's rule."""
        call = Call(self, func, args, kwargs, out)
        tensors = call.tensors()
        if any(t.is_nested for t in (*tensors, *call.outputs())):
            raise GraphError(f"{call.name} works on nested tensors, which cannot be followed: give padded inputs")
        leaves = [self.leaf_index(t) for t in tensors]
        self.touched.update(i for i in leaves if i >= 0)
        inputs = [self.axes(t) for t in tensors]
        written = [(t, copy_of(self.axes(t))) for t in written_by(func, args, kwargs)]
        module = self.stack[-1] if self.stack else ""
        self.ledger.where = self._here(call.name)
        self.ledger.mentions.enter(self.stack)
        for axes in inputs:
            self.ledger.settle(axes)
        rule = self.rules.find(func)
        strange = any(t.layout != torch.strided for t in (*tensors, *call.outputs()))
        if rule is None or strange:
            if any(axes.parts for axes in inputs):
                self.unknown.setdefault(call.name, set()).add(module)
                self.ledger.where += " is an operator without a rule"
            call.freeze()
        else:
            self._apply(rule, call)
        if any(axes.numbers is not None for axes in inputs):
            self._follow_numbers(call, inputs)
        for tensor, before in written:
            self.rewritten(before, self.axes(tensor))
        if self.keep_ops and call.name not in UNTRACED:
            outputs = [self.axes(t) for t in call.outputs()]
            groups = int(call.args.get("groups") or 1) if call.macs else 1
            self.ops.append(Op(call.name, module, inputs, outputs, leaves, call.macs, groups))

    def _apply(self, rule: Rule, call: Call) -> None:
        """Apply a rule; one that fails is reported as such, not as a failure of the model."""
        try:
            rule(call)
        except GraphError:
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in call.tensors())
            raise GraphError(
                f"{self.ledger.where}: the rule for this operator fails on tensors of shape {shapes or 'none'}: "
                f"{type(error).__name__}: {str(error)[:200]}. The rule is at fault, not the model: report it, or "
                "register another one (secateur.graph.rules.rule)"
            ) from error

    def _follow_numbers(self, call: Call, inputs: Sequence[Axes]) -> None:
        """Pass numbers of experts on where elements only move; fix the experts where numbers are computed with."""
        first = inputs[0].numbers
        if first is not None and type(call.out) is int:  # Python code will look something up by it
            self.number_read = call.out, first
            self.mention(first, call.out)
        if first is not None and call.name in _MOVE_NUMBERS:
            outputs = call.outputs()
            for out in outputs if call.name not in _FIRST_ONLY else outputs[:1]:
                self.axes(out).numbers = first
        elif call.name not in _USE_NUMBERS:
            if call.name in _SAME and all(axes.numbers is first for axes in inputs) and len(inputs) > 1:
                return  # which are the same does not depend on how they are numbered
            other = call.args.get("other")
            bound = other if call.name in _COMPARE and isinstance(other, int | float) else -1
            for axes in inputs:
                if axes.numbers is None or bound >= np.count_nonzero(axes.numbers):
                    continue
                if call.name in _SAME and type(other) is int and other >= 0:
                    self.mention(axes.numbers, other, compared=True)
                else:
                    self.ledger.freeze(axes.numbers, f"{self.ledger.where} computes with the number of an expert")

    def rewritten(self, before: Axes, after: Axes) -> None:
        """Carry what an in-place operator did to a tensor over to its other views, labelled as before."""
        if before.shape != after.shape:
            return
        for ours, theirs in ((before, after), (after, before)):
            matching = {part.dims: part.labels for part in theirs.parts}
            for part in ours.parts:
                if part.dims in matching:
                    self.ledger.tie(part.labels, matching[part.dims])
                else:
                    self.ledger.freeze(part.labels)


def copy_of(axes: Axes) -> Axes:
    """Return the axes as they are now; rules drop parts from them."""
    return Axes(axes.shape, axes.parts)
