"""Which outputs of a model must keep their shape."""

from __future__ import annotations

from typing import Any

from secateur.graph.trees import entries, leaves

RESULTS = ("logits", "loss", "prob", "pred", "scores", "boxes", "masks")
"""Words in the names of outputs that are results."""

INTERNAL = ("hidden_state", "pooler_output", "attentions", "past_key_values", "feature_maps", "model_output")
"""Words in the names of outputs that are intermediate values, returned beside the results."""

STATE = ("past_key_values", "cache")
"""Words in the names of outputs that only the model itself reads, at its next call."""


def fixed_outputs(out: Any) -> list[Any]:
    """Return the leaves of a model's output whose shape pruning must keep.

    That is all of them, with two exceptions, which are not compared: where outputs are named and some are results
    (``logits``), intermediate ones beside them (``encoder_last_hidden_state``) may shrink with the width of the
    network; and so may what the model keeps for its next call (``past_key_values``).

    Args:
        out: What the forward returned: tensors in containers, dataclasses or objects of any class.

    Example:
        >>> fixed_outputs({"logits": 1, "encoder_last_hidden_state": 2}), fixed_outputs({"last_hidden_state": 2})
        ([1], [2])
    """
    named = entries(out)
    if named is None:
        return leaves(out)
    free = INTERNAL if any(_has(name, RESULTS) for name in named) else STATE
    kept = leaves([value for name, value in named.items() if not _has(name, free)])
    return kept or leaves(out)


def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name for word in words)
