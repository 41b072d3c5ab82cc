"""Optimizer state follows the parameters it belongs to."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import PlanError
from secateur.graph.changes import Kept, Undo, slice_tensor
from secateur.graph.plan import Plan
from secateur.graph.trees import tensors

Dims = Mapping[int, NDArray[np.int64]]


def slice_state(optimizer: Optimizer, model: nn.Module, plan: Plan, undo: Undo) -> None:
    """Cut momentum and other per-element state to the kept indices. Call it before the model is shrunk.

    State of the parameter's own shape is sliced along the same dimensions; factored state (one dimension of the
    parameter missing) along those it has, where that is clear; scalars stay.

    Args:
        optimizer: Built from the model's parameters.
        model: Still dense.
        plan: What will be kept.
        undo: Where changes are noted.

    Raises:
        PlanError: When the optimizer holds none of the model's parameters, or a state whose shape is not understood;
            nothing is changed then.
    """
    if not isinstance(optimizer, Optimizer):
        raise PlanError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if held and not any(id(p) in names for p in held):
        raise PlanError("the optimizer holds none of this model's parameters; build it from this model's parameters")
    if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
        raise PlanError("the state of LBFGS spans all parameters and cannot be cut; shrink without it, build a new one")
    changes: list[tuple[dict[str, object], str, Tensor]] = []
    for parameter in held:
        name = names.get(id(parameter))
        if name is None or name not in plan.kept or parameter not in optimizer.state:
            continue
        state = optimizer.state[parameter]
        for key, value in state.items():
            large = [t for t in tensors(value) if t.numel() > 1]
            if large and not isinstance(value, Tensor):
                raise _cannot(name, key, tuple(large[0].shape), tuple(parameter.shape))
            if large:
                changes.append((state, key, _cut(name, key, value, tuple(parameter.shape), plan.kept[name])))
    for state, key, value in changes:
        before = state[key]
        state[key] = value
        undo.add(lambda state=state, key=key, before=before: state.__setitem__(key, before))  # type: ignore[misc]


def forget(optimizer: Optimizer, gone: Collection[nn.Parameter], undo: Undo) -> None:
    """Take parameters that left the model out of an optimizer, with their state.

    Args:
        optimizer: The optimizer.
        gone: The parameters.
        undo: Where changes are noted.
    """
    left = {id(p) for p in gone}
    for group in optimizer.param_groups:
        before = group["params"]
        group["params"] = [p for p in before if id(p) not in left]
        undo.add(lambda group=group, before=before: group.__setitem__("params", before))  # type: ignore[misc]
    for parameter in gone:
        if parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            undo.add(lambda p=parameter, state=state: optimizer.state.__setitem__(p, state))  # type: ignore[misc]


def _cut(name: str, key: str, value: Tensor, shape: tuple[int, ...], dims: Dims) -> Tensor:
    if tuple(value.shape) == shape:
        return slice_tensor(value, dims)
    cuts = [
        slice_tensor(value, {d - (d > missing): i for d, i in dims.items() if d != missing})
        for missing in range(len(shape))
        if tuple(value.shape) == shape[:missing] + shape[missing + 1 :]
    ]
    if cuts and all(cut.shape == cuts[0].shape and bool((cut == cuts[0]).all()) for cut in cuts):
        return cuts[0]  # of a square weight, a row's state and a column's look alike
    if value.dim() == len(shape) and all(v in (1, s) for v, s in zip(value.shape, shape, strict=True)):
        return slice_tensor(value, {d: i for d, i in dims.items() if value.shape[d] != 1})
    raise _cannot(name, key, tuple(value.shape), shape)


def _cannot(name: str, key: str, held: tuple[int, ...], shape: tuple[int, ...]) -> PlanError:
    return PlanError(
        f"the optimizer keeps {key!r} of shape {held} for {name} of shape {shape}, which cannot be cut; "
        "shrink without it and build a new optimizer"
    )


__all__ = ["Kept", "forget", "slice_state"]
