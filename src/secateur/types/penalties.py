"""What presses on weights during training, and the coupled units it presses on together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Module

from secateur.types.values import Tensors


@runtime_checkable
class Penalty(Protocol):
    """A term R(w; s) that presses on weights during training, with a state s of tensors. Its functions are pure.

    :class:`~secateur.penalties.Penalised` calls them around an optimizer's steps and keeps the state. A penalty acts
    before a step, by its gradient; or after it, by its proximal step, the only way to exact zeros; or both.
    """

    def parameters(self, model: Module) -> tuple[str, ...]:
        """Return the names of the parameters that it presses on."""
        ...

    def start(self, weights: Tensors) -> dict[str, Tensor]:
        """Return the state before the first step; empty where nothing changes from step to step."""
        ...

    def value(self, weights: Tensors, state: Tensors) -> Tensor:
        """Return R, one differentiable number."""
        ...

    def gradient(self, weights: Tensors, state: Tensors) -> dict[str, Tensor]:
        """Return dR/dw (a subgradient where there is none), or nothing where it acts by the proximal step alone."""
        ...

    def proximal(self, weights: Tensors, state: Tensors, rates: Tensors) -> dict[str, Tensor]:
        """Return argmin_x (x - w)^2 / (2 rate) + R(x) for a step's rates, one per weight or element, or nothing."""
        ...

    def advance(self, weights: Tensors, state: Tensors, step: int, loss: float | None) -> dict[str, Tensor]:
        """Return the state for the next step: after step number ``step``, and the loss, if somebody told it."""
        ...


@runtime_checkable
class LossPenalty(Penalty, Protocol):
    """A penalty that may adapt to the training loss: then no step is taken before somebody told it."""

    @property
    def follows_loss(self) -> bool:
        """Whether it does, as it was built."""
        ...


@runtime_checkable
class ActivityPenalty(Protocol):
    """A term R(o) on what modules put out, and so no function of the weights. Its functions are pure.

    :class:`~secateur.penalties.PenalisedActivity` watches the modules and hands out R, to be added to the loss.
    """

    def modules(self, model: Module) -> tuple[str, ...]:
        """Return the names of the modules whose outputs it presses on."""
        ...

    def value(self, outputs: Tensor) -> Tensor:
        """Return R of one module's outputs on a batch, samples first: one differentiable number."""
        ...


@dataclass(frozen=True)
class CoupledSlices:
    """Where the units of a group are in one dimension of one parameter.

    Attributes:
        name: Qualified name of the parameter.
        dim: The dimension.
        units: For every index of the dimension, the unit that it belongs to, or -1.
    """

    name: str
    dim: int
    units: tuple[int, ...]

    @cached_property
    def index(self) -> Tensor:
        """The units as a tensor, made once: penalties ask for it in every step."""
        return torch.tensor(self.units)


@dataclass(frozen=True)
class CoupledGroup:
    """Units that have their places in several parameters, for penalties that press on all of a unit together.

    Attributes:
        name: Name of the group.
        units: How many there are.
        slices: Their places.
    """

    name: str
    units: int
    slices: tuple[CoupledSlices, ...] = field(repr=False)
