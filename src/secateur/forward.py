"""Running a user's model: any form of inputs, in evaluation mode, with every flag put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import SecateurError, WeightError


def check_module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        WeightError: Says what came.
    """
    if not isinstance(model, nn.Module):
        raise WeightError(f"expected a torch.nn.Module, got {type(model).__name__}")


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run the model on one batch of inputs: a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def run_on(
    function: Callable[[nn.Module, Any], Any],
    model: nn.Module,
    batch: Any,
    index: int,
    *,
    what: str,
    error: type[SecateurError],
) -> Any:
    """Call a user's function of model and batch; a failure of it is reported as such.

    Args:
        function: The function.
        model: The model.
        batch: One batch.
        index: Its number, for the message.
        what: What to call the function.
        error: What to raise.

    Raises:
        SecateurError: Of that type, when the function raises; says on what.
    """
    try:
        return function(model, batch)
    except (SecateurError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        raise error(
            f"{what} fails on batch {index} ({_described(batch)}): {type(failure).__name__}: "
            f"{str(failure).strip()[:300]}. It is called with the model and one of the batches at a time"
        ) from failure


def _described(batch: Any) -> str:
    found = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    shapes = ", ".join(f"{tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in found[:4])
    return f"a {type(batch).__name__}: {shapes or 'no tensor'}{', ...' if len(found) > 4 else ''}"


def check_batches(what: str, batches: object, *, error: type[SecateurError]) -> None:
    """Refuse what cannot be gone through batch by batch.

    Args:
        what: What it is, for the message.
        batches: The batches.
        error: What to raise.

    Raises:
        SecateurError: Of that type; says what came.
    """
    # A tensor or a dict can be iterated over, by rows and by names: never by what was meant.
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise error(
            f"{what} must be a list of batches, a data loader, or a function that returns one; got "
            f"{type(batches).__name__}. For a single batch: batches=[batch]"
        )


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
def requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters have gradients too, and freeze them again on exit."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


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
