"""Running a user's forward without a trace of it: what it caches, counts or draws is put back."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.valueless import has_values

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})

_CLOSED = (type(None), str, bytes, int, float, complex, nn.Module, type, FunctionType, MethodType, ModuleType)
"""What is not opened in search of state: plain values, what is put back by other means, and code."""

_DEPTH = 6

_LARGE = 1 << 14


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, on exit, every module's attributes, what they hold, and the values of buffers and other tensors.

    A forward may cache tensors of the present sizes (attention biases, rotary tables), count its calls or move its
    running statistics; none of that may survive a recording, wherever inside the module's attributes it is kept.
    Parameters are left alone: a forward that changes them is refused before it does.
    """
    found = _State()
    for module in model.modules():
        found.open(vars(module), _DEPTH)
    values = [_Held(alike) for alike in _alike(found.tensors)]
    try:
        yield
    finally:
        found.put_back()
        with torch.no_grad():
            for held in values:
                held.put_back()


class _Held:
    """The values of some tensors of one kind, in one piece: there may be hundreds, of a few numbers each.

    Args:
        tensors: On one device, of one dtype.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._shapes = [tensor.shape for tensor in tensors]
        self._values = self._joined()

    def _joined(self) -> Tensor:
        if len(self._tensors) == 1:
            return self._tensors[0].detach().clone()
        return torch.cat([tensor.detach().reshape(-1) for tensor in self._tensors])

    def put_back(self) -> None:
        """Write the values back where they differ.

        By value: fused batch norms move their statistics without counting it as a change.
        """
        if len(self._tensors) == 1:
            each: Sequence[Tensor] = [self._values]
        elif torch.equal(self._joined(), self._values):
            return
        else:
            parts = torch.split(self._values, [shape.numel() for shape in self._shapes])
            each = [values.view(shape) for values, shape in zip(parts, self._shapes, strict=True)]
        for tensor, values in zip(self._tensors, each, strict=True):
            if not torch.equal(tensor, values):
                tensor.copy_(values)


def _alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the tensors that have values, those of one device and dtype together, large ones alone."""
    out: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in tensors:
        if has_values(tensor) and tensor.layout == torch.strided:
            alone = id(tensor) if tensor.numel() > _LARGE else 0
            out.setdefault((tensor.device, tensor.dtype, alone), []).append(tensor)
    return list(out.values())


class _State:
    """Containers and objects inside a module's attributes, with copies to put back, and the tensors in them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._empty: list[Any] = []  # a dozen dictionaries of hooks per module
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._seen: set[int] = set()

    def open(self, held: Any, depth: int) -> None:
        """Note what a value holds."""
        if depth == 0 or id(held) in self._seen or isinstance(held, _CLOSED):
            return
        if isinstance(held, Tensor):
            if not isinstance(held, nn.Parameter):
                self._seen.add(id(held))
                self.tensors.append(held)
            return
        self._seen.add(id(held))
        for value in self._inside(held):
            if type(value) not in _ATOMS:  # most are
                self.open(value, depth - 1)

    def _inside(self, held: Any) -> Iterable[Any]:
        if isinstance(held, dict | list | deque | set) and not held:
            self._empty.append(held)
            return ()
        if isinstance(held, dict):
            content = dict(held)
            self._dicts.append((held, content))
            return content.values()
        if isinstance(held, list | deque):
            items = list(held)
            self._lists.append((held, items))
            return items
        if isinstance(held, set):
            self._sets.append((held, set(held)))
            return ()
        if isinstance(held, tuple):
            return held
        return [vars(held)] if hasattr(held, "__dict__") else ()

    def put_back(self) -> None:
        """Give every container what it held."""
        for none in self._empty:
            if none:
                (_kind(none) if isinstance(none, dict) else type(none)).clear(none)
        for held, content in self._dicts:
            if held.keys() != content.keys() or not all(map(is_, held.values(), content.values())):
                _kind(held).clear(held)
                _kind(held).update(held, content)
        for items, before in self._lists:
            if len(items) != len(before) or not all(map(is_, items, before)):
                items.clear()
                items.extend(before)
        for members, former in self._sets:
            if members != former:
                members.clear()
                members.update(former)


def _kind(held: dict[Any, Any]) -> type[dict[Any, Any]]:
    """Return the type whose methods change a dictionary, past those of a subclass."""
    return OrderedDict if isinstance(held, OrderedDict) else dict


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """Put back, on exit, the random generators that a forward may draw from: PyTorch's, Python's and NumPy's."""
    cards = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cards):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
