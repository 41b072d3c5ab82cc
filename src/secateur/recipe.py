"""The recipe: one validated description of a run, in TOML, YAML or JSON.

Nothing that the recipe names is imported while it is read: a wrong field, value or pair of parts is refused before
any of the user's code runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from secateur.errors import RecipeError, SecateurError, nearest
from secateur.export import FORMATS
from secateur.method import Method
from secateur.pipeline.distill import check_distillation
from secateur.pipeline.optim import LEARNING_RATES, check_optimizer
from secateur.pipeline.tasks import TASKS
from secateur.recipe_checks import check_clock, check_coupled, check_penalty, check_training
from secateur.recipe_files import parse
from secateur.recipe_parts import Positive, Section, Tuple, build_part
from secateur.recipe_sections import (
    CheckpointSection,
    DataSection,
    MeasureSection,
    ModelSection,
    PruneSection,
    RecoverSection,
    TrainSection,
)


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
    prune: PruneSection = PruneSection()
    recover: RecoverSection = RecoverSection()
    export: Tuple = ("safetensors",)
    measure: MeasureSection = MeasureSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _parts_exist_and_fit(self) -> Recipe:
        recovery = self.recover.build()
        check_optimizer(self.train.optimizer.name, self.train.optimizer.options)
        build_part(LEARNING_RATES, self.train.lr_schedule, "train.lr_schedule")
        TASKS[self.task]
        check_penalty(self.train, self.recover, recovery)
        check_training(self.train, self.prune, recovery)
        for name in self.export:
            if name not in FORMATS:
                raise RecipeError(f"export: unknown format {name!r}; {nearest(name, FORMATS)}")
        method = self.build_method()
        during = method is None or self.prune.when == "during"
        check_distillation(
            self.recover.build_distillation(),
            recovery,
            task=self.task,
            when="during" if during else "after",
            weights=self.model.weights,
        )
        recovery.check(self.train.epochs)
        if method is not None:
            check_coupled(method)
            if self.train.dynamics is None:
                check_clock(method.schedule, recovery, during=during, trained=self.train.epochs)
        return self

    def build_method(self) -> Method | None:
        """Return the method; none where a parametrisation decides what goes.

        Raises:
            RecipeError: When parts exclude each other or an option is wrong.
        """
        if self.train.parametrisation is not None:
            return None
        return self.prune.build(under_dynamics=self.train.dynamics is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; :func:`from_dict` of it gives an equal recipe."""
        plain: dict[str, Any] = json.loads(self.model_dump_json(exclude_none=True))
        if self.train.parametrisation is not None:  # the other defaults of this table have no part in such a run
            del plain["prune"]
            said = json.loads(self.prune.model_dump_json(exclude_defaults=True, exclude_none=True))
            plain |= {"prune": said} if said else {}
        return plain

    def to_toml(self) -> str:
        """Return the whole recipe, defaults included, as TOML."""
        return tomli_w.dumps(self.to_dict())


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
