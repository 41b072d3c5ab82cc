"""The tensors in what goes into and comes out of a forward, whatever holds them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.Size,
    Tensor,
    nn.Module,
    type,
)


def leaves(value: Any) -> list[Any]:
    """Return everything in a value that holds nothing else.

    Containers that PyTorch knows are opened, and so are dataclasses and objects of any other class that have
    attributes: a forward may return its results in any of them.

    Args:
        value: Inputs or outputs of a forward.

    Example:
        >>> from types import SimpleNamespace
        >>> leaves({"a": 1, "b": SimpleNamespace(c=[2, 3])})
        [1, 2, 3]
    """
    return list(_walk(value, set()))


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors among the leaves."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return a copy of a value with every leaf replaced; objects are copied, never changed.

    Args:
        change: Called with each leaf.
        value: Inputs of a forward.
    """

    def one(leaf: Any) -> Any:
        held = attributes(leaf)
        if held is None:
            return change(leaf)
        twin = copy.copy(leaf)
        for name, inner in held.items():
            object.__setattr__(twin, name, mapped(change, inner))
        return twin

    return tree_map(one, value)


def attributes(value: Any) -> dict[str, Any] | None:
    """Return what an object holds by name; ``None`` for plain values, tensors, modules, classes and functions."""
    if isinstance(value, _PLAIN) or callable(value):
        return None
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    held = getattr(value, "__dict__", None)
    return dict(held) if isinstance(held, dict) and held else None


def entries(value: Any) -> dict[str, Any] | None:
    """Return the named parts of a result: of a mapping, a named tuple, a dataclass or another object."""
    if isinstance(value, Mapping):
        return {str(name): inner for name, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    return attributes(value)


def _walk(value: Any, above: set[int]) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        held = attributes(leaf)
        if held is None:
            yield leaf
        elif id(leaf) not in above:  # an object may hold itself
            for inner in held.values():
                yield from _walk(inner, above | {id(leaf)})
