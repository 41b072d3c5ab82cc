"""Parameters: how many, how many are not zero, how many stay. Tied parameters are counted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from secateur.errors import MetricsError, nearest


@dataclass(frozen=True)
class ParamRow:
    """One parameter, counted once however many names it has.

    Attributes:
        name: Its first qualified name.
        shape: Its shape.
        params: Elements.
        nonzero: Elements that are not zero, after the mask.
        kept: Elements that the mask keeps; all of them where there is no mask.
        prunable: Whether it lies in the scope of pruning.
        aliases: Its other names.
    """

    name: str
    shape: tuple[int, ...]
    params: int
    nonzero: int
    kept: int
    prunable: bool
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParamCount:
    """Parameters of a model.

    Attributes:
        total: Elements of all parameters, ties once.
        nonzero: Elements that are not zero, after the masks.
        prunable: Elements in the scope of pruning.
        prunable_kept: Those of them that the masks keep.
        rows: One row per parameter.
    """

    total: int
    nonzero: int
    prunable: int
    prunable_kept: int
    rows: tuple[ParamRow, ...] = ()

    @property
    def remaining(self) -> int:
        """Parameters that stay: all, less those that a mask removes."""
        return self.total - self.prunable + self.prunable_kept

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable elements that the masks remove."""
        return 1.0 - self.prunable_kept / self.prunable if self.prunable else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the four sums as plain values, for JSON."""
        return {
            "total": self.total,
            "nonzero": self.nonzero,
            "prunable": self.prunable,
            "prunable_kept": self.prunable_kept,
        }


def tie_key(tensor: Tensor) -> tuple[object, ...]:
    """Return what two names of the same tensor have in common: address, shape, strides, dtype.

    Args:
        tensor: Any tensor, on any device.

    Returns:
        A hashable key; equal exactly when both names show the same elements of the same memory.
    """
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return ("object", id(tensor))
    # Tensors without memory (meta, empty) all have the address 0: only their storage object tells them apart.
    place: tuple[object, ...] = ("address", tensor.data_ptr())
    if tensor.data_ptr() == 0:
        place = ("storage", tensor.untyped_storage()._cdata, tensor.storage_offset())
    return (*place, tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())


def unique_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """List a model's parameters, each under its first name.

    Args:
        model: Any module.

    Returns:
        ``{first name: parameter}`` and ``{any name: first name}``.

    Raises:
        MetricsError: When it is no module, or a lazy parameter has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise MetricsError(f"expected a torch.nn.Module, got {type(model).__name__}")
    first: dict[str, nn.Parameter] = {}
    names: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise MetricsError(f"{name}: a lazy parameter has no shape yet; call the model once on an input first")
        names[name] = seen.setdefault(tie_key(parameter), name)
        if names[name] == name:
            first[name] = parameter
    return first, names


def resolve_masks(
    masks: Mapping[str, Tensor] | None, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Check masks and key them by the first name of each tensor.

    Args:
        masks: Bool tensors by name, or ``None``.
        tensors: Tensors by first name.
        names: Any name to first name.

    Returns:
        Masks by first name.

    Raises:
        MetricsError: When a mask has no tensor, the wrong dtype or shape, or contradicts that of a tied name.
    """
    found: dict[str, Tensor] = {}
    for name, mask in (masks or {}).items():
        if name not in names:
            raise MetricsError(f"mask {name!r} belongs to no tensor of this model; {nearest(name, names)}")
        first, shape = names[name], tuple(tensors[names[name]].shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise MetricsError(
                f"mask {name!r}: expected torch.bool of shape {shape}, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if first in found and not torch.equal(found[first], mask):
            raise MetricsError(f"masks of {first!r} and {name!r} differ, but the two names share one tensor; give one")
        found[first] = mask
    return found


def count(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None, prunable: Iterable[str] | None = None
) -> ParamCount:
    """Count parameters, ties once.

    Two names are tied when they hold one ``Parameter``, or two with the same address, shape and strides.
    A masked parameter keeps ``mask.sum()`` elements, whatever its values; one without a mask keeps all,
    and ``nonzero`` alone tells how many of its values are zero.

    Args:
        model: Any module.
        masks: Bool masks by parameter name; ``True`` = keep.
        prunable: Names in the scope of pruning; masked parameters always are. ``None``: the masked ones alone.

    Returns:
        Exact counts (Python integers) and one row per parameter.

    Raises:
        MetricsError: When a name is unknown, a mask does not fit, or the model has no values to look at.

    Example:
        >>> count(nn.Linear(3, 2, bias=False), prunable=["weight"]).prunable
        6
    """
    parameters, names = unique_parameters(model)
    kept = resolve_masks(masks, parameters, names)
    scope = set(kept)
    for name in prunable or ():
        if name not in names:
            raise MetricsError(f"prunable name {name!r} is no parameter of this model; {nearest(name, names)}")
        scope.add(names[name])
    aliases: dict[str, list[str]] = {}
    for name, first in names.items():
        if name != first:
            aliases.setdefault(first, []).append(name)
    rows = tuple(
        ParamRow(
            name,
            tuple(parameter.shape),
            parameter.numel(),
            _nonzero(name, parameter, kept.get(name)),
            int(kept[name].sum()) if name in kept else parameter.numel(),
            name in scope,
            tuple(aliases.get(name, ())),
        )
        for name, parameter in parameters.items()
    )
    return ParamCount(
        sum(r.params for r in rows),
        sum(r.nonzero for r in rows),
        sum(r.params for r in rows if r.prunable),
        sum(r.kept for r in rows if r.prunable),
        rows,
    )


def _nonzero(name: str, tensor: Tensor, mask: Tensor | None) -> int:
    """Count the elements that are neither zero nor masked; NaN counts as not zero."""
    if tensor.is_meta:
        raise MetricsError(f"{name}: on the meta device there are no values to count; load the weights first")
    values = tensor.detach()
    if values.dtype.is_floating_point and values.dtype.itemsize == 1:
        values = values.float()  # torch cannot compare 8-bit floats with zero
    if mask is None:
        return int((values != 0).sum())
    return int(((values != 0) & mask.to(values.device)).sum())
