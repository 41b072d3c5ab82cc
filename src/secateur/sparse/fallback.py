"""Products through torch's own sparse matrices, for where the kernels are missing.

Where they break even with torch's dense layers, measured on one thread of an AVX-512 processor, torch 2.13:

- linear layers of 256 to 3072 features, 128 to 512 vectors: at 80 to 85 % zeros where they have no fewer outputs than
  inputs, later otherwise, up to 91 % (2304 to 256);
- the same on one vector: at 70 to 75 %; on eight, where torch's dense layers are slow: below 70 %;
- convolutions of one tap: at 83 to 93 %; of 3x3 taps: at 94 %, or never.

The kernels are 1.3 to 3 times faster at the same sparsity. So this is worth a try from about 85 % up;
:func:`secateur.sparse.compile` measures it for every layer, and keeps the dense one where nothing is gained.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import SecateurWarning, SparseError
from secateur.sparse.arrays import Packed, as_matrix
from secateur.sparse.library import reason

if TYPE_CHECKING:
    from secateur.sparse.images import Convolution

LEAST_SPARSITY = 0.7
"""Layers with fewer zeros are not tried: only those on a handful of vectors would gain."""

AFTERWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
"""What the kernels' activations are in torch."""


@dataclass(frozen=True, eq=False)
class Csr(Packed):
    """Compressed rows as torch has them, with indices of 32 bits: what torch multiplies fastest.

    Bytes: 8 per non-zero weight and 4 per row.

    Example:
        >>> packed = Csr.pack(torch.eye(3))
        >>> packed.indices.tolist(), torch.equal(packed.to_dense(), torch.eye(3))
        ([0, 1, 2], True)
    """

    kind: ClassVar[str] = "csr"
    NUMBERS: ClassVar = ("rows", "columns")
    DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "values": torch.float32,
        "indices": torch.int32,
        "offsets": torch.int32,
    }
    rows: int
    columns: int
    values: Tensor
    indices: Tensor
    offsets: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> Csr:
        """Pack a dense float32 weight ``[outputs, ...]``.

        Raises:
            WeightError: When the weight is of another kind.
            SparseError: When it has more weights than 32 bits can count.
        """
        matrix = as_matrix(weight)
        there = matrix != 0
        counts = there.sum(1)
        if int(counts.sum()) >= 2**31:
            raise SparseError(f"a csr weight has at most {2**31 - 1} non-zero weights, got {int(counts.sum())}")
        offsets = torch.zeros(matrix.shape[0] + 1, dtype=torch.int32)
        offsets[1:] = counts.cumsum(0)
        packed = cls(matrix.shape[0], matrix.shape[1], matrix[there], there.nonzero()[:, 1].int(), offsets)
        _ = packed.versions
        return packed

    def check_contents(self) -> None:
        """Refuse indices and counts that do not fit each other."""
        offsets, indices = self.offsets.long(), self.indices.long()
        whole = offsets.numel() == self.rows + 1 and indices.numel() == self.values.numel()
        whole = whole and self.columns < 2**31 and self.rows * self.columns < 2**62
        if whole:
            counts = offsets.diff()
            whole = int(offsets[0]) == 0 and int(offsets[-1]) == indices.numel() and bool((counts >= 0).all())
        if whole and indices.numel():
            within = int(indices.min()) >= 0 and int(indices.max()) < self.columns
            places = torch.arange(self.rows).repeat_interleave(counts) * self.columns + indices
            whole = within and bool((places.diff() > 0).all())  # in order, and none twice
        if not whole:
            raise SparseError(
                "reading a csr weight: the packed weight is damaged: its indices and counts do not fit each other"
            )

    @cached_property
    def matrix(self) -> Tensor:
        """What torch multiplies with; it shares the arrays."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.offsets, self.indices, self.values, (self.rows, self.columns), check_invariants=False
            )

    def to_dense(self) -> Tensor:
        """The matrix, float32 ``[rows, columns]``."""
        dense = torch.zeros(self.rows, self.columns)
        rows = torch.arange(self.rows).repeat_interleave(self.offsets.diff())
        dense[rows, self.indices.long()] = self.values
        return dense


@functools.cache
def _warn() -> None:
    why = reason()
    if why:
        warnings.warn(
            f"sparse products run through torch's own sparse matrices, since {why}. That takes 1.3 to 3 times as "
            "long as the kernels do, and pays from about 85 % zeros only",
            SecateurWarning,
            stacklevel=4,
        )


def product(weight: Csr, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    r"""Return :math:`\mathrm{act}(W x + b + r)`, all as ``[features, vectors]``; every size was checked before.

    NaN and infinities come out where a dense layer has them: they are multiplied by a dense matrix.

    Args:
        weight: Packed.
        x: Float32 ``[columns, vectors]``.
        bias: Float32 ``[rows]``.
        residual: Float32 ``[rows, vectors]``.
        activation: A key of :data:`AFTERWARDS`.
    """
    _warn()
    if not torch.isfinite(x.sum()):  # a sparse product would leave zeros times infinity out, or add some of its own
        out = weight.to_dense() @ x
    elif weight.values.numel() == 0 or x.shape[1] == 0:
        out = torch.zeros(weight.rows, x.shape[1])
    elif x.shape[1] == 1:
        out = torch.mv(weight.matrix, x[:, 0]).unsqueeze(1)
    else:
        out = weight.matrix @ x.contiguous()
    if bias is not None:
        out += bias.unsqueeze(1)
    if residual is not None:
        out += residual
    return AFTERWARDS[activation](out)


def convolve(
    weight: Csr, x: Tensor, how: Convolution, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """Return a convolution as products with unfolded images; every size was checked before.

    Args:
        weight: Packed.
        x: Float32 ``[batch, channels, height, width]``.
        how: Kernel, stride, padding, dilation.
        bias: Float32 ``[rows]``.
        residual: Float32, shaped as the output.
        activation: A key of :data:`AFTERWARDS`.
    """
    height, width = how.output(x.shape[2], x.shape[3])
    top, left, bottom, right = how.padding
    out = torch.empty(x.shape[0], weight.rows, height, width)
    for i, image in enumerate(x):
        padded = F.pad(image, (left, right, top, bottom))
        if weight.columns == 0:
            columns = torch.zeros(0, height * width)
        elif how.pointwise:
            columns = padded.flatten(1)
        else:
            columns = F.unfold(padded, how.kernel, how.dilation, stride=how.stride)
        added = None if residual is None else residual[i].flatten(1)
        out[i] = product(weight, columns, bias, added, activation).view(weight.rows, height, width)
    return out
