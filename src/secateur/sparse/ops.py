"""Products and convolutions with packed weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.errors import SparseError, check_choice
from secateur.sparse import fallback
from secateur.sparse.fallback import Csr
from secateur.sparse.formats import Bitmask, Panelled, Weight
from secateur.sparse.images import IMAGE_BLOCK, Blocked, Convolution, laid_out, shape_of, size_of
from secateur.sparse.library import (
    ACTIVATIONS,
    ConvolutionStruct,
    EpilogueStruct,
    PlanStruct,
    check,
    library,
)


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
    _check_all(x, weight.rows, bias, residual, activation)
    if x.dim() < 1 or x.shape[-1] != weight.columns:
        raise SparseError(f"expected inputs of {weight.columns} features, got shape {tuple(x.shape)}")
    shape = (*x.shape[:-1], weight.rows)
    if residual is not None and tuple(residual.shape) != shape:
        raise SparseError(f"the residual has shape {tuple(residual.shape)}, and the output {shape}")
    count = math.prod(x.shape[:-1])
    plan = _plan(tile, threads)
    vectors = as_vectors(x.resolve_neg(), count)
    bias = None if bias is None else bias.contiguous()
    feature_major = feature_major and count > 1 and not isinstance(weight, Bitmask)
    if isinstance(weight, Csr):
        flat = None if residual is None else residual.reshape(count, weight.rows).t()
        product = fallback.product(weight, vectors.t(), bias, flat, activation).t()
        return spread(product if feature_major else product.contiguous(), shape[:-1])
    out = torch.empty(weight.rows, count).t() if feature_major else torch.empty(count, weight.rows)
    added = None if residual is None else _matrix_like(residual.reshape(count, weight.rows), out)
    struct, kernels = weight.struct, library()
    if isinstance(weight, Panelled) and count > 1:
        status = kernels.secateur_spmm(
            struct,
            vectors.data_ptr(),
            *vectors.stride(),
            out.data_ptr(),
            *out.stride(),
            count,
            _epilogue(bias, added, activation),
            plan,
        )
        check(status, "a sparse product")
    else:
        run = kernels.secateur_gemv if isinstance(weight, Panelled) else kernels.secateur_gemv_bitmask
        vectors = vectors.contiguous()
        for i in range(count):
            after = _epilogue(bias, None if added is None else added[i], activation)
            check(run(struct, vectors[i].data_ptr(), out[i].data_ptr(), after, plan), "a sparse product")
    return out.view(shape) if not feature_major else spread(out, shape[:-1])


def conv2d(  # noqa: PLR0913  # what a convolution is, and what follows it
    x: Tensor | Blocked,
    weight: Panelled | Csr,
    convolution: Convolution,
    bias: Tensor | None = None,
    residual: Tensor | Blocked | None = None,
    activation: str = "none",
    *,
    tile: int = 0,
    threads: int | None = None,
    blocked: bool = False,
) -> Any:
    """Return a convolution with a packed weight, its bias, a residual and an activation.

    Pixels side by side are the vectors of the product; what every tap of the kernel sees of them is laid out just
    before it is used. A 1x1 convolution of images in blocks reads them where they are.

    Args:
        x: Float32 ``[batch, channels, height, width]`` on the CPU, or images in blocks.
        weight: Packed from ``[outputs, channels, kernel height, kernel width]``; groups are not known to it. A ``Csr``
            weight is multiplied by torch, with unfolded images.
        convolution: Kernel, stride, padding, dilation.
        bias: Float32 ``[outputs]``.
        residual: Shaped as the output, in either layout; added before the activation.
        activation: One of ``ACTIVATIONS``.
        tile: Pixels that are worked on at a time, a power of two; 0 leaves it to the kernels.
        threads: By default as many as torch's operators use.
        blocked: Return images in blocks.

    Returns:
        Float32 ``[batch, outputs, height, width]``, or a :class:`Blocked`.

    Raises:
        SparseError: When a shape, a dtype or a number does not fit, or the kernels are not installed.
    """
    data, shape = _laid_out(x, weight.rows, convolution, blocked)
    if shape.channels * shape.taps != weight.columns:
        raise SparseError(
            f"expected images of {weight.columns // max(shape.taps, 1)} channels, got {shape.channels} in "
            f"{tuple(data.shape)}"
        )
    out = torch.empty(shape.out)
    added = _laid_out_like(residual, out, blocked)
    _check_all(data, weight.rows, bias, added, activation)
    bias = None if bias is None else bias.contiguous()
    if isinstance(weight, Csr):
        _plan(tile, threads)
        plain = x.images() if isinstance(x, Blocked) else data
        shaped = Blocked(added, *shape.size).images() if added is not None and blocked else added
        result = fallback.convolve(weight, plain, convolution, bias, shaped, activation)
        return Blocked.of(result) if blocked else result
    images = data.resolve_neg().contiguous()
    status = library().secateur_conv2d(
        weight.struct,
        shape.struct,
        images.data_ptr(),
        out.data_ptr(),
        _epilogue(bias, added, activation),
        _plan(tile, threads),
    )
    check(status, "a sparse convolution")
    return Blocked(out, *shape.size) if blocked else out


def depthwise2d(
    x: Tensor | Blocked,
    weight: Tensor,
    convolution: Convolution,
    bias: Tensor | None = None,
    residual: Tensor | Blocked | None = None,
    activation: str = "none",
    *,
    threads: int | None = None,
    blocked: bool = False,
) -> Any:
    """Return a depthwise convolution: every channel has kernels of its own. Their zeros are multiplied by, too.

    Args:
        x: Float32 ``[batch, channels, height, width]`` on the CPU, or images in blocks.
        weight: Float32 ``[outputs, 1, kernel height, kernel width]``; outputs are a whole multiple of the channels.
        convolution: Kernel, stride, padding, dilation.
        bias: Float32 ``[outputs]``.
        residual: Shaped as the output, in either layout; added before the activation.
        activation: One of ``ACTIVATIONS``.
        threads: By default as many as torch's operators use.
        blocked: Return images in blocks.

    Returns:
        Float32 ``[batch, outputs, height, width]``, or a :class:`Blocked`.

    Raises:
        SparseError: When a shape, a dtype or a number does not fit, or the kernels are not installed.

    Example:
        >>> x, kernels = torch.ones(1, 2, 3, 3), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        >>> depthwise2d(x, kernels, Convolution())[0, :, 0, 0].tolist()
        [1.0, 2.0]
    """
    rows = weight.shape[0] if weight.dim() == 4 else 0
    data, shape = _laid_out(x, rows, convolution, blocked)
    check_depthwise(weight, shape.channels, convolution)
    out = torch.empty(shape.out)
    added = _laid_out_like(residual, out, blocked)
    _check_all(data, rows, bias, added, activation)
    bias = None if bias is None else bias.contiguous()
    images, kernels = data.resolve_neg().contiguous(), weight.resolve_neg().contiguous()
    status = library().secateur_depthwise2d(
        kernels.data_ptr(),
        rows // shape.channels,
        shape.struct,
        images.data_ptr(),
        out.data_ptr(),
        _epilogue(bias, added, activation),
        _plan(0, threads),
    )
    check(status, "a depthwise convolution")
    return Blocked(out, *shape.size) if blocked else out


def check_depthwise(weight: Tensor, channels: int, convolution: Convolution) -> None:
    """Refuse kernels that are not those of a depthwise convolution.

    Raises:
        SparseError: Says what came and what was expected.
    """
    check_floats("the weight", weight)
    whole = channels >= 1 and weight.dim() == 4 and weight.shape[0] >= 1 and weight.shape[0] % channels == 0
    if not whole or weight.shape[1:] != (1, *convolution.kernel):
        raise SparseError(
            f"expected kernels [outputs, 1, {', '.join(map(str, convolution.kernel))}], outputs a whole multiple of "
            f"{channels}, got shape {tuple(weight.shape)}"
        )


def max_pool2d(
    x: Tensor | Blocked, convolution: Convolution, *, threads: int | None = None, blocked: bool = False
) -> Any:
    """Return the largest value that a kernel sees, in every channel of its own: ``torch.nn.functional.max_pool2d``.

    What is beside the image is never the largest. NaN is, as in torch.

    Args:
        x: Float32 ``[batch, channels, height, width]`` on the CPU, or images in blocks.
        convolution: Kernel, stride, padding, dilation.
        threads: By default as many as torch's operators use.
        blocked: Return images in blocks.

    Returns:
        Float32 ``[batch, channels, height, width]``, or a :class:`Blocked`.

    Raises:
        SparseError: When a shape, a dtype or a number does not fit, or the kernels are not installed.

    Example:
        >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), Convolution((2, 2), (2, 2))).flatten().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """
    data, shape = _laid_out(x, None, convolution, blocked)
    _check_all(data, 0, None, None, "none")
    out, images = torch.empty(shape.out), data.resolve_neg().contiguous()
    status = library().secateur_max_pool2d(shape.struct, images.data_ptr(), out.data_ptr(), _plan(0, threads))
    check(status, "a maximum over images")
    return Blocked(out, *shape.size) if blocked else out


class _Shape(NamedTuple):
    """What follows from the sizes of a convolution: worked out once for all images of a size."""

    struct: ConvolutionStruct
    channels: int
    taps: int
    size: tuple[int, int]
    out: tuple[int, ...]


def _laid_out(x: Tensor | Blocked, rows: int | None, how: Convolution, blocked: bool) -> tuple[Tensor, _Shape]:
    """Return the tensor that holds images, and their sizes; of as many output channels as input ones by default."""
    if isinstance(x, Blocked):
        x.check()
        return x.data, shape_for(x.data.shape[0], x.data.shape[2], rows, x.height, x.width, how, True, blocked)
    height, width = size_of(x)
    return x, shape_for(x.shape[0], x.shape[1], rows, height, width, how, False, blocked)


def _laid_out_like(residual: Tensor | Blocked | None, out: Tensor, blocked: bool) -> Tensor | None:
    """Return the tensor that holds a residual, in the output's layout."""
    if residual is None:
        return None
    if isinstance(residual, Blocked):
        residual.check()
    else:
        size_of(residual)
    added = laid_out(residual, blocked)
    if added.shape != out.shape:
        raise SparseError(f"the residual has shape {tuple(added.shape)}, and the output {tuple(out.shape)}")
    return added.contiguous()


