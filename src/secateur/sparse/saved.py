"""Compiled models on disk: one safetensors file, which is mapped into memory and not read."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._files import read_tensors, write_tensors
from secateur.errors import CheckpointError, SparseError
from secateur.inputs import split_inputs
from secateur.sparse.compiled import Compiled
from secateur.sparse.fuse import Fused, fuse, take_in_
from secateur.sparse.image_layers import MaxPool2d
from secateur.sparse.layers import KernelLayer, layer_of
from secateur.sparse.library import engine
from secateur.sparse.plain import replace_
from secateur.sparse.report import CompileReport

KIND = "sparse"
_KEY = "secateur.sparse"


def save(compiled: Compiled, path: str | Path) -> None:
    """Save a compiled model: packed weights, all other tensors, and what was chosen; atomically, without pickle.

    The file does not depend on the instruction set: it can be compiled on one machine and run on another, with the
    choices of the first.

    Args:
        compiled: From :func:`compile`.
        path: By custom ``model.sparse.safetensors``.

    Raises:
        CheckpointError: When the file cannot be written.
    """
    layers = {n: m.settings() for n, m in compiled.model.named_modules() if isinstance(m, KernelLayer)}
    what = {"layers": layers, "traced": compiled.fused.traced, "folded": compiled.fused.folded}
    write_tensors(path, _state(compiled.model), KIND, {_KEY: json.dumps(what)})


def load(path: str | Path, model: nn.Module, example_inputs: Any, *, mapped: bool = True) -> Compiled:
    """Load a compiled model into the architecture that it came from.

    Everything in the file is checked before a kernel sees it: checksum, shapes, every index of every packed weight.

    Args:
        path: From :func:`save`.
        model: The architecture, with any weights; it is left as it is.
        example_inputs: What one forward takes.
        mapped: Map the file into memory: pages are read when they are used, and shared between processes. The file must
            then stay as it is while the model lives. ``False`` copies it.

    Returns:
        The compiled model, with nothing measured again: ``report.layers`` is empty.

    Raises:
        CheckpointError: When the file is missing, damaged, hostile, or of another architecture.
        SparseError: When a packed weight is damaged, or one needs the kernels and they are not installed.
    """
    tensors, metadata = read_tensors(path, KIND, mapped=mapped)
    layers, was_traced, folded = _described(path, metadata)
    args, kwargs = split_inputs(example_inputs)
    with torch.no_grad():
        dense = copy.deepcopy(model).eval()
        changed = was_traced or folded or layers  # the dense model itself is saved where compiling gained nothing
        fused = fuse(dense, args, kwargs) if changed else Fused(dense, traced=False)
        if (fused.traced, fused.folded) != (was_traced, folded):
            raise CheckpointError(
                f"{path}: comes from another architecture: {folded} batch norms were folded there and "
                f"{fused.folded} here, and its graph could{'' if was_traced else ' not'} be traced"
            )
        missing = [name for name in layers if name not in dict(fused.model.named_modules())]
        if missing:
            raise CheckpointError(f"{path}: comes from another architecture: this model has no layer {missing[0]!r}")
        built = {name: _layer(path, name, settings, tensors) for name, settings in layers.items()}
        take_in_(fused, {name for name, layer in built.items() if not isinstance(layer, MaxPool2d)}, args, kwargs)
        for name, layer in built.items():
            if isinstance(layer, MaxPool2d):
                _check_pool(path, name, fused.model.get_submodule(name), layer)
            elif layer.activation != fused.activations.get(name, "none"):
                raise CheckpointError(
                    f"{path}: comes from another architecture: {name} is followed by {layer.activation} there and by "
                    f"{fused.activations.get(name, 'none')} here"
                )
            replace_(fused.model, name, layer)
        _fill(path, fused.model, tensors)
    report = CompileReport([], torch.get_num_threads(), engine(), fused.traced, fused.folded)
    return Compiled(fused.model, report, fused)


def _layer(path: str | Path, name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> KernelLayer:
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    try:
        return layer_of(settings, own)
    except SparseError as error:
        raise SparseError(f"{path}: {name}: {error}") from None


def _check_pool(path: str | Path, name: str, module: nn.Module, layer: MaxPool2d) -> None:
    here = MaxPool2d.of(module)
    if here is None or here.convolution != layer.convolution:
        raise CheckpointError(
            f"{path}: comes from another architecture: {name} is a maximum with {layer.convolution} there, and "
            f"{module} here"
        )


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _described(path: str | Path, metadata: Mapping[str, str]) -> tuple[dict[str, Mapping[str, Any]], bool, int]:
    try:
        what = json.loads(metadata[_KEY])
        layers, traced, folded = what["layers"], what["traced"], what["folded"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header: {_KEY!r} cannot be read ({error})") from None
    whole = isinstance(layers, dict) and all(isinstance(settings, dict) for settings in layers.values())
    if not whole or not isinstance(traced, bool) or type(folded) is not int:
        raise CheckpointError(f"{path}: damaged header: {_KEY!r} is not what this secateur writes")
    return layers, traced, folded


def _fill(path: str | Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the file's tensors in the place of the model's: no copy, so that they stay where they are mapped."""
    own = _state(model)
    if own.keys() != tensors.keys():
        other = sorted(own.keys() ^ tensors.keys())
        raise CheckpointError(f"{path}: comes from another architecture: {other[0]!r} is only in one of them")
    for name, tensor in tensors.items():
        here = own[name]
        if here.shape != tensor.shape or here.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} there, and {here.dtype} of shape "
                f"{tuple(here.shape)} here"
            )
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, KernelLayer):
            continue  # built from these tensors
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[key] = tensor
