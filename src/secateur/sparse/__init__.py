"""Sparse weights that are really faster on a CPU: kernels, formats, a tuner, and compiled models."""

from secateur.sparse.formats import Bitmask, Panelled, nbytes
from secateur.sparse.library import isa, isas, reason, use_isa
from secateur.sparse.ops import Convolution, conv2d, linear

__all__ = ["Bitmask", "Convolution", "Panelled", "conv2d", "isa", "isas", "linear", "nbytes", "reason", "use_isa"]