@functools.lru_cache(1024)
def shape_for(
    batch: int,
    channels: int,
    rows: int | None,
    height: int,
    width: int,
    how: Convolution,
    blocked_in: bool,
    blocked: bool,
) -> _Shape:
    """Return the sizes of a convolution's images; of as many output channels as input ones where rows are not given.

    Raises:
        SparseError: When the kernel does not fit in the image.
    """
    size = how.output(height, width)
    if min(size) < 1:
        raise SparseError(f"a kernel of {how.kernel} does not fit in an image of {(height, width)}")
    blocks = (IMAGE_BLOCK if blocked_in else 0, IMAGE_BLOCK if blocked else 0)
    struct = ConvolutionStruct(batch, channels, height, width, *how.flat(), *blocks)
    out = shape_of(batch, channels if rows is None else rows, *size, blocked)
    return _Shape(struct, channels, math.prod(how.kernel), size, out)


def are_images(x: object) -> bool:
    """Whether the kernels take something as images, without anyone having to look closer."""
    if isinstance(x, Blocked):
        x.check()
    data = x.data if isinstance(x, Blocked) else x
    if type(data) is not Tensor or data.dim() != 4 or data.numel() == 0:
        return False
    plain = data.dtype is torch.float32 and data.is_cpu and data.layout is torch.strided
    return plain and not (data.requires_grad and torch.is_grad_enabled())


