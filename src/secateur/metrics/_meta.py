"""A copy of a model without its values, and the conditions under which it runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import MetricsError
from secateur.forward import attention_fast_path
from secateur.metrics.params import tie_key

META = torch.device("meta")


def meta_copy(model: nn.Module, twins: dict[int, Any]) -> nn.Module:
    """Deep-copy a model with every tensor swapped for a twin on meta, so that no weight is ever duplicated.

    Tensors tied in the model share a storage in the copy; others never do, even where the model's are cut from one
    block of memory (CUDA recurrent networks), so that a storage names its parameter.

    Args:
        model: An eager module, possibly compiled.
        twins: Filled with ``{id(tensor): twin}``; serves as the memo of the copy.

    Returns:
        The copy, in eval mode.

    Raises:
        MetricsError: When the model is scripted, or something in it cannot be copied.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise MetricsError(f"MACs need an eager torch.nn.Module, got {type(model).__name__}")
    tied: dict[tuple[object, ...], Tensor] = {}
    for module in model.modules():
        held = {name: value for name, value in vars(module).items() if name != "_modules"}
        for leaf in tree_leaves(held):
            if isinstance(leaf, Tensor) and id(leaf) not in twins:
                twins[id(leaf)] = _twin(leaf, tied)
    memo = dict(twins)  # the copy adds entries of its own
    try:
        twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        raise MetricsError(
            f"MACs: {type(model).__name__} cannot be deep-copied ({error}); "
            "unwrap it (DDP, FSDP) and drop handles such as locks or open files from its attributes"
        ) from error
    for module in twin.modules():
        _drop_function_hooks(module)
    return twin.eval()


def to_meta(values: Any, twins: dict[int, Any]) -> Any:
    """Move every tensor of a nest to meta; one object stays one object (attention asks ``query is key``).

    Args:
        values: Nested tuples, lists and dicts; other objects pass through.
        twins: Known twins by ``id``; grows.

    Returns:
        The nest with meta tensors.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in twins:
            twins[id(leaf)] = _twin(leaf, {})
        return twins[id(leaf)]

    return tree_map(move, values)


@contextmanager
def meta_forward() -> Iterator[None]:
    """No gradients, new tensors on meta, random state kept, and attention as products that can be seen.

    Yields:
        Nothing.
    """
    # Not inference_mode: under it composite operators reach a dispatch mode whole.
    with attention_fast_path(False), torch.random.fork_rng(devices=[]), torch.no_grad(), META:
        yield


def _twin(tensor: Tensor, tied: dict[tuple[object, ...], Tensor]) -> Tensor:
    """Return a tensor of the same class, shape and strides without memory; tied tensors get one storage."""
    if tensor.layout != torch.strided or tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
        what = type(tensor).__name__ if tensor.layout == torch.strided else str(tensor.layout)
        raise MetricsError(
            f"MACs: a tensor of shape {tuple(tensor.shape)} is a {what}, which has no twin on the meta device; "
            "count on the dense, unsharded, unquantised model"
        )
    key = tie_key(tensor)
    if key not in tied:
        tied[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
    if not isinstance(tensor, nn.Parameter):
        return tied[key].detach()
    made: Tensor = torch.Tensor._make_subclass(type(tensor), tied[key], tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    return made


def _drop_function_hooks(module: nn.Module) -> None:
    """Keep hooks that are (copied) objects or torch's own; a user's plain function may write to the user's lists."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            own = (getattr(hook, "__module__", None) or "").startswith("torch.")
            if isinstance(hook, FunctionType | BuiltinFunctionType) and not own:
                del hooks[key]
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()
