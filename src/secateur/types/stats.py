"""What parts measure before they decide, and from what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Module, Parameter

from secateur.types.values import Tensors

Stats = Mapping[Any, Any]
"""What was collected, keyed by what a part lists in ``needs``: tensors by parameter, or what a statistic returns."""


@dataclass(frozen=True)
class Source:
    """What statistics are collected from.

    Attributes:
        model: The model, pruned so far.
        parameters: The prunable parameters by name.
        loss_fn: ``loss_fn(model, batch)``, if there is one.
        batches: Returns the batches anew, if there are any.
        example_inputs: What one forward pass takes, if it is known: a tensor, a tuple, a dict, or ``(tuple, dict)``.
        masks: Masks so far; empty before the first update.
    """

    model: Module
    parameters: Mapping[str, Parameter]
    loss_fn: Callable[[Module, Any], Tensor] | None = None
    batches: Callable[[], Iterable[Any]] | None = None
    example_inputs: Any = None
    masks: Tensors = field(default_factory=dict)


@runtime_checkable
class Statistic(Protocol):
    """Something to measure, with its options. Hashable: equal ones that several parts need are collected once."""

    @property
    def uses(self) -> frozenset[str]:
        """What it looks at: ``"loss"``, ``"batches"``, ``"example_inputs"``; missing ones are refused early.

        ``"trajectory"`` stands for a training that nobody has watched yet.
        """
        ...

    @property
    def elementwise(self) -> bool:
        """Whether it is one tensor per parameter, of the parameter's shape; only such can be added up over units."""
        ...

    def collect(self, source: Source) -> Any:
        """Measure. Modes, buffers and ``.grad`` of the model are as before afterwards."""
        ...


Need = str | Statistic
"""What a part lists in ``needs``: the name of a simple statistic, or one with options."""
