"""Convolutions of images with packed weights or kernels of single channels, and maxima over images."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.errors import SparseError
from secateur.sparse import fallback
from secateur.sparse.arguments import check_all, check_floats, epilogue_of, plan_of
from secateur.sparse.fallback import Csr
from secateur.sparse.formats import Panelled
from secateur.sparse.images import IMAGE_BLOCK, Blocked, Convolution, laid_out, shape_of, size_of
from secateur.sparse.library import ConvolutionStruct, check, library


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
    check_all(data, weight.rows, bias, added, activation)
    bias = None if bias is None else bias.contiguous()
    if isinstance(weight, Csr):
        plan_of(tile, threads)
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
        epilogue_of(bias, added, activation),
        plan_of(tile, threads),
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
    check_all(data, rows, bias, added, activation)
    bias = None if bias is None else bias.contiguous()
    images, kernels = data.resolve_neg().contiguous(), weight.resolve_neg().contiguous()
    status = library().secateur_depthwise2d(
        kernels.data_ptr(),
        rows // shape.channels,
        shape.struct,
        images.data_ptr(),
        out.data_ptr(),
        epilogue_of(bias, added, activation),
        plan_of(0, threads),
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
    check_all(data, 0, None, None, "none")
    out, images = torch.empty(shape.out), data.resolve_neg().contiguous()
    status = library().secateur_max_pool2d(shape.struct, images.data_ptr(), out.data_ptr(), plan_of(0, threads))
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
