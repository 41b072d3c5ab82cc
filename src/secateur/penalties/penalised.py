"""A penalty at work: around every step of any optimizer, with a state that resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError, MissingStatsError, RecipeError, WeightError
from secateur.forward import check_module
from secateur.masks import parameters_of
from secateur.types import ActivityPenalty, LossPenalty, Penalty

STATE_VERSION = 1


class Penalised:
    """Presses on a model's weights while your own loop trains it.

    The penalty's gradient is added to ``.grad`` before each of the optimizer's steps, its proximal step is taken after
    it: both on the optimizer's own hooks, so that nothing in the loop changes. Gradients that you clip are clipped
    before the penalty is added. Parameters without a gradient in a step, and frozen ones, are left alone. Under a
    ``GradScaler`` that the optimizer handles itself (fused optimizers) the penalty's gradient is scaled along, and a
    step that is skipped for overflow is no step. The proximal step is measured by how far the optimizer moves a weight
    for a gradient: the learning rate, momentum, and the scaling of Adam, RMSprop and Adagrad; of others the learning
    rate alone.

    Args:
        model: The model.
        penalty: The penalty.
        optimizer: Any optimizer that holds all the weights that are pressed on; :meth:`attach` does it later.

    Raises:
        WeightError: When the penalty finds nothing to press on, or the optimizer does not hold it.

    Example:
        >>> from secateur.penalties import ScaleL1
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> penalised = Penalised(net, ScaleL1(0.5, proximal_step=True), optimizer=optimizer)
        >>> net(torch.zeros(4, 4)).sum().backward()
        >>> optimizer.step()
        >>> round(float(net[1].weight[0].detach()), 2)  # 1 - 0.1 * 0.5, of a scale that the loss does not ask for
        0.95
    """

    def __init__(self, model: nn.Module, penalty: Penalty, *, optimizer: Optimizer | None = None) -> None:
        if isinstance(penalty, ActivityPenalty) and not isinstance(penalty, type):
            raise RecipeError(f"{penalty} presses on activations; use PenalisedActivity(model, penalty)")
        if isinstance(penalty, type) or not isinstance(penalty, Penalty):
            raise RecipeError(f"expected a Penalty such as ScaleL1(1e-4), got {penalty!r}")
        self.penalty = penalty
        check_module(model)
        names = dict.fromkeys(penalty.parameters(model))
        self._parameters = {n: p for n, p in parameters_of(model, names).items() if p.requires_grad}
        if not self._parameters:
            raise WeightError(f"everything that {penalty} would press on is frozen")
        self._steps, self._loss = 0, None  # type: tuple[int, float | None]
        self._follows_loss = isinstance(penalty, LossPenalty) and penalty.follows_loss
        with torch.no_grad():
            weights = self._weights()
            self._state = penalty.start(weights)
            still = {n: torch.zeros(()).to(w) for n, w in weights.items()}
            self._proximal = bool(penalty.proximal(weights, self._state, still))
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []
        if optimizer is not None:
            self.attach(optimizer)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weights that are pressed on."""
        return tuple(self._parameters)

    def value(self) -> Tensor:
        """Return the penalty as one differentiable number, for a log, or for optimizers that compute the loss again."""
        return self.penalty.value(self._parameters, self._state)

    def observe(self, loss: float) -> None:
        """Tell the penalty the training loss; those that adapt to it look at the last one before a step.

        They refuse a step (before anything moves) as long as there is none, or when it is not finite.
        """
        self._loss = float(loss)

    def attach(self, optimizer: Optimizer) -> None:
        """Act around every step of an optimizer, until :meth:`detach`; one at a time.

        Raises:
            WeightError: When it does not hold all the weights that are pressed on.
        """
        if not isinstance(optimizer, Optimizer):
            raise WeightError(f"expected a torch.optim.Optimizer, got a {type(optimizer).__name__}")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [n for n, p in self._parameters.items() if id(p) not in held]
        if missing:
            raise WeightError(
                f"the optimizer does not hold {missing[0]} ({len(missing)} of {len(self._parameters)} weights that the "
                "penalty presses on); build it from this model's parameters, or exclude them from the penalty"
            )
        self.detach()
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def detach(self) -> None:
        """Stop; weights and state stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    def _weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self._parameters.items()}

    def _check_loss(self, optimizer: Optimizer) -> None:
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return  # no step will be taken
        if self._loss is None or not math.isfinite(self._loss):
            what = "nobody told it" if self._loss is None else f"the last one it was told is {self._loss}"
            raise MissingStatsError(
                f"{self.penalty} follows the training loss, and {what}: call penalised.observe(loss) before the "
                "optimizer's step, or give it a fixed strength"
            )

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._follows_loss:
            self._check_loss(optimizer)
        pressed = self.penalty.gradient(self._weights(), self._state)
        if pressed and any(a is not None and a is not optimizer for a in (*args, *kwargs.values())):
            raise RecipeError(
                f"the optimizer computes gradients again inside its step (a closure), where {self.penalty} cannot add "
                "its own; add penalised.value() to the loss in the closure, and detach()"
            )
        scale = getattr(optimizer, "grad_scale", None)  # fused optimizers take the loss scale off themselves
        upwards = {id(p) for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}
        for name, gradient in pressed.items():
            grad = self._parameters[name].grad
            if grad is not None:
                sign = -1 if id(self._parameters[name]) in upwards else 1  # the penalty is always to fall
                grad.add_(gradient.to(grad) if scale is None else gradient.to(grad) * scale, alpha=sign)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        weights = self._weights()
        if self._proximal:
            groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            rates = {n: _rate(optimizer, groups[id(p)], p) for n, p in self._parameters.items()}
            for name, value in self.penalty.proximal(weights, self._state, rates).items():
                if self._parameters[name].grad is not None:
                    self._parameters[name].copy_(value)
        self._state = self.penalty.advance(weights, self._state, self._steps, self._loss)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and copies of the state's tensors; saves without pickle."""
        return {
            "version": STATE_VERSION,
            "penalty": str(self.penalty),
            "steps": self._steps,
            "loss": self._loss,
            "state": {name: tensor.clone() for name, tensor in self._state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            CheckpointError: When it is none, or that of another penalty or model; nothing is changed then.
        """
        try:
            version, penalty, own = state["version"], state["penalty"], dict(state["state"])
            steps, loss = int(state["steps"]), state["loss"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not the state of a penalty: {type(error).__name__}: {error}") from error
        if version != STATE_VERSION:
            raise CheckpointError(f"the penalty's state has version {version!r}; this reads {STATE_VERSION}")
        if penalty != str(self.penalty):
            raise CheckpointError(f"the state is that of {penalty}, not of {self.penalty}")
        shapes = {n: tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for n, t in own.items()}
        if shapes != {n: tuple(t.shape) for n, t in self._state.items()}:
            raise CheckpointError(f"the penalty's state does not fit this model: it has {shapes}")
        if steps < 0:
            raise CheckpointError(f"the penalty's state stands at step {steps}: it is damaged")
        self._state = {n: own[n].detach().clone().to(t) for n, t in self._state.items()}
        self._steps, self._loss = steps, None if loss is None else float(loss)


def _rate(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> Tensor:
    """Return how far a steady gradient of one moves a weight in a step: one number, or one per element.

    With momentum that is further than the learning rate, and adaptive optimizers rescale it element by element. The
    proximal step in that measure ends at the minimum of loss and penalty, as the gradient form does; with the plain
    learning rate it would not.
    """
    momentum = float(group.get("momentum") or 0.0)
    rate = float(group["lr"]) * (1 - float(group.get("dampening") or 0.0) if momentum else 1.0) / (1 - momentum)
    state, eps = optimizer.state.get(parameter, {}), float(group.get("eps") or 0.0)
    if "exp_avg_sq" in state and "betas" in group:  # Adam and its kin
        square: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (
            1 - group["betas"][1] ** float(state["step"])
        )
    elif "square_avg" in state:  # RMSprop
        square = state["square_avg"] - state["grad_avg"].square() if group.get("centered") else state["square_avg"]
    elif "sum" in state:  # Adagrad
        square = state["sum"]
        rate /= 1 + (float(state["step"]) - 1) * float(group.get("lr_decay") or 0.0)
    else:
        return torch.tensor(rate, dtype=torch.float64).to(parameter)
    return rate / (square.clamp_min(0.0).sqrt() + max(eps, 1e-30))
