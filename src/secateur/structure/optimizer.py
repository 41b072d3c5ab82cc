"""Optimizer state follows the parameters it belongs to."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import PlanError
from secateur.graph.plan import Kept, Plan, Undo, slice_tensor

Dims = Mapping[int, NDArray[np.int64]]


def slice_state(optimizer: Optimizer, model: nn.Module, plan: Plan, undo: Undo) -> None:
    """Cut momentum and other per-element state to the kept indices. Call it before the model is shrunk.

    State of the parameter's own shape is sliced along the same dimensions; factored state (one dimension of the
    parameter missing) along those it has; scalars stay.

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
    changes: list[tuple[dict[str, object], str, Tensor]] = []
    for parameter in held:
        name = names.get(id(parameter))
        if name is None or name not in plan.kept or parameter not in optimizer.state:
            continue
        state = optimizer.state[parameter]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1:
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
    for missing in range(len(shape)):
        if tuple(value.shape) == shape[:missing] + shape[missing + 1 :]:
            return slice_tensor(value, {d - (d > missing): i for d, i in dims.items() if d != missing})
    if value.dim() == len(shape) and all(v in (1, s) for v, s in zip(value.shape, shape, strict=True)):
        return slice_tensor(value, {d: i for d, i in dims.items() if value.shape[d] != 1})
    raise PlanError(
        f"the optimizer keeps {key!r} of shape {tuple(value.shape)} for {name} of shape {shape}, which cannot be cut; "
        "shrink without it and build a new optimizer"
    )


__all__ = ["Kept", "forget", "slice_state"]
