"""Example inputs in any form, and where they go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils._pytree import tree_leaves

from secateur.errors import GraphError
from secateur.graph.trees import tensors

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def split_inputs(example_inputs: Any) -> Inputs:
    """Return positional and keyword arguments.

    Args:
        example_inputs: A tensor, a tuple or list of positional inputs, a dict of keyword inputs, or a pair of a tuple
            and a dict for both.

    Raises:
        GraphError: When there is no tensor in it, or an iterator.
    """
    if not tensors(example_inputs):
        raise GraphError(
            f"example_inputs hold no tensor (got {type(example_inputs).__name__}); give what the forward takes: a "
            "tensor, a tuple of positional or a dict of keyword inputs, or (tuple, dict) for both"
        )
    streams = [type(leaf).__name__ for leaf in tree_leaves(example_inputs) if isinstance(leaf, Iterator)]
    if streams:
        raise GraphError(
            f"example_inputs hold a {streams[0]}, which gives its values only once, while the forward runs often; "
            "give a list"
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict):
            return example_inputs[0], dict(example_inputs[1])
        return tuple(example_inputs), {}
    return (example_inputs,), {}
