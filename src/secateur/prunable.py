"""Which parameters may be pruned, and what their dimensions mean."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.errors import WeightError, nearest
from secateur.types import Weight

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")


@dataclass(frozen=True)
class Found:
    """The prunable weights of a model, in the model's order, and what was left alone.

    Attributes:
        weights: Description of every weight that may be pruned.
        skipped: Weights that the filters or their storage ruled out, with the reason.
        ties: Other names of a weight that is stored once, to the name that stands for it.
    """

    weights: dict[str, Weight]
    skipped: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)


def find_prunable(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    types: Sequence[str] = (),
) -> Found:
    """List the weights of linear, convolution, attention and recurrent layers that pass the filters.

    Biases, norms and embeddings are not prunable by default; naming a module class in ``types`` adds it and leaves
    out the others. A tied weight is listed once, under the first of its names in the model's order, and counts once.

    Args:
        model: The model, not yet wrapped for distributed training.
        include: Shell patterns; when given, a weight must match one. Matched against the parameter's qualified
            name (``fc1.weight``) and its module's (``fc1``).
        exclude: Shell patterns that rule a weight out.
        types: Module class names to consider, such as ``"Conv2d"``; base classes count.

    Returns:
        The weights, the skipped ones with reasons, and the ties.

    Raises:
        WeightError: When nothing is left to prune, a pattern or type matches nothing, the model is wrapped, or a
            weight is quantised, on the meta device, or overlaps another in memory.

    Example:
        >>> list(find_prunable(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), exclude=["2"]).weights)
        ['0.weight']
    """
    if type(model).__name__ in _WRAPPERS:
        raise WeightError(f"the model is wrapped in {type(model).__name__}; prune the inner module, then wrap it")
    named = dict(_candidates(model, types))
    if types:
        _check_types(model, types)
    _check_patterns([*include, *exclude], named)
    weights: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, (weight, tensor) in named.items():
        key = _identity(tensor)
        if key in seen:
            ties[name] = seen[key]
            continue
        seen[key] = name
        reason = _filtered(name, include, exclude)
        if reason is None and tensor.numel() == 0:
            reason = "empty"
        if reason is not None:
            skipped[name] = reason
            continue
        _check_storage(name, tensor)
        weights[name] = weight
    skipped.update(_parametrised(model))
    if not weights:
        why = "; ".join(f"{n}: {r}" for n, r in list(skipped.items())[:8]) or "it has no prunable layer"
        raise WeightError(f"nothing to prune in {type(model).__name__} ({why})")
    _check_overlaps(model, weights)
    return Found(weights, skipped, ties)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a parameter's or its module's qualified name matches one of the shell patterns."""
    module = name.rpartition(".")[0]
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(module, p) for p in patterns)


def _candidates(model: nn.Module, types: Sequence[str]) -> Iterator[tuple[str, tuple[Weight, Tensor]]]:
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for attribute, weight in _describe(module, types):
            tensor = module._parameters.get(attribute)
            if tensor is not None:
                bias = (
                    f"{dot}{weight.bias}" if weight.bias and module._parameters.get(weight.bias) is not None else None
                )
                yield (
                    dot + attribute,
                    (
                        Weight(
                            dot + attribute,
                            tuple(tensor.shape),
                            weight.out_dim,
                            weight.in_dim,
                            weight.groups,
                            weight.transposed,
                            bias,
                            type(module).__name__,
                        ),
                        tensor,
                    ),
                )


def _describe(module: nn.Module, types: Sequence[str]) -> list[tuple[str, Weight]]:
    """Return the prunable attributes of one module, each with its layout."""
    if types and not any(cls.__name__ in types for cls in type(module).__mro__):
        return []
    if isinstance(module, nn.Linear | nn.Bilinear):
        return [("weight", Weight("", (), 0, module.weight.dim() - 1, bias="bias"))]
    if isinstance(module, _CONV):
        return [("weight", Weight("", (), 0, 1, module.groups, bias="bias"))]
    if isinstance(module, _CONV_TRANSPOSE):
        return [("weight", Weight("", (), 1, 0, module.groups, transposed=True, bias="bias"))]
    if isinstance(module, nn.MultiheadAttention):
        return [(attribute, Weight("", ())) for attribute in _ATTENTION]
    if isinstance(module, nn.RNNBase):
        return [(attribute, Weight("", ())) for attribute in module._parameters if attribute.startswith("weight_")]
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        return []
    if type(module).__name__ == "Conv1D":  # the layout of transformers' Conv1D is (in, out)
        return [("weight", Weight("", (), 1, 0, bias="bias"))]
    # Any other class only when it was asked for by name: an embedding, say, or a layer of the user's own.
    return [("weight", Weight("", (), bias="bias"))] if types else []


def _check_types(model: nn.Module, types: Sequence[str]) -> None:
    present = {cls.__name__ for m in model.modules() for cls in type(m).__mro__} - {"object", "Module"}
    for name in types:
        if name not in present:
            raise WeightError(f"no module of type {name!r} in {type(model).__name__}; {nearest(name, present)}")


def _check_patterns(patterns: Sequence[str], named: Mapping[str, object]) -> None:
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in named):
            names = {n.rpartition(".")[0] or n for n in named}
            raise WeightError(f"the pattern {pattern!r} matches no prunable weight; {nearest(pattern, names)}")


def _filtered(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if exclude and matches(name, exclude):
        return "excluded by name"
    if include and not matches(name, include):
        return "not in include"
    return None


def _parametrised(model: nn.Module) -> dict[str, str]:
    """Name the weights hidden behind a parametrisation: masking them would mask a derived value."""
    out = {}
    for prefix, module in model.named_modules():
        inner = getattr(module, "parametrizations", None)
        if isinstance(inner, nn.ModuleDict):
            for attribute in inner:
                out[f"{prefix}.{attribute}" if prefix else attribute] = (
                    "parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
                )
    return out


def _identity(tensor: Tensor) -> tuple[object, ...]:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device)


def _check_storage(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise WeightError(f"{name}: is on the meta device and has no values; load the weights first")
    if tensor.is_quantized or not tensor.is_floating_point():
        raise WeightError(
            f"{name}: has dtype {tensor.dtype}; pruning needs floating-point weights. Prune before quantising, or "
            f"leave it out with exclude=[{name!r}]"
        )
    if tensor.layout != torch.strided:
        raise WeightError(f"{name}: has layout {tensor.layout}; expected a dense tensor (call .to_dense())")


def _check_overlaps(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Refuse a weight whose memory another parameter partly shares: masking one would silently change the other."""
    spans: list[tuple[int, int, str]] = []
    done: set[tuple[object, ...]] = set()
    for name, tensor in model.named_parameters():
        key = _identity(tensor)
        if key in done or tensor.numel() == 0 or tensor.device.type == "meta" or tensor.is_quantized:
            continue
        done.add(key)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), name))
    spans.sort()
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end and (name in weights or other in weights):
            raise WeightError(
                f"{name} and {other} share memory without being the same tensor, so masking one changes the other. "
                f"Make them separate parameters, or tie them as one and the same nn.Parameter"
            )
