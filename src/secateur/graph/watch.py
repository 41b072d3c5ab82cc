"""Calls that no operator shows: values that leave for Python, and sizes that become values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ESCAPES: dict[Any, str] = {
    Tensor.tolist: "tolist()",
    Tensor.numpy: "numpy()",
    Tensor.__array__: "numpy",
    Tensor.__dlpack__: "dlpack",
    Tensor.data_ptr: "data_ptr()",
    Tensor.untyped_storage: "untyped_storage()",
    Tensor.storage: "storage()",
}


class Watch(TorchFunctionMode):
    """Watches calls that no operator shows: values that leave for Python, and sizes that become values.

    Args:
        escape: Called with a tensor that Python reads; returns the values it should see.
        sized: Called where the size of a dimension is used as a value: tensor, dimension, reason.
    """

    def __init__(
        self, escape: Callable[[Tensor, str], Tensor], sized: Callable[[Tensor, int, str], None] | None = None
    ) -> None:
        super().__init__()
        self._escape, self._sized = escape, sized

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note, then call."""
        kwargs = kwargs or {}
        how = _ESCAPES.get(func)
        if how is not None and args:
            return func(self._escape(args[0], how), *args[1:], **kwargs)
        if self._sized is not None and func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
            bound = {**dict(zip(names, args, strict=False)), **kwargs}
            if bound.get("scale") is None:
                for name in ("query", "key"):
                    self._sized(bound[name], -1, "attention without a given scale reads the head size")
        return func(*args, **kwargs)
