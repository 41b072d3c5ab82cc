"""Multiply-accumulates of one forward, each traced to the parameter whose elements it multiplies.

The forward runs once on the meta device: shapes only, no values and no memory. A dispatch mode sees every
matrix product and convolution, whoever calls it, so functional code, tied weights, packed parameters and
modules called twice need no special case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from secateur.errors import MetricsError
from secateur.metrics._meta import META, meta_copy, meta_forward, to_meta
from secateur.metrics.latency import input_tensors
from secateur.metrics.params import resolve_masks, unique_parameters

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class WeightMacs:
    """What one parameter costs.

    Attributes:
        macs: Multiply-accumulates that its elements take part in, dense.
        positions: ``macs / numel``: the cost of one element. A fraction where only slices are used.
        density_weighted: ``macs`` that remain when masked elements cost nothing.
    """

    macs: int
    positions: float
    density_weighted: int | float


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one forward on one input.

    Attributes:
        dense: All of them.
        density_weighted: Theoretical: those that remain when a masked element costs nothing. An integer
            wherever every element of a weight is used equally often.
        per_weight: By first parameter name; parameters that no product uses are absent.
        unattributed: Products without a weight (QK^T, AV); dense even when everything is pruned.
        uncounted: Operators that ran and have no formula, with how often; views are left out.
        input: The input it holds for: ``"float32[1, 3, 224, 224]"``.
    """

    dense: int
    density_weighted: int | float
    per_weight: Mapping[str, WeightMacs]
    unattributed: int
    uncounted: Mapping[str, int] = field(default_factory=dict)
    input: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as plain values, for JSON."""
        return {
            "dense": self.dense,
            "density_weighted": self.density_weighted,
            "input": self.input,
            "uncounted": dict(self.uncounted),
        }


def count_macs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
) -> MacCount:
    r"""Count the multiply-accumulates of one forward in eval mode.

    .. math:: \text{dense} = \sum_w \text{macs}_w + \text{unattributed}, \qquad
              \text{density weighted} = \sum_w \text{macs}_w \, d_w + \text{unattributed}

    with :math:`d_w` the density of the mask over the elements that the product uses (1 without a mask). One
    multiply-accumulate is half of what ``torch.utils.flop_counter`` calls two flops; biases, normalisation and
    activations are not counted, products with padding zeros are, as is usual. Linear: ``in*out`` per token.
    Convolution: ``H_out*W_out*k_h*k_w*C_in/groups*C_out`` per sample.

    A weight made from a parameter by copying, casting or multiplying (weight norm, pruning masks in buffers) counts
    for that parameter, with the density of all its mask. Sums of weights do not: zeros do not survive an addition.

    The model is copied without its values and the copy runs; the model itself, its hooks, its training flags and
    the random state stay as they are. Plain functions hooked into the model are not run, since they could record
    shapes without values; hooks that are objects (weight norm, pruning) run as copies.

    Args:
        model: An eager module; its parameters may lie on any device.
        args: Positional inputs; only shapes and dtypes matter.
        kwargs: Keyword inputs.
        masks: Bool masks by parameter name; ``True`` = keep.

    Returns:
        Exact counts.

    Raises:
        MetricsError: When the forward depends on values, uses an operator without a shape rule, or the model cannot
            be copied to the meta device; names the operator.

    References:
        Blalock, Gonzalez Ortiz, Frankle and Guttag, What is the state of neural network pruning?, 2020, for the
        theoretical speed-up that this is the denominator of.

    Example:
        >>> count_macs(nn.Linear(8, 4), (torch.empty(2, 8),)).dense
        64
    """
    input_tensors(args, kwargs)
    first, names = unique_parameters(model)
    kept = resolve_masks(masks, first, names)
    twins: dict[int, Any] = {}
    copied = meta_copy(model, twins)
    fixed = [t for t in twins.values() if isinstance(t, Tensor)]
    counter = _MacMode({name: twins[id(p)] for name, p in first.items()}, fixed, kept)
    meta_args, meta_kwargs = (to_meta(x, twins) for x in (args, dict(kwargs or {})))
    with meta_forward():
        _run(copied, meta_args, meta_kwargs, counter)
    return _result(counter, first, _describe(args, kwargs))


def _result(counter: _MacMode, first: Mapping[str, Tensor], description: str) -> MacCount:
    per_weight = {
        name: WeightMacs(counter.macs[name], counter.macs[name] / p.numel(), _plain(counter.weighted[name]))
        for name, p in first.items()
        if counter.macs[name]
    }
    dense = sum(counter.macs.values()) + counter.unattributed
    weighted = _plain(sum(counter.weighted.values(), Fraction(counter.unattributed)))
    uncounted = dict(sorted(counter.uncounted.items()))
    return MacCount(dense, weighted, per_weight, counter.unattributed, uncounted, description)


def _plain(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)


def _describe(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> str:
    """Name dtype and shape of every tensor input."""

    def shown(values: object) -> list[str]:
        tensors = (v for v in tree_leaves(values) if isinstance(v, Tensor))
        return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors]

    named = [f"{name}={text}" for name, value in (kwargs or {}).items() for text in shown(value)]
    return ", ".join(shown(args) + named)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], counter: _MacMode) -> None:
    try:
        with counter:
            model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        where = f"operator {counter.running}" if counter.running else f"code after operator {counter.last}"
        raise MetricsError(
            f"MACs: the forward cannot run on the meta device, stopped in {where}: {reason}. If the same call works on "
            "the real model, this code depends on values or has no shape rule: count the part before and after it"
        ) from error


def _grouped_macs(a: Tensor, b: Tensor, out: Tensor) -> int:
    """Every row of ``a`` meets one of the matrices of ``b``; with two matrices the sum is cut into groups instead."""
    if a.dim() == 2 and b.dim() == 2:
        return a.shape[0] * a.shape[1] * b.shape[1]
    return out.numel() * a.shape[-1]


_EXTRA: dict[Any, Callable[[Tensor, Tensor, Tensor], int]] = {
    _ATEN.mv: lambda a, b, out: a.numel(),
    _ATEN.dot: lambda a, b, out: a.numel(),
    _ATEN.vdot: lambda a, b, out: a.numel(),
    _ATEN.addmv: lambda a, b, out: a.numel(),
    _ATEN.addbmm: lambda a, b, out: a.numel() * b.shape[-1],
    _ATEN._addmm_activation: lambda a, b, out: a.numel() * b.shape[-1],
    _ATEN._int_mm: lambda a, b, out: a.numel() * b.shape[-1],
    _ATEN._grouped_mm: _grouped_macs,
}
"""Products that torch's own registry leaves out, as functions of both factors and the result."""

