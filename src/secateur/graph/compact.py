"""Statistics of the masked dense model, over the channels that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

_Compact = Callable[[Any, dict[str, Any], dict[int, Tensor]], Any]


def _select(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _spread(small: Tensor, dims: Mapping[int, Tensor], shape: Sequence[int]) -> Tensor:
    """Put kept channels back in their places, zeros elsewhere."""
    for dim, index in dims.items():
        full = list(small.shape)
        full[dim] = shape[dim]
        small = small.new_zeros(full).index_copy(dim, index.to(small.device), small)
    return small


def _reduced_dims(bound: dict[str, Any], rank: int) -> set[int]:
    dim = bound.get("dim")
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return set(range(rank))
    return {d % rank for d in (dim if isinstance(dim, list | tuple) else [dim])}


def _compact_reduction(func: Any, bound: dict[str, Any], kept: dict[int, Tensor]) -> Any:
    first = next(iter(bound))
    x = bound[first]
    dims = {d: i for d, i in kept.items() if d in _reduced_dims(bound, x.dim())}
    return func(**{**bound, first: _select(x, dims)}) if dims else None


def _compact_layer_norm(func: Any, bound: dict[str, Any], kept: dict[int, Tensor]) -> Any:
    x, shape = bound["input"], list(bound["normalized_shape"])
    low = x.dim() - len(shape)
    dims = {d: i for d, i in kept.items() if d >= low}
    if not dims:
        return None
    small = _select(x, dims)
    inner = {d - low: i for d, i in dims.items()}
    new = dict(bound, input=small, normalized_shape=list(small.shape[low:]))
    for name in ("weight", "bias"):
        if isinstance(bound.get(name), Tensor):
            new[name] = _select(bound[name], inner)
    out = func(**new)
    if isinstance(out, Tensor):
        return _spread(out, dims, x.shape)
    return (_spread(out[0], dims, x.shape), *out[1:])


def _compact_group_norm(func: Any, bound: dict[str, Any], kept: dict[int, Tensor]) -> Any:
    x = bound["input"]
    dims = {d: i for d, i in kept.items() if d == 1}
    if not dims:
        return None
    small = _select(x, dims)
    new = dict(bound, input=small, C=small.shape[1])
    for name in ("weight", "bias"):
        if isinstance(bound.get(name), Tensor):
            new[name] = _select(bound[name], {0: dims[1]})
    out = func(**new)
    return (_spread(out[0], dims, x.shape), *out[1:])


def _compact_batch_norm(func: Any, bound: dict[str, Any], kept: dict[int, Tensor]) -> Any:
    if not (bound.get("training") or bound.get("running_mean") is None):
        return None
    x = bound["input"]
    dims = {d: i for d, i in kept.items() if d != 1}
    if not dims:
        return None
    out = func(**dict(bound, input=_select(x, dims)))
    return (_spread(out[0], dims, x.shape), *out[1:])


def _compact_shares(func: Any, bound: dict[str, Any], kept: dict[int, Tensor]) -> Any:
    # An expert that is gone has no share.
    first = next(iter(bound))
    x = bound[first]
    dims = {d: i for d, i in kept.items() if d == bound["dim"] % x.dim()}
    return _spread(func(**{**bound, first: _select(x, dims)}), dims, x.shape) if dims else None


def _compact_topk(func: Any, bound: dict[str, Any], kept: dict[int, Tensor]) -> Any:
    x = bound["self"]
    dims = {d: i for d, i in kept.items() if d == bound["dim"] % x.dim()}
    if not dims:
        return None
    values, places = func(**dict(bound, self=_select(x, dims)))
    return values, next(iter(dims.values())).to(places.device)[places]


def _compact_highest(func: Any, bound: dict[str, Any], kept: dict[int, Tensor]) -> Any:
    x = bound["self"]
    dims = {d: i for d, i in kept.items() if bound.get("dim") is not None and d == bound["dim"] % x.dim()}
    if not dims:
        return None
    out = func(**dict(bound, self=_select(x, dims)))
    stay = next(iter(dims.values())).to(x.device)
    return stay[out] if isinstance(out, Tensor) else (out[0], stay[out[1]])


def _compact_weight_norm(func: Any, bound: dict[str, Any], kept: dict[int, Tensor]) -> Any:
    # A removed row has norm 0, and 0/0 where the kept ones are wanted.
    dim = bound["dim"] % bound["v"].dim()
    if dim not in kept:
        return None
    rows = {dim: kept[dim]}
    out = func(_select(bound["v"], rows), _select(bound["g"], rows), bound["dim"])
    return (_spread(out[0], rows, bound["v"].shape), out[1])


COMPACT: dict[str, _Compact] = {
    **dict.fromkeys(
        ("aten::mean", "aten::var", "aten::std", "aten::var_mean", "aten::std_mean",
         "aten::linalg_vector_norm", "aten::norm", "aten::amax", "aten::amin"), _compact_reduction),
    **dict.fromkeys(("aten::_softmax", "aten::softmax", "aten::_safe_softmax"), _compact_shares),
    "aten::topk": _compact_topk,
    **dict.fromkeys(("aten::argmax", "aten::max"), _compact_highest),
    "aten::native_layer_norm": _compact_layer_norm,
    "aten::_fused_rms_norm": _compact_layer_norm,
    "aten::rms_norm": _compact_layer_norm,
    "aten::native_group_norm": _compact_group_norm,
    "aten::native_batch_norm": _compact_batch_norm,
    "aten::_native_batch_norm_legit": _compact_batch_norm,
    "aten::_weight_norm_interface": _compact_weight_norm,
}  # fmt: skip
"""By operator: its result with statistics over kept indices, zeros in the other places; ``None`` where all are kept."""
