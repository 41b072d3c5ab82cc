"""What a model owns, and its forward, run without a trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from secateur.errors import GraphError, SecateurError
from secateur.forward import attention_fast_path, evaluation_mode_of
from secateur.graph.state import same_randomness
from secateur.graph.trees import tensors
from secateur.graph.valueless import fake_mode_of


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has a storage of its own (sparse and wrapped ones have none)."""
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def owned_tensors(model: nn.Module) -> Iterator[tuple[list[str], Tensor, str]]:
    """Yield every parameter, buffer and plain tensor attribute once, with all the names it goes by."""
    names: dict[int, list[str]] = {}
    found: dict[int, tuple[Tensor, str]] = {}
    for path, module in model.named_modules(remove_duplicate=True):
        places: list[tuple[str, Tensor | None, str]] = [
            *((n, t, "parameter") for n, t in module._parameters.items()),
            *((n, t, "buffer") for n, t in module._buffers.items()),
            *((n, t, "tensor") for n, t in vars(module).items() if isinstance(t, Tensor)),
        ]
        for name, tensor, kind in places:
            if isinstance(tensor, Tensor):
                names.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
                found.setdefault(id(tensor), (tensor, kind))
    for key, (tensor, kind) in found.items():
        yield names[key], tensor, kind


@contextmanager
def module_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep ``stack`` up to date with the qualified names of the modules whose forward is running."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _args: Any) -> None:
        stack.append(names.get(id(module), stack[-1] if stack else ""))

    def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
        if stack:
            stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.clear()


@contextmanager
def quiet_forward(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Run the model's forward without gradients, in eval (or train) mode, leaving flags and random state as found."""
    with ExitStack() as context:
        context.enter_context(evaluation_mode_of(model))
        if training:
            for module in model.modules():
                module.training = True
        context.enter_context(fake_mode_of(model))
        context.enter_context(torch.no_grad())
        context.enter_context(attention_fast_path(enabled=False))
        context.enter_context(same_randomness(model))
        for kind in ("cpu", "cuda"):  # casts of an outer autocast would come between what is recorded and compared
            if torch.is_autocast_enabled(kind):
                context.enter_context(torch.autocast(kind, enabled=False))
        yield


def call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the forward; a failure of the user's own code is reported as such."""
    try:
        return model(*args, **kwargs)
    except (SecateurError, KeyboardInterrupt):
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors((args, kwargs)))
        raise GraphError(
            f"the model's own forward fails on the example inputs (tensors of shape {shapes or 'none'}): "
            f"{type(error).__name__}: {str(error)[:300]}. Give inputs that model(*inputs) accepts"
        ) from error
