"""Linear and convolutional layers with packed weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SparseError, check_choice
from secateur.sparse.convolutions import conv2d
from secateur.sparse.fallback import Csr
from secateur.sparse.formats import FORMATS, Bitmask, Panelled, Weight, nbytes
from secateur.sparse.image_layers import Call, DepthwiseConv2d, ImageLayer, MaxPool2d, checked_bias
from secateur.sparse.images import Blocked, Convolution
from secateur.sparse.library import ACTIVATIONS, CONV2D
from secateur.sparse.operators import conv2d_operator
from secateur.sparse.prepared import Prepared, Settings
from secateur.sparse.products import linear


class SparseLayer(nn.Module):
    """What both layers share: packed arrays as buffers, a bias, what comes after, and where the kernels' choices are.

    The arrays are buffers, so that they are saved, mapped and copied like other tensors. Their indices are checked
    whenever the buffers have changed, before a kernel follows them.

    Attributes:
        kind: Format of the weight.
        activation: What is fused behind it.
        tile: Positions that are worked on at a time; 0 leaves it to the kernels.
    """

    bias: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor | None = None, *, activation: str = "none", tile: int = 0) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.kind = weight.kind
        self.activation = activation
        self.tile = tile
        self._numbers = weight.header()
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._known: Weight | None = weight
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @property
    def packed(self) -> Weight:
        """The packed weight, its indices checked.

        Raises:
            SparseError: When its arrays were replaced by others that do not fit each other.
        """
        known, form = self._known, FORMATS[self.kind]
        arrays = [self._buffers[name] for name in form.DTYPES]
        if known is None or not known.holds(arrays):
            known = form.from_tensors(self._numbers, {name: self.get_buffer(name) for name in form.DTYPES})
            self._known = known
        return known

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the dense weight, for code that looks at them; every value is NaN."""
        return torch.full((), math.nan).expand(self._numbers["rows"], self._numbers["columns"])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return nbytes(self.packed)

    def settings(self) -> dict[str, Any]:
        """Return what, beside the tensors, makes this layer: plain values, for JSON."""
        return {"kind": self.kind, "numbers": dict(self._numbers), "activation": self.activation, "tile": self.tile}

    def _arrays(self) -> tuple[list[Tensor], list[int]]:
        """Return what an operator takes; it checks the indices itself, when it runs."""
        return [self.get_buffer(name) for name in FORMATS[self.kind].DTYPES], list(self._numbers.values())

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        weight = self.packed
        blocks = f" of {weight.block_rows}x{weight.block_columns}" if isinstance(weight, Panelled) else ""
        after = "" if self.activation == "none" else f", {self.activation}"
        return f"{weight.columns} -> {weight.rows}, {self.kind}{blocks}, {self.nbytes:,} bytes{after}"


def _forget(layer: nn.Module, _: object) -> None:
    """After loading, the arrays are the same objects with other contents."""
    if isinstance(layer, SparseLayer):
        layer._known = None
        _ = layer.packed  # refused now, not in the middle of a forward


class SparseLinear(SparseLayer):
    r""":math:`\mathrm{act}(W x + b + r)` with a packed weight.

    Example:
        >>> layer = SparseLinear(Panelled.pack(torch.eye(4)), activation="relu")
        >>> layer(torch.tensor([[1.0, -1.0, 2.0, 0.0]])).tolist()
        [[1.0, 0.0, 2.0, 0.0]]
    """

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        tile: int = 0,
        feature_major: bool = False,
    ) -> None:
        super().__init__(weight, bias, activation=activation, tile=tile)
        self.feature_major = feature_major
        self._prepared: Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the outputs, ``[..., rows]``; arguments are named as torch's."""
        if torch.compiler.is_compiling():
            arrays, numbers = self._arrays()
            out: Tensor = torch.ops.secateur.sparse_linear(
                input, arrays, numbers, self.bias, residual, self.activation, self.tile, self.feature_major
            )
            return out
        settings = Settings(self.activation, self.tile, self.feature_major)
        if residual is None and self._prepared is not None:
            again = self._prepared.repeat(self._buffers, settings, input)
            if again is not None:
                return again
        weight = self.packed
        out = linear(
            input, weight, self.bias, residual, self.activation, tile=self.tile, feature_major=self.feature_major
        )
        if residual is None:
            self._prepared = Prepared.of(weight, self._buffers, settings, input)
        return out

    def settings(self) -> dict[str, Any]:
        """Return what, beside the tensors, makes this layer: plain values, for JSON."""
        return super().settings() | {"layer": "linear", "feature_major": self.feature_major}


