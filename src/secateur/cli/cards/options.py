"""The options of a part, read off its signature and its docstring."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal

from secateur.cli.docstrings import Docstring

# Values that make an example of a required option.
EXAMPLES: Mapping[str, Any] = {
    "seed": 0, "rounds": 5, "begin": 0, "end": 10, "epochs": 4, "milestones": [30, 60], "n": 2, "m": 4,
    "dynamics.end": 1000, "densities": [["fc1.weight", 0.1], ["fc2.weight", 0.5]],
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One option of a part; ``default`` is ``None`` where it is required."""

    name: str
    type: str
    required: bool
    default: Any
    description: str


def options_of(factory: Callable[..., Any], doc: Docstring) -> Iterator[Option]:
    """Read the options of a part.

    Args:
        factory: A class, or a function that makes the part.
        doc: Its docstring, for what the options mean.

    Yields:
        Its options, in the order of the signature.
    """
    hints = typing.get_type_hints(factory if inspect.isfunction(factory) else factory.__init__)
    for name, parameter in inspect.signature(factory).parameters.items():
        if name == "params":  # of an optimizer; the run fills it in
            continue
        required = parameter.default is inspect.Parameter.empty
        default = None if required else _plain_default(factory, parameter)
        yield Option(name, type_words(hints.get(name, Any)), required, default, doc.arguments.get(name, ""))


def _plain_default(factory: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return a default; a part that is made anew each time as text."""
    made = {f.name: f.default_factory for f in fields(factory)} if is_dataclass(factory) else {}
    maker = made.get(parameter.name, MISSING)
    return parameter.default if maker is MISSING else repr(maker())


def type_words(hint: Any) -> str:
    """Write a type for people who write recipes.

    Example:
        >>> type_words(float | None), type_words(tuple[float, ...]), type_words(Literal["steps", "rounds"])
        ('number', 'list of numbers', '"steps" | "rounds"')
    """
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        names = dict.fromkeys(type_words(a) for a in arguments if a is not type(None))
        return " | ".join(n for n in names if n != "Tensor") or "nothing"
    if typing.get_origin(hint) in (tuple, list):
        if typing.get_origin(hint) is tuple and len(arguments) > 1 and Ellipsis not in arguments:
            return "(" + ", ".join(type_words(a) for a in arguments) + ")"
        each = dict.fromkeys(type_words(a) for a in arguments if a is not Ellipsis)
        return "list of " + " | ".join(word if word.endswith(")") else f"{word}s" for word in each)
    words = {int: "integer", float: "number", bool: "true | false", str: "text", Any: "any value"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
