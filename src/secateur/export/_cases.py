"""Inputs to try an export on, and the model's own answers to them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import ExportError
from secateur.export._common import CAPTURE_ERRORS, difference, first_line, plain, quiet, tensors_of
from secateur.forward import attention_fast_path
from secateur.types import Tensors


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs, and the tensors that the model itself makes of them."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """A model to export.

    Attributes:
        model: The model, in eval mode.
        masks: Where its weights must be zero.
        tolerance: Largest difference allowed.
        cases: The given inputs first, then others of the same shapes.
        resized: Inputs of other batch sizes; empty when the batch size has to be fixed.
        why_fixed: Why it has to be, or empty.
        names: A name for each output tensor.
        notes: What the user must know of the model's answers.
    """

    model: nn.Module
    masks: Tensors
    tolerance: float
    cases: tuple[Case, ...]
    resized: tuple[Case, ...]
    why_fixed: str
    names: tuple[str, ...]
    notes: tuple[str, ...]


def prepare(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, masks: Tensors, tolerance: float
) -> Job:
    """Run the model on the given inputs, on other values, and on other batch sizes.

    Args:
        model: The model, in eval mode.
        args: Positional inputs.
        kwargs: Keyword inputs.
        masks: Where the weights must be zero.
        tolerance: Largest difference allowed.

    Returns:
        The job, with the model's answers.

    Raises:
        ExportError: The model does not run on the inputs, or returns no tensor.
    """
    given = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
    generator = torch.Generator().manual_seed(0)  # of its own: the user's random state stays as it was
    other = pytree.tree_map_only(Tensor, lambda t: _other_values(t, generator), given)
    try:
        output = plain(model(*given[0], **given[1]))
        cases = _case(model, "the given inputs", given), _case(model, "other values", other)
    except CAPTURE_ERRORS as error:
        raise ExportError(f"the model does not run on the inputs given: {first_line(error)}") from error
    names = _names(output)
    if not names:
        raise ExportError(f"the model returned a {type(output).__name__} without a tensor; there is nothing to compare")
    no_cases: tuple[Case, ...] = ()
    sizes = {t.shape[0] if t.dim() else None for t in tensors_of(given)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        found = ", ".join(str(tuple(t.shape)) for t in tensors_of(given)) or "none"
        why, resized = f"the inputs share no first dimension (shapes: {found})", no_cases
    else:
        why, resized = _resized(model, other, int(sizes.pop() or 0))
    return Job(model, masks, tolerance, cases, resized, why, names, _fast_path(model, cases[0], tolerance))


def _case(model: nn.Module, label: str, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Case:
    """Ask the model; it gets copies, so that a model that writes into its inputs changes nothing."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    outputs = tuple(t.detach().cpu().clone() for t in tensors_of(plain(model(*args, **kwargs))))
    return Case(label, *inputs, outputs)


def _fast_path(model: nn.Module, given: Case, tolerance: float) -> tuple[str, ...]:
    """Say when PyTorch's fast path for attention gives another answer, as it does at padded positions.

    The export equals the model without the fast path.
    """
    if not any(isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer) for module in model.modules()):
        return ()
    with attention_fast_path(True), quiet():
        fast = _case(model, given.label, (given.args, given.kwargs))
    gap = max(difference(a, b) for a, b in zip(given.outputs, fast.outputs, strict=True))
    if gap <= tolerance:
        return ()
    return (
        f"the model's own outputs differ by {gap:.3g} with and without PyTorch's fast path for attention (at padded "
        "positions it returns zeros); the file equals the model without it, as after "
        "torch.backends.mha.set_fastpath_enabled(False)",
    )


def _resized(model: nn.Module, inputs: Any, batch: int) -> tuple[str, tuple[Case, ...]]:
    """Ask the model about a batch of one and about one more than given; it may not like either."""
    cases = []
    for size in (1, batch + 1):
        rows = torch.arange(size) % batch
        changed = pytree.tree_map_only(Tensor, functools.partial(_rows, rows), inputs)
        try:
            cases.append(_case(model, f"batch size {size}", changed))
        except CAPTURE_ERRORS as error:
            return f"the model itself does not run with batch size {size}: {first_line(error)}", ()
    return "", tuple(cases)


def _rows(rows: Tensor, tensor: Tensor) -> Tensor:
    """Take some rows of a tensor."""
    return tensor[rows.to(tensor.device)]


def _other_values(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Make a tensor like another one: floats from the same range, everything else in another order.

    A bool tensor, often a mask, is rolled along its last dimension, so that no row loses all its ones.
    """
    if tensor.numel() == 0:
        return tensor.clone()
    if tensor.dtype == torch.bool:
        return tensor.roll(1, dims=-1) if tensor.dim() else tensor.clone()
    if tensor.is_floating_point() and bool(torch.isfinite(tensor).all()):
        low, high = float(tensor.min()), float(tensor.max())
        width = high - low or 1.0  # a constant says nothing of the range: take the unit above it
        fresh = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * width + low
        return fresh.to(tensor.device, tensor.dtype)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].reshape(tensor.shape)


def inputs_of(case: Case) -> list[Tensor]:
    """Return the input tensors in the order in which a flat graph takes them."""
    return tensors_of((case.args, case.kwargs))


def _names(output: Any) -> tuple[str, ...]:
    """Name the output tensors after their keys: ``logits``, ``output_0``, ``hidden_1``."""
    names: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(output)[0]:
        if isinstance(leaf, Tensor):
            parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
            name = "_".join(parts)
            names.append(name if name[:1].isalpha() else "_".join(["output", *parts]))
    return tuple(name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names))