class SparseConv2d(ImageLayer, SparseLayer):
    """A convolution with a packed weight, its bias, a residual and an activation; one group."""

    def __init__(
        self,
        weight: Panelled | Csr,
        convolution: Convolution,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        tile: int = 0,
        blocked: bool = False,
    ) -> None:
        super().__init__(weight, bias, activation=activation, tile=tile)
        self.convolution = convolution
        self.blocked = blocked

    def run(self, x: Tensor | Blocked, residual: Tensor | Blocked | None, blocked: bool) -> Any:
        """Return the output images of a batch, in blocks or as torch has them."""
        if torch.compiler.is_compiling():
            arrays, numbers = self._arrays()
            return conv2d_operator(
                x, arrays, numbers, self.convolution, self.bias, residual, self.activation, self.tile, blocked
            )
        weight = self.packed
        if isinstance(weight, Bitmask):
            raise SparseError(f"a convolution needs a panelled or csr weight, not a {weight.kind} one")
        return conv2d(
            x, weight, self.convolution, self.bias, residual, self.activation, tile=self.tile, blocked=blocked
        )

    def call(self) -> Call | None:
        """Return what the library is given for this layer, checked; nothing where torch runs it."""
        weight = self.packed
        if not isinstance(weight, Panelled):
            return None
        bias = checked_bias(self.bias, weight.rows)
        channels = weight.columns // math.prod(self.convolution.kernel)
        return Call(CONV2D, weight.rows, channels, weight, None, bias, self.activation, self.tile)

    def settings(self) -> dict[str, Any]:
        """Return what, beside the tensors, makes this layer: plain values, for JSON."""
        return super().settings() | {
            "layer": "conv2d",
            "convolution": self.convolution.flat(),
            "blocked": self.blocked,
        }


KernelLayer = SparseLayer | DepthwiseConv2d | MaxPool2d
"""Whatever runs in the kernels."""


def layer_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> KernelLayer:
    """Put a layer together again from its ``settings()`` and its tensors, all of it checked.

    Raises:
        SparseError: When something is missing, of another type, or does not fit.
    """
    check_choice("layer", settings.get("layer"), ("linear", "conv2d", "depthwise2d", "max_pool2d"))
    if settings["layer"] == "max_pool2d":
        return MaxPool2d(_convolution_of(settings), blocked=settings.get("blocked", False) is True)
    if settings["layer"] == "depthwise2d":
        return _depthwise_of(settings, tensors)
    try:
        kind, numbers, layer = settings["kind"], settings["numbers"], settings["layer"]
        activation, tile = settings["activation"], settings["tile"]
    except (KeyError, TypeError) as error:
        raise SparseError(f"a sparse layer's settings lack {error}") from None
    check_choice("kind", kind, FORMATS)
    if activation not in ACTIVATIONS or type(tile) is not int or not 0 <= tile <= 256:
        raise SparseError(f"a sparse layer with activation {activation!r} and tile {tile!r} cannot be")
    if not isinstance(numbers, Mapping):
        raise SparseError(f"a sparse layer's numbers must be a table, got {type(numbers).__name__}")
    weight = FORMATS[kind].from_tensors(numbers, tensors)
    bias = _bias_of(tensors, weight.rows)
    if layer == "linear":
        feature_major = settings.get("feature_major", False) is True
        return SparseLinear(weight, bias, activation=activation, tile=tile, feature_major=feature_major)
    convolution = _convolution_of(settings)
    height, width = convolution.kernel
    if isinstance(weight, Bitmask):
        raise SparseError("a sparse convolution needs a panelled or csr weight, not a bitmask one")
    if weight.columns % (height * width):
        raise SparseError(f"a weight of {weight.columns} columns does not fit a kernel of {height}x{width}")
    blocked = settings.get("blocked", False) is True
    return SparseConv2d(weight, convolution, bias, activation=activation, tile=tile, blocked=blocked)


def _depthwise_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DepthwiseConv2d:
    weight, channels, activation = tensors.get("weight"), settings.get("channels"), settings.get("activation")
    if weight is None or activation not in ACTIVATIONS or type(channels) is not int:
        raise SparseError(
            f"a depthwise convolution of {channels!r} channels with activation {activation!r} and "
            f"{'no ' if weight is None else 'a '}weight cannot be"
        )
    return DepthwiseConv2d(
        weight,
        _convolution_of(settings),
        channels,
        _bias_of(tensors, weight.shape[0] if weight.dim() else 0),
        activation=activation,
        blocked=settings.get("blocked", False) is True,
    )


def _bias_of(tensors: Mapping[str, Tensor], rows: int) -> Tensor | None:
    bias = tensors.get("bias")
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (rows,)):
        raise SparseError(f"expected a float32 bias of {rows} entries, got {bias.dtype} {tuple(bias.shape)}")
    return bias


def _convolution_of(settings: Mapping[str, Any]) -> Convolution:
    flat = settings.get("convolution")
    if not isinstance(flat, list) or len(flat) != 10 or not all(type(n) is int and 0 <= n < 2**31 for n in flat):
        raise SparseError(f"a sparse convolution is described by ten whole numbers, got {flat!r}")
    return Convolution.of_flat(flat)
