"""Saving and loading without pickle: models, masks, training state and random generators.

Every file is safetensors, written atomically (:func:`write_atomic`) with a format name, a version and a
checksum. A damaged, truncated or hostile file gives one :class:`~secateur.errors.CheckpointError` that
names the file and the reason; nothing in it can run. The one pickle that can be read is the ``.pt`` or
``.pth`` of :func:`load_weights`, and only through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._files import read_header, read_tensors, remove_stale, write_atomic, write_tensors
from secateur._rng import capture_rng, restore_rng
from secateur._tree import check_dense, checked_metadata, geometry, load_tree, save_tree
from secateur.errors import CheckpointError, nearest
from secateur.masks import check_masks
from secateur.types import Masks, Tensors

__all__ = [
    "capture_rng",
    "check_masks",
    "load_masks",
    "load_model",
    "load_tree",
    "load_weights",
    "nonzero_pruned",
    "read_metadata",
    "read_model",
    "remove_stale",
    "restore_rng",
    "save_masks",
    "save_model",
    "save_tree",
    "write_atomic",
]

_ALIASES_KEY = "secateur.aliases"
_MAX_LISTED = 8

# What torch.load(weights_only=True) was seen to raise on refused, damaged and random files.
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


def save_model(
    path: str | Path, model: nn.Module, *, masks: Tensors | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Save a model's parameters and buffers; tensors that are tied are stored once, with their other names.

    Args:
        path: The file, by custom ``model.safetensors``.
        model: Any module whose state dict holds dense tensors only.
        masks: When given, nothing is written unless every pruned weight is exactly zero. The masks
            themselves go to a file of their own: :func:`save_masks`.
        metadata: Text for :func:`read_metadata` and other programs.

    Raises:
        CheckpointError: A pruned weight that is not zero, a state that is not a tensor, or a failed write.
        WeightError: A mask that does not belong to the model.
    """
    state = model.state_dict()
    if masks is not None:
        check_masks(model, masks)
        if bad := nonzero_pruned(state, masks):
            raise CheckpointError(
                f"{path}: not saved, because pruned weights are not zero: {_listed(bad)}; "
                "apply the masks first (secateur.masks.apply_masks_)"
            )
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {name}: the state dict holds a {type(tensor).__name__}; only tensors can be saved "
                "(remove get_extra_state, or save that part with save_tree)"
            )
        check_dense(path, name, tensor)
        key = geometry(tensor)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    text = {**checked_metadata(path, metadata), _ALIASES_KEY: json.dumps(aliases)}
    write_tensors(path, tensors, "model", text)


def nonzero_pruned(tensors: Tensors, masks: Tensors) -> dict[str, int]:
    """Count, per name, the elements that a mask prunes and that are not exactly zero (NaN is not zero).

    Args:
        tensors: Weights by name; names without a mask are not looked at.
        masks: Bool masks of the weights' shapes; ``True`` = keep.

    Returns:
        Name to count, for the names where the count is not 0.
    """
    counts = {}
    for name, mask in masks.items():
        if name in tensors:
            pruned = tensors[name].detach()[~mask.to(tensors[name].device)]
            counts[name] = int((pruned != 0).sum())
    return {name: count for name, count in counts.items() if count}


def read_model(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a model file by name; tied names give the same tensor object.

    Args:
        path: A file of :func:`save_model`, or plain safetensors of another program.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, hostile or of another kind.
    """
    tensors, aliases = _read_model(path, None)
    return {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}


def _read_model(path: str | Path, kind: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a model file into tensors and aliases."""
    tensors, metadata = read_tensors(path, kind)
    try:
        aliases = json.loads(metadata.get(_ALIASES_KEY, "{}"))
        if any(alias in tensors or tensors[name] is None for alias, name in aliases.items()):
            raise ValueError("a name is both a tensor and an alias")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the list of tied names is damaged: {error!r}") from error
    return tensors, aliases


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata that was given when a file was saved, without its tensors and unchecked by the checksum.

    Args:
        path: Any safetensors file.

    Returns:
        The text, without the library's own entries.

    Raises:
        CheckpointError: The file is missing or its header is damaged.
    """
    return {key: value for key, value in read_header(path).items() if not key.startswith("secateur.")}


def load_model(model: nn.Module, path: str | Path) -> None:
    """Load a file of :func:`save_model` into a model of the same class, or leave the model untouched.

    Names, shapes and dtypes must agree exactly. Tensors that were tied when saved are tied again where
    the model's constructor did not do it, so build the optimizer afterwards.

    Args:
        model: The model to fill, in place.
        path: The file.

    Raises:
        CheckpointError: The file cannot be read, or does not fit the model; lists what differs.
    """
    tensors, aliases = _read_model(path, "model")
    _fill(model, path, tensors, aliases)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights of any origin into a model, or leave the model untouched.

    ``.safetensors`` may come from :func:`save_model` or from another program; ``.pt`` and ``.pth`` must
    hold a state dict and are read with ``torch.load(weights_only=True)``, which runs no code. A name that
    is missing is accepted when the model ties it to one that is there.

    Args:
        model: The model to fill, in place.
        path: The file; its suffix decides how it is read.

    Raises:
        CheckpointError: The file cannot be read, holds code, or does not fit the model.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        tensors, aliases = _read_model(path, None)
    elif suffix in (".pt", ".pth"):
        tensors, aliases = _read_torch(path), {}
    else:
        raise CheckpointError(f"{path}: unknown suffix {suffix!r}; expected '.safetensors', '.pt' or '.pth'")
    names = {**tensors, **aliases}
    state = _state(model, path)
    ties: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        ties.setdefault(geometry(tensor), []).append(name)
    for group in ties.values():
        present = [name for name in group if name in names]
        for name in group:
            if present and name not in names:
                aliases[name] = aliases.get(present[0], present[0])
    _fill(model, path, tensors, aliases)


def _read_torch(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict that ``torch.save`` wrote, without running code."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        # Old files are not archives and cannot be mapped.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _LOAD_ERRORS as error:
        # The first sentence: PyTorch's second one is how to load it all the same, running what is in it.
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise CheckpointError(
            f"{path}: refused: not a plain state dict, because it is damaged or needs code to load "
            f"({type(error).__name__}: {reason[:200]}). Save model.state_dict(), or better safetensors"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}; expected a state dict (name to tensor)")
    wrong = {name: type(value).__name__ for name, value in found.items() if not isinstance(value, Tensor)}
    if wrong or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{path}: not a state dict (name to tensor): {_listed(wrong or found)}; save model.state_dict() by itself"
        )
    for name, tensor in found.items():
        check_dense(path, name, tensor)
    return dict(found)


def _state(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Return the model's state dict, refusing models that cannot be filled."""
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name}: the model's state dict holds a {type(tensor).__name__}")
        check_dense(path, name, tensor)
    return state


