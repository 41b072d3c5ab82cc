"""Masks outside the model: applied after each optimizer step, keyed by qualified name.

The modules, their state dict and the exported graph stay as they were. A pruned weight is zero after every step
whatever momentum, weight decay or a fused optimizer did, because the mask is applied last, from the optimizer's own
post-step hook. Gradients stay dense, so that methods which regrow weights can see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from secateur.errors import WeightError, nearest
from secateur.forward import check_module
from secateur.types import Masks, Tensors


def parameters_of(model: nn.Module, names: Mapping[str, object]) -> dict[str, nn.Parameter]:
    """Look up parameters by qualified name, afresh: sharding and ``.to()`` may replace the tensors.

    Args:
        model: The model.
        names: A mapping whose keys are the names.

    Returns:
        Name to parameter, in the order of ``names``.

    Raises:
        WeightError: When the model has no parameter of that name, or is none.
    """
    check_module(model)
    if not isinstance(names, Mapping):
        raise WeightError(f"expected something by name of a parameter, got {type(names).__name__}")
    known = dict(model.named_parameters(remove_duplicate=False))
    out = {}
    for name in names:
        if name not in known:
            raise WeightError(f"the model has no parameter {name!r}; {nearest(name, known)}")
        out[name] = known[name]
    return out


def check_masks(model: nn.Module, masks: Tensors) -> None:
    """Refuse masks that do not belong to the model.

    Args:
        model: The model.
        masks: Masks by parameter name.

    Raises:
        WeightError: On an unknown name, another shape or another dtype than bool.
    """
    for name, parameter in parameters_of(model, masks).items():
        mask: object = masks[name]
        if not isinstance(mask, Tensor):
            raise WeightError(f"{name}: expected a mask, a tensor of torch.bool, got {type(mask).__name__}")
        if mask.shape != parameter.shape:
            raise WeightError(f"{name}: mask of shape {tuple(mask.shape)} on a weight of {tuple(parameter.shape)}")
        if mask.dtype != torch.bool:
            raise WeightError(f"{name}: mask of dtype {mask.dtype}; expected torch.bool (True = keep)")


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Tensors) -> None:
    """Set the pruned weights to zero, in place.

    Args:
        model: The model.
        masks: Bool masks by parameter name.

    Raises:
        WeightError: When a mask does not belong to the model.
    """
    check_masks(model, masks)
    for name, parameter in parameters_of(model, masks).items():
        # Filling, unlike multiplying by zero, also clears NaN and leaves no -0.0 behind.
        parameter.masked_fill_(~masks[name].to(parameter.device), 0.0)


@torch.no_grad()
def clear_optimizer_state_(optimizer: Optimizer, model: nn.Module, masks: Tensors) -> int:
    """Zero momentum, variance and every other per-element state where the mask is ``False``.

    A stale momentum would otherwise push against the mask, and jump out when a method lets the weight grow back.

    Args:
        optimizer: Any optimizer; state is recognised by having the parameter's shape.
        model: The model.
        masks: Bool masks by parameter name.

    Returns:
        Number of state tensors changed.
    """
    changed = 0
    for name, parameter in parameters_of(model, masks).items():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(~masks[name].to(value.device), 0)
                changed += 1
    return changed


class MaskHook:
    """Keeps pruned weights at zero: one callable on an optimizer's post-step hook.

    One fused multiplication by a mask in the weight's own dtype: seven times as fast as filling through a bool mask,
    for one more copy of the prunable weights in memory. It turns a pruned -w into -0.0 and cannot clear a NaN;
    :func:`apply_masks_`, which runs whenever masks change and before anything is saved, does both.

    Args:
        model: The model.
        masks: The live dict of masks; changes to it take effect after :meth:`refresh`.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self._model = model
        self._masks = masks
        self._parameters: list[Tensor] = []
        self._factors: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the masks again: they, or the parameters behind the names, have changed."""
        found = parameters_of(self._model, self._masks)
        self._parameters = list(found.values())
        self._factors = [self._masks[name].to(device=p.device, dtype=p.dtype) for name, p in found.items()]

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        """Zero the pruned weights."""
        if self._parameters:
            torch._foreach_mul_(self._parameters, self._factors)

    def attach(self, optimizer: Optimizer) -> Callable[[], None]:
        """Apply the masks after every step of ``optimizer``.

        Returns:
            A function that detaches the hook.
        """
        handle = optimizer.register_step_post_hook(self)
        return handle.remove


class MaskKeeper:
    """The masks that training runs under: on every attached optimizer, and on averaged copies.

    Args:
        model: The model.
        names: The weights that may be masked.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, object]) -> None:
        self.masks: Masks = {}
        self._model, self._names = model, names
        self._hook = MaskHook(model, self.masks)
        self._optimizers: dict[int, tuple[Optimizer, Callable[[], None]]] = {}
        self._covered = False  # whether the attached optimizers hold every weight that may be masked
        self._averages: list[nn.Module] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Apply the masks after every step of an optimizer, until :meth:`detach`.

        Raises:
            WeightError: When it holds none of the weights: it was built from another model.
        """
        if not isinstance(optimizer, Optimizer):
            raise WeightError(f"expected a torch.optim.Optimizer, got a {type(optimizer).__name__}")
        if id(optimizer) in self._optimizers:
            return
        if not self._held_by(optimizer):
            raise WeightError(
                "the optimizer holds none of this model's prunable weights; build it from this model's parameters"
            )
        self._hook.refresh()  # an optimizer is often new because the parameters are
        self._optimizers[id(optimizer)] = (optimizer, self._hook.attach(optimizer))
        held = set().union(*(self._held_by(o) for o, _ in self._optimizers.values()))
        self._covered = self._names.keys() <= held

    def _held_by(self, optimizer: Optimizer) -> set[str]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name for name, p in parameters_of(self._model, self._names).items() if id(p) in held}

    def attach_ema(self, ema: nn.Module) -> None:
        """Mask an averaged copy of the model whenever the masks change.

        Raises:
            WeightError: When its weights have other names or shapes.
        """
        inner = ema.module if isinstance(ema, AveragedModel) else ema
        own = parameters_of(self._model, self._names)
        check_masks(inner, {name: torch.ones(p.shape, dtype=torch.bool) for name, p in own.items()})
        self._averages.append(inner)
        apply_masks_(inner, self.masks)

    def detach(self) -> None:
        """Take the masks off all optimizers; weights stay as they are."""
        for _, remove in self._optimizers.values():
            remove()
        self._optimizers.clear()
        self._covered = False

    def reapply(self) -> None:
        """Apply the masks where no attached optimizer does."""
        if not self._covered:
            self._hook()

    def set(self, masks: Masks) -> None:
        """Change to other masks, and apply them.

        Raises:
            WeightError: When a mask does not belong to the model.
        """
        check_masks(self._model, masks)
        self.masks.clear()
        self.masks.update(masks)
        self._to_weights()
        self._hook.refresh()
        self.zero(self.masks)

    def follow(self) -> None:
        """Bring the masks to where their weights are: models move."""
        if self._to_weights():
            self._hook.refresh()

    def _to_weights(self) -> bool:
        """Bring every mask to its weight's device; return whether any was elsewhere, as in another's state."""
        found = parameters_of(self._model, self.masks)
        moved = [name for name, p in found.items() if self.masks[name].device != p.device]
        for name in moved:
            self.masks[name] = self.masks[name].to(found[name].device)
        return bool(moved)

    def zero(self, masks: Tensors) -> None:
        """Set what the masks remove to zero this once, averaged copies included."""
        for model in (self._model, *self._averages):
            apply_masks_(model, masks)

    def clear_state(self, masks: Tensors) -> None:
        """Let the optimizers forget their momentum of what the masks remove."""
        for optimizer, _ in self._optimizers.values():
            clear_optimizer_state_(optimizer, self._model, masks)

    def restart(self) -> None:
        """Let the optimizers forget all that they know of this model, step counts included."""
        for optimizer, _ in self._optimizers.values():
            for parameter in self._model.parameters():
                optimizer.state.pop(parameter, None)

    def catch_up(self) -> None:
        """Make the averaged copies what the model is now."""
        for average in self._averages:
            average.load_state_dict(self._model.state_dict())
