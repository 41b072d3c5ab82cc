"""Parts named in a recipe, and the plain values that it holds: read, checked against signatures, and built."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, cast, get_type_hints

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
)

from secateur.errors import RecipeError, SecateurError, nearest
from secateur.registry import Registry
from secateur.schedules import SCHEDULES, Schedule

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


def as_part(value: object) -> object:
    """Take a name, or a table with a name, for a part."""
    if isinstance(value, str):
        return Part(name=value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return Part(name=value["name"], options={k: v for k, v in value.items() if k != "name"})
    if isinstance(value, Part):
        return value
    raise ValueError(f"expected a name or a table with a name, got {value!r}")


def plain_part(part: Part) -> dict[str, Any]:
    """Return the table that :func:`as_part` takes."""
    return {"name": part.name, **part.options}


PartField = Annotated[Part, BeforeValidator(as_part), PlainSerializer(plain_part)]
Tuple = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


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
    if hint is Schedule:  # a part that has a part
        return _schedule(value, path)
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(_tuples(value))
    except ValidationError as error:
        raise RecipeError(f"{path}: got {value!r}; {error.errors()[0]['msg'].lower()}") from None
    except PydanticUserError:  # a type that no text stands for
        raise RecipeError(f"{path}: got {value!r}; only Python can give this option, leave it out") from None


def _schedule(value: Any, path: str) -> Schedule:
    try:
        part = as_part(value)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    schedule: Schedule = build_part(SCHEDULES, cast(Part, part), path)
    return schedule
