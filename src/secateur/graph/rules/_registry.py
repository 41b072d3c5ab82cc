"""Which rule serves which operator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from secateur.graph.calls import Call, Rule, op_name


class Rules:
    """Rules by operator name, with one for everything that PyTorch tags as pointwise.

    Example:
        >>> rules = Rules()
        >>> @rules.add("mylib::swish")
        ... def _(call):
        ...     call.put(call.result, call.axes(call.first))
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Rule] = {}

    def add(self, *names: str) -> Callable[[Rule], Rule]:
        """Register a rule for operators, ``"aten::add"`` or ``"add"``; in-place forms share it."""

        def register(rule: Rule) -> Rule:
            for name in names:
                self._by_name[name if "::" in name else f"aten::{name}"] = rule
            return rule

        return register

    def find(self, func: torch._ops.OpOverload) -> Rule | None:
        """Return the rule of an operator, or ``None``."""
        found = self._by_name.get(op_name(func))
        if found is None and torch.Tag.pointwise in func.tags:
            return elementwise
        return found

    def __contains__(self, name: str) -> bool:
        return (name if "::" in name else f"aten::{name}") in self._by_name


def elementwise(call: Call) -> None:
    """Tie indices that meet after broadcasting."""
    tensors = [t for t in call.tensors() if t.dim() > 0]
    for out in call.outputs():
        call.put(out, call.ledger.combine([call.axes(t) for t in tensors], out.shape))


RULES = Rules()
rule = RULES.add
