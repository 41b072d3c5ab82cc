"""Scores are computed in float32 or better, whatever the weights are stored in."""

from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 unless it is that wide already.

    A product of two small float16 or bfloat16 numbers underflows to zero or loses its order; a score must not.
    """
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
