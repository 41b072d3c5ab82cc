"""How a part is used: the lines of a recipe that name it, or of Python where no recipe does."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from secateur.cli.axes import TARGETS, Axis
from secateur.cli.cards.options import EXAMPLES, Option

# What a recipe says where none of several options is required, but one must be given.
_ONE_OF: Mapping[str, dict[str, Any]] = {"weight_rewinding": {"rewind_to": 0}}
# Options that are parts themselves.
_PARTS: Mapping[str, dict[str, Any]] = {"Schedule": {"name": "cubic", "begin": 100, "end": 1000, "every": 10}}


def recipe_of(axis: Axis, name: str, options: tuple[Option, ...]) -> str:
    """Write a use of a part that runs: required options have an example's value, the others their default.

    Args:
        axis: Its axis.
        name: Its name there.
        options: Its options.

    Returns:
        TOML, or Python for an axis that no recipe has a field for.
    """
    if not axis.field:
        return _python(axis, name, options)
    head = f"[{axis.table}]\n" if axis.table else ""
    if axis.name == "target":
        pattern = '\npattern = { name = "channel", coupled = true }' if name == "channels" else ""
        return f"{head}target = {{ {name} = {TARGETS[name][0]} }}{pattern}"
    if axis.name == "task":
        return f'task = "{name}"'
    if axis.name == "batch-norm":
        from secateur.recipe_sections import RecoverSection

        return f'{head}batch_norm = "{name}"\nbatch_norm_samples = {RecoverSection().batch_norm_samples}'
    chosen = {o.name: _example(axis, o.name) if o.required else o.default for o in options} | _ONE_OF.get(name, {})
    if not axis.committed:
        chosen = {k: v for k, v in chosen.items() if k == "lr"}
    plain = inspect.signature(axis.parts[name]).parameters
    chosen |= {o.name: _PARTS[o.type] for o in options if o.type in _PARTS}
    made = [  # parts, not plain values
        o.name for o in options if not o.required and plain[o.name].default != o.default and o.type not in _PARTS
    ]
    pairs = [f"{k} = {toml(v)}" for k, v in (("name", name), *chosen.items()) if v is not None and k not in made]
    if axis.name == "distill":  # nothing learns without it
        head += 'retrain = { name = "learning_rate_rewinding", epochs = 5 }\n'
    tail = '\n\n[prune]\nwhen = "during"' if axis.name == "dynamics" else ""
    inline = f"{axis.field} = {{ {', '.join(pairs)} }}"
    if len(inline) <= 72:
        return head + inline + tail
    return "\n".join([f"[{axis.table}.{axis.field}]", *pairs]) + tail  # TOML lets no inline table go over lines


def _python(axis: Axis, name: str, options: tuple[Option, ...]) -> str:
    """Write how Python uses a part that no recipe names: every option whose default is a plain value."""
    factory = axis.parts[name]
    home, use = axis.home
    plain = inspect.signature(factory).parameters
    values = [(o.name, o.default) for o in options if isinstance(o.default, bool | int | float | str | tuple)]
    values = [(n, v) for n, v in values if plain[n].default == v]
    required = [(o.name, _example(axis, o.name)) for o in options if o.required]
    shown = [f"{n}={json.dumps(v) if isinstance(v, str) else repr(v)}" for n, v in (*required, *values)]
    part = f"{factory.__name__}({', '.join(shown)})"
    use = use.replace("Channel()", "Layer()") if name == "block_influence" else use  # it rates blocks, not channels
    if len(use.format(part)) > 100:
        return f"from {home} import {factory.__name__}\n\npart = {part}\n{use.format('part')}"
    return f"from {home} import {factory.__name__}\n\n{use.format(part)}"


def _example(axis: Axis, option: str) -> Any:
    return EXAMPLES.get(f"{axis.name}.{option}", EXAMPLES.get(option, 1))


def toml(value: Any) -> str:
    """Write a number, a word, a list or an inline table as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return json.dumps(value)
