"""Whether a forward may do something else in training mode: which modules ask for the mode while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_NAME = "training"


class _Asked:
    """Stands in the way of ``module.training``, and notes who reads it."""

    def __init__(self) -> None:
        self.by: dict[int, nn.Module] = {}

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            raise AttributeError(_NAME)
        self.by[id(module)] = module
        held = vars(module)
        # A scripted module keeps its flag elsewhere.
        return held[_NAME] if _NAME in held else type(module).__getattr__(module, _NAME)

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[_NAME] = value


@contextmanager
def who_asks_for_the_mode() -> Iterator[dict[int, nn.Module]]:
    """Note every module whose ``training`` flag is read, by its forward or by anything that it calls.

    Yields:
        The modules, by identity; complete once the context is left.
    """
    asked = _Asked()
    nn.Module.training = asked  # type: ignore[assignment]
    try:
        yield asked.by
    finally:
        del nn.Module.training


def is_stock(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own, unchanged: training mode drops elements or takes a batch's statistics.

    Neither ties one channel to another, so that training mode adds nothing to what evaluation mode has shown.

    Example:
        >>> is_stock(nn.Dropout()), is_stock(type("Mine", (nn.Dropout,), {})())
        (True, False)
    """
    return type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
