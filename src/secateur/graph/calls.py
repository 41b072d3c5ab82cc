"""One operator call: its arguments by name, its results, what it writes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.graph.axes import Axes, Labels
from secateur.graph.labels import Ledger

if TYPE_CHECKING:
    from secateur.graph.record import Recorder

Products = Sequence[Sequence[tuple[Axes, int]]]
"""Multiply-accumulates: a sum of products of dimension sizes, each dimension given by (axes, dim)."""


class Call:
    """What a rule sees of one operator call: arguments by schema name, the result, and the labels of both."""

    __slots__ = ("_mode", "_outputs", "_tensors", "args", "func", "macs", "name", "out")

    def __init__(
        self, mode: Recorder, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        self._mode = mode
        self.func = func
        self.name = op_name(func)
        self.args = bind(func, args, kwargs)
        self.out = out
        self.macs: Products = ()
        self._tensors = flat_tensors(list(self.args.values()))
        self._outputs = flat_tensors(out)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    @property
    def ledger(self) -> Ledger:
        """Where labels are tied."""
        return self._mode.ledger

    @property
    def exact(self) -> bool:
        """Whether statistics over pruned dimensions are forbidden."""
        return self._mode.exact

    @property
    def first(self) -> Tensor:
        """The first tensor argument."""
        return self._tensors[0]

    @property
    def result(self) -> Tensor:
        """The first result."""
        return self.out[0] if isinstance(self.out, tuple | list) else self.out  # type: ignore[no-any-return]

    @property
    def number_read(self) -> tuple[int, Labels] | None:
        """The number of an expert that Python code last read from a tensor, and the labels of all of them."""
        return self._mode.number_read

    def mention(self, labels: Labels, number: int | None) -> None:
        """Note that one index of a dimension is picked, an expert by its number perhaps; ``None`` for all of them."""
        self._mode.mention(labels, number)

    def tensors(self) -> list[Tensor]:
        """All tensor arguments, in order."""
        return list(self._tensors)

    def outputs(self) -> list[Tensor]:
        """All tensor results."""
        return list(self._outputs)

    def axes(self, tensor: Tensor) -> Axes:
        """Return the labels of an argument."""
        return self._mode.axes(tensor)

    def put(self, tensor: Tensor, axes: Axes) -> None:
        """Label a result."""
        self._mode.put(tensor, axes)

    def put_fixed(self, tensors: Sequence[Tensor]) -> None:
        """Label results as fixed in every dimension."""
        for tensor in tensors:
            self._mode.put(tensor, Axes(tensor.shape))

    def put_aside(self, tensors: Sequence[Tensor]) -> None:
        """Label by-products that nothing should be concluded from."""
        for tensor in tensors:
            self._mode.put(tensor, Axes(tensor.shape, known=False))

    def freeze(self) -> None:
        """Fix everything that the call touches."""
        for tensor in self.tensors():
            self.ledger.freeze_all(self.axes(tensor))
        self.put_fixed(self.outputs())


Rule = Callable[[Call], None]


@lru_cache(maxsize=4096)
def op_name(func: torch._ops.OpOverload) -> str:
    """Return ``"aten::add"`` for ``aten.add_.Tensor``: in-place and out-of-place do the same to labels."""
    name = func._schema.name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def bind(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments after the operator's schema, defaults included."""
    out: dict[str, Any] = {}
    for i, (name, default) in enumerate(_arguments(func)):
        if i < len(args):
            out[name] = args[i]
        elif name in kwargs:
            out[name] = kwargs[name]
        elif default is not None:
            out[name] = default[0]
    return out


@lru_cache(maxsize=4096)
def _arguments(func: torch._ops.OpOverload) -> list[tuple[str, tuple[Any] | None]]:
    """Return the name of each argument of an operator, and its default if it has one."""
    return [
        (argument.name, (argument.default_value,) if argument.has_default_value() else None)
        for argument in func._schema.arguments
        if not argument.is_out
    ]


@lru_cache(maxsize=4096)
def _written(func: torch._ops.OpOverload) -> list[tuple[int, str]]:
    """Return place and name of the arguments that an operator writes to."""
    return [
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def flat_tensors(value: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operator, which come in plain containers only."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flat_tensors(v)] if isinstance(value, list | tuple) else []


def only_shape(func: torch._ops.OpOverload) -> bool:
    """Whether an in-place operator changes how a tensor is seen, not its values."""
    return torch.Tag.inplace_view in func.tags


def written_by(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensor arguments that an operator writes to."""
    return [t for i, name in _written(func) for t in flat_tensors(args[i] if i < len(args) else kwargs.get(name))]
