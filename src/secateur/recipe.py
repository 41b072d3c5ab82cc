"""The recipe: one validated description of a run, in TOML, YAML or JSON.

Nothing that the recipe names is imported while it is read: a wrong field, value or pair of parts is refused before
any of the user's code runs.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PydanticUserError,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from secateur.ablations import ABLATIONS, SmallerDense
from secateur.allocate import ALLOCATIONS
from secateur.errors import RecipeError, SecateurError, TargetError, nearest
from secateur.export import FORMATS
from secateur.method import Method, Override
from secateur.patterns import PATTERNS, Channel
from secateur.penalties import PENALTIES
from secateur.pipeline.distill import check_distillation
from secateur.pipeline.optim import LEARNING_RATES, check_optimizer
from secateur.pipeline.tasks import TASKS
from secateur.recipe_files import parse
from secateur.recover import DISTILLATIONS, RECOVERIES, Distillation, Nothing
from secateur.recover.retrain import Recovery
from secateur.registry import Registry
from secateur.schedules import SCHEDULES
from secateur.scores import GROUP_SCORES, SCORES
from secateur.solvers import SOLVERS
from secateur.targets import Kind, Target
from secateur.types import Ablation, ActivityPenalty, Penalty, Score

Reference = Annotated[str, StringConstraints(pattern=r"^([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[\w./\-]+\.py):[A-Za-z_]\w*$")]
"""``package.module:function`` or ``file.py:function`` (relative to the recipe)."""


def _plain_value(value: object, where: str = "args") -> object:
    """Accept what TOML, YAML and JSON all have: text, finite numbers, booleans, lists and tables."""
    if isinstance(value, dict):
        return {str(k): _plain_value(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(v, where) for v in value]
    if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{where} is {value!r}; a recipe holds text, finite numbers, true, false, lists and tables")


Args = Annotated[dict[str, Any], BeforeValidator(_plain_value)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A table of the recipe: no unknown fields, no coercion, no changes after validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Part(Section):
    """A registered part and its options: ``"magnitude"`` or ``{name = "magnitude", p = 2}``."""

    name: str
    options: dict[str, Any] = {}


def _part(value: object) -> object:
    if isinstance(value, str):
        return Part(name=value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return Part(name=value["name"], options={k: v for k, v in value.items() if k != "name"})
    if isinstance(value, Part):
        return value
    raise ValueError(f"expected a name or a table with a name, got {value!r}")


def _plain(part: Part) -> dict[str, Any]:
    return {"name": part.name, **part.options}


def _distill(value: object) -> object:
    unnamed = isinstance(value, Mapping) and "name" not in value
    return _part({"name": "soft_targets", **value} if unnamed and isinstance(value, Mapping) else value)


PartField = Annotated[Part, BeforeValidator(_part), PlainSerializer(_plain)]
Tuple = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class ModelSection(Section):
    """Where the network comes from."""

    factory: Reference
    args: Args = {}
    weights: str | None = None


class DataSection(Section):
    """Where the data comes from."""

    factory: Reference
    args: Args = {}
    batch_size: Positive = 128
    eval_batch_size: Positive = 1000


class TrainSection(Section):
    """Training to convergence, before or while pruning. No epochs: the weights are used as they are."""

    epochs: Count = 0
    optimizer: PartField = Part(name="adam", options={"lr": 1e-3})
    lr_schedule: PartField = Part(name="constant")
    penalty: PartField | None = None

    def build_penalty(self) -> Penalty | ActivityPenalty | None:
        """Return the penalty, if there is one.

        Raises:
            RecipeError: When an option is wrong.
        """
        if self.penalty is None:
            return None
        penalty: Penalty | ActivityPenalty = build_part(PENALTIES, self.penalty, "train.penalty")
        return penalty


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

    def build(self) -> Method:
        """Return the method.

        Raises:
            RecipeError: When parts exclude each other or an option is wrong.
        """
        return Method(
            target=None if self.target is None else self.target.build(),
            score=build_part(GROUP_SCORES if self.score.name in GROUP_SCORES else SCORES, self.score, "prune.score"),
            pattern=build_part(PATTERNS, self.pattern, "prune.pattern"),
            allocate=None if self.allocate is None else build_part(ALLOCATIONS, self.allocate, "prune.allocate"),
            solver=None if self.solver is None else build_part(SOLVERS, self.solver, "prune.solver"),
            schedule=build_part(SCHEDULES, self.schedule, "prune.schedule"),
            when=self.when,
            include=self.include,
            exclude=self.exclude,
            types=self.types,
            overrides=tuple(Override(o.match, o.sparsity) for o in self.overrides),
            allow_empty=self.allow_empty,
            ablate=ablation if isinstance(ablation := self.build_ablation(), Ablation) else None,
        )

    def build_ablation(self) -> Ablation | SmallerDense | None:
        """Return what the method is robbed of, or compared with, if anything.

        Raises:
            RecipeError: When an option is wrong.
        """
        return None if self.ablate is None else build_part(ABLATIONS, self.ablate, "prune.ablate")


class RecoverSection(Section):
    """What follows each pruning step."""

    retrain: PartField = Part(name="nothing")
    distill: Annotated[Part, BeforeValidator(_distill), PlainSerializer(_plain)] | None = None
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


class Recipe(Section):
    """Everything that determines a run."""

    version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=r"^[\w][\w .+:%\-]{0,99}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Positive | None = None
    task: str = "classification"
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    prune: PruneSection
    recover: RecoverSection = RecoverSection()
    export: Tuple = ("safetensors",)
    measure: MeasureSection = MeasureSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _parts_exist_and_fit(self) -> Recipe:
        method, recovery = self.prune.build(), self.recover.build()
        check_optimizer(self.train.optimizer.name, self.train.optimizer.options)
        build_part(LEARNING_RATES, self.train.lr_schedule, "train.lr_schedule")
        TASKS[self.task]
        self._check_penalty(recovery)
        for name in self.export:
            if name not in FORMATS:
                raise RecipeError(f"export: unknown format {name!r}; {nearest(name, FORMATS)}")
        _check_coupled(method)
        check_distillation(
            self.recover.build_distillation(), recovery, task=self.task, when=method.when, weights=self.model.weights
        )
        recovery.check(self.train.epochs)
        schedule = method.schedule
        if recovery.rewinds_weights and schedule.unit != "rounds" and method.when == "after":
            raise RecipeError(
                "recover.retrain 'weight_rewinding' and a schedule in steps or epochs after training exclude each "
                "other: rewinding starts a round. Use a schedule with unit = 'rounds'"
            )
        if schedule.unit == "epochs":
            where = "train.epochs" if method.when == "during" else "recover.retrain.epochs"
            epochs = self.train.epochs if method.when == "during" else recovery.length(self.train.epochs, 1)
            if schedule.time(schedule.updates - 1) > epochs or not epochs:
                raise RecipeError(
                    f"prune.schedule ends at epoch {schedule.time(schedule.updates - 1):g}, but {where} = {epochs}: "
                    "the target would never be reached"
                )
        return self

    def _check_penalty(self, recovery: Recovery) -> None:
        """Refuse a penalty that would never act, and an option that does nothing."""
        penalty, penalise = self.train.build_penalty(), self.recover.penalise
        if penalty is None and penalise:
            raise RecipeError("recover.penalise goes on with train.penalty, and there is none")
        if penalise and isinstance(recovery, Nothing):
            raise RecipeError("recover.penalise has no retraining to act in; give recover.retrain, or leave it out")
        if penalty is not None and not self.train.epochs and not penalise:
            raise RecipeError(
                f"train.penalty = {self.train.penalty and self.train.penalty.name!r} would never act: train.epochs is "
                "0; train, or set recover.penalise = true"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; :func:`from_dict` of it gives an equal recipe."""
        plain: dict[str, Any] = json.loads(self.model_dump_json(exclude_none=True))
        return plain

    def to_toml(self) -> str:
        """Return the whole recipe, defaults included, as TOML."""
        return tomli_w.dumps(self.to_dict())