def _fill(model: nn.Module, path: str | Path, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Check everything, then copy the tensors and renew the ties."""
    values = {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}
    state = _state(model, path)
    if problems := _differences(state, values):
        raise CheckpointError(f"{path}: does not fit the model: " + "; ".join(problems))
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        other = first.setdefault(geometry(tensor), name)
        if values[other] is not values[name] and not _same_bits(values[other], values[name]):
            raise CheckpointError(
                f"{path}: does not fit the model: it ties {name!r} to {other!r}, and the file has different values"
            )
    loose = {a: n for a, n in aliases.items() if geometry(state[a]) != geometry(state[n])}
    slots = {name: _slot(model, name) for pair in loose.items() for name in pair}
    for alias, name in loose.items():
        if isinstance(slots[alias][2], nn.Parameter) != isinstance(slots[name][2], nn.Parameter):
            raise CheckpointError(
                f"{path}: does not fit the model: {alias!r} and {name!r} were tied when saved, and one is a parameter "
                "and the other a buffer; tie them in the model's constructor"
            )
    model.load_state_dict(with_versions(model, values))
    for alias, name in loose.items():
        owner, attribute, _ = slots[alias]
        setattr(owner, attribute, slots[name][2])


def with_versions(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the versions of the model's own modules, which files without pickle do not keep.

    Some modules refuse a state of unknown version, or take it for one of the oldest and convert it.

    Args:
        model: The model to load into.
        values: Its tensors by name.
    """
    state = OrderedDict(values)
    state._metadata = getattr(model.state_dict(), "_metadata", OrderedDict())  # type: ignore[attr-defined]
    return state


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str, Any]:
    """Return the module, the attribute and the tensor behind a name of the state dict."""
    prefix, _, attribute = name.rpartition(".")
    owner = model.get_submodule(prefix)
    return owner, attribute, getattr(owner, attribute)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bits; NaN equals itself here."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)


def _differences(state: Tensors, values: Tensors) -> list[str]:
    """Say how a file's tensors differ from a model's, in at most one sentence per kind of difference."""
    missing = [name for name in state if name not in values]
    extra = [name for name in values if name not in state]
    both = [name for name in state if name in values]
    shapes = [
        f"{n!r} is {tuple(values[n].shape)} and the model has {tuple(state[n].shape)}"
        for n in both
        if values[n].shape != state[n].shape
    ]
    dtypes = [
        f"{n!r} is {values[n].dtype} and the model has {state[n].dtype}"
        for n in both
        if values[n].dtype != state[n].dtype
    ]
    hint = f" ({missing[0]!r}: {nearest(missing[0], extra)})" if missing and extra else ""
    found = {"missing": [repr(n) for n in missing], "unexpected": [repr(n) for n in extra], "shape": shapes}
    texts = [f"{kind}: {_listed(items)}" for kind, items in {**found, "dtype": dtypes}.items() if items]
    if hint:
        texts[0] += hint
    return texts


def _listed(items: Iterable[Any]) -> str:
    """Join the first few items."""
    texts = [f"{k}: {v}" for k, v in items.items()] if isinstance(items, Mapping) else [str(i) for i in items]
    more = f" and {len(texts) - _MAX_LISTED} more" if len(texts) > _MAX_LISTED else ""
    return ", ".join(texts[:_MAX_LISTED]) + more


def save_masks(path: str | Path, masks: Tensors, *, metadata: Mapping[str, str] | None = None) -> None:
    """Save masks, one bool tensor per parameter name.

    Args:
        path: The file, by custom ``masks.safetensors``.
        masks: The masks; ``True`` = keep.
        metadata: Text for :func:`read_metadata`.

    Raises:
        CheckpointError: A mask that is not bool, or a failed write.
    """
    for name, mask in masks.items():
        check_dense(path, name, mask)
        if mask.dtype != torch.bool:
            raise CheckpointError(f"{path}: {name}: a mask of {mask.dtype}; expected torch.bool (True = keep)")
    write_tensors(path, masks, "masks", checked_metadata(path, metadata))


def load_masks(path: str | Path) -> Masks:
    """Load what :func:`save_masks` saved; :func:`check_masks` says whether they fit a model.

    Args:
        path: The file.

    Returns:
        The masks, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind, or holds something else than bool.
    """
    masks, _ = read_tensors(path, "masks")
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise CheckpointError(f"{path}: {name}: a mask of {mask.dtype}; expected torch.bool (True = keep)")
    return masks
