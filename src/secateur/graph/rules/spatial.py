"""Pooling, resizing and padding of positions: batch and channels pass, positions are fixed."""

from __future__ import annotations

import numpy as np

from secateur.graph.axes import Axes, Part
from secateur.graph.calls import Call
from secateur.graph.rules._registry import rule


def _positions(call: Call, count: int) -> None:
    axes = call.axes(call.first)
    rank = len(axes.shape)
    for dim in range(rank - count, rank):
        call.ledger.drop(axes, dim)
    for out in call.outputs():
        call.put(out, Axes(out.shape, axes.parts))


@rule("max_pool1d", "max_pool1d_with_indices", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d",
      "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d", "reflection_pad1d",
      "replication_pad1d")  # fmt: skip
def one(call: Call) -> None:
    """One spatial dimension."""
    _positions(call, 1)


@rule("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
      "adaptive_max_pool2d", "fractional_max_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d",
      "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
      "reflection_pad2d", "replication_pad2d", "mkldnn_max_pool2d", "max_unpool2d")  # fmt: skip
def two(call: Call) -> None:
    """Two spatial dimensions."""
    _positions(call, 2)


@rule("max_pool3d", "max_pool3d_with_indices", "avg_pool3d", "adaptive_avg_pool3d", "_adaptive_avg_pool3d",
      "adaptive_max_pool3d", "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d",
      "reflection_pad3d", "replication_pad3d")  # fmt: skip
def three(call: Call) -> None:
    """Three spatial dimensions."""
    _positions(call, 3)


@rule("grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback", "grid_sampler")
def grid(call: Call) -> None:
    """Positions are sampled; the grid is fixed."""
    tensors = call.tensors()
    call.ledger.freeze_all(call.axes(tensors[1]))
    _positions(call, tensors[0].dim() - 2)


@rule("im2col")
def im2col(call: Call) -> None:
    """(B, C, H, W) to (B, C·k, L): every channel gives k rows."""
    axes, out = call.axes(call.first), call.result
    for dim in (len(axes.shape) - 2, len(axes.shape) - 1):
        call.ledger.drop(axes, dim)
    channel = len(axes.shape) - 3
    labels = call.ledger.plain(axes, channel)
    parts = [p for p in axes.parts if p.dims[-1] < channel]
    if labels is not None:
        parts.append(Part([channel], np.repeat(labels, out.shape[channel] // axes.shape[channel])))
    call.put(out, Axes(out.shape, parts))


@rule("col2im")
def col2im(call: Call) -> None:
    """(B, C·k, L) to (B, C, H, W): the k rows of one channel live and die together."""
    axes, out = call.axes(call.first), call.result
    call.ledger.drop(axes, len(axes.shape) - 1)
    channel = len(axes.shape) - 2
    labels = call.ledger.plain(axes, channel)
    parts = [p for p in axes.parts if p.dims[-1] < channel]
    if labels is not None:
        rows = labels.reshape(out.shape[channel], -1)
        call.ledger.tie(rows[:, :1], rows)
        parts.append(Part([channel], rows[:, 0]))
    call.put(out, Axes(out.shape, parts))


@rule("unfold")
def unfold(call: Call) -> None:
    """Windows along one dimension, which is fixed; they come last."""
    axes, out = call.axes(call.first), call.result
    call.ledger.drop(axes, call["dimension"] % len(axes.shape))
    call.put(out, Axes(out.shape, axes.parts))
