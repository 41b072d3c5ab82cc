"""Images, and what a convolution does to them: sizes, and the kernels' own layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from secateur.errors import SparseError

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


def laid_out(images: Tensor | Blocked, blocked: bool) -> Tensor:
    """Return the tensor that holds images, in blocks or as torch has them; laid out anew where they are not."""
    if isinstance(images, Blocked):
        return images.data if blocked else images.images()
    return Blocked.of(images).data if blocked else images


def size_of(images: Tensor) -> tuple[int, int]:
    """Return height and width of images in torch's layout.

    Raises:
        SparseError: When they have other than four dimensions.
    """
    if images.dim() != 4:
        raise SparseError(f"expected images [batch, channels, height, width], got shape {tuple(images.shape)}")
    return images.shape[2], images.shape[3]


def shape_of(batch: int, rows: int, height: int, width: int, blocked: bool) -> tuple[int, ...]:
    """Return the shape of the tensor that holds images, in blocks or as torch has them."""
    if not blocked:
        return batch, rows, height, width
    return batch, -(-(height * width) // IMAGE_BLOCK), rows, IMAGE_BLOCK
