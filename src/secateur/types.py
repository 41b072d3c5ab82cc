"""Every protocol and value that crosses a module boundary: read this page and you know the library.

A pruning method is one value on each axis:

    stats -> score -> pattern.reduce to units -> allocate -> select exactly k -> masks -> solver -> recover

Words: *density* = fraction kept, *sparsity* = fraction removed, *k* = number kept, mask ``True`` = keep,
a high score = keep, *macs* = multiply-accumulates. A *unit* is what is removed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor
from torch.nn import Module, Parameter

Tensors = Mapping[str, Tensor]
"""Tensors keyed by the qualified name of the parameter they belong to."""

Stats = Mapping[Any, Any]
"""What was collected, keyed by what a part lists in ``needs``: tensors by parameter, or what a statistic returns."""

Masks = dict[str, Tensor]
"""Bool tensors of the parameters' shapes, keyed by qualified parameter name; ``True`` = keep."""


@dataclass(frozen=True)
class Source:
    """What statistics are collected from.

    Attributes:
        model: The model, pruned so far.
        parameters: The prunable parameters by name.
        loss_fn: ``loss_fn(model, batch)``, if there is one.
        batches: Returns the batches anew, if there are any.
        example_inputs: What one forward pass takes, if it is known: a tensor, a tuple, a dict, or ``(tuple, dict)``.
        masks: Masks so far; empty before the first update.
    """

    model: Module
    parameters: Mapping[str, Parameter]
    loss_fn: Callable[[Module, Any], Tensor] | None = None
    batches: Callable[[], Iterable[Any]] | None = None
    example_inputs: Any = None
    masks: Tensors = field(default_factory=dict)


@runtime_checkable
class Statistic(Protocol):
    """Something to measure, with its options. Hashable: equal ones that several parts need are collected once."""

    @property
    def uses(self) -> frozenset[str]:
        """What it looks at: ``"loss"``, ``"batches"``, ``"example_inputs"``; missing ones are refused early.

        ``"trajectory"`` stands for a training that nobody has watched yet.
        """
        ...

    @property
    def elementwise(self) -> bool:
        """Whether it is one tensor per parameter, of the parameter's shape; only such can be added up over units."""
        ...

    def collect(self, source: Source) -> Any:
        """Measure. Modes, buffers and ``.grad`` of the model are as before afterwards."""
        ...


Need = str | Statistic
"""What a part lists in ``needs``: the name of a simple statistic, or one with options."""


@dataclass(frozen=True)
class Weight:
    """A prunable parameter and the meaning of its dimensions.

    Attributes:
        name: Qualified name of the parameter, ``"layer1.0.conv1.weight"``.
        shape: Shape of the parameter.
        out_dim: Dimension that indexes output units.
        in_dim: Dimension that indexes input units; all others are kernel positions.
        groups: Groups of a grouped convolution.
        transposed: ``True`` where ``out_dim`` counts per group (transposed convolutions).
        bias: Name of the parameter with one entry per output unit that dies with it, if any.
        companions: Further parameters with one entry per output unit that die with it: scale and shift of its norm.
        kind: Class name of the owning module.
    """

    name: str
    shape: tuple[int, ...]
    out_dim: int = 0
    in_dim: int = 1
    groups: int = 1
    transposed: bool = False
    bias: str | None = None
    companions: tuple[str, ...] = ()
    kind: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def sizes(self) -> tuple[int, ...]:
        """Outputs, inputs of one group, kernel positions: the shape in one order for every layout."""
        kernel = (n for i, n in enumerate(self.shape) if i not in (self.out_dim, self.in_dim))
        return (self.shape[self.out_dim], self.shape[self.in_dim], *kernel)


