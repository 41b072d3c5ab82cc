"""Products with packed weights: plain functions, and the same as torch operators that compile and export."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from secateur.errors import SparseError, check_choice
from secateur.sparse import fallback
from secateur.sparse.arrays import versions_of
from secateur.sparse.fallback import Csr
from secateur.sparse.formats import FORMATS, Bitmask, Panelled, Weight
from secateur.sparse.library import (
    ACTIVATIONS,
    ConvolutionStruct,
    EpilogueStruct,
    PlanStruct,
    check,
    library,
)

IMAGE_BLOCK = 64
"""Pixels in a block of the kernels' own layout."""


class Blocked(NamedTuple):
    """Images in the kernels' own layout: 64 pixels side by side, all channels of these, then the next 64.

    A product then reads and writes one run of memory, and nothing is laid out anew between two convolutions. Lanes
    beyond the last pixel are zero or rounding's leftovers; they mean nothing.

    Attributes:
        data: Float32 ``[batch, blocks, channels, 64]``.
        height: Of the images.
        width: Of the images.
    """

    data: Tensor
    height: int
    width: int

    @classmethod
    def of(cls, images: Tensor) -> Blocked:
        """Lay images ``[batch, channels, height, width]`` out in blocks."""
        batch, channels, height, width = images.shape
        pad = -(height * width) % IMAGE_BLOCK
        flat = F.pad(images.reshape(batch, channels, height * width), (0, pad))
        data = (
            flat.reshape(batch, channels, (height * width + pad) // IMAGE_BLOCK, IMAGE_BLOCK)
            .transpose(1, 2)
            .contiguous()
        )
        return cls(data, height, width)

    def check(self) -> None:
        """Refuse what is not laid out as it should be.

        Raises:
            SparseError: When there are more or fewer blocks than the image has.
        """
        blocks = -(-(self.height * self.width) // IMAGE_BLOCK)
        if min(self.height, self.width) < 0 or self.data.dim() != 4 or self.data.shape[1::2] != (blocks, IMAGE_BLOCK):
            raise SparseError(
                f"images of {self.height}x{self.width} in blocks have the shape [batch, {blocks}, channels, "
                f"{IMAGE_BLOCK}], got {tuple(self.data.shape)}"
            )

    def images(self) -> Tensor:
        """Return the images ``[batch, channels, height, width]``."""
        batch, blocks, channels, block = self.data.shape
        flat = self.data.transpose(1, 2).reshape(batch, channels, blocks * block)
        return flat[:, :, : self.height * self.width].reshape(batch, channels, self.height, self.width)


@dataclass(frozen=True)
class Convolution:
    """What a convolution does besides its weight.

    Attributes:
        kernel: Height and width.
        stride: Vertical and horizontal.
        padding: Zeros on top, left, bottom and right.
        dilation: Vertical and horizontal.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name, length, least in (("kernel", 2, 1), ("stride", 2, 1), ("padding", 4, 0), ("dilation", 2, 1)):
            numbers = getattr(self, name)
            if len(numbers) != length or not all(type(n) is int and least <= n < 2**31 for n in numbers):
                raise SparseError(
                    f"{name} of a convolution must be {length} whole numbers from {least} up, got {numbers}"
                )

    @property
    def pointwise(self) -> bool:
        """Whether every pixel of the output comes from the same one of the input."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the output image; 0 where the kernel does not fit."""
        top, left, bottom, right = self.padding

        def along(size: int, axis: int) -> int:
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            return (size - reach) // self.stride[axis] + 1 if size >= reach else 0

        return along(height + top + bottom, 0), along(width + left + right, 1)

    def flat(self) -> list[int]:
        """Return all numbers in one list, as an operator takes them."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]

    @classmethod
    def of_flat(cls, numbers: Sequence[int]) -> Convolution:
        """Undo :meth:`flat`."""
        kh, kw, sh, sw, top, left, bottom, right, dh, dw = numbers
        return cls((kh, kw), (sh, sw), (top, left, bottom, right), (dh, dw))


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
    vectors = _matrix(x.resolve_neg(), count)
    bias = None if bias is None else bias.contiguous()
    feature_major = feature_major and count > 1 and not isinstance(weight, Bitmask)
    if isinstance(weight, Csr):
        flat = None if residual is None else residual.reshape(count, weight.rows).t()
        product = fallback.product(weight, vectors.t(), bias, flat, activation).t()
        return _spread(product if feature_major else product.contiguous(), shape[:-1])
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
    return out.view(shape) if not feature_major else _spread(out, shape[:-1])


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

    The image is laid out once so that every tap of the kernel is a shift of whole rows; pixels side by side are the
    vectors of the product. A 1x1 convolution of images in blocks reads them where they are.

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
    data, height, width = x if isinstance(x, Blocked) else (x, *_size(x))
    if isinstance(x, Blocked):
        x.check()
    channels = data.shape[2] if isinstance(x, Blocked) else data.shape[1]
    taps = math.prod(convolution.kernel)
    if channels * taps != weight.columns:
        raise SparseError(
            f"expected images of {weight.columns // max(taps, 1)} channels, got {channels} in {tuple(data.shape)}"
        )
    out_height, out_width = convolution.output(height, width)
    if out_height < 1 or out_width < 1:
        raise SparseError(f"a kernel of {convolution.kernel} does not fit in an image of {(height, width)}")
    out = torch.empty(_shape(data.shape[0], weight.rows, out_height, out_width, blocked))
    added = None
    if residual is not None:
        if isinstance(residual, Blocked):
            residual.check()
            added = residual.data if blocked else residual.images()
        else:
            _size(residual)
            added = Blocked.of(residual).data if blocked else residual
        added = added.contiguous()
        if added.shape != out.shape:
            raise SparseError(f"the residual has shape {tuple(added.shape)}, and the output {tuple(out.shape)}")
    _check_all(data, weight.rows, bias, added, activation)
    bias = None if bias is None else bias.contiguous()
    if isinstance(weight, Csr):
        _plan(tile, threads)
        plain = x.images() if isinstance(x, Blocked) else data
        shaped = Blocked(added, out_height, out_width).images() if added is not None and blocked else added
        result = fallback.convolve(weight, plain, convolution, bias, shaped, activation)
        return Blocked.of(result) if blocked else result
    images = data.resolve_neg().contiguous()
    blocks = (IMAGE_BLOCK if isinstance(x, Blocked) else 0, IMAGE_BLOCK if blocked else 0)
    status = library().secateur_conv2d(
        weight.struct,
        ConvolutionStruct(images.shape[0], channels, height, width, *convolution.flat(), *blocks),
        images.data_ptr(),
        out.data_ptr(),
        _epilogue(bias, added, activation),
        _plan(tile, threads),
    )
    check(status, "a sparse convolution")
    return Blocked(out, out_height, out_width) if blocked else out


def _size(images: Tensor) -> tuple[int, int]:
    if images.dim() != 4:
        raise SparseError(f"expected images [batch, channels, height, width], got shape {tuple(images.shape)}")
    return images.shape[2], images.shape[3]


def _shape(batch: int, rows: int, height: int, width: int, blocked: bool) -> tuple[int, ...]:
    if not blocked:
        return batch, rows, height, width
    return batch, -(-(height * width) // IMAGE_BLOCK), rows, IMAGE_BLOCK


def _check_all(x: Tensor, rows: int, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    for name, tensor in (("the input", x), ("the bias", bias), ("the residual", residual)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise SparseError(
                f"sparse kernels take dense float32 on the CPU, and {name} is {tensor.dtype} on {tensor.device} with "
                f"layout {tensor.layout}; convert it with .float().cpu()"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise SparseError(
                f"sparse kernels have no backward pass, and {name} wants a gradient; wrap the call in "
                "torch.inference_mode() or torch.no_grad()"
            )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise SparseError(f"expected a bias of shape ({rows},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        check_choice("activation", activation, ACTIVATIONS)


def _matrix(x: Tensor, count: int) -> Tensor:
    """Return vectors as rows, contiguous or the transpose of a contiguous matrix: what the kernels can read."""
    matrix = x.reshape(count, x.shape[-1])
    step, stride = matrix.stride()
    if (stride == 1 and step >= matrix.shape[1]) or (step == 1 and stride >= count):
        return matrix
    return matrix.contiguous()


def _spread(x: Tensor, shape: Sequence[int]) -> Tensor:
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


class _Checked(NamedTuple):
    """That the indices of arrays were checked, without keeping them alive."""

    header: tuple[int, ...]
    others: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]

    def covers(self, header: Sequence[int], arrays: Sequence[Tensor]) -> bool:
        same = all(ref() is array for ref, array in zip(self.others, arrays[1:], strict=True))
        return same and self.header == tuple(header) and self.versions == versions_of(arrays)


_checked: Any = WeakIdKeyDictionary()
"""By the values of a weight: an exported program may come from anywhere, and is not checked at every call."""


def _weight_of(header: Sequence[int], arrays: Sequence[Tensor]) -> Any:
    form = next((f for f in FORMATS.values() if (len(f.NUMBERS), len(f.DTYPES)) == (len(header), len(arrays))), None)
    if form is None:
        raise SparseError(f"no sparse weight has {len(header)} numbers and {len(arrays)} arrays")
    numbers, tensors = dict(zip(form.NUMBERS, header, strict=True)), dict(zip(form.DTYPES, arrays, strict=True))
    known = _checked.get(arrays[0])
    if known is not None and len(known.others) == len(arrays) - 1 and known.covers(header, arrays):
        fields: dict[str, Any] = {**numbers, **tensors}
        return form(**fields)
    weight = form.from_tensors(numbers, tensors)
    if weight.holds(arrays):
        others = tuple(weakref.ref(array) for array in arrays[1:])
        _checked[arrays[0]] = _Checked(tuple(header), others, weight.versions)
    return weight


_library: Any = torch.library.Library("secateur", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "sparse_linear(Tensor x, Tensor[] arrays, int[] header, Tensor? bias, Tensor? residual, str activation, "
    "int tile, bool feature_major) -> Tensor"
)
_library.define(
    "sparse_conv2d(Tensor x, Tensor[] arrays, int[] header, SymInt[] convolution, Tensor? bias, Tensor? residual, "
    "str activation, int tile) -> Tensor"
)


@torch.library.impl(_library, "sparse_linear", "CPU")
def _sparse_linear(
    x: Tensor,
    arrays: list[Tensor],
    header: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    tile: int,
    feature_major: bool,
) -> Tensor:
    weight = _weight_of(header, arrays)
    return linear(x, weight, bias, residual, activation, tile=tile, feature_major=feature_major)


@torch.library.impl(_library, "sparse_conv2d", "CPU")
def _sparse_conv2d(
    x: Tensor,
    arrays: list[Tensor],
    header: list[int],
    convolution: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    tile: int,
) -> Tensor:
    *flat, height, width, blocked_in, blocked = convolution
    how, weight = Convolution.of_flat(flat), _weight_of(header, arrays)
    images = Blocked(x, height, width) if blocked_in else x
    added = Blocked(residual, *how.output(height, width)) if blocked and residual is not None else residual
    out = conv2d(images, weight, how, bias, added, activation, tile=tile, blocked=bool(blocked))
    result: Tensor = out.data if isinstance(out, Blocked) else out
    return result


@torch.library.register_fake("secateur::sparse_linear", lib=_library)  # type: ignore[untyped-decorator]
def _fake_linear(
    x: Tensor,
    arrays: list[Tensor],
    header: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    tile: int,
    feature_major: bool,
) -> Tensor:
    shape = (*x.shape[:-1], header[0])
    if not feature_major or len(header) == len(Bitmask.NUMBERS):
        return x.new_empty(shape)
    count = math.prod(x.shape[:-1])
    return _spread(x.new_empty(header[0], count).t(), x.shape[:-1])


@torch.library.register_fake("secateur::sparse_conv2d", lib=_library)  # type: ignore[untyped-decorator]
def _fake_conv2d(
    x: Tensor,
    arrays: list[Tensor],
    header: list[int],
    convolution: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    tile: int,
) -> Tensor:
    *flat, height, width, _, blocked = convolution
    return x.new_empty(_shape(x.shape[0], header[0], *Convolution.of_flat(flat).output(height, width), bool(blocked)))


def conv2d_operator(  # noqa: PLR0913  # as the operator
    x: Tensor | Blocked,
    arrays: list[Tensor],
    header: list[int],
    convolution: Convolution,
    bias: Tensor | None,
    residual: Tensor | Blocked | None,
    activation: str,
    tile: int,
    blocked: bool,
) -> Any:
    """Call the operator ``secateur::sparse_conv2d``, which knows tensors and numbers alone."""
    data, height, width = x if isinstance(x, Blocked) else (x, *_size(x))
    if isinstance(residual, Blocked) and not blocked:
        residual = residual.images()
    elif isinstance(residual, Tensor) and not isinstance(residual, Blocked) and blocked:
        residual = Blocked.of(residual)
    added = residual.data if isinstance(residual, Blocked) else residual
    numbers = [*convolution.flat(), height, width, int(isinstance(x, Blocked)), int(blocked)]
    out = torch.ops.secateur.sparse_conv2d(data, arrays, header, numbers, bias, added, activation, tile)
    return Blocked(out, *convolution.output(height, width)) if blocked else out
