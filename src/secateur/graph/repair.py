"""Sizes that a module keeps as attributes, changed only where the pruned forward shows that they are read.

Rewriting every attribute that happens to equal an old size would be wrong: a scale, a position or another layer's
width may have the same value. So the pruned model is run, every operator's result is compared with its predicted
shape, and at the first difference only attributes that the failing code names may change, and only from an old size
to a new one that was seen in that module.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from operator import ne
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import GraphError, PlanError
from secateur.graph.calls import op_name
from secateur.graph.changes import Edit, Undo, edit_
from secateur.graph.composite import Decomposing
from secateur.graph.coupling import Coupling, iter_parts
from secateur.graph.examples import copies
from secateur.graph.model import quiet_forward
from secateur.graph.record import UNTRACED
from secateur.graph.state import preserved

_LAYOUT = frozenset({"aten::clone", "aten::view", "aten::_unsafe_view", "aten::_reshape_alias"})
"""Operators that a reshape needs or not, depending on strides."""

_BY_VALUE = frozenset(
    f"aten::{name}" for name in ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
)
"""Operators whose result has a size that depends on values: which tokens an expert gets, say."""

_MOST_TRIALS = 400
_MOST_TUPLES = 16
_LEAST_FACTOR = 8


class ShapeMismatchError(RuntimeError):
    """An operator of the pruned forward gave another shape than predicted."""


class ShapeCheck(Decomposing):
    """Compares the shape of every result with the predicted one, as long as the same operators run.

    Args:
        expected: Operator name, shapes of its results, and whether these may depend on which experts are left: how
            many tokens each gets, say. In order.
    """

    def __init__(self, expected: Sequence[tuple[str, list[tuple[int, ...] | None], bool]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.expected = expected
        self.done = 0
        self.ran = 0
        self.aligned = True

    def act(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute and compare."""
        out = func(*args, **kwargs)
        name = op_name(func)
        self.ran += name not in UNTRACED
        if name in UNTRACED or not self.aligned:
            return out
        place = self.done
        while place < len(self.expected) and self.expected[place][0] != name and self.expected[place][0] in _LAYOUT:
            place += 1
        if place == len(self.expected) or self.expected[place][0] != name:
            self.aligned = name in _LAYOUT
            return out
        _, shapes, varies = self.expected[place]
        tensors = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        for tensor, shape in zip(tensors, shapes, strict=False):
            if shape is not None and tuple(tensor.shape) != shape:
                # Other values than those recorded; what follows cannot be predicted.
                if varies or name in _BY_VALUE or _by_mask(args):
                    self.aligned = False
                    return out
                self.ran -= 1
                raise ShapeMismatchError(f"{name} gives {tuple(tensor.shape)}, predicted {shape}")
        self.done = place + 1
        return out


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Whether an operator picks elements by a mask."""
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for a in args if isinstance(a, list | tuple) for t in a)


@dataclass
class Failure:
    """Where a pruned forward stopped.

    Attributes:
        step: Operators that had run.
        message: The error.
        line: File and line that raised it.
        frames: The Python frames on the way, outermost first.
    """

    step: int
    message: str
    line: str
    frames: list[FrameType]

    def module(self, names: Mapping[int, str]) -> tuple[str, ...]:
        """Return the modules on the way, innermost first."""
        found = []
        for frame in reversed(self.frames):
            owner = _self_of(frame)
            if isinstance(owner, nn.Module) and id(owner) in names and names[id(owner)] not in found:
                found.append(names[id(owner)])
        return tuple(found)


class Repair:
    """Runs a sliced model and mends the attributes it trips over.

    Args:
        model: Sliced, with native attributes brought in line.
        coupling: The groups.
        alive: Which labels stay.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        undo: Where changes are noted.
        names: The name of every module by identity, before any of them went and others were counted anew.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        alive: NDArray[np.bool_],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        undo: Undo,
        names: Mapping[int, str],
    ) -> None:
        self.model = model
        self.inputs = args, kwargs
        self.undo = undo
        self.edits: list[Edit] = []
        self.trials = 0
        self.names = names
        self._now = {names[id(m)]: n for n, m in model.named_modules()}
        self.modules = {names[id(m)]: m for m in model.modules()}
        shapes: dict[int, tuple[int, ...]] = {}
        kept: dict[int, Any] = {}

        def after(axes: Any) -> tuple[int, ...]:
            if id(axes) not in shapes:
                shapes[id(axes)] = coupling.shape(axes, alive) if axes.parts else axes.shape
                kept[id(axes)] = axes
            return shapes[id(axes)]

        self.expected = [
            (
                op.name,
                [after(a) if a.known else None for a in op.outputs],
                coupling.in_lists(op.module) and all(after(a) == a.shape for a in op.outputs),
            )
            for op in coupling.trace.ops
        ]
        left = coupling.units_by_group(alive)
        self._own: dict[str, dict[int, Counter[int]]] = {}
        for op, axes in iter_parts(coupling.trace.ops):
            if not axes.parts:
                continue
            sizes = self._own.setdefault(op.module, {})
            for old, new in zip(axes.shape, after(axes), strict=True):
                sizes.setdefault(old, Counter())[new] += 1
            for group in coupling.groups_in(axes):  # heads may occur only multiplied with the batch
                sizes.setdefault(coupling.groups[group].units, Counter()).setdefault(left[group], 0)
        self._below = _below(self._own)

    def run(self) -> Failure | None:
        """Run the forward; return where it stopped, or ``None``."""
        args, kwargs = copies(self.inputs)
        check = ShapeCheck(self.expected)
        self.trials += 1
        try:
            with preserved(self.model), quiet_forward(self.model), check:
                self.model(*args, **kwargs)
        except (KeyboardInterrupt, GraphError):
            raise
        except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
            frames = []
            step = error.__traceback__
            while step is not None:
                frames.append(step.tb_frame)
                step = step.tb_next
            last = traceback.extract_tb(error.__traceback__)[-2:]
            where = next((f for f in reversed(last) if not f.filename.endswith("repair.py")), last[0])
            message = f"{type(error).__name__}: {str(error)[:300]}"
            return Failure(check.ran, message, f"{where.filename}:{where.lineno}", frames)
        return None

    def mend(self) -> Failure | None:
        """Change attributes until the forward runs as predicted; return what could not be mended."""
        failure = self.run()
        tried: set[tuple[int, str, str]] = set()
        while failure is not None and self.trials < _MOST_TRIALS:
            better = self._step(failure, tried)
            if better is failure:
                return failure
            failure = better
        return failure

    def _step(self, failure: Failure, tried: set[tuple[int, str, str]]) -> Failure | None:
        """Try the edits that the failing code suggests; return the new failure, or the same one."""
        for frame in reversed(failure.frames):
            candidates = list(self._candidates(frame))
            for edit in candidates:
                key = (failure.step, f"{edit.module}.{edit.attribute}", repr(edit.new))
                if key in tried:
                    continue
                tried.add(key)
                result = self._try([edit], failure)
                if result is not failure:
                    return result
            first: dict[str, Edit] = {}
            for edit in candidates:
                first.setdefault(f"{edit.module}.{edit.attribute}", edit)
            if len(first) > 1:
                key = (failure.step, "all", repr(list(first.values())))
                if key not in tried:
                    tried.add(key)
                    result = self._try(list(first.values()), failure)
                    if result is not failure:
                        return result
        return failure

    def _try(self, edits: list[Edit], failure: Failure) -> Failure | None:
        mark = self.undo.count
        try:
            for edit in edits:
                self._edit(edit)
        except PlanError:  # what looks like a size is worked out afresh at every look, by a property
            self.undo.revert(mark)
            return failure
        result = self.run()
        if result is not None and not _is_progress(failure, result):
            self.undo.revert(mark)
            return failure
        self.edits += edits
        siblings = [e for edit in edits for e in self._siblings(edit)]
        if siblings and result is not None:
            mark = self.undo.count
            for edit in siblings:
                self._edit(edit)
            together = self.run()
            if together is None or together.step >= result.step:
                self.edits += siblings
                return together
            self.undo.revert(mark)
        return result

    def _edit(self, edit: Edit) -> None:
        edit_(self.model, replace(edit, module=self._now[edit.module]), self.undo)

    def _siblings(self, edit: Edit) -> Iterator[Edit]:
        """Yield the same change in modules of the same class that saw the same old size become a new one."""
        if "." in edit.attribute:
            return
        kind = type(self.modules[edit.module])
        for name, module in self.modules.items():
            if name != edit.module and type(module) is kind and vars(module).get(edit.attribute) == edit.old:
                new = next(self._replacements(name, edit.old), None)
                if new is not None:
                    yield Edit(name, edit.attribute, edit.old, new)

    def _candidates(self, frame: FrameType) -> Iterator[Edit]:
        owner = _self_of(frame)
        if not isinstance(owner, nn.Module) or id(owner) not in self.names:
            return
        module = self.names[id(owner)]
        names = _names_in(frame.f_code, type(owner))
        for name in names:
            if name in vars(owner):
                value = vars(owner)[name]
                yield from self._edits(module, name, value)
                if hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type):
                    for inner in _names_in(frame.f_code, type(value)):
                        held = getattr(value, inner, None) if not inner.startswith("__") else None
                        yield from self._edits(module, f"{name}.{inner}", held)
            elif id(owner._modules.get(name)) in self.names:
                child = owner._modules[name]
                for inner in names:
                    if inner in vars(child):
                        yield from self._edits(self.names[id(child)], inner, vars(child)[inner])

    def _edits(self, module: str, attribute: str, value: Any) -> Iterator[Edit]:
        before = next((e.old for e in self.edits if (e.module, e.attribute) == (module, attribute)), value)
        for new in self._replacements(module, before):
            if new != value:
                yield Edit(module, attribute, value, new)

    def _replacements(self, module: str, value: Any) -> Iterator[Any]:
        """Yield new values for a size, or a tuple of sizes: most frequently seen in the module itself first."""
        while module and module not in self._below:  # a method that the module around it calls
            module = module.rpartition(".")[0]
        own, below = self._own.get(module, {}), self._below.get(module, {})
        if type(value) is int and value > 1:
            seen = [new for new, _ in own.get(value, Counter()).most_common()]
            seen += [new for new, _ in below.get(value, Counter()).most_common() if new not in seen]
            seen += [new for new in _multiples(value, own) if new not in seen]
            yield from (new for new in seen if new != value)
        elif isinstance(value, tuple | list) and value and all(type(v) is int for v in value) and len(value) < 16:
            options = [[v, *(n for n, _ in below.get(v, Counter()).most_common(2) if n != v)] for v in value]
            choices = sorted(islice(product(*options), 1024), key=lambda new: sum(map(ne, new, value)))
            yield from (type(value)(new) for new in choices[1:_MOST_TUPLES])