def _check_all(x: Tensor, rows: int, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    check_floats("the input", x)
    if bias is not None:
        check_bias(bias, rows)
    if residual is not None:
        check_floats("the residual", residual)
    if activation not in ACTIVATIONS:
        check_choice("activation", activation, ACTIVATIONS)


def check_floats(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not dense float32 on the CPU, or that wants a gradient.

    Raises:
        SparseError: Says what it is, and what to do.
    """
    if not (tensor.dtype is torch.float32 and tensor.is_cpu and tensor.layout is torch.strided):
        raise SparseError(
            f"sparse kernels take dense float32 on the CPU, and {name} is {tensor.dtype} on {tensor.device} with "
            f"layout {tensor.layout}; convert it with .float().cpu()"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise SparseError(
            f"sparse kernels have no backward pass, and {name} wants a gradient; wrap the call in "
            "torch.inference_mode() or torch.no_grad()"
        )


def check_bias(bias: Tensor, rows: int) -> None:
    """Refuse a bias that is not one float32 for each output.

    Raises:
        SparseError: Says what came, and what was expected.
    """
    check_floats("the bias", bias)
    if tuple(bias.shape) != (rows,):
        raise SparseError(f"expected a bias of shape ({rows},), got {tuple(bias.shape)}")


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


def _plan(tile: int, threads: int | None) -> PlanStruct:
    if type(tile) is not int or not 0 <= tile <= 256 or tile & (tile - 1):
        raise SparseError(f"tile must be a power of two up to 256, or 0 to leave it to the kernels; got {tile!r}")
    if threads is None:
        threads = torch.get_num_threads()
    elif type(threads) is not int or not 1 <= threads < 2**31:
        raise SparseError(
            f"threads must be a whole number of at least 1, or None for as many as torch's; got {threads!r}"
        )
    return PlanStruct(threads, tile)


def _epilogue(bias: Tensor | None, residual: Tensor | None, activation: str) -> EpilogueStruct:
    # Both contiguous, and kept alive by the caller.
    return EpilogueStruct(
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        ACTIVATIONS.index(activation),
    )
