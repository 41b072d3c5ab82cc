"""A penalty on activations at work: hooks on the modules, one number to add to the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, RecipeError, WeightError
from secateur.forward import check_module
from secateur.types import ActivityPenalty

STATE_VERSION = 1


class PenalisedActivity:
    """Watches what modules put out while your own loop trains them.

    In training mode with gradients, every forward of the model starts :meth:`value` anew, and every call of a watched
    module adds to it. Add it to the loss. Nothing else changes: not the outputs, not the state dict; in evaluation mode
    nothing is watched.

    Args:
        model: The model, as you call it.
        penalty: The penalty.

    Raises:
        WeightError: When the penalty finds no module to press on.

    Example:
        >>> from secateur.penalties import Chauvin
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> active = PenalisedActivity(net, Chauvin(0.1, order=0))
        >>> x = torch.randn(8, 2)
        >>> loss = net(x).square().mean() + active.value()
        >>> bool(torch.isclose(active.value(), 0.1 * net[:2](x).square().sum(1).mean()))
        True
    """

    def __init__(self, model: nn.Module, penalty: ActivityPenalty) -> None:
        if isinstance(penalty, type) or not isinstance(penalty, ActivityPenalty):
            raise RecipeError(f"expected an ActivityPenalty such as Chauvin(1e-4), got {penalty!r}")
        check_module(model)
        self.penalty = penalty
        self._model = model
        self._names = penalty.modules(model)
        self._values: list[Tensor] = []
        self._handles: list[Any] = []
        self.attach()

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that are watched."""
        return self._names

    def attach(self) -> None:
        """Watch, until :meth:`detach`."""
        self.detach()
        self._handles = [self._model.register_forward_pre_hook(self._beginner())]
        for name in self._names:
            watched = self._model.get_submodule(name)
            self._handles.append(watched.register_forward_hook(self._watcher(name, watched)))

    def detach(self) -> None:
        """Stop watching, and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._values = [], []

    def value(self) -> Tensor:
        """Return the penalty on the model's last forward in training mode, one differentiable number.

        Raises:
            RecipeError: When there was none, or it ran none of the watched modules.
        """
        if not self._values:
            raise RecipeError(
                f"{self.penalty} has seen no activation: call value() after a forward pass in training mode, with "
                f"gradients, that runs {self._names[0]}"
            )
        return torch.stack([v.to(self._values[0]) for v in self._values]).sum()

    # Functions that know their module: a deep copy of the model (an average of it) takes its hooks along.

    def _beginner(self) -> Callable[[nn.Module, Any], None]:
        def begin(module: nn.Module, args: Any) -> None:
            if module is self._model and module.training and torch.is_grad_enabled():
                self._values = []

        return begin

    def _watcher(self, name: str, watched: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, args: Any, outputs: Any) -> None:
            if module is not watched or not (self._model.training and torch.is_grad_enabled()):
                return
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or not outputs.dim():
                raise WeightError(f"{name} puts out no tensor of activations ({type(outputs).__name__}); exclude it")
            # A copy: the layer behind may work in place.
            wide = torch.promote_types(outputs.dtype, torch.float32)
            self._values.append(self.penalty.value(outputs.to(wide, copy=True)))

        return see

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the penalty; there is nothing that changes from step to step."""
        return {"version": STATE_VERSION, "penalty": str(self.penalty), "modules": list(self._names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a state is that of this penalty on this model.

        Raises:
            CheckpointError: When it is not.
        """
        if dict(state) != self.state_dict():
            raise CheckpointError(f"the state is that of {dict(state)}, not of {self.state_dict()}")
