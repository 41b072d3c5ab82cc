"""Layers that run on images in either layout and store no sparse weight: they keep the layout between convolutions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SparseError, check_choice
from secateur.sparse.arguments import check_bias
from secateur.sparse.convolutions import check_depthwise, depthwise2d, max_pool2d
from secateur.sparse.formats import Panelled
from secateur.sparse.images import Blocked, Convolution, size_of
from secateur.sparse.library import ACTIVATIONS, DEPTHWISE2D, MAX_POOL2D, StepStruct
from secateur.sparse.operators import depthwise2d_operator, max_pool2d_operator


@dataclass(frozen=True)
class Call:
    """What the library is given for a layer, beside images.

    Attributes:
        kind: Of the step.
        rows: Channels of the output; ``None`` for as many as the input has.
        channels: That the input must have; ``None`` for any.
        weight: Of a convolution.
        kernels: Of a depthwise convolution.
        bias: Of the outputs.
        activation: One of ``ACTIVATIONS``.
        tile: Pixels at a time.
    """

    kind: int
    rows: int | None = None
    channels: int | None = None
    weight: Panelled | None = None
    kernels: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    tile: int = 0

    def fill(self, step: StepStruct) -> None:
        """Write it into one of the library's steps, which points to this call's tensors."""
        step.kind, step.activation, step.tile = self.kind, ACTIVATIONS.index(self.activation), self.tile
        step.bias = None if self.bias is None else self.bias.data_ptr()
        if self.weight is not None:
            step.weight = ctypes.pointer(self.weight.struct)
        if self.kernels is not None and self.channels:
            step.kernels, step.multiplier = self.kernels.data_ptr(), self.kernels.shape[0] // self.channels


def checked_bias(bias: Tensor | None, rows: int) -> Tensor | None:
    """Return a bias as the library reads it.

    Raises:
        SparseError: When it is not one float32 for each output.
    """
    if bias is None:
        return None
    check_bias(bias, rows)
    return bias.contiguous()


class ImageLayer(nn.Module):
    """From images to images, each as torch has them or in the kernels' own layout; a single image needs no batch.

    Attributes:
        convolution: Kernel, stride, padding, dilation.
        blocked: Whether it returns images in the kernels' own layout, for another such layer; it takes both.
    """

    convolution: Convolution
    blocked: bool

    def forward(self, input: Tensor | Blocked, residual: Tensor | Blocked | None = None) -> Any:
        """Return the output images, ``[batch, channels, height, width]``; a single image may come without its batch."""
        if isinstance(input, Tensor) and input.dim() == 3:
            added = residual.unsqueeze(0) if isinstance(residual, Tensor) else residual
            return self.run(input.unsqueeze(0), added, False).squeeze(0)  # blocks do not say that there was no batch
        return self.run(input, residual, self.blocked)

    def run(self, x: Tensor | Blocked, residual: Tensor | Blocked | None, blocked: bool) -> Any:
        """Return the output images of a batch, in blocks or as torch has them."""
        raise NotImplementedError

    def call(self) -> Call | None:
        """Return what the library is given for this layer, checked; nothing where something else runs it.

        Raises:
            SparseError: When its tensors do not fit each other.
        """
        raise NotImplementedError


class DepthwiseConv2d(ImageLayer):
    """A convolution in which every channel has kernels of its own, its bias, a residual and an activation.

    Its weight is dense: a few numbers per channel, whose zeros are not worth an index.

    Attributes:
        activation: What is fused behind it.
        channels: Of the input; a whole multiple of them is the output's.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        convolution: Convolution,
        channels: int,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        blocked: bool = False,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        check_depthwise(weight, channels, convolution)
        self.convolution = convolution
        self.channels = channels
        self.activation = activation
        self.blocked = blocked
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def run(self, x: Tensor | Blocked, residual: Tensor | Blocked | None, blocked: bool) -> Any:
        """Return the output images of a batch, in blocks or as torch has them."""
        channels = x.data.shape[2] if isinstance(x, Blocked) else size_of(x) and x.shape[1]
        if channels != self.channels:
            raise SparseError(f"expected images of {self.channels} channels, got {channels}")
        run = depthwise2d_operator if torch.compiler.is_compiling() else depthwise2d
        return run(x, self.weight, self.convolution, self.bias, residual, self.activation, blocked=blocked)

    def call(self) -> Call:
        """Return what the library is given for this layer, checked."""
        check_depthwise(self.weight, self.channels, self.convolution)
        bias = checked_bias(self.bias, self.weight.shape[0])
        kernels = self.weight.resolve_neg().contiguous()
        return Call(DEPTHWISE2D, kernels.shape[0], self.channels, None, kernels, bias, self.activation)

    def settings(self) -> dict[str, Any]:
        """Return what, beside the tensors, makes this layer: plain values, for JSON."""
        return {
            "layer": "depthwise2d",
            "channels": self.channels,
            "convolution": self.convolution.flat(),
            "activation": self.activation,
            "blocked": self.blocked,
        }

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        after = "" if self.activation == "none" else f", {self.activation}"
        return f"{self.channels} -> {self.weight.shape[0]}, {self.convolution}{after}"


class MaxPool2d(ImageLayer):
    """The largest value that a kernel sees, from and to images in either layout."""

    def __init__(self, convolution: Convolution, *, blocked: bool = False) -> None:
        super().__init__()
        self.convolution = convolution
        self.blocked = blocked

    @classmethod
    def of(cls, module: nn.Module) -> MaxPool2d | None:
        """Return what does the same as one of torch's; nothing for other modules, or where the kernels cannot."""
        if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
            return None
        kernel, stride, padding, dilation = (
            (int(n), int(n)) if isinstance(n, int) else (int(n[0]), int(n[1]))
            for n in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        if 2 * padding[0] > kernel[0] or 2 * padding[1] > kernel[1]:
            return None  # torch refuses it
        return cls(Convolution(kernel, stride, padding * 2, dilation))

    def run(self, x: Tensor | Blocked, residual: Tensor | Blocked | None, blocked: bool) -> Any:
        """Return the output images of a batch, in blocks or as torch has them."""
        if torch.compiler.is_compiling():
            return max_pool2d_operator(x, self.convolution, blocked)
        return max_pool2d(x, self.convolution, blocked=blocked)

    def call(self) -> Call:
        """Return what the library is given for this layer."""
        return Call(MAX_POOL2D)

    def settings(self) -> dict[str, Any]:
        """Return what makes this layer: plain values, for JSON."""
        return {"layer": "max_pool2d", "convolution": self.convolution.flat(), "blocked": self.blocked}

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return str(self.convolution)