def _below(own: Mapping[str, Mapping[int, Counter[int]]]) -> dict[str, dict[int, Counter[int]]]:
    """Return the sizes seen in each module and everything inside it."""
    out: dict[str, dict[int, Counter[int]]] = {}
    for module, sizes in own.items():
        path = module
        while True:
            here = out.setdefault(path, {})
            for old, counts in sizes.items():
                here.setdefault(old, Counter()).update(counts)
            if not path:
                break
            path = path.rpartition(".")[0]
    return out


def _multiples(value: int, sizes: Mapping[int, Counter[int]]) -> list[int]:
    """Return what becomes of a value that is a small multiple of a size (3 × width), largest size first."""
    out = []
    for size in sorted((s for s in sizes if s >= _LEAST_FACTOR and s < value <= 4 * s), reverse=True):
        for new, _ in sizes[size].most_common(1):
            if value % size == 0 and new != size:
                out.append(value // size * new)
    return out


def _self_of(frame: FrameType) -> object:
    """Return the first argument of a function's frame, whatever it is called."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _names_in(code: CodeType, owner: type) -> list[str]:
    """Names that a piece of code reads, those of properties of its class included."""
    names = list(code.co_names)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names += const.co_names
    for name in list(names):
        attribute = getattr(owner, name, None)
        if isinstance(attribute, property) and attribute.fget is not None:
            names += attribute.fget.__code__.co_names
    return list(dict.fromkeys(names))


def _is_progress(before: Failure, after: Failure) -> bool:
    """Whether the forward got further. Another wrong shape at the same place is not."""
    if after.step != before.step:
        return after.step > before.step
    return after.line != before.line and not after.message.startswith(ShapeMismatchError.__name__)
