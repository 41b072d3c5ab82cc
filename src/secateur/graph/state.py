"""Running a user's forward without a trace of it: what it caches, counts or draws is put back."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CLOSED = (str, bytes, int, float, complex, nn.Parameter, nn.Module, type, FunctionType, MethodType, ModuleType)
"""What is not opened in search of state: plain values, what is put back by other means, and code."""

_DEPTH = 6


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
    values = [(t, t.detach().clone()) for t in found.tensors if t.device.type != "meta" and t.layout == torch.strided]
    try:
        yield
    finally:
        for step in found.steps:
            step()
        with torch.no_grad():
            for tensor, before in values:
                # By value: fused batch norms move their statistics without counting it as a change.
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


class _State:
    """Containers and objects inside a module's attributes, with the way back, and the tensors in them."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.tensors: list[Tensor] = []
        self._seen: set[int] = set()

    def open(self, held: Any, depth: int) -> None:
        """Note what a value holds, and how to put it back."""
        if held is None or isinstance(held, _CLOSED) or id(held) in self._seen or depth == 0:
            return
        self._seen.add(id(held))
        inside: list[Any] = []
        if isinstance(held, Tensor):
            self.tensors.append(held)
        elif isinstance(held, dict):
            content = dict(held)
            self.steps.append(lambda: _refill(held, content))
            inside = list(content.values())
        elif isinstance(held, list | deque):
            inside = list(held)
            self.steps.append(lambda: _reorder(held, inside))
        elif isinstance(held, set):
            members = set(held)
            self.steps.append(lambda: _refill_set(held, members))
        elif isinstance(held, tuple):
            inside = list(held)
        elif hasattr(held, "__dict__"):
            inside = [vars(held)]
        for value in inside:
            self.open(value, depth - 1)


def _refill(held: dict[Any, Any], content: dict[Any, Any]) -> None:
    if held.keys() != content.keys() or any(held[k] is not v for k, v in content.items()):
        kind = OrderedDict if isinstance(held, OrderedDict) else dict  # past any method of a subclass
        kind.clear(held)
        kind.update(held, content)


def _reorder(held: Any, items: list[Any]) -> None:
    if len(held) != len(items) or any(a is not b for a, b in zip(held, items, strict=True)):
        held.clear()
        held.extend(items)


def _refill_set(held: set[Any], members: set[Any]) -> None:
    if held != members:
        held.clear()
        held.update(members)


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
