"""The proof: the pruned model against the masked dense one, in float64, on values that tell indices apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.graph.axes import Axes, Labels
from secateur.graph.calls import bind, flat_tensors, op_name
from secateur.graph.changes import Kept
from secateur.graph.compact import COMPACT
from secateur.graph.compare import tolerated
from secateur.graph.composite import Decomposing
from secateur.graph.examples import Example
from secateur.graph.labels import Ledger
from secateur.graph.model import has_storage, module_stack, quiet_forward
from secateur.graph.outputs import fixed_outputs
from secateur.graph.record import Leaf, Recorder
from secateur.graph.rules import Rules
from secateur.graph.spread import spreading
from secateur.graph.state import preserved
from secateur.graph.values import LOOKUP, Float64, Probe, in_float64
from secateur.graph.watch import Watch


@dataclass(frozen=True)
class Proof:
    """How a pruned model compares with the masked dense one.

    Attributes:
        difference: Largest absolute difference of any output, in float64.
        scale: Largest absolute value of the output that differs most.
        inputs: How many inputs were compared.
        normalised: Operators whose statistics run over kept channels only, with how often.
        level: ``"values"``, or ``"shapes"`` on the meta device and for fake tensors, which have no values to compare.
        bypassed: Whole blocks that are gone; the dense model let its stream pass by them.
    """

    difference: float
    scale: float
    inputs: int
    normalised: Mapping[str, int]
    level: str = "values"
    bypassed: int = 0

    @classmethod
    def of_shapes(cls) -> Self:
        """Return what is said where there are no values to compare."""
        return cls(0.0, 0.0, 0, {}, "shapes")

    @property
    def equal(self) -> bool:
        """Whether the difference is rounding."""
        return self.difference <= tolerated(self.scale)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "level": self.level,
            "equal": self.equal,
            "difference": self.difference,
            "scale": self.scale,
            "inputs": self.inputs,
            "normalised": dict(self.normalised),
            "bypassed": self.bypassed,
        }

    def __str__(self) -> str:
        if self.level == "shapes":
            return "only shapes were checked: tensors on the meta device, and fake ones, have no values"
        verdict = "equal to" if self.equal else "NOT equal to"
        over = sum(self.normalised.values())
        note = f"; {over} normalisations run over kept channels" if over else ""
        how = f"bypassing {self.bypassed} blocks" if self.bypassed else "with its pruned weights at zero"
        return (
            f"{verdict} the dense model {how}: largest difference {self.difference:.1e} of "
            f"{self.scale:.3g}, in float64, on {self.inputs} input{'s' if self.inputs != 1 else ''}{note}"
        )


class _Loose(Ledger):
    """Passes labels on and keeps no ties between them, which a proof does not ask for."""

    def tie(self, a: Labels, b: Labels) -> None:
        """Do nothing."""

    def freeze(self, labels: Labels, why: str | None = None) -> None:
        """Do nothing."""


class Reference(Recorder):  # type: ignore[no-untyped-call]
    """Runs the dense model with removed indices of its parameters at zero, statistics over kept channels only.

    Labels are passed on live, so that any branch may be taken.

    Args:
        leaves: The model's tensors, with labels.
        removed: Per label of the leaves, whether it goes.
        probe: Values.
        rules: Rules for labels.
    """

    def __init__(self, leaves: list[Leaf], removed: NDArray[np.bool_], probe: Probe, rules: Rules) -> None:
        ledger = _Loose()
        ledger.count = len(removed)
        super().__init__(ledger, rules, keep_ops=False)
        self.adopt(leaves)
        self._removed = removed
        self._values = Float64()
        self._probe = probe
        self._buffers: dict[int, Tensor] = {}
        self.normalised: dict[str, int] = {}

    def _leaf_value(self, tensor: Tensor) -> Tensor | None:
        index = self.leaf_index(tensor)
        if index < 0:
            return None
        if index in self._buffers:
            return self._buffers[index]
        value = self._probe.value(index)
        for dim, gone in self._gone(index) if value.is_floating_point() or value.is_complex() else ():
            value.index_fill_(dim, gone.to(value.device), 0.0)
        if self.leaves[index].kind == "buffer":  # the forward may write to it, and read what it wrote
            self._buffers[index] = value = value.clone()
        return value

    def _gone(self, index: int) -> list[tuple[int, Tensor]]:
        """Return the removed indices of every dimension of a leaf that loses some."""
        flags = ((part.dims[0], self._removed[part.labels]) for part in self.leaves[index].axes.parts)
        return [(dim, torch.from_numpy(np.flatnonzero(gone))) for dim, gone in flags if gone.any()]

    def _rows(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Look rows of a leaf up before they become float64, which changes no value and spares copying the table."""
        index = self.leaf_index(args[0]) if op_name(func) == LOOKUP else -1
        if index < 0 or self._probe.changed(index) or self.leaves[index].kind == "buffer":
            return None
        gone = self._gone(index)
        if any(dim == 0 for dim, _ in gone):
            return None
        rows = self._values.look_up(func, self._probe.dense(index), args, kwargs, self._leaf_value)
        for _, lost in gone:
            rows.index_fill_(-1, lost.to(rows.device), 0.0)
        return rows

    def run(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute in float64; where statistics meet removed channels, over the kept ones."""
        rows = self._rows(func, args, kwargs)
        if rows is not None:
            return rows
        new_args, new_kwargs = self._values.promote(func, args, kwargs, self._leaf_value)
        name = op_name(func)
        if name in COMPACT:
            bound = bind(func, new_args, new_kwargs)
            kept = self._kept(flat_tensors((args, kwargs))[0])
            if kept:
                out = COMPACT[name](spreading(func, self.spread), bound, kept)
                if out is not None:
                    self.normalised[name] = self.normalised.get(name, 0) + 1
                    return out
        return compute(spreading(func, self.spread), new_args, new_kwargs)

    def escape(self, tensor: Tensor, how: str) -> Tensor:
        """Return the values that Python code should read."""
        return self._values.seen(tensor, self._leaf_value)

    def _kept(self, tensor: Tensor) -> dict[int, Tensor]:
        axes: Axes = self.axes(tensor)
        out = {}
        for part in axes.parts:
            if len(part.dims) == 1:
                labels = part.labels
                gone = self._removed[np.minimum(labels, len(self._removed) - 1)] & (labels < len(self._removed))
                if gone.any():
                    out[part.dims[0]] = torch.from_numpy(np.flatnonzero(~gone))
        return out


class Small(Decomposing):
    """Runs the pruned model on the same float64 values.

    Args:
        leaves: The model's tensors.
        kept: Kept indices.
        probe: Values.
        held: What the pruned model's tensors hold.
        spread: See :class:`~secateur.graph.examples.Example`.
    """

    def __init__(self, leaves: list[Leaf], kept: Kept, probe: Probe, held: Sequence[Tensor], spread: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spread = spread
        self._index: dict[int, int] = {}
        self._leaves, self._kept, self._probe, self._held = leaves, kept, probe, held
        self._buffers: dict[int, Tensor] = {}
        self._storage: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            self._index[id(leaf.tensor)] = i
            if has_storage(leaf.tensor):
                storage = leaf.tensor.untyped_storage()._cdata
                self._storage[storage] = -1 if storage in self._storage else i
        self._values = Float64()
        self._watch: Watch | None = None

    def __enter__(self) -> Self:
        """Start."""
        self._watch = Watch(lambda tensor, _: self._values.seen(tensor, self._leaf_value))
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Stop."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._watch is not None:
            self._watch.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
            self._watch = None

    def _find(self, tensor: Tensor) -> int:
        index = self._index.get(id(tensor))
        if index is None:
            index = self._storage.get(tensor.untyped_storage()._cdata, -1) if has_storage(tensor) else -1
            if index < 0 or self._leaves[index].tensor.shape != tensor.shape:
                return -1
        return index

    def _leaf_value(self, tensor: Tensor) -> Tensor | None:
        index = self._find(tensor)
        if index < 0:
            return None
        if index in self._buffers:
            return self._buffers[index]
        leaf = self._leaves[index]
        value = self._probe.small(index, self._held[index], self._kept.get(leaf.name, {}))
        if leaf.kind == "buffer":
            self._buffers[index] = value = value.clone()
        return value

    def act(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute in float64."""
        if op_name(func) == LOOKUP:
            index = self._find(args[0])
            if index >= 0 and not self._probe.changed(index) and self._leaves[index].kind != "buffer":
                return self._values.look_up(func, self._held[index], args, kwargs, self._leaf_value)
        new_args, new_kwargs = self._values.promote(func, args, kwargs, self._leaf_value)
        return compute(spreading(func, self._spread), new_args, new_kwargs)


def compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator in float64, also where PyTorch has no kernel for it."""
    if isinstance(func, torch._ops.OpOverload) and op_name(func) == "aten::_grouped_mm":
        bound = bind(func, args, kwargs)
        a, b, ends = bound["self"], bound["mat2"], bound["offs"].tolist()
        if a.dtype == torch.float64 and a.dim() == 2 and b.dim() == 3:
            out = a.new_zeros(a.shape[0], b.shape[2])
            for expert, (low, high) in enumerate(zip([0, *ends], ends, strict=False)):
                out[low:high] = a[low:high] @ b[expert]
            return out
    return func(*args, **kwargs)


def run_reference(
    model: nn.Module,
    examples: Sequence[Example],
    leaves: list[Leaf],
    removed: NDArray[np.bool_],
    probe: Probe,
    rules: Rules,
) -> tuple[list[list[Any]], dict[str, int], set[int]]:
    """Run the masked dense model on each example.

    Returns:
        Output leaves per example; normalisations that ran over kept channels; leaves that were used.
    """
    outputs, normalised, touched = [], dict[str, int](), set[int]()
    for example in examples:
        with preserved(model), quiet_forward(model, training=example.training), in_float64(leaves):
            mode = Reference(leaves, removed, probe, rules)
            mode.spread = example.spread
            with module_stack(model, mode.stack), mode:
                out = example.double().run(model)
        outputs.append(fixed_outputs(out))
        touched |= mode.touched
        for name, count in mode.normalised.items():
            normalised[name] = normalised.get(name, 0) + count
    return outputs, normalised, touched


def run_small(
    model: nn.Module,
    examples: Sequence[Example],
    leaves: list[Leaf],
    kept: Kept,
    probe: Probe,
) -> list[list[Any]]:
    """Run the pruned model on each example; return output leaves per example."""
    outputs = []
    for example in examples:
        with (
            preserved(model),
            quiet_forward(model, training=example.training),
            in_float64(leaves) as held,
            Small(leaves, kept, probe, held, example.spread),
        ):
            out = example.double().run(model)
        outputs.append(fixed_outputs(out))
    return outputs
