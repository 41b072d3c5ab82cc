"""Squared gradients of single samples from one backward pass over the batch: from what layers get and give back.

Shapes: N samples, O outputs, I inputs, L positions, K = inputs times kernel positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from secateur.errors import MissingStatsError
from secateur.stats._common import refuse_infinite, slack_of
from secateur.types import Source

_WAY_OUT = 'per_sample = "vmap" or "loop" differentiates each sample instead'


@dataclass
class _Call:
    """One call of a module that owns parameters: their names by attribute, its arguments, what comes back."""

    path: str
    module: nn.Module
    names: Mapping[str, str]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]
    edge: GradientEdge | None
    delta: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor)]


def add_squares(
    who: object,
    sums: dict[str, Tensor],
    source: Source,
    loss: Callable[[], Tensor],
    count: int,
    *,
    chunk: int,
    check: bool,
) -> None:
    """Add the squared gradients of a batch's samples.

    Args:
        who: The statistic, for messages.
        sums: What to add to, by parameter.
        source: Model and parameters.
        loss: Computes the batch's loss, the mean over its samples.
        count: Samples in the batch.
        chunk: Samples at once where their gradients are held.
        check: Whether to compare the samples' mean gradient with that of the batch.

    Raises:
        MissingStatsError: When samples cannot be told apart in some layer, or a parameter is used outside its module.
    """
    calls: list[_Call] = []
    with _recorded(source, calls):
        value = loss()
    live = [call for call in calls if call.edge is not None]
    inputs: list[Any] = [call.edge for call in live]
    if check:
        inputs += list(source.parameters.values())
    found = torch.autograd.grad(value, inputs, allow_unused=True) if inputs else ()
    by_name: dict[str, list[_Call]] = {}
    for call, delta in zip(live, found, strict=False):
        if delta is None:
            continue
        _check_call(who, call, delta, count)
        call.delta = delta * count  # the loss is a mean: a sample alone pulls N times as hard
        for name in call.names.values():
            by_name.setdefault(name, []).append(call)
    means = dict(zip(source.parameters, found[len(live) :], strict=True)) if check else {}
    for name in source.parameters:
        total = torch.zeros_like(sums[name]) if check else None
        for gradients in _gradients(name, by_name.get(name, []), count, chunk, sums[name], total):
            sums[name] += gradients.square().sum(0)
            if total is not None:
                total += gradients.sum(0)
        if total is not None:
            _check_mean(who, name, total / count, means[name])


class _recorded:
    """Records the calls of all modules that own parameters of interest."""

    def __init__(self, source: Source, calls: list[_Call]) -> None:
        names = {id(p): name for name, p in source.parameters.items()}
        self._handles = []
        for path, module in source.model.named_modules():
            own = {a: names[id(p)] for a, p in module._parameters.items() if p is not None and id(p) in names}
            if own:
                hook = self._hook(path, own, calls)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    @staticmethod
    def _hook(path: str, own: Mapping[str, str], calls: list[_Call]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            # The edge stands for what the layer returned even if a later layer overwrites it in place.
            edge = get_gradient_edge(out) if isinstance(out, Tensor) and out.requires_grad else None
            call = _Call(path, module, own, args, kwargs, (), edge)
            call.versions = tuple(t._version for t in call.tensors)
            calls.append(call)

        return hook

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _check_call(who: object, call: _Call, delta: Tensor, count: int) -> None:
    shapes = [tuple(t.shape) for t in (*call.tensors, delta)]
    if any(not shape or shape[0] != count for shape in shapes) or len(shapes) == 1:
        raise MissingStatsError(
            f"{who}: {call.path} works on tensors of shapes {shapes} for a batch of {count}, so samples cannot be told "
            f"apart there; {_WAY_OUT}"
        )
    if any(t._version != v for t, v in zip(call.tensors, call.versions, strict=True)):
        raise MissingStatsError(
            f"{who}: the forward changes the input of {call.path} in place after the layer has read it; {_WAY_OUT}"
        )


def _check_mean(who: object, name: str, ours: Tensor, theirs: Tensor | None) -> None:
    theirs = torch.zeros_like(ours) if theirs is None else theirs
    refuse_infinite(f"{who}: the gradient of {name}", theirs)
    slack = slack_of(theirs.dtype)
    theirs = theirs.to(ours.dtype)
    if not bool((ours - theirs).norm() <= slack * (ours.norm() + theirs.norm()) + 1e-7):
        raise MissingStatsError(
            f"{who}: the gradient of {name} is not what the calls of its module explain, so it is also used outside "
            f"them (packed attention, a functional call, a computed weight); {_WAY_OUT}"
        )


def _gradients(
    name: str, calls: list[_Call], count: int, chunk: int, sums: Tensor, total: Tensor | None
) -> Iterator[Tensor]:
    """Yield gradients of single samples, chunk by chunk; those of linear layers on vectors are added right away."""
    if len(calls) == 1 and _adds_directly(calls[0], name):
        _add_vectors(calls[0], name, sums, total)
        return
    for start in range(0, count if calls else 0, chunk):
        part = slice(start, min(start + chunk, count))
        first, *others = (_of_samples(call, name, part, sums.dtype) for call in calls)
        for other in others:  # one parameter, several calls: a sample's gradient is the sum
            first = first + other
        yield first


def _attribute(call: _Call, name: str) -> str:
    return next(a for a, n in call.names.items() if n == name)


def _is(call: _Call, kind: type[nn.Module]) -> bool:
    """Tell whether a call is that of a plain layer with one input; subclasses may compute something else."""
    return type(call.module) is kind and len(call.tensors) == 1


def _adds_directly(call: _Call, name: str) -> bool:
    # A tied weight has one call under two names only when the module itself holds it twice.
    return _is(call, nn.Linear) and call.tensors[0].dim() == 2 and list(call.names.values()).count(name) == 1


def _add_vectors(call: _Call, name: str, sums: Tensor, total: Tensor | None) -> None:
    x_NI, d_NO = call.tensors[0].detach().to(sums.dtype), _delta(call).to(sums.dtype)
    if _attribute(call, name) == "bias":
        sums += d_NO.square().sum(0)
    else:
        sums.addmm_(d_NO.square().T, x_NI.square())
    if total is not None:
        total += d_NO.sum(0) if total.dim() == 1 else d_NO.T @ x_NI


def _delta(call: _Call) -> Tensor:
    if call.delta is None:
        raise AssertionError("only calls with a gradient are looked at")
    return call.delta


def _of_samples(call: _Call, name: str, part: slice, dtype: torch.dtype) -> Tensor:
    """Return the gradients of some samples by one parameter, from one call."""
    attribute = _attribute(call, name)
    delta = _delta(call)[part].to(dtype)
    if _is(call, nn.Linear):
        if attribute == "bias":
            return delta.flatten(1, -2).sum(1) if delta.dim() > 2 else delta
        x = call.tensors[0][part].detach().to(dtype)
        x, delta = (t.flatten(1, -2) if t.dim() > 2 else t[:, None] for t in (x, delta))
        return delta.transpose(1, 2) @ x
    if _is(call, nn.Conv2d) and attribute == "bias":
        return delta.sum((2, 3))
    if _is(call, nn.Conv2d) and _unfolds(call.module):
        return _of_convolution(call.module, call.tensors[0][part].detach().to(dtype), delta)
    return _by_module(call, attribute, part, dtype)


def _unfolds(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _of_convolution(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    if not isinstance(module, nn.Conv2d):
        raise AssertionError("asked by _of_samples")
    if isinstance(module.padding, str):
        raise AssertionError("asked by _unfolds")
    columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    n, g = len(x), module.groups
    columns_NGKL = columns.reshape(n, g, -1, columns.shape[-1])
    delta_NGOL = delta.reshape(n, g, -1, columns.shape[-1])
    return (delta_NGOL @ columns_NGKL.transpose(2, 3)).reshape(n, *module.weight.shape)


def _by_module(call: _Call, attribute: str, part: slice, dtype: torch.dtype) -> Tensor:
    """Differentiate any other module by itself, vectorised over samples."""
    module = call.module
    known = {a: p.detach().to(dtype) for a, p in module._parameters.items() if p is not None}
    tensors = [t[part].detach() for t in call.tensors]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]

    def one(delta: Tensor, *own: Tensor) -> Tensor:
        left: Iterable[Tensor] = iter([t.unsqueeze(0) for t in own])
        args = tuple(next(iter(left)) if isinstance(a, Tensor) else a for a in call.args)
        kwargs = {k: next(iter(left)) if isinstance(a, Tensor) else a for k, a in call.kwargs.items()}

        def run(value: Tensor) -> Tensor:
            out: Tensor = functional_call(module, {**known, attribute: value}, args, kwargs)
            return out

        back = vjp(run, known[attribute])[1]
        gradient: Tensor = back(delta.unsqueeze(0))[0]
        return gradient

    found: Tensor = vmap(one)(_delta(call)[part].to(dtype), *tensors)
    return found
