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
from secateur.sparse.watch import Example, inputs_of

_Module = TypeVar("_Module", bound=nn.Module)


def plain_layers_(model: nn.Module, example: Example) -> None:
    """Put layers that the kernels know in the place of others that do the same.

    Subclasses of torch's layers, which may pad in forwards of their own; of its norms, which may do something behind
    them; and layers that keep the weight of a linear one the other way round. They are tried on numbers: with other
    weights than theirs, so that nothing depends on these, and inputs of several sizes. A model that misses what is
    inside them keeps them.
    """
    others = {n: m for n, m in model.named_modules() if n and _is_other(m)}
    if not others:
        return
    inputs = inputs_of(model, others, example.args, example.kwargs)
    found = {name: _recognised(others[name], x) for name, x in inputs.items()}

    def change(undo: list[Callable[[], None]]) -> nn.Module:
        for name, plain in found.items():
            if plain is not None:
                undo.append(partial(replace_, model, name, others[name]))
                replace_(model, name, plain)
        return model

    example.kept(model, change)


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
    for way in _ways(trial, x):
        tried = way(trial)
        if all(_same(trial, tried, probe) for probe in (*alike, *others)):
            return way(module)
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


def _ways(module: nn.Module, x: Tensor) -> Iterator[Callable[[Any], nn.Module]]:
    """Yield what makes layers with the weights and settings of another: torch's own, others that pad otherwise."""
    if isinstance(module, NORMS):
        yield _norm
    elif isinstance(module, nn.Linear):
        yield _linear
    elif isinstance(module, nn.Conv2d):
        yield _convolution
        for pads in _paddings(module, x) if module.padding_mode == "zeros" else ():
            yield partial(_padded, pads)
    else:
        yield _linear
        yield _transposed


def _norm(module: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """A norm, followed by what it holds: libraries put it and an activation into one module."""
    kind = next(kind for kind in NORMS if isinstance(module, kind))
    tracks = module.track_running_stats
    plain = kind(module.num_features, module.eps, module.momentum, module.affine, tracks, device="meta")
    plain._buffers.update(module._buffers)
    children = [child for child in module.children() if not isinstance(child, IDLE)]
    return nn.Sequential(_filled(plain, module), *children) if children else _filled(plain, module)


def _linear(module: nn.Module) -> nn.Module:
    outputs, inputs = module.get_parameter("weight").shape
    return _filled(nn.Linear(inputs, outputs, module.bias is not None, "meta"), module)


def _transposed(module: nn.Module) -> nn.Module:
    inputs, outputs = module.get_parameter("weight").shape
    plain = _filled(nn.Linear(inputs, outputs, module.bias is not None, "meta"), module)
    plain.weight = nn.Parameter(module.get_parameter("weight").detach().t().contiguous(), requires_grad=False)
    return plain


def _padded(pads: tuple[int, int, int, int], module: nn.Conv2d) -> nn.Module:
    padded: PaddedConv2d = _convolution(module, PaddedConv2d, 0)
    padded.pads = pads
    return padded


def _convolution(module: nn.Conv2d, kind: type[nn.Conv2d] = nn.Conv2d, padding: Any = None) -> Any:
    plain = kind(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding if padding is None else padding,  # type: ignore[arg-type]
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
