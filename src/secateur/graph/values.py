"""The values that a proof computes with: float64, those of constant tensors made distinct, in memory used again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.graph.changes import slice_tensor
from secateur.graph.record import Leaf
from secateur.graph.weak import ByTensor

_POOLED = 1 << 15
"""Tensors of fewer elements are not worth a place in the pool."""

_REMEMBERED = 1 << 16
"""Constant tensors of at most this many elements are made distinct once and kept."""

_FIRST_LOOK = 64

LOOKUP = "aten::embedding"
"""The operator that picks rows of a table and computes nothing."""


class Pool:
    """Float64 copies in memory that is used again as soon as no tensor refers to it.

    The system hands out large pieces of memory page by page, zeroed, which costs several times the copy itself; a
    proof copies every weight once per run. A piece is free when the count of references to its array says so: every
    storage that PyTorch makes from an array holds one, however many views there are of it.
    """

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.float64]] = []

    def double(self, tensor: Tensor) -> Tensor:
        """Return a float64 copy that may be written to."""
        strided = tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_complex()
        if tensor.device.type != "cpu" or tensor.numel() < _POOLED or not strided:
            return tensor.to(wide_of(tensor), copy=True)
        piece = self._take(tensor.numel())[: tensor.numel()]
        return torch.from_numpy(piece).view(tensor.shape).copy_(tensor)

    def _take(self, count: int) -> NDArray[np.float64]:
        """Return a free piece of at least so many elements; the smallest, or a new one in place of all free ones."""
        free = [place for place in range(len(self._pieces)) if self._references(place) == _UNUSED]
        fits = [place for place in free if self._pieces[place].size >= count]
        if fits:
            return self._pieces[min(fits, key=lambda place: self._pieces[place].size)]
        for place in reversed(free):
            del self._pieces[place]
        self._pieces.append(np.empty(count))
        return self._pieces[-1]

    def _references(self, place: int) -> int:
        return sys.getrefcount(self._pieces[place])


def _references_of_unused() -> int:
    pool = Pool()
    pool._take(1)
    return pool._references(0)


_UNUSED = _references_of_unused()
"""References to a piece that only its pool knows, by the count that the pool sees."""


class Probe:
    """Float64 values for the tensors of a model, those that are constant made distinct.

    A scale that is 1 everywhere, or a branch that starts at 0, would hide a mistake from any comparison. Both models
    are therefore run with the same values, in which such tensors differ from index to index.

    Args:
        dense: The tensors before pruning.
        distinct: Whether to change constant tensors; off where two models bring values of their own.
    """

    def __init__(self, dense: Sequence[Tensor], *, distinct: bool = True) -> None:
        self._dense = dense
        self._distinct = distinct
        self._changed: dict[int, bool] = {}
        self._remembered: dict[int, Tensor] = {}
        self._pool = Pool()

    def changed(self, index: int) -> bool:
        """Whether a leaf is constant, so that the proof gives it other values."""
        if index not in self._changed:
            tensor = self._dense[index]
            self._changed[index] = self._distinct and wide_of(tensor) is not None and is_constant(tensor)
        return self._changed[index]

    def dense(self, index: int) -> Tensor:
        """Return a leaf as it is, before pruning."""
        return self._dense[index]

    def value(self, index: int) -> Tensor:
        """Return a leaf's values before pruning in float64, as a copy (integers as they are, no copy)."""
        tensor = self._dense[index]
        if wide_of(tensor) is None:
            return tensor
        if not self.changed(index):
            return self._pool.double(tensor)
        if index in self._remembered:
            return self._remembered[index].clone()
        generator = torch.Generator("cpu").manual_seed(index)
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor.device)
        value = tensor.to(wide_of(tensor)) * (1 + 0.25 * noise) + 0.05 * noise
        if value.numel() <= _REMEMBERED:
            self._remembered[index] = value.clone()
        return value

    def small(self, index: int, tensor: Tensor, kept: Mapping[int, NDArray[np.int64]]) -> Tensor:
        """Return a leaf's values after pruning in float64: those that the pruned model really holds.

        Args:
            index: The leaf.
            tensor: What the pruned model holds.
            kept: Kept indices by dimension, for a leaf that the proof has given other values.
        """
        if wide_of(tensor) is None:
            return tensor
        return slice_tensor(self.value(index), kept) if self.changed(index) else self._pool.double(tensor)


