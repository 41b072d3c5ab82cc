"""What is known of tensors, as long as they live."""

from __future__ import annotations

from typing import Generic, TypeVar
from weakref import ref

from torch import Tensor

T = TypeVar("T")


class _Key(ref[Tensor]):
    __slots__ = ("key",)

    key: int


class ByTensor(Generic[T]):
    """A dictionary by identity that keeps no tensor alive and forgets those that are gone.

    Example:
        >>> import torch
        >>> known, x = ByTensor[str](), torch.zeros(3)
        >>> known[x] = "input"
        >>> known.get(x), known.get(torch.zeros(3)), len(known)
        ('input', None, 1)
        >>> del x
        >>> len(known)
        0
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[_Key, T]] = {}
        itself = ref(self)  # no circle: values may hold much memory

        def forget(gone: ref[Tensor]) -> None:
            here = itself()
            if here is not None and isinstance(gone, _Key):
                here._known.pop(gone.key, None)

        self._forget = forget

    def get(self, tensor: Tensor) -> T | None:
        """Return what is known of a tensor, ``None`` for a stranger."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._known

    def __len__(self) -> int:
        return len(self._known)

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        key = _Key(tensor, self._forget)
        key.key = id(tensor)
        self._known[key.key] = key, value
