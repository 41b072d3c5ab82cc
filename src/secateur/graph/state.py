"""Running a user's forward without a trace of it: what it caches or counts is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set)

_LARGE = 1 << 14


def _containers(modules: Iterable[nn.Module]) -> list[tuple[Any, Any]]:
    """Return every plain container that a module holds, with a copy of what is in it."""
    out: dict[int, tuple[Any, Any]] = {}
    for module in modules:
        for value in vars(module).values():
            if type(value) in _CONTAINERS:
                out.setdefault(id(value), (value, copy.copy(value)))
    return list(out.values())


class _Held:
    """The values of some buffers of one kind, in one piece: there may be hundreds, of a few numbers each.

    Args:
        buffers: On one device, of one dtype.
    """

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._shapes = [buffer.shape for buffer in buffers]
        self._values = self._joined()

    def _joined(self) -> Tensor:
        if len(self._buffers) == 1:
            return self._buffers[0].detach().clone()
        return torch.cat([buffer.detach().reshape(-1) for buffer in self._buffers])

    def put_back(self) -> None:
        """Write the values back where they differ.

        By value: fused batch norms move their statistics without counting it as a change.
        """
        if len(self._buffers) == 1:
            each: Sequence[Tensor] = [self._values]
        elif torch.equal(self._joined(), self._values):
            return
        else:
            parts = torch.split(self._values, [shape.numel() for shape in self._shapes])
            each = [values.view(shape) for values, shape in zip(parts, self._shapes, strict=True)]
        for buffer, values in zip(self._buffers, each, strict=True):
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def _alike(modules: Iterable[nn.Module]) -> list[list[Tensor]]:
    """Return the buffers that have values, those of one device and dtype together, large ones alone."""
    buffers = {id(b): b for module in modules for b in module._buffers.values() if b is not None}
    out: dict[tuple[object, ...], list[Tensor]] = {}
    for buffer in buffers.values():
        if buffer.device.type != "meta":
            alone = id(buffer) if buffer.numel() > _LARGE or buffer.layout != torch.strided else 0
            out.setdefault((buffer.device, buffer.dtype, alone), []).append(buffer)
    return list(out.values())


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, on exit, every module's attributes and every buffer's values.

    A forward may cache tensors of the present sizes (attention biases, rotary tables), count its calls or move its
    running statistics; none of that may survive a recording.
    """
    modules = list(model.modules())
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    contents = _containers(modules)
    buffers = [_Held(alike) for alike in _alike(modules)]
    try:
        yield
    finally:
        for here, before in attributes:
            if here.keys() != before.keys() or any(here[k] is not v for k, v in before.items()):
                here.clear()
                here.update(before)
        for value, before in contents:
            if isinstance(value, list):
                value[:] = before
            else:
                value.clear()
                value.update(before)
        with torch.no_grad():
            for held in buffers:
                held.put_back()