def is_constant(tensor: Tensor) -> bool:
    """Whether all elements of a tensor are equal, so that it hides mistakes; one that stands alone if it is zero."""
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    if tensor.numel() == 1:
        return not tensor.any()
    flat = tensor.flatten()
    return all(bool((part == flat[0]).all()) for part in (flat[:_FIRST_LOOK], flat))


def wide_of(value: Tensor | torch.dtype) -> torch.dtype | None:
    """Return the widest dtype of the same kind; ``None`` for integers and truth values."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else None


LeafValue = Callable[[Tensor], Tensor | None]
"""Returns the float64 values of a tensor that the model owns; ``None`` for any other."""


class Float64:
    """Runs operators in float64, whatever the dtype of what the code passes."""

    def __init__(self) -> None:
        self._shadow = ByTensor[Tensor]()

    def seen(self, tensor: Tensor, leaf_value: LeafValue) -> Tensor:
        """Return the values that Python code should read from a tensor."""
        known = self._shadow.get(tensor)
        found = leaf_value(tensor) if known is None else known
        return tensor if found is None else found

    def promote(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], leaf_value: LeafValue
    ) -> Any:
        """Replace tensors and dtypes of a call by their float64 forms."""
        writes = func._schema.is_mutable
        return (
            tuple(self._promoted(value, leaf_value, writes) for value in args),
            {name: self._promoted(value, leaf_value, writes) for name, value in kwargs.items()},
        )

    def _promoted(self, value: Any, leaf_value: LeafValue, writes: bool) -> Any:
        # A method, since functions that call themselves keep what they have seen until circles are collected.
        if isinstance(value, Tensor):
            known = self._shadow.get(value)
            found = leaf_value(value) if known is None else known
            if found is not None:
                return found
            wide = wide_of(value)
            if wide is None or value.dtype == wide:
                return value
            promoted = value.to(wide)
            if writes:
                self._shadow[value] = promoted
            return promoted
        if isinstance(value, torch.dtype):
            return wide_of(value) or value
        if type(value) is list or type(value) is tuple:
            return type(value)(self._promoted(v, leaf_value, writes) for v in value)
        return value

    def look_up(
        self,
        func: torch._ops.OpOverload,
        table: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaf_value: LeafValue,
    ) -> Tensor:
        """Return float64 rows of a leaf, whose values are given as they are."""
        rest, named = self.promote(func, args[1:], kwargs, leaf_value)
        rows: Tensor = func(table, *rest, **named)
        return rows.to(wide_of(rows), copy=True)


@contextmanager
def in_float64(leaves: Sequence[Leaf]) -> Iterator[list[Tensor]]:
    """Make new tensors float64, and the model's own tensors look it.

    Python code and composite operators compare dtypes before any operator is dispatched. Each leaf therefore stands
    for a float64 tensor of its shape that takes no memory; its values are put in where an operator uses it. A forward
    that brings a module to a dtype first (a router to float32) finds nothing to do, as it does outside.

    Yields:
        What the model's tensors hold meanwhile.
    """
    before = torch.get_default_dtype()
    held = [leaf.tensor.data for leaf in leaves]
    torch.set_default_dtype(torch.float64)
    apply = nn.Module._apply
    nn.Module._apply = lambda module, *_args, **_kwargs: module  # type: ignore[method-assign]
    try:
        for leaf in leaves:
            wide = wide_of(leaf.tensor)
            if wide is not None and leaf.tensor.layout == torch.strided:
                empty = torch.zeros((), dtype=wide, device=leaf.tensor.device)
                leaf.tensor.data = empty.expand(leaf.tensor.shape)
        yield held
    finally:
        for leaf, data in zip(leaves, held, strict=True):
            if wide_of(data) is not None and data.layout == torch.strided:
                leaf.tensor.data = data
        nn.Module._apply = apply  # type: ignore[method-assign]
        torch.set_default_dtype(before)
