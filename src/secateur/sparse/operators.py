"""The products as torch operators, with fake kernels: compiled and exported models call these."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from secateur.errors import SparseError
from secateur.sparse.arrays import versions_of
from secateur.sparse.convolutions import conv2d, depthwise2d, max_pool2d
from secateur.sparse.formats import FORMATS, Bitmask
from secateur.sparse.images import Blocked, Convolution, laid_out, shape_of, size_of
from secateur.sparse.products import linear, spread


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
_library.define(
    "depthwise2d(Tensor x, Tensor weight, SymInt[] convolution, Tensor? bias, Tensor? residual, str activation) "
    "-> Tensor"
)
_library.define("max_pool2d(Tensor x, SymInt[] convolution) -> Tensor")


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


@torch.library.impl(_library, "depthwise2d", "CPU")
def _depthwise2d(
    x: Tensor,
    weight: Tensor,
    convolution: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    *flat, height, width, blocked_in, blocked = convolution
    how = Convolution.of_flat(flat)
    images = Blocked(x, height, width) if blocked_in else x
    added = Blocked(residual, *how.output(height, width)) if blocked and residual is not None else residual
    out = depthwise2d(images, weight, how, bias, added, activation, blocked=bool(blocked))
    result: Tensor = out.data if isinstance(out, Blocked) else out
    return result


@torch.library.impl(_library, "max_pool2d", "CPU")
def _max_pool2d(x: Tensor, convolution: list[int]) -> Tensor:
    *flat, height, width, blocked_in, blocked = convolution
    images = Blocked(x, height, width) if blocked_in else x
    out = max_pool2d(images, Convolution.of_flat(flat), blocked=bool(blocked))
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
    return spread(x.new_empty(header[0], count).t(), x.shape[:-1])


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
    return x.new_empty(shape_of(x.shape[0], header[0], *Convolution.of_flat(flat).output(height, width), bool(blocked)))


@torch.library.register_fake("secateur::depthwise2d", lib=_library)  # type: ignore[untyped-decorator]
def _fake_depthwise2d(
    x: Tensor,
    weight: Tensor,
    convolution: list[int],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    *flat, height, width, _, blocked = convolution
    size = Convolution.of_flat(flat).output(height, width)
    return x.new_empty(shape_of(x.shape[0], weight.shape[0], *size, bool(blocked)))


@torch.library.register_fake("secateur::max_pool2d", lib=_library)  # type: ignore[untyped-decorator]
def _fake_max_pool2d(x: Tensor, convolution: list[int]) -> Tensor:
    *flat, height, width, blocked_in, blocked = convolution
    size = Convolution.of_flat(flat).output(height, width)
    return x.new_empty(shape_of(x.shape[0], x.shape[2 if blocked_in else 1], *size, bool(blocked)))


def max_pool2d_operator(x: Tensor | Blocked, convolution: Convolution, blocked: bool) -> Any:
    """Call the operator ``secateur::max_pool2d``, which knows tensors and numbers alone."""
    data, numbers = _flat(x, convolution, blocked)
    out = torch.ops.secateur.max_pool2d(data, numbers)
    return _images(out, numbers)


def depthwise2d_operator(
    x: Tensor | Blocked,
    weight: Tensor,
    convolution: Convolution,
    bias: Tensor | None,
    residual: Tensor | Blocked | None,
    activation: str,
    *,
    blocked: bool,
) -> Any:
    """Call the operator ``secateur::depthwise2d``, which knows tensors and numbers alone."""
    data, numbers = _flat(x, convolution, blocked)
    out = torch.ops.secateur.depthwise2d(data, weight, numbers, bias, _added(residual, blocked), activation)
    return _images(out, numbers)


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
    data, numbers = _flat(x, convolution, blocked)
    added = _added(residual, blocked)
    out = torch.ops.secateur.sparse_conv2d(data, arrays, header, numbers, bias, added, activation, tile)
    return _images(out, numbers)


def _flat(x: Tensor | Blocked, convolution: Convolution, blocked: bool) -> tuple[Tensor, list[int]]:
    """Return images as the operators take them: a tensor, and its size and layout among the numbers."""
    data, height, width = x if isinstance(x, Blocked) else (x, *size_of(x))
    return data, [*convolution.flat(), height, width, int(isinstance(x, Blocked)), int(blocked)]


def _added(residual: Tensor | Blocked | None, blocked: bool) -> Tensor | None:
    """Return the tensor that holds a residual, in the output's layout."""
    return None if residual is None else laid_out(residual, blocked)


def _images(out: Tensor, numbers: Sequence[int]) -> Any:
    *flat, height, width, _, blocked = numbers
    return Blocked(out, *Convolution.of_flat(flat).output(height, width)) if blocked else out
