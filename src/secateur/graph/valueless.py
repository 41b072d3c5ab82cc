"""Tensors that have a shape and no values: those on the meta device, and fake ones."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's elements can be looked at.

    Example:
        >>> import torch
        >>> has_values(torch.zeros(1)), has_values(torch.zeros(1, device="meta"))
        (True, False)
    """
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def all_have_values(tensors: Iterable[Tensor]) -> bool:
    """Whether all of them do."""
    return all(map(has_values, tensors))


def fake_mode_of(model: nn.Module) -> AbstractContextManager[object]:
    """Return the mode that a model of fake tensors was made in; what its forward makes on the way must be fake too."""
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return nullcontext()


outside_fake_mode = unset_fake_temporarily
"""Leaves a mode of fake tensors that the caller may be in: indices and scores have values."""
