"""A plain mapping from a name in a recipe to the part that it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from secateur.errors import UnknownNameError, nearest


def in_words(part: object) -> str:
    """Return a part's ``repr`` without the addresses that parts of plain classes print, the same in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part))


class Registry(Mapping[str, Callable[..., Any]]):
    """Named parts of one axis.

    The library's own parts are listed by hand where the registry is made: no folder is walked and
    nothing registers itself when imported. Other packages add theirs through the entry point group
    ``secateur.<axis>``; those are loaded when they are asked for by name.

    Args:
        axis: What the parts are: ``"score"``, ``"pattern"``, ...
        parts: Name to factory.
    """

    def __init__(self, axis: str, parts: Mapping[str, Callable[..., Any]]) -> None:
        self.axis = axis
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return the part called ``name``.

        Raises:
            UnknownNameError: When there is none; names the nearest.
        """
        if name in self._parts:
            return self._parts[name]
        plugins = self._plugins()
        if name in plugins:
            part: Callable[..., Any] = plugins[name].load()
            return part
        raise UnknownNameError(f"unknown {self.axis} {name!r}; {nearest(name, [*self._parts, *plugins])}")

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._plugins()

    def __iter__(self) -> Iterator[str]:
        return iter([*self._parts, *(name for name in self._plugins() if name not in self._parts)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _plugins(self) -> dict[str, Any]:
        return {point.name: point for point in entry_points(group=f"secateur.{self.axis}")}
