"""Operators that PyTorch computes by others, seen as these."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Decomposing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode to which no composite operator comes whole.

    They are taken apart where gradients are arranged for. ``torch.inference_mode`` leaves that out, so that a forward
    under it shows ``conv2d`` and ``quantile`` to a mode, and not what these are made of.
    """

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take an operator apart, or act on it."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]  # not what a subclass does on entry
            try:
                out = func.decompose(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)  # type: ignore[no-untyped-call]
            if out is not NotImplemented:
                return out
        return self.act(func, args, kwargs)

    def act(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute an operator that is made of no others.

        Args:
            func: The operator.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        return func(*args, **kwargs)
