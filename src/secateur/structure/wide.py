"""A model's forward in float64, whatever its own dtype, and how far two are apart; models are left as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from secateur.errors import GraphError
from secateur.graph.axes import Axes
from secateur.graph.examples import Example
from secateur.graph.model import owned_tensors
from secateur.graph.record import Leaf
from secateur.graph.values import Probe
from secateur.graph.verify import run_small
from secateur.inputs import split_inputs
from secateur.stats.activations import watched


def run_wide(model: nn.Module, batch: Any) -> list[Any]:
    """Run the forward in evaluation mode, every operator in float64; casts to other dtypes do nothing.

    Args:
        model: Of any dtype; what its forward counts or caches is put back.
        batch: A tensor, a tuple of positional inputs, a dict, or ``(tuple, dict)``.

    Returns:
        The outputs, whatever held them.

    Raises:
        GraphError: When the forward fails on the batch.
    """
    leaves = [Leaf(tuple(names), tensor, Axes(tensor.shape), kind) for names, tensor, kind in owned_tensors(model)]
    probe = Probe([leaf.tensor.detach() for leaf in leaves], distinct=False)
    return run_small(model, [Example(*split_inputs(batch))], leaves, {}, probe)[0]


@contextmanager
def watched_wide(model: nn.Module, layers: Collection[str], act: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show what some layers get while :func:`run_wide` runs; no time is lost on what ``act`` computes with it.

    Args:
        model: The model.
        layers: Names of layers.
        act: Called with name and input, float64.
    """

    def seen(name: str, x: Tensor) -> None:
        values = x.clone()  # a parameter stands without its values until an operator uses it
        with _disable_current_modes():
            act(name, values)

    with watched(model, layers, seen):
        yield


@contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let some tensors of a model hold others' values, of any dtype, for a while.

    Args:
        model: The model.
        values: By name of the parameter or buffer.
    """
    own = {name: tensor for names, tensor, _ in owned_tensors(model) for name in names}
    before = {name: own[name].data for name in values}
    try:
        for name, value in values.items():
            own[name].data = value.to(own[name].device)
        yield
    finally:
        for name, data in before.items():
            own[name].data = data


def apart(a: nn.Module, b: nn.Module, batches: Iterable[Any]) -> float:
    """Return by how much two models' outputs differ on some batches, in float64.

    Args:
        a: The model that sets the scale.
        b: The other one.
        batches: Inputs.

    Returns:
        The largest difference of any output, relative to that output's own largest value; of outputs that are whole
        numbers or truth values the share that differs. Infinite where one is NaN and the other is not.

    Raises:
        GraphError: When a forward fails, or the outputs are not of one form.
    """
    moved: dict[int, float] = {}
    largest: dict[int, float] = {}
    for batch in batches:
        ours, theirs = run_wide(a, batch), run_wide(b, batch)
        if [getattr(x, "shape", None) for x in ours] != [getattr(x, "shape", None) for x in theirs]:
            raise GraphError(f"the outputs no longer have the shapes {[tuple(t.shape) for t in _tensors(ours)]}")
        for i, (x, y) in enumerate(zip(_tensors(ours), _tensors(theirs), strict=True)):
            gap, size = _apart(x, y)
            moved[i] = max(moved.get(i, 0.0), gap)
            largest[i] = max(largest.get(i, 0.0), size)
    return max((gap / largest[i] if largest[i] else math.inf for i, gap in moved.items() if gap), default=0.0)


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy.

    Raises:
        GraphError: When the model cannot be copied; says why.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise GraphError(
            f"the model cannot be copied, and a change is tried on a copy first: {type(error).__name__}: {error}. "
            "Tensors that modules keep must be parameters, buffers, or detached"
        ) from error


def _tensors(outputs: list[Any]) -> list[Tensor]:
    return [x for x in outputs if isinstance(x, Tensor)]


def _apart(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the largest difference, and the largest value of the first."""
    if not x.numel():
        return 0.0, 0.0
    if not (x.is_floating_point() or x.is_complex()):
        return float((x != y).double().mean()), 1.0
    x, y = x.detach(), y.detach()
    if not torch.equal(torch.isfinite(x), torch.isfinite(y)) or not torch.equal(torch.isnan(x), torch.isnan(y)):
        return math.inf, 1.0
    gap = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(0.0, posinf=math.inf)
    return float(gap.max()), float(x.abs().nan_to_num(0.0, posinf=0.0).max())


__all__ = ["apart", "copy_of", "holding", "run_wide", "watched_wide"]
