"""Which parameters may be pruned, and what their dimensions mean."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from secateur.errors import PatternError, TargetError, WeightError, nearest
from secateur.types import Weight

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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


def check_each(found: Found, check: Callable[[Weight], None]) -> None:
    """Refuse once, naming every weight that does not fit.

    Args:
        found: The weights.
        check: Raises for one that does not.

    Raises:
        PatternError: As ``check`` raises for the first; names the others.
        TargetError: The same.
    """
    refused: dict[str, PatternError | TargetError] = {}
    for name, weight in found.weights.items():
        try:
            check(weight)
        except (PatternError, TargetError) as error:
            refused[name] = error
    if refused:
        first, *others = refused
        more = f". The same holds for {', '.join(others)}" if others else ""
        raise type(refused[first])(f"{refused[first]}{more}")


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
    if not isinstance(model, nn.Module):
        raise WeightError(f"expected a torch.nn.Module, got a {type(model).__name__}")
    if types:
        _check_types(model, types)
    named = dict(_candidates(model, types))
    check_patterns([*include, *exclude], named)
    names_of: dict[int, list[str]] = {}
    for name, (_, tensor) in named.items():
        names_of.setdefault(id(tensor), []).append(name)
    weights: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    ties: dict[str, str] = {}
    for first, *others in names_of.values():
        ties.update(dict.fromkeys(others, first))
        weight, tensor = named[first]
        reason = _filtered([first, *others], include, exclude)
        if reason is None and not isinstance(tensor, UninitializedParameter) and tensor.numel() == 0:
            reason = "empty"
        if reason is not None:
            skipped[first] = reason
            continue
        check_storage(first, tensor)
        weights[first] = weight
    skipped.update(derived_weights(model, types))
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
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for attribute, layout in _describe(module, types):
            tensor = module._parameters.get(attribute)
            if tensor is None:
                continue
            bias = module._parameters.get(layout.bias) if layout.bias else None
            # A bias that other layers use too does not die with this one's unit.
            own = bias is not None and owners[id(bias)] == 1
            named = replace(
                layout,
                name=dot + attribute,
                shape=() if isinstance(tensor, UninitializedParameter) else tuple(tensor.shape),
                bias=f"{dot}{layout.bias}" if own else None,
                kind=type(module).__name__,
            )
            yield named.name, (named, tensor)


def _describe(module: nn.Module, types: Sequence[str]) -> list[tuple[str, Weight]]:
    """Return the prunable attributes of one module, each with its layout."""
    if types and not any(cls.__name__ in types for cls in type(module).__mro__):
        return []
    if isinstance(module, nn.Linear | nn.Bilinear):
        return [("weight", Weight("", (), 0, 2 if isinstance(module, nn.Bilinear) else 1, bias="bias"))]
    if isinstance(module, _CONV):
        return [("weight", Weight("", (), 0, 1, module.groups, bias="bias"))]
    if isinstance(module, _CONV_TRANSPOSE):
        return [("weight", Weight("", (), 1, 0, module.groups, transposed=True, bias="bias"))]
    if isinstance(module, nn.MultiheadAttention):
        return [(attribute, Weight("", ())) for attribute in _ATTENTION]
    if isinstance(module, nn.RNNBase):
        return [(attribute, Weight("", ())) for attribute in module._parameters if attribute.startswith("weight_")]
    if isinstance(module, torch.jit.ScriptModule):  # sizes baked in, and no dict of parameters
        return []
    weight = module._parameters.get("weight")
    if weight is None or isinstance(weight, UninitializedParameter) or weight.dim() < 2:
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


def check_patterns(patterns: Iterable[str], names: Collection[str], what: str = "prunable weight") -> None:
    """Refuse a filter that does nothing, which is a slip of the pen.

    Args:
        patterns: Shell patterns.
        names: Names of which each of them must match one.
        what: What the names are those of.

    Raises:
        WeightError: Names the pattern and the nearest module.
    """
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            known = {n.rpartition(".")[0] or n for n in names}
            raise WeightError(f"the pattern {pattern!r} matches no {what}; {nearest(pattern, known)}")


def _filtered(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Return why a weight is left out, by any of its names, or nothing."""
    if any(matches(name, exclude) for name in names):
        return "excluded by name"
    if include and not any(matches(name, include) for name in names):
        return "not in include"
    return None


def derived_weights(model: nn.Module, types: Sequence[str]) -> dict[str, str]:
    """Name the weights that are computed from other parameters: masking them would mask a derived value."""
    out = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        inner = getattr(module, "parametrizations", None)
        if isinstance(inner, nn.ModuleDict):
            for attribute in inner:
                out[dot + attribute] = "parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
        for attribute, _ in _describe(module, types):
            if attribute not in module._parameters and isinstance(vars(module).get(attribute), Tensor):
                out[dot + attribute] = (
                    "computed from other parameters in every forward pass (weight_norm, spectral_norm or "
                    "nn.utils.prune): remove that first"
                )
    return out


def check_storage(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that masks cannot be laid over.

    Args:
        name: What to call it.
        tensor: A parameter.

    Raises:
        WeightError: For tensors without values or shape, quantised, sparse or expanded ones, and those of inference
            mode.
    """
    if isinstance(tensor, UninitializedParameter):
        raise WeightError(f"{name}: has no shape yet (a lazy layer); run one forward pass first")
    if tensor.device.type == "meta":
        raise WeightError(f"{name}: is on the meta device and has no values; load the weights first")
    if tensor.is_quantized or tensor.dtype not in _DTYPES:
        raise WeightError(
            f"{name}: has dtype {tensor.dtype}; pruning needs float16, bfloat16, float32 or float64. Prune before "
            f"quantising, or leave it out with exclude=[{name!r}]"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise WeightError(
            f"{name}: was made under torch.inference_mode(), and cannot be changed outside of it; build or load the "
            "model without, or copy it (copy.deepcopy)"
        )
    if tensor.layout != torch.strided:
        raise WeightError(f"{name}: has layout {tensor.layout}; expected a dense tensor (call .to_dense())")
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise WeightError(f"{name}: is an expanded tensor, one number in many places; make it contiguous first")


def _check_overlaps(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Refuse a weight whose memory another parameter shares: masking one would change the other behind its back."""
    spans: list[tuple[int, int, str]] = []
    for name, tensor in model.named_parameters():
        if isinstance(tensor, UninitializedParameter) or tensor.layout != torch.strided or tensor.is_quantized:
            continue
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), name))
    reach, owner = 0, ""
    for start, end, name in sorted(spans):
        if start < reach and (name in weights or owner in weights):
            raise WeightError(
                f"{owner} and {name} share memory without being the same parameter, so masking one changes the "
                f"other. Copy one of them, or tie them as one and the same nn.Parameter"
            )
        if end > reach:
            reach, owner = end, name
