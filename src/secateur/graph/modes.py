"""Whether a forward may do something else in training mode: whose code asks for the mode while it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_NAME = "training"


class _Asked:
    """Stands in the way of ``module.training``, and counts who reads it."""

    def __init__(self) -> None:
        self.by: set[str] = set()

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            raise AttributeError(_NAME)
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if not asker.startswith("torch.nn.modules."):
            self.by.add(asker)
        held = vars(module)
        # A scripted module keeps its flag elsewhere.
        return held[_NAME] if _NAME in held else type(module).__getattr__(module, _NAME)

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[_NAME] = value


@contextmanager
def who_asks_for_the_mode() -> Iterator[set[str]]:
    """Note whose code reads the ``training`` flag of any module, apart from PyTorch's own layers.

    In training mode these drop elements or take a batch's statistics, which ties no channel to another: where nobody
    else asks, training mode adds nothing to what evaluation mode has shown. Scripted code asks without being seen.

    Yields:
        Names of Python modules; complete once the context is left.
    """
    asked = _Asked()
    nn.Module.training = asked  # type: ignore[assignment]
    try:
        yield asked.by
    finally:
        del nn.Module.training
