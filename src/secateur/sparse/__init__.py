"""Sparse weights that are really faster on a CPU: kernels, formats, a tuner, and compiled models."""

from secateur.sparse.compiled import Compiled, compile
from secateur.sparse.convolutions import conv2d, depthwise2d, max_pool2d
from secateur.sparse.fallback import Csr
from secateur.sparse.formats import Bitmask, Panelled, nbytes
from secateur.sparse.image_layers import DepthwiseConv2d, MaxPool2d
from secateur.sparse.images import Convolution
from secateur.sparse.layers import SparseConv2d, SparseLinear
from secateur.sparse.library import isa, isas, reason, use_isa
from secateur.sparse.products import linear
from secateur.sparse.saved import load, save

__all__ = [
    "Bitmask",
    "Compiled",
    "Convolution",
    "Csr",
    "DepthwiseConv2d",
    "MaxPool2d",
    "Panelled",
    "SparseConv2d",
    "SparseLinear",
    "compile",
    "conv2d",
    "depthwise2d",
    "isa",
    "isas",
    "linear",
    "load",
    "max_pool2d",
    "nbytes",
    "reason",
    "save",
    "use_isa",
]