_FACTORS = {
    **dict.fromkeys((_ATEN.mm, _ATEN.bmm, _ATEN._scaled_mm, _ATEN.mv, _ATEN.dot, _ATEN.vdot), (0, 1)),
    **dict.fromkeys((_ATEN._int_mm, _ATEN._grouped_mm), (0, 1)),
    **dict.fromkeys((_ATEN.addmm, _ATEN.baddbmm, _ATEN.addmv, _ATEN.addbmm, _ATEN._addmm_activation), (1, 2)),
    **dict.fromkeys((_ATEN.convolution, _ATEN._convolution, _ATEN.convolution_overrideable), (0, 1)),
}
"""Which arguments are multiplied; attention kernels are not listed, having no weight."""

_KEEP_ZEROS = {_ATEN.mul, _ATEN.neg, _ATEN.abs, _ATEN._weight_norm_interface, _ATEN.clone, _ATEN._to_copy}
"""Operators whose result is zero wherever the weight is; so is that of ``div``, in its first argument."""

_NO_WORK = {
    "_unsafe_view",
    "lift_fresh",
    "_reshape_alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "device",
}


@dataclass(frozen=True)
class _Source:
    """The parameter behind a storage; ``exact`` when the storage is the parameter's own, not a copy."""

    name: str
    numel: int
    exact: bool