def _check_coupled(method: Method) -> None:
    """Refuse early what only units of coupled groups have, and what they do not."""
    coupled = isinstance(method.pattern, Channel) and method.pattern.coupled
    hint = "which only pattern = {name = 'channel', coupled = true} knows"
    if not coupled and not isinstance(method.score, Score):
        raise RecipeError(f"prune.score {method.score} rates units of coupled groups, {hint}")
    if not coupled and method.target is not None and method.target.kind == "channels":
        raise RecipeError(f"prune.target channels counts units of coupled groups, {hint}")
    if coupled and (method.overrides or method.allow_empty):
        raise RecipeError(
            "prune.pattern with coupled = true excludes prune.overrides and prune.allow_empty: units of coupled groups "
            "have no sparsity of one layer, and a group cut to nothing would cut the network. Use exclude"
        )


def from_dict(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate plain values.

    Args:
        values: As read from a file.
        source: Where they came from, for messages.

    Returns:
        The recipe.

    Raises:
        RecipeError: One message with source, field path, value and, where a name is wrong, the nearest valid one.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        lines = [_describe(values, item) for item in error.errors()]
        raise RecipeError(f"{source}: " + "\n  ".join(lines)) from None
    except SecateurError as error:
        raise RecipeError(f"{source}: {error}") from None


def load(path: str | Path) -> Recipe:
    """Read and validate a recipe file (``.toml``, ``.yaml``, ``.yml`` or ``.json``).

    Args:
        path: The file.

    Returns:
        The recipe.

    Raises:
        RecipeError: When the file cannot be read or is not a valid recipe.
    """
    return from_dict(parse(Path(path)), source=str(path))


def build_part(registry: Registry, part: Part, path: str) -> Any:
    """Build a registered part from its options, checked against the types of its signature.

    Args:
        registry: The axis.
        part: Name and options.
        path: Field path, for messages.

    Returns:
        The part.

    Raises:
        RecipeError: On an unknown name, option or value; names path, value and what was expected.
    """
    try:
        factory = registry[part.name]
    except SecateurError as error:
        raise RecipeError(f"{path}: {error}") from None
    signature = inspect.signature(factory).parameters
    hints = _hints(factory)
    for option in part.options:
        if option not in signature:
            raise RecipeError(f"{path}.{option}: {part.name!r} has no such option; {nearest(option, signature)}")
    values = {
        option: _typed(hints.get(option, Any), value, f"{path}.{option}") for option, value in part.options.items()
    }
    missing = [n for n, p in signature.items() if p.default is inspect.Parameter.empty and n not in values]
    if missing:
        raise RecipeError(f"{path}: {part.name!r} needs {', '.join(missing)}")
    try:
        return factory(**values)
    except SecateurError as error:
        raise RecipeError(f"{path}: {error}") from None


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(factory if inspect.isfunction(factory) else factory.__init__)


def _tuples(value: Any) -> Any:
    """Turn lists, and lists in lists, into tuples: parts are values."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _typed(hint: Any, value: Any, path: str) -> Any:
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(_tuples(value))
    except ValidationError as error:
        raise RecipeError(f"{path}: got {value!r}; {error.errors()[0]['msg'].lower()}") from None
    except PydanticUserError:  # a type that no text stands for
        raise RecipeError(f"{path}: got {value!r}; only Python can give this option, leave it out") from None


def _describe(values: Mapping[str, Any], item: Any) -> str:
    """Turn one pydantic error into a sentence with the field path."""
    path = ".".join(str(p) for p in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown field; {nearest(str(item['loc'][-1]), _fields(item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{path}: is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path or 'recipe'}: got {item['input']!r}; {message[:1].lower()}{message[1:]}"


def _fields(path: tuple[Any, ...]) -> list[str]:
    """Return the field names of the section at ``path``."""
    section: Any = Recipe
    for name in path:
        field = section.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        candidates += [a for c in candidates for a in getattr(c, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)
