"""Running a user's model: any form of inputs, in evaluation mode, with every flag put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run the model on one batch of inputs: a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


@contextmanager
def evaluation_mode_of(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; restore each submodule's own flag on exit, frozen ones included.

    Only flags are set. A ``train`` method that does more, such as merging adapters into the weights, is not called: it
    would change weights for good.
    """
    flags = {module: module.training for module in model.modules()}
    for module, training in flags.items():
        if training:
            module.training = False
    try:
        yield
    finally:
        for module, training in flags.items():
            if module.training is not training:
                module.training = training


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and restore flags and buffers on exit: a forward may count its calls in one."""
    held = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with evaluation_mode_of(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in held:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def attention_fast_path(enabled: bool) -> Iterator[None]:
    """Allow or forbid PyTorch's fused attention in evaluation mode, and put the setting back.

    Its nested tensors fit into no graph, its products cannot be counted, and it returns zeros at padded positions.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
