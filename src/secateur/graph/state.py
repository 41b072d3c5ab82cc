"""Running a user's forward without a trace of it: what it caches or counts is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set)


def _containers(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return every plain container that a module holds, with a copy of what is in it."""
    out: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in _CONTAINERS:
                out.setdefault(id(value), (value, copy.copy(value)))
    return list(out.values())


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, on exit, every module's attributes and every buffer's values.

    A forward may cache tensors of the present sizes (attention biases, rotary tables), count its calls or move its
    running statistics; none of that may survive a recording.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    contents = _containers(model)
    buffers = [(b, b.detach().clone()) for b in model.buffers() if b.device.type != "meta"]
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
            for buffer, values in buffers:
                # By value: fused batch norms move their statistics without counting it as a change.
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
