"""What a method is robbed of, to see what it was worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch.nn import Module

from secateur.types.patterns import Pattern
from secateur.types.values import Masks, Tensors, Weight


@runtime_checkable
class Ablation(Protocol):
    """What a method is robbed of, to see what that was worth: where its zeros lie, or the weights that it leaves."""

    @property
    def restarts(self) -> bool:
        """Whether all weights start anew after the last pruning step."""
        ...

    def check(self, pattern: object, *, rounds: bool) -> None:
        """Raise :class:`~secateur.errors.RecipeError` for a pattern, or a schedule not in rounds, that does not go."""
        ...

    def masks(self, weights: Mapping[str, Weight], pattern: Pattern, masks: Masks, previous: Tensors | None) -> Masks:
        """Return what to use in place of the method's own masks; pruned stays pruned."""
        ...

    def restart_(self, model: Module) -> None:
        """Give all weights new values, where it restarts."""
        ...
