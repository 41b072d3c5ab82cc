"""What the weights did during training: sums over the optimizer's steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError, MissingStatsError, RecipeError, WeightError, check_choice
from secateur.stats._common import wide
from secateur.types import Source

STATE_VERSION = 1
Sum = Literal["fall", "movement", "initial"]


class PathIntegral:
    r"""Watches any optimizer's steps and adds up, for every weight, what they did to the loss.

    With :math:`g_t` the gradient and :math:`\Delta w_t` what the step changed:

    .. math:: \texttt{fall} = \sum_t -g_t\, \Delta w_t, \qquad \texttt{movement} = \sum_t -g_t\, w_t, \qquad
              \texttt{initial} = w_0

    ``fall`` sums over all weights to the loss at the beginning less that at the end, the better the smaller the steps;
    with plain gradient descent it is :math:`\sum_t \Delta w_t^2 / \eta`. Two more numbers per weight, and a copy of
    weights and gradients during a step. Gradients are taken as the optimizer finds them: clipped, and with what weight
    penalties of others have added; decay inside the optimizer is in :math:`\Delta w` only.

    Args:
        model: The model.
        optimizer: Any optimizer whose step takes no closure; :meth:`attach` does it later.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = net.weight.fill_(2.0)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> path = PathIntegral(net, optimizer)
        >>> net.weight.square().sum().backward()  # gradient 4: the step is -0.4
        >>> optimizer.step()
        >>> round(float(path.sums("fall")["weight"]), 4), float(path.sums("movement")["weight"])
        (1.6, -8.0)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []
        self.restart()
        if optimizer is not None:
            self.attach(optimizer)

    @property
    def steps(self) -> int:
        """Steps seen."""
        return self._steps

    def restart(self) -> None:
        """Begin anew from the weights as they are."""
        self._steps = 0
        self._sums: dict[str, dict[str, Tensor]] = {"fall": {}, "movement": {}, "initial": {}}
        for name, p in self._parameters().items():
            self._sums["initial"][name] = p.detach().clone()
            for what in ("fall", "movement"):
                self._sums[what][name] = torch.zeros_like(p, dtype=wide(p.dtype), requires_grad=False)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._model.named_parameters() if p.is_floating_point()}

    def attach(self, optimizer: Optimizer) -> None:
        """Watch an optimizer, until :meth:`detach`; one at a time.

        Raises:
            WeightError: When it is none, or holds no weight of the model.
        """
        if not isinstance(optimizer, Optimizer):
            raise WeightError(f"expected a torch.optim.Optimizer, got a {type(optimizer).__name__}")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self._parameters().values()):
            raise WeightError("the optimizer holds none of this model's weights; build it from this model's parameters")
        self.detach()
        self._handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._add),
        ]

    def detach(self) -> None:
        """Stop; the sums stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(a is not None and a is not optimizer for a in (*args, *kwargs.values())):
            raise RecipeError(
                "the optimizer computes gradients again inside its step (a closure), so there is no gradient to add "
                "up; detach() the path integral, or train with an optimizer whose step takes none"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        scale = getattr(optimizer, "grad_scale", None)  # fused optimizers take the loss scale off themselves
        self._before = {
            n: (p.detach().clone(), p.grad.clone() if scale is None else p.grad / scale)
            for n, p in self._parameters().items()
            if id(p) in held and p.grad is not None
        }

    @torch.no_grad()
    def _add(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before, self._before = self._before, {}
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return  # the step was skipped
        parameters = self._parameters()
        for name, (weight, gradient) in before.items():
            fall, movement = self._sums["fall"][name], self._sums["movement"][name]
            gradient, weight = gradient.to(fall), weight.to(fall)
            fall -= gradient * (parameters[name].detach().to(fall) - weight)
            movement -= gradient * weight
        self._steps += 1

    def sums(self, what: Sum) -> dict[str, Tensor]:
        """Return one of the sums, by parameter.

        Args:
            what: ``"fall"``, ``"movement"`` or ``"initial"``.

        Raises:
            MissingStatsError: When no step was seen.
        """
        check_choice("path integral: what", what, get_args(Sum))
        if not self._steps:
            raise MissingStatsError(
                "the path integral has seen no step of an optimizer: attach it before training, "
                "PathIntegral(model, optimizer), and prune after"
            )
        return {name: value.clone() for name, value in self._sums[what].items()}

    def state_dict(self) -> dict[str, Any]:
        """Return counter and copies of the sums; saves without pickle."""
        sums = {what: {n: t.clone() for n, t in table.items()} for what, table in self._sums.items()}
        return {"version": STATE_VERSION, "steps": self._steps, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            CheckpointError: When it is none, or that of another model; nothing is changed then.
        """
        try:
            version, steps = state["version"], int(state["steps"])
            sums = {what: dict(state["sums"][what]) for what in self._sums}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not the state of a path integral: {type(error).__name__}: {error}") from error
        if version != STATE_VERSION or steps < 0:
            raise CheckpointError(
                f"a path integral's state of version {version!r}, step {steps}; this reads {STATE_VERSION}"
            )
        for what, table in self._sums.items():
            odd = table.keys() ^ sums[what].keys()
            odd |= {n for n in table.keys() - odd if getattr(sums[what][n], "shape", None) != table[n].shape}
            if odd:
                raise CheckpointError(f"the path integral's state is that of another model: see {sorted(odd)[:4]}")
        self._steps = steps
        self._sums = {
            what: {n: sums[what][n].detach().clone().to(t) for n, t in table.items()}
            for what, table in self._sums.items()
        }


@dataclass(frozen=True)
class Trajectory:
    """One of the sums over training that a :class:`PathIntegral` keeps.

    Args:
        what: ``"fall"``, ``"movement"`` or ``"initial"``.
        path: Who watched the training; ``None`` in a recipe, whose run attaches one.
    """

    what: Sum
    path: PathIntegral | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_choice("trajectory: what", self.what, get_args(Sum))
        if self.path is not None and not isinstance(self.path, PathIntegral):
            raise MissingStatsError(f"path is a {type(self.path).__name__}: {HOW}")

    @property
    def uses(self) -> frozenset[str]:
        """A trajectory, where there is none yet."""
        return frozenset() if self.path is not None else frozenset({"trajectory"})

    @property
    def elementwise(self) -> bool:
        """Each weight has a number of its own."""
        return True

    def collect(self, source: Source) -> dict[str, Tensor]:
        """Look it up.

        Raises:
            MissingStatsError: When nobody watched, or something else than these weights.
        """
        if self.path is None:
            raise MissingStatsError(f"{self} of what? {HOW}")
        found = self.path.sums(self.what)
        for name, parameter in source.parameters.items():
            if name not in found or found[name].shape != parameter.shape:
                raise MissingStatsError(
                    f"the path integral did not watch {name} of shape {tuple(parameter.shape)}: it is another model's"
                )
        return {name: found[name].to(p.device) for name, p in source.parameters.items()}


HOW = (
    "make path = PathIntegral(model, optimizer) before training, and give it to the score: Karnin(path=path); "
    "the run of a recipe does so by itself"
)
"""What to do where a trajectory is missing."""
