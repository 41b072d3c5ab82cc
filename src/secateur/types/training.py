"""Weights that are made anew in every forward pass, and masks that move while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from torch import Generator, Tensor

from secateur.types.patterns import Pattern
from secateur.types.values import Masks, Tensors, Weight


@dataclass(frozen=True)
class Moment:
    """Where a training stands, as a parametrisation sees it.

    Attributes:
        weights: The parameters that the optimizer trains, under their names: the weights, and what dies with their
            units.
        latents: The tensors that are trained beside them, under names that the parametrisation chose.
        layouts: The weights that are made anew in every forward pass.
        step: Number of the optimizer's steps so far.
    """

    weights: Tensors
    latents: Tensors
    layouts: Mapping[str, Weight]
    step: int = 0


@runtime_checkable
class Parametrisation(Protocol):
    """Weights made anew in every forward pass, from trained ones and from latent tensors trained along. Pure functions.

    :class:`~secateur.training.Reparametrised` keeps the latents and puts the weights that are made into the model.
    """

    def check(self, weight: Weight) -> None:
        """Raise :class:`~secateur.errors.PatternError` or ``TargetError`` where a weight cannot be made this way."""
        ...

    def asked(self, step: int | None) -> float | None:
        """Return the sparsity asked for after a step, or at the end (``None``); nothing where training finds it."""
        ...

    def start(self, weights: Tensors, layouts: Mapping[str, Weight], noise: Generator) -> dict[str, Tensor]:
        """Return the latents before the first step, float32 or float64; none where nothing is trained along."""
        ...

    def weights(self, at: Moment, noise: Generator | None) -> dict[str, Tensor]:
        """Return the parameters that training computes with; the same every time without ``noise``."""
        ...

    def final(self, at: Moment) -> tuple[dict[str, Tensor], Masks]:
        """Return the parameters of the finished network, exactly zero where their masks are ``False``."""
        ...

    def penalty(self, at: Moment) -> Tensor:
        """Return the term that belongs to the loss, one differentiable number."""
        ...

    def advance(self, at: Moment) -> dict[str, Tensor]:
        """Return the latents that change after an optimizer's step beyond what it did; often none."""
        ...


@runtime_checkable
class ActivationNoise(Parametrisation, Protocol):
    """A parametrisation whose noise is drawn per sample, on the outputs of layers, instead of on weights."""

    def variances(self, at: Moment) -> dict[str, Tensor]:
        """Return each weight's variance, of its shape; none where the noise is on the weights after all."""
        ...


@runtime_checkable
class PatternedParametrisation(Parametrisation, Protocol):
    """A parametrisation that closes more than single weights."""

    @property
    def pattern(self) -> Pattern:
        """What it removes together; masks that it ends in are of this pattern."""
        ...


@dataclass(frozen=True)
class Connections:
    """The units of one weight while it trains under a mask.

    Attributes:
        sizes: Magnitude of each unit, 1-D; of a masked one what its zeros give.
        active: Which units are not masked.
        gradients: Magnitude of the loss gradient of each unit, masked ones too; empty where nothing needs it.
    """

    sizes: Tensor
    active: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Turn:
    """A point in a training at which masks may move.

    Attributes:
        time: Steps or epochs trained, as the dynamics counts.
        final: Level of the target: the fraction of the budget that is to go in the end.
        units: Connections of each weight, where the dynamics needs them.
        select: ``select(level)``: the masks that score, allocation and pattern choose at a level; masked stays masked.
        reduce: Reads masks as active units per weight.
        expand: Writes flags of units per weight as masks, of the weights and of what goes with their units.
    """

    time: int
    final: float
    units: Mapping[str, Connections]
    select: Callable[[float], Masks]
    reduce: Callable[[Tensors], dict[str, Tensor]]
    expand: Callable[[Tensors], Masks]


@dataclass(frozen=True)
class Move:
    """Where the masks go. What leaves them is set to zero and forgotten by the optimizer; the rest is said here.

    Attributes:
        masks: The new masks; a weight without one is dense.
        level: The level that they stand for.
        zero: ``True`` where a parameter becomes zero now, masked or not.
        clear: ``True`` where the optimizer forgets its momentum. What comes back has gathered some while it was masked.
        restart: Whether the optimizer forgets everything, its step counts too.
    """

    masks: Masks
    level: float
    zero: Masks = field(default_factory=dict)
    clear: Masks = field(default_factory=dict)
    restart: bool = False


@runtime_checkable
class Dynamics(Protocol):
    """How masks move while a network trains. Pure: what it does depends on the turn and its own fields alone."""

    @property
    def unit(self) -> Literal["steps", "epochs"]:
        """What its times count."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """``"units"`` (weight by weight, of a pattern with a free density) and ``"gradients"``, or neither."""
        ...

    @property
    def sparse_start(self) -> bool:
        """Whether training starts at the target, with the masks of the method, or dense."""
        ...

    @property
    def last(self) -> int | None:
        """Time of the last move; 0 where there is none after the start, ``None`` where there is no end."""
        ...

    def due(self, time: int) -> bool:
        """Tell whether the masks move at a time; 1 is after the first step or epoch."""
        ...

    def update(self, turn: Turn) -> Move:
        """Return where the masks go."""
        ...
