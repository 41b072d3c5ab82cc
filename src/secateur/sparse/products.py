"""Products of packed weights and vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SparseError
from secateur.sparse import fallback
from secateur.sparse.arguments import check_all, epilogue_of, plan_of
from secateur.sparse.fallback import Csr
from secateur.sparse.formats import Bitmask, Panelled, Weight
from secateur.sparse.library import check, library


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    tile: int = 0,
    threads: int | None = None,
    feature_major: bool = False,
) -> Tensor:
    r"""Return :math:`\mathrm{act}(W x + b + r)` for every vector of x.

    Vectors may lie one after the other, or side by side with their features a step apart (the transpose of a contiguous
    matrix): the second is the kernels' own layout, and torch's elementwise operators keep it.

    A ``Bitmask`` takes one vector after the other; a ``Panelled`` weight takes all at once. A ``Csr`` weight is
    multiplied by torch: it needs no kernels, knows no tile, and runs on as many threads as torch does.

    Args:
        x: Float32 ``[..., columns]`` on the CPU.
        weight: Packed.
        bias: Float32 ``[rows]``.
        residual: Float32 ``[..., rows]``, added before the activation.
        activation: One of ``ACTIVATIONS``.
        tile: Vectors that are worked on at a time, a power of two; 0 leaves it to the kernels.
        threads: By default as many as torch's operators use.
        feature_major: Lay the output out with features a step apart.

    Returns:
        Float32 ``[..., rows]``.

    Raises:
        SparseError: When a shape, a dtype or a number does not fit, or the kernels are not installed.

    Example:
        >>> linear(torch.ones(2, 3), Panelled.pack(-torch.eye(3)), torch.full((3,), 2.0), activation="relu").tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    check_all(x, weight.rows, bias, residual, activation)
    if x.dim() < 1 or x.shape[-1] != weight.columns:
        raise SparseError(f"expected inputs of {weight.columns} features, got shape {tuple(x.shape)}")
    shape = (*x.shape[:-1], weight.rows)
    if residual is not None and tuple(residual.shape) != shape:
        raise SparseError(f"the residual has shape {tuple(residual.shape)}, and the output {shape}")
    count = math.prod(x.shape[:-1])
    plan = plan_of(tile, threads)
    vectors = as_vectors(x.resolve_neg(), count)
    bias = None if bias is None else bias.contiguous()
    feature_major = feature_major and count > 1 and not isinstance(weight, Bitmask)
    if isinstance(weight, Csr):
        flat = None if residual is None else residual.reshape(count, weight.rows).t()
        product = fallback.product(weight, vectors.t(), bias, flat, activation).t()
        return spread(product if feature_major else product.contiguous(), shape[:-1])
    out = torch.empty(weight.rows, count).t() if feature_major else torch.empty(count, weight.rows)
    added = None if residual is None else _matrix_like(residual.reshape(count, weight.rows), out)
    run = kernel_for(weight, count)
    if isinstance(weight, Panelled) and count > 1:
        status = run(
            weight.struct,
            vectors.data_ptr(),
            *vectors.stride(),
            out.data_ptr(),
            *out.stride(),
            count,
            epilogue_of(bias, added, activation),
            plan,
        )
        check(status, "a sparse product")
    else:
        vectors = vectors.contiguous()
        for i in range(count):
            after = epilogue_of(bias, None if added is None else added[i], activation)
            check(run(weight.struct, vectors[i].data_ptr(), out[i].data_ptr(), after, plan), "a sparse product")
    return out.view(shape) if not feature_major else spread(out, shape[:-1])


def kernel_for(weight: Panelled | Bitmask, count: int) -> Any:
    """Return the library's function for so many vectors at a time."""
    if isinstance(weight, Bitmask):
        return library().secateur_gemv_bitmask
    return library().secateur_spmm if count > 1 else library().secateur_gemv


def as_vectors(x: Tensor, count: int) -> Tensor:
    """Return vectors as rows, contiguous or the transpose of a contiguous matrix: what the kernels can read."""
    matrix = x.reshape(count, x.shape[-1])
    step, stride = matrix.stride()
    if (stride == 1 and step >= matrix.shape[1]) or (step == 1 and stride >= count):
        return matrix
    return matrix.contiguous()


def spread(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return vectors of a matrix in several dimensions again; their strides allow it without a copy."""
    out: Tensor = x.view(*shape, x.shape[-1])
    return out


def _matrix_like(x: Tensor, other: Tensor) -> Tensor:
    """Return a matrix in the strides of another one."""
    return x if x.stride() == other.stride() else torch.empty_like(other).copy_(x)
