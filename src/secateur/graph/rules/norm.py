"""Normalisation: over pruned dimensions the statistics are those of what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from secateur.graph.axes import Axes
from secateur.graph.calls import Call
from secateur.graph.rules._registry import rule


def normalise(call: Call, axes: Axes, dims: Sequence[int]) -> None:
    """Allow statistics over pruned dimensions, or fix these in exact mode.

    In a joint part (the head dimension of a normalised query) the normalised dimension is fixed.
    """
    for dim in dims:
        part = axes.part(dim)
        if part is None:
            continue
        if call.exact or (len(part.dims) > 1 and not set(part.dims) <= set(dims)):
            why = f"{call.ledger.where}: exact mode keeps normalised dimensions" if call.exact else None
            call.ledger.drop(axes, dim, why)


def _affine(call: Call, axes: Axes, dim: int, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            call.ledger.same(axes, dim, call.axes(tensor), 0)


def _statistics(call: Call) -> None:
    call.put_aside(call.outputs()[1:])


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "batch_norm",
      "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
      "_batch_norm_impl_index", "_native_batch_norm_legit_functional",
      "_batch_norm_with_update_functional")  # fmt: skip
def batch_norm(call: Call) -> None:
    """One scale, shift, mean and variance per channel."""
    tensors = call.tensors()
    axes = call.axes(tensors[0])
    call.ledger.plain(axes, 1)
    training = bool(call["training"]) if "training" in call.args else "no_training" not in call.name
    if training or call["running_mean"] is None:
        normalise(call, axes, [d for d in range(len(axes.shape)) if d != 1])
    _affine(call, axes, 1, *tensors[1:])
    call.put(call.result, axes)
    _statistics(call)


@rule("native_layer_norm")
def layer_norm(call: Call) -> None:
    """Statistics over the last dimensions."""
    _over_last(call, call["input"], (call["weight"], call["bias"]))


@rule("_fused_rms_norm", "rms_norm")
def rms_norm(call: Call) -> None:
    """Root mean square over the last dimensions."""
    given, *affine = call.tensors()
    _over_last(call, given, affine)


def _over_last(call: Call, given: Tensor, affine: Iterable[Tensor | None]) -> None:
    axes = call.axes(given)
    count = len(call["normalized_shape"])
    dims = range(len(axes.shape) - count, len(axes.shape))
    normalise(call, axes, dims)
    for tensor in affine:
        if tensor is not None:
            for i, dim in enumerate(dims):
                call.ledger.same(axes, dim, call.axes(tensor), i)
    call.put(call.result, axes)
    _statistics(call)


@rule("native_group_norm")
def group_norm(call: Call) -> None:
    """Statistics over runs of channels: every group loses the same places, so that groups stay equal."""
    axes = call.axes(call["input"])
    groups = call["group"]
    labels = call.ledger.plain(axes, 1)
    normalise(call, axes, range(2, len(axes.shape)))
    if labels is not None:
        rows = labels.reshape(groups, -1)
        if call.exact or rows.shape[1] == 1:
            call.ledger.drop(axes, 1, f"{call.ledger.where}: one channel per group" if not call.exact else None)
        elif groups > 1:
            call.ledger.tie(rows[:1], rows)
    _affine(call, axes, 1, call["weight"], call["bias"])
    call.put(call.result, axes)
    _statistics(call)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> None:
    """``g v / |v|``, with the norm over all dimensions but one."""
    axes, dim = call.axes(call["v"]), call["dim"] % call["v"].dim()
    gain = call.axes(call["g"])
    for part in list(axes.parts):
        if part.dims != (dim,) and len(part.dims) > 1:
            call.ledger.only(axes, dim)
    normalise(call, axes, [d for d in range(len(axes.shape)) if d != dim])
    call.ledger.same(axes, dim, gain, dim)
    call.put(call.result, axes)
    _statistics(call)


@rule("renorm")
def renorm(call: Call) -> None:
    """Every slice along one dimension is scaled down to a largest norm, which runs over all the others."""
    axes = call.axes(call.first)
    dim = call["dim"] % len(axes.shape)
    for part in list(axes.parts):
        if dim in part.dims and len(part.dims) > 1:
            call.ledger.only(axes, dim)
    normalise(call, axes, [d for d in range(len(axes.shape)) if d != dim])
    call.put(call.result, axes)
