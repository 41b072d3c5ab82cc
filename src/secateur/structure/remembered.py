"""Which plans a model has been shrunk by, for as long as it lives: nothing is added to the model itself."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from secateur.errors import PlanError
from secateur.graph.plan import Plan

_PLANS: WeakKeyDictionary[nn.Module, tuple[Plan, ...]] = WeakKeyDictionary()


def remember(model: nn.Module, *plans: Plan) -> None:
    """Note that a model has been shrunk, once more."""
    _PLANS[model] = (*_PLANS.get(model, ()), *plans)


def plans_of(model: nn.Module, call: str) -> tuple[Plan, ...]:
    """Return the plans that a model was shrunk by, in order.

    Args:
        model: The very object that was shrunk; a copy of it is another model.
        call: What to give the plan to, for the message.

    Raises:
        PlanError: When nothing is known of it.
    """
    found = _PLANS.get(model, ())
    if not found:
        raise PlanError(
            f"this {type(model).__name__} has not been shrunk or loaded in this process, or is a copy of one that has: "
            f"pass the plan or the report of its shrinking to {call}"
        )
    return found
