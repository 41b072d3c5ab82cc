"""The tables of a recipe: their fields, and what each builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from secateur.ablations import ABLATIONS, SmallerDense
from secateur.allocate import ALLOCATIONS
from secateur.errors import RecipeError, TargetError
from secateur.method import Method, Override
from secateur.patterns import PATTERNS
from secateur.penalties import PENALTIES
from secateur.recipe_parts import (
    Args,
    Count,
    Part,
    PartField,
    Positive,
    Reference,
    Section,
    Tuple,
    as_part,
    build_part,
    plain_part,
)
from secateur.recover import DISTILLATIONS, RECOVERIES, Distillation
from secateur.recover.retrain import Recovery
from secateur.schedules import SCHEDULES
from secateur.scores import GROUP_SCORES, SCORES
from secateur.solvers import SOLVERS
from secateur.targets import Kind, Target
from secateur.training import DYNAMICS, PARAMETRISATIONS
from secateur.types import Ablation, ActivityPenalty, Dynamics, Parametrisation, Pattern, Penalty


class ModelSection(Section):
    """Where the network comes from."""

    factory: Reference
    args: Args = Field(default_factory=dict)
    weights: str | None = None


class DataSection(Section):
    """Where the data comes from."""

    factory: Reference
    args: Args = Field(default_factory=dict)
    batch_size: Positive = 128
    eval_batch_size: Positive = 1000


class LatentsSection(Section):
    """How the optimizer treats what a parametrisation trains along: by default as weights, but without decay."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class TrainSection(Section):
    """Training to convergence, before or while pruning. No epochs: the weights are used as they are."""

    epochs: Count = 0
    optimizer: PartField = Part(name="adam", options={"lr": 1e-3})
    lr_schedule: PartField = Part(name="constant")
    penalty: PartField | None = None
    parametrisation: PartField | None = None
    latents: LatentsSection | None = None
    dynamics: PartField | None = None

    @property
    def prunes(self) -> bool:
        """Whether training itself makes the masks, by a parametrisation or by dynamics."""
        return self.parametrisation is not None or self.dynamics is not None

    def build_penalty(self) -> Penalty | ActivityPenalty | None:
        """Return the penalty, if there is one.

        Raises:
            RecipeError: When an option is wrong.
        """
        if self.penalty is None:
            return None
        penalty: Penalty | ActivityPenalty = build_part(PENALTIES, self.penalty, "train.penalty")
        return penalty

    def build_parametrisation(self) -> Parametrisation | None:
        """Return how weights are made anew in every forward pass, if they are.

        Raises:
            RecipeError: When an option is wrong.
        """
        if self.parametrisation is None:
            return None
        part: Parametrisation = build_part(PARAMETRISATIONS, self.parametrisation, "train.parametrisation")
        return part

    def build_dynamics(self) -> Dynamics | None:
        """Return how masks move, if they do.

        Raises:
            RecipeError: When an option is wrong.
        """
        if self.dynamics is None:
            return None
        part: Dynamics = build_part(DYNAMICS, self.dynamics, "train.dynamics")
        return part


class TargetSection(Section):
    """How much: exactly one of these."""

    sparsity: float | None = None
    kept_parameters: float | None = None
    compression_ratio: float | None = None
    macs: float | None = None
    channels: float | None = None

    @model_validator(mode="after")
    def _one(self) -> TargetSection:
        given = {k: v for k, v in self.model_dump().items() if v is not None}
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of sparsity, kept_parameters, compression_ratio, macs, channels; got {given}"
            )
        try:
            self.build()
        except TargetError as error:
            raise RecipeError(f"prune.target: {error}") from None
        return self

    def build(self) -> Target:
        """Return the target."""
        (kind, value), *_ = ((k, v) for k, v in self.model_dump().items() if v is not None)
        return Target(cast(Kind, kind), value)


class OverrideSection(Section):
    """A sparsity of its own for the weights that match."""

    match: str
    sparsity: Annotated[float, Field(ge=0, le=1)]


class PruneSection(Section):
    """The axes."""

    target: TargetSection | None = None
    score: PartField = Part(name="magnitude")
    pattern: PartField = Part(name="unstructured")
    allocate: PartField | None = None
    solver: PartField | None = None
    schedule: PartField = Part(name="one_shot")
    when: Literal["during", "after"] = "after"
    include: Tuple = ()
    exclude: Tuple = ()
    types: Tuple = ()
    overrides: Annotated[
        tuple[OverrideSection, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
    ] = ()
    allow_empty: bool = False
    ablate: PartField | None = None
    score_batches: Positive = 8

    def build(self, *, under_dynamics: bool = False) -> Method:
        """Return the method.

        Args:
            under_dynamics: Whether dynamics say when; the method is then one without a clock of its own.

        Raises:
            RecipeError: When parts exclude each other or an option is wrong.
        """
        return Method(
            target=None if self.target is None else self.target.build(),
            score=build_part(GROUP_SCORES if self.score.name in GROUP_SCORES else SCORES, self.score, "prune.score"),
            pattern=self.build_pattern(),
            allocate=None if self.allocate is None else build_part(ALLOCATIONS, self.allocate, "prune.allocate"),
            solver=None if self.solver is None else build_part(SOLVERS, self.solver, "prune.solver"),
            schedule=build_part(SCHEDULES, self.schedule, "prune.schedule"),
            when="after" if under_dynamics else self.when,
            include=self.include,
            exclude=self.exclude,
            types=self.types,
            overrides=tuple(Override(o.match, o.sparsity) for o in self.overrides),
            allow_empty=self.allow_empty,
            ablate=ablation if isinstance(ablation := self.build_ablation(), Ablation) else None,
        )

    def build_pattern(self) -> Pattern:
        """Return what is removed together.

        Raises:
            RecipeError: When an option is wrong.
        """
        pattern: Pattern = build_part(PATTERNS, self.pattern, "prune.pattern")
        return pattern

    def build_ablation(self) -> Ablation | SmallerDense | None:
        """Return what the method is robbed of, or compared with, if anything.

        Raises:
            RecipeError: When an option is wrong.
        """
        return None if self.ablate is None else build_part(ABLATIONS, self.ablate, "prune.ablate")


def _distill(value: object) -> object:
    unnamed = isinstance(value, Mapping) and "name" not in value
    return as_part({"name": "soft_targets", **value} if unnamed and isinstance(value, Mapping) else value)


class RecoverSection(Section):
    """What follows each pruning step."""

    retrain: PartField = Part(name="nothing")
    distill: Annotated[Part, BeforeValidator(_distill), PlainSerializer(plain_part)] | None = None
    penalise: bool = False
    batch_norm: Literal["rematch", "reestimate", "nothing"] = "rematch"
    batch_norm_samples: Annotated[int, Field(ge=2)] = 256

    def build(self) -> Recovery:
        """Return the retraining part.

        Raises:
            RecipeError: When an option is wrong.
        """
        recovery: Recovery = build_part(RECOVERIES, self.retrain, "recover.retrain")
        return recovery

    def build_distillation(self) -> Distillation | None:
        """Return what the retraining learns from the dense network, if anything.

        Raises:
            RecipeError: When an option is wrong.
        """
        return None if self.distill is None else build_part(DISTILLATIONS, self.distill, "recover.distill")


class MeasureSection(Section):
    """What is measured at the end."""

    latency: bool = True
    energy: bool = True
    runs: Annotated[int, Field(ge=2)] = 50
    warmup: Count = 10
    threads: Positive = 1
    batch: Positive = 1


class CheckpointSection(Section):
    """How often the run can be taken up again."""

    every_epochs: Positive = 1
    every_steps: Positive | None = None
