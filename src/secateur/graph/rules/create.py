"""Operators that make constants."""

from __future__ import annotations

from secateur.graph.calls import Call
from secateur.graph.rules._registry import rule


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided",
      "new_empty_strided", "empty.memory_format", "_efficientzerotensor")  # fmt: skip
def uniform(call: Call) -> None:
    """The same value everywhere (or none yet): any part of it would do."""
    for out in call.outputs():
        call.put(out, call.ledger.made(out.shape))


@rule("arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "scalar_tensor", "tril_indices",
      "triu_indices", "hann_window", "hamming_window", "kaiser_window", "bartlett_window", "blackman_window",
      "_local_scalar_dense", "item", "is_nonzero", "equal", "size", "sym_size", "_assert_async", "_assert_scalar",
      "_assert_tensor_metadata", "manual_seed", "from_file", "vander", "isin", "prim::device", "prim::layout",
      "sym_stride", "sym_numel", "sym_storage_offset", "is_contiguous", "is_strides_like_format")  # fmt: skip
def ordered(call: Call) -> None:
    """Values that depend on the index, or no tensor at all: fixed."""
    call.put_fixed(call.outputs())