class _MacMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums multiply-accumulates by the parameter whose storage they read."""

    def __init__(self, weights: Mapping[str, Tensor], fixed: list[Tensor], masks: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[str] = Counter()
        self.weighted: dict[str, Fraction] = {name: Fraction(0) for name in weights}
        self.unattributed = 0
        self.uncounted: Counter[str] = Counter()
        self.running, self.last = "", "(none)"
        self._weights, self._masks = weights, masks
        # Storages that do not depend on the input. Kept alive: a freed address could be handed to another tensor.
        self._alive: list[Tensor] = [*weights.values(), *fixed]
        self._sources: dict[int, _Source | None] = {_place(b): None for b in fixed}
        self._sources |= {_place(w): _Source(name, w.numel(), True) for name, w in weights.items()}
        self._densities: dict[object, Fraction] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator on meta, decomposing those made of others, and count it."""
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = META  # code that names its device would otherwise mix real and meta tensors
        self.running = str(func)
        packet = func.overloadpacket
        if packet not in flop_registry and packet not in _EXTRA:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if packet in flop_registry or packet in _EXTRA:
            self._count(packet, args, kwargs, out)
        elif not func.is_view and packet.__name__ not in _NO_WORK:
            self.uncounted[str(packet)] += 1
        self._follow(packet, args, kwargs, out)
        self.running, self.last = "", str(func)
        return out

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        factors = [args[i] for i in _FACTORS.get(packet, ())]
        if packet in _EXTRA:
            macs = _EXTRA[packet](factors[0], factors[1], out)
        else:
            macs = int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
        found = [(s, t) for t in factors if (s := self._sources.get(_place(t))) is not None]
        if not found:
            self.unattributed += macs
            return
        source, tensor = max(found, key=lambda pair: pair[0].numel)
        self.macs[source.name] += macs
        self.weighted[source.name] += macs * self._density(source, tensor)

    def _density(self, source: _Source, tensor: Tensor) -> Fraction:
        """Density of the mask over the elements that ``tensor`` shows."""
        mask = self._masks.get(source.name)
        if mask is None or mask.numel() == 0:
            return Fraction(1)
        view = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset()) if source.exact else None
        key = (source.name, view)
        if key not in self._densities:
            shown = mask
            if view is not None:
                # Lay the mask out as the parameter is, so that the view's strides pick the same elements.
                weight = self._weights[source.name]
                laid = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bool, device=mask.device)
                shown = laid.copy_(mask).as_strided(*view)
            self._densities[key] = Fraction(int(shown.sum()), shown.numel()) if shown.numel() else Fraction(1)
        return self._densities[key]

    def _follow(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Remember results that depend on weights alone, and which weight's zeros they have."""
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor) and _place(t) not in self._sources]
        if not results or any(_place(t) not in self._sources for t in inputs):
            return
        source, numel = self._kept_source(packet, inputs)
        for i, result in enumerate(results):
            self._sources[_place(result)] = source if i == 0 and result.numel() == numel else None
            self._alive.append(result)

    def _kept_source(self, packet: Any, inputs: list[Tensor]) -> tuple[_Source | None, int]:
        """Return the parameter whose zeros the result has, and how many elements of it went in."""
        if packet == _ATEN.div:
            inputs = inputs[:1]
        elif packet not in _KEEP_ZEROS:
            return None, 0
        found = [(s, t.numel()) for t in inputs if (s := self._sources[_place(t)]) is not None]
        if not found:
            return None, 0
        source, numel = max(found, key=lambda pair: pair[0].numel)
        return _Source(source.name, source.numel, False), numel


def _place(tensor: Tensor) -> int:
    """Identity of a tensor's storage, which all its views share."""
    return int(tensor.untyped_storage()._cdata)
