"""Layers that do what the kernels' do, under another name: those of other libraries are found by trying them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.sparse.known import LAYERS, NORMS, PaddedConv2d
from secateur.sparse.watch import inputs_of

_Module = TypeVar("_Module", bound=nn.Module)
_Conv = TypeVar("_Conv", bound=nn.Conv2d)


def plain_layers_(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put layers that the kernels know in the place of others that do the same.

    Subclasses of torch's, which may pad in forwards of their own, and layers that keep the weight of a linear one the
    other way round are tried on the input of one forward pass, and on larger ones, up to a stride: what they pad may
    depend on sizes.
    """
    others = {n: m for n, m in model.named_modules() if _is_other(m)}
    if not others:
        return
    for name, x in inputs_of(model, others, args, kwargs).items():
        module = others[name]
        if not x.is_floating_point():
            continue
        larger = max(module.stride) if isinstance(module, nn.Conv2d) else 0
        probes = [x, *(torch.rand_like(F.pad(x, (0, n, 0, n) if larger else ())) for n in range(1, max(larger, 2)))]
        for plain in _plain(module, x):
            if all(_same(module, plain, probe) for probe in probes):
                replace_(model, name, plain)
                break


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_other(module: nn.Module) -> bool:
    """Whether a module might be one of torch's layers or norms under another name."""
    if isinstance(module, (*LAYERS, *NORMS)):
        return type(module) not in (*LAYERS, *NORMS)
    weight, alone = module._parameters.get("weight"), not module._modules and not module._buffers
    return alone and weight is not None and weight.dim() == 2 and module._parameters.keys() == {"weight", "bias"}


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a single layer, also under another name."""
    return isinstance(module, (*LAYERS, nn.Conv1d)) or _is_other(module)


def _plain(module: nn.Module, x: Tensor) -> Iterator[nn.Module]:
    """Yield layers with the weights and settings of another: torch's own, others that pad otherwise.

    A norm may be followed by what it holds: libraries put it and an activation into one module.
    """
    if set(module._parameters) != {"weight", "bias"} or _hooked(module):
        return
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        kind = next(kind for kind in NORMS if isinstance(module, kind))
        yield _norm(kind, module)
        yield nn.Sequential(_norm(kind, module), *module.children())
        return
    if isinstance(module, nn.Linear):
        yield _filled(nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta"), module)
    elif not isinstance(module, nn.Conv2d):
        weight = module.get_parameter("weight")
        for matrix in (weight, weight.detach().t().contiguous()):
            plain = _filled(nn.Linear(matrix.shape[1], matrix.shape[0], module.bias is not None, "meta"), module)
            plain.weight = nn.Parameter(matrix, requires_grad=False)
            yield plain
    elif isinstance(module, nn.Conv2d):
        yield _convolution(nn.Conv2d, module, module.padding)
        for pads in _paddings(module, x) if module.padding_mode == "zeros" else ():
            padded = _convolution(PaddedConv2d, module, 0)
            padded.pads = pads
            yield padded


def _norm(kind: type[nn.BatchNorm1d | nn.BatchNorm2d], module: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    tracks = module.track_running_stats
    plain = kind(module.num_features, module.eps, module.momentum, module.affine, tracks, device="meta")
    plain._buffers.update(module._buffers)
    return _filled(plain, module)


def _convolution(kind: type[_Conv], module: nn.Conv2d, padding: Any) -> _Conv:
    plain = kind(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        padding,
        module.dilation,  # type: ignore[arg-type]
        module.groups,
        module.bias is not None,
        module.padding_mode,
        device="meta",
    )
    return _filled(plain, module)


def _filled(plain: _Module, module: nn.Module) -> _Module:
    plain._parameters.update(module._parameters)
    plain.eval()
    return plain


def _paddings(module: nn.Conv2d, x: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield what a convolution may pad, top, left, bottom and right, to make of an image what it makes of it.

    Fewer zeros than a stride are left open by the sizes; an odd one is below, or right.
    """
    with torch.no_grad():
        try:
            y = module(x)
        except Exception:  # noqa: BLE001  # not made for one tensor
            return
    if not isinstance(y, Tensor) or y.dim() != x.dim():
        return
    axes = []
    for axis in (0, 1):
        (kernel, stride, dilation), place = (
            (v[axis] for v in (module.kernel_size, module.stride, module.dilation)),
            axis - 2,
        )
        least = (kernel - 1) * dilation + 1 + (y.shape[place] - 1) * stride - x.shape[place]
        axes.append([(total // 2, total - total // 2) for total in range(max(least, 0), least + stride)])
    for (top, bottom), (left, right) in itertools.product(*axes):
        yield top, left, bottom, right


def _same(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        try:
            a, b = one(x), other(x)
        except Exception:  # noqa: BLE001  # made for other sizes, or for other inputs
            return False
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    # What multiplies by a weight the other way round adds in another order.
    exact = isinstance(one, (*LAYERS, *NORMS))
    return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def replace_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of one, by its dotted name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, new)