@dataclass(frozen=True)
class Units:
    """One weight's units, scored and priced, as the allocation sees them.

    Attributes:
        scores: One score per unit, 1-D, float32 or float64; ``-inf`` marks a unit already pruned.
        cost: Cost of one unit, in the budget's currency: the same for all, or one per unit.
        floor: Fewest units that must stay.
        kind: The same word for sets of units of one structure (the attention heads of all blocks), for allocations
            that compare only like with like.
        shape: The weight's dimensions: outputs, inputs (of one group), kernel positions; empty for units of several
            tensors, which have none in common.
        edge: ``"first"`` for the network's first convolution and ``"last"`` for its last layer, where that is known.
    """

    scores: Tensor
    cost: float | Tensor
    floor: int = 1
    kind: str = ""
    shape: tuple[int, ...] = ()
    edge: Literal["", "first", "last"] = ""


@dataclass(frozen=True)
class Budget:
    """What may stay.

    Attributes:
        kept: Total cost that may stay over all prunable weights.
        total: Total cost of the prunable weights when dense.
        cost: Cost of one element of each weight (1 for parameters, output positions for MACs).
        currency: ``"weights"`` or ``"macs"``.
    """

    kept: float
    total: float
    cost: Mapping[str, float]
    currency: str = "weights"


