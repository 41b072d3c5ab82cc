"""Choices that give every expert something to do, so that what is recorded and proven does not depend on luck."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.graph.calls import bind, op_name
from secateur.graph.labels import Ledger

if TYPE_CHECKING:
    from secateur.graph.record import Op

CHOICES = frozenset({"aten::topk", "aten::argmax", "aten::max"})
"""Operators by which a router chooses: the highest along a dimension, by place."""

MOST_PASSES = 8
"""Forwards that reach all experts, at most: with few tokens and many experts, some are left to the router."""


def spreading(func: Any, spread: int) -> Callable[..., Any]:
    """Return an operator, or in place of one that chooses along a dimension one that takes turns.

    The first row gets the first ``k``, the next one those that follow, from the start again after the last. What is
    chosen depends on places alone, so two models that have the same experts choose the same.

    Args:
        func: The operator.
        spread: Which pass: the second one goes on where the first has ended. 0 for the operator itself.
    """
    name = op_name(func)
    if not spread or name not in CHOICES:
        return func  # type: ignore[no-any-return]

    def chosen(*args: Any, **kwargs: Any) -> Any:
        bound = bind(func, args, kwargs)
        x, dim = bound["self"], bound.get("dim")
        if dim is None or not x.dim():  # of all elements, or of two tensors
            return func(*args, **kwargs)
        found = _in_turn(x, bound.get("k", 1), dim, spread)
        if name != "aten::topk" and not bound["keepdim"]:
            found = found[0].squeeze(dim), found[1].squeeze(dim)
        return found[1] if name == "aten::argmax" else found

    return chosen


def _in_turn(x: Tensor, k: int, dim: int, spread: int) -> tuple[Tensor, Tensor]:
    """Return values and places of ``k`` elements along a dimension, others in every row."""
    count = x.shape[dim]
    others = [size for d, size in enumerate(x.shape) if d != dim % x.dim()]
    rows = math.prod(others)
    first = (torch.arange(rows, device=x.device) + (spread - 1) * rows) * k
    places = (first[:, None] + torch.arange(k, device=x.device)) % count
    places = places.view(*others, k).movedim(-1, dim)
    return x.gather(dim, places), places


def passes_to_reach_all(ops: Sequence[Op], ledger: Ledger) -> int:
    """Return how many forwards it takes to give every entry of a list something to do, whatever a router prefers.

    Args:
        ops: Operators of one forward.
        ledger: Its labels.

    Returns:
        0 where no router chooses among as many as a list of modules has entries.
    """
    sizes = ledger.mentions.sizes if ledger.mentions.made else set()
    most = 0
    for labels, k, _ in ledger.chosen:
        shapes = [op.inputs[0].shape for op in ops if op.name in CHOICES]
        rows = min((math.prod(s) // labels.size for s in shapes if labels.size in s), default=0)
        if labels.size in sizes and rows:
            most = max(most, -(-labels.size // (rows * k)))
    return min(most, MOST_PASSES)
