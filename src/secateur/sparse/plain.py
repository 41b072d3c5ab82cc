"""Layers that do what the kernels' do, under another name: those of other libraries are found by trying them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.sparse.known import IDLE, LAYERS, NORMS, PaddedConv2d, hooked
from secateur.sparse.watch import inputs_of, kept

_Module = TypeVar("_Module", bound=nn.Module)
_Conv = TypeVar("_Conv", bound=nn.Conv2d)


def plain_layers_(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put layers that the kernels know in the place of others that do the same.

    Subclasses of torch's layers, which may pad in forwards of their own; of its norms, which may do something behind
    them; and layers that keep the weight of a linear one the other way round. They are tried on numbers: with other
    weights than theirs, so that nothing depends on these, and inputs of several sizes. A model that misses what is
    inside them keeps them.
    """
    others = {n: m for n, m in model.named_modules() if n and _is_other(m)}
    if not others:
        return
    found = {name: _recognised(others[name], x) for name, x in inputs_of(model, others, args, kwargs).items()}

    def change(undo: list[Callable[[], None]]) -> nn.Module:
        for name, plain in found.items():
            if plain is not None:
                undo.append(partial(replace_, model, name, others[name]))
                replace_(model, name, plain)
        return model

    kept(model, args, kwargs, change)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a single layer, also under another name."""
    return isinstance(module, (*LAYERS, nn.Conv1d)) or _is_other(module)


def _is_other(module: nn.Module) -> bool:
    """Whether a module might be one of torch's layers or norms under another name."""
    if hooked(module) or module._parameters.keys() != {"weight", "bias"}:
        return False
    if isinstance(module, (*LAYERS, *NORMS)):
        return type(module) not in (*LAYERS, *NORMS)
    weight, alone = module._parameters["weight"], not module._modules and not module._buffers
    return alone and weight is not None and weight.dim() == 2


def _recognised(module: nn.Module, x: Tensor) -> nn.Module | None:
    """Return a layer that does what another does, of its weights; nothing where none is known."""
    if not x.is_floating_point() or x.numel() == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    try:
        trial = _randomised(module, generator)
    except Exception:  # noqa: BLE001  # it cannot be copied
        return None
    alike = [torch.randn([1, *x.shape[1:]], generator=generator) * scale for scale in (1.0, 30.0, 1000.0)]
    others = list(_other_sizes(module, x, generator))
    for plain, tried in zip(_plain(module, x), _plain(trial, x), strict=False):
        if all(_same(trial, tried, probe) for probe in (*alike, *others)):
            return plain
    return None


def _randomised(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy with other numbers in it."""
    trial = copy.deepcopy(module)
    for tensor in (*trial.parameters(), *trial.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator)
    if isinstance(trial, NORMS) and trial.running_var is not None:
        trial.running_var.abs_().add_(0.1)
    return trial


def _other_sizes(module: nn.Module, x: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield inputs of other sizes than an example: images up to a stride larger, vectors in other numbers."""
    if isinstance(module, nn.Conv2d):
        *batch, height, width = (1, *x.shape[1:])
        for more in range(1, max(module.stride)):
            yield torch.randn([*batch, height + more, width + more], generator=generator)
    elif not isinstance(module, NORMS):
        for shape in ([3], [2, 3]):
            yield torch.randn([*shape, x.shape[-1]], generator=generator)


def _plain(module: nn.Module, x: Tensor) -> Iterator[nn.Module]:
    """Yield layers with the weights and settings of another: torch's own, others that pad otherwise.

    A norm is followed by what it holds: libraries put it and an activation into one module.
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        kind = next(kind for kind in NORMS if isinstance(module, kind))
        children = [child for child in module.children() if not isinstance(child, IDLE)]
        yield nn.Sequential(_norm(kind, module), *children) if children else _norm(kind, module)
    elif isinstance(module, nn.Linear):
        yield _filled(nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta"), module)
    elif isinstance(module, nn.Conv2d):
        yield _convolution(nn.Conv2d, module, module.padding)
        for pads in _paddings(module, x) if module.padding_mode == "zeros" else ():
            padded = _convolution(PaddedConv2d, module, 0)
            padded.pads = pads
            yield padded
    else:
        weight = module.get_parameter("weight")
        for matrix in (weight, weight.detach().t().contiguous()):
            plain = _filled(nn.Linear(matrix.shape[1], matrix.shape[0], module.bias is not None, "meta"), module)
            plain.weight = nn.Parameter(matrix.detach(), requires_grad=False)
            yield plain


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
            a, b = one(x.clone()), other(x.clone())
        except Exception:  # noqa: BLE001  # made for other sizes, or for other inputs
            return False
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    # What multiplies by a weight the other way round adds in another order.
    exact = isinstance(one, (*LAYERS, *NORMS))
    return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def replace_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of one, by its dotted name and by every other that it has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for own, child in parent._modules.items():
            if child is old:
                parent._modules[own] = new