@runtime_checkable
class Score(Protocol):
    """Importance of every element of every weight: higher means keep. A pure function."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that must be collected first."""
        ...

    def __call__(self, weights: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return one float score per element, of each weight's shape."""
        ...


@dataclass(frozen=True)
class MemberView:
    """What a group of coupled units owns of one tensor.

    Attributes:
        name: Qualified name of the tensor.
        role: ``"out"`` (rows that make the units), ``"in"`` (columns that read them), ``"norm"`` (scale of a
            normalisation), ``"bias"`` or ``"other"``.
        values: Shape (units, elements per unit).
    """

    name: str
    role: str
    values: Tensor


@dataclass(frozen=True)
class GroupView:
    """A group of coupled units, as a score sees it.

    Attributes:
        name: Name of the group.
        units: How many there are.
        members: What they own, tensor by tensor.
    """

    name: str
    units: int
    members: tuple[MemberView, ...]

    def of(self, *roles: str) -> tuple[MemberView, ...]:
        """Return the members of some roles."""
        return tuple(m for m in self.members if m.role in roles)


@runtime_checkable
class GroupScore(Protocol):
    """Importance of every unit of a coupled group: higher means keep. A pure function."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that must be collected first."""
        ...

    def units(self, group: GroupView, stats: Stats) -> Tensor | None:
        """Return one float score per unit, or ``None`` where the score says nothing about such a group."""
        ...


@runtime_checkable
class OutputScore(GroupScore, Protocol):
    """A group score without labels: it says itself in which directions a change of the outputs matters."""

    @property
    def seed(self) -> int:
        """Seed of the directions."""
        ...

    def directions(self, outputs: Tensor, generator: Generator) -> Tensor:
        """Return one random direction per sample, of the outputs' shape."""
        ...


@runtime_checkable
class Pattern(Protocol):
    """What is removed together. Axis order and padding are the pattern's business alone."""

    @property
    def density(self) -> float | None:
        """The density this pattern always has, or ``None`` when it is free."""
        ...

    def check(self, weight: Weight) -> None:
        """Raise :class:`~secateur.errors.PatternError` where the pattern cannot be laid over the weight."""
        ...

    def reduce(self, weight: Weight, values: Tensor) -> Tensor:
        """Turn element scores into unit scores, 1-D."""
        ...

    def sizes(self, weight: Weight) -> int | Tensor:
        """Elements per unit: one number, or one per unit where they differ."""
        ...

    def select(self, weight: Weight, scores: Tensor, keep: int) -> Tensor:
        """Choose exactly ``keep`` units; ties lose the lowest index first."""
        ...

    def expand(self, weight: Weight, kept: Tensor) -> Masks:
        """Turn kept units into element masks, of the weight and of what dies with its units."""
        ...


@runtime_checkable
class UnitPattern(Protocol):
    """Units that no mask over one weight can express: they can only be cut out, with everything that is theirs."""

    @property
    def unit(self) -> Literal["expert", "layer"]:
        """What a unit is."""
        ...


@runtime_checkable
class Allocation(Protocol):
    """How much to keep where."""

    def __call__(self, units: Mapping[str, Units], kept: float) -> dict[str, int]:
        """Return the number of units that stay in each weight, at a total cost of at most ``kept``."""
        ...


@runtime_checkable
class FlooredAllocation(Allocation, Protocol):
    """An allocation that never takes all of some layers, so that targets out of its reach are refused early."""

    def floor(self, units: int, edge: Literal["", "first", "last"]) -> int:
        """Return the fewest of a layer's units that stay, by the layer's place in the network."""
        ...


@runtime_checkable
class Solver(Protocol):
    """What the surviving weights become when others go. A pure function."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that must be collected first, of the network before this step's weights go."""
        ...

    def solve(self, weights: Tensors, masks: Tensors, stats: Stats) -> dict[str, Tensor]:
        """Return new values of the weights, of their shapes and types, zero where a mask is ``False``.

        Args:
            weights: The prunable weights before the step.
            masks: What stays of each, earlier steps included.
            stats: What it needs.
        """
        ...


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


@dataclass(frozen=True)
class Update:
    """One pruning step.

    Attributes:
        masks: The new masks.
        values: New values of weights that survive, where something makes up for those that go.
    """

    masks: Masks
    values: Tensors = field(default_factory=dict)


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


@runtime_checkable
class Ablation(Protocol):
    """What a method is robbed of, to see what that was worth: where its zeros lie, or the weights that it leaves."""

    @property
    def restarts(self) -> bool:
        """Whether all weights start anew after the last pruning step."""
        ...

    def check(self, pattern: object, *, rounds: bool) -> None:
        """Raise :class:`~secateur.errors.RecipeError` for a pattern, or a schedule not in rounds, that does not go."""
        ...

    def masks(self, weights: Mapping[str, Weight], pattern: Pattern, masks: Masks, previous: Tensors | None) -> Masks:
        """Return what to use in place of the method's own masks; pruned stays pruned."""
        ...

    def restart_(self, model: Module) -> None:
        """Give all weights new values, where it restarts."""
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


@dataclass(frozen=True)
class LayerReport:
    """What happened to one weight."""

    name: str
    shape: tuple[int, ...]
    total: int
    kept: int

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1.0 - self.kept / self.total if self.total else 0.0


@dataclass(frozen=True)
class GroupReport:
    """One coupled group.

    Attributes:
        name: Its name.
        units: Units before.
        kept: Units after.
        members: Tensors and dimensions that shrink with it, ``"layer1.0.conv1.weight[0]"``, and modules that go with
            its units, ``"mixture.experts.3"``.
    """

    name: str
    units: int
    kept: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class PruneReport:
    """Asked beside achieved: what every pruning step returns.

    Attributes:
        target: Name of the target, as in the recipe.
        asked: The target's value at this point of the schedule.
        achieved: The same quantity, counted on the masks.
        goal: The target's value at the end of the schedule.
        finished: Whether the schedule has reached its end.
        sparsity: Fraction of the prunable weights that is zero by mask.
        layers: One row per weight.
        skipped: Weights left alone, and why; with coupled units, groups.
        groups: One row per coupled group, where units of coupled groups are pruned.
        ablation: What the method was robbed of, in words; empty for the method itself.
    """

    target: str
    asked: float
    achieved: float
    goal: float
    finished: bool
    sparsity: float
    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[GroupReport, ...] = ()
    ablation: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "target": self.target,
            "asked": self.asked,
            "achieved": self.achieved,
            "goal": self.goal,
            "finished": self.finished,
            "sparsity": self.sparsity,
            "layers": [
                {"name": r.name, "shape": list(r.shape), "total": r.total, "kept": r.kept, "sparsity": r.sparsity}
                for r in self.layers
            ],
            "skipped": dict(self.skipped),
            "groups": [{"name": g.name, "units": g.units, "kept": g.kept} for g in self.groups],
            "ablation": self.ablation,
        }
