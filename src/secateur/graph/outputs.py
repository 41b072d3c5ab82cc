"""Which outputs of a model must keep their shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils._pytree import tree_leaves

RESULTS = ("logits", "loss", "prob", "pred", "scores", "boxes", "masks")
"""Words in the names of outputs that are results."""

INTERNAL = ("hidden_state", "pooler_output", "attentions", "past_key_values", "feature_maps", "model_output")
"""Words in the names of outputs that are intermediate values, returned beside the results."""


def fixed_outputs(out: Any) -> list[Any]:
    """Return the leaves of a model's output whose shape pruning must keep.

    That is all of them, with one exception: where outputs are named and some are results (``logits``), intermediate
    ones beside them (``encoder_last_hidden_state``) may shrink with the width of the network. They are not compared.

    Args:
        out: What the forward returned.

    Example:
        >>> fixed_outputs({"logits": 1, "encoder_last_hidden_state": 2}), fixed_outputs({"last_hidden_state": 2})
        ([1], [2])
    """
    if isinstance(out, Mapping) and any(_has(name, RESULTS) for name in out):
        return [leaf for name, value in out.items() if not _has(name, INTERNAL) for leaf in tree_leaves(value)]
    return tree_leaves(out)


def internal_outputs(out: Any) -> list[str]:
    """Return the names of the outputs that may shrink."""
    if isinstance(out, Mapping) and any(_has(name, RESULTS) for name in out):
        return [str(name) for name, value in out.items() if _has(name, INTERNAL) and tree_leaves(value)]
    return []


def _has(name: Any, words: tuple[str, ...]) -> bool:
    return isinstance(name, str) and any(word in name for word in words)
