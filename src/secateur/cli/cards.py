"""Method cards: what is registered on every axis, read off docstrings and signatures.

``python -m secateur.cli.cards docs/methods`` writes one Markdown file per part; a test fails when one is out of date.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.cli.axes import TARGETS, Axis, axes, axis_named
from secateur.cli.docstrings import Docstring, formula, is_formula, is_table, math_to_text, parse, table, to_text
from secateur.cli.docstrings import to_markdown as paragraph
from secateur.errors import UnknownNameError, nearest
from secateur.types import Need

# Values that make an example of a required option.
_EXAMPLES: Mapping[str, Any] = {
    "seed": 0, "rounds": 5, "begin": 0, "end": 10, "epochs": 4, "milestones": [30, 60], "n": 2, "m": 4,
    "dynamics.end": 1000, "densities": [["fc1.weight", 0.1], ["fc2.weight", 0.5]],
}  # fmt: skip
# What a recipe says where none of several options is required, but one must be given.
_ONE_OF: Mapping[str, dict[str, Any]] = {"weight_rewinding": {"rewind_to": 0}}
# Options that are parts themselves.
_PARTS: Mapping[str, dict[str, Any]] = {"Schedule": {"name": "cubic", "begin": 100, "end": 1000, "every": 10}}
_STATISTICS = {
    "gradient": "the mean gradient of the loss over prune.score_batches batches",
    "absolute_gradient": "the mean absolute gradient of the loss over prune.score_batches batches",
    "unit_product": "weight times gradient, added up per unit: loss_fn and batches",
    "unit_product_square": "weight times gradient, added up per unit and squared per batch: loss_fn and batches",
    "unit_product_absolute": "weight times gradient, added up per unit, its size per batch: loss_fn and batches",
    "activation_product": "activation times gradient per unit and sample: loss_fn and batches",
    "activation_product_absolute": "the size of activation times gradient per unit and sample: loss_fn and batches",
    "activation_product_square": "activation times gradient per unit and sample, squared: batches",
    "activation_product_recent": "activation times gradient per unit, the latest batches most: loss_fn and batches",
    "centred_product_square": "activation, less its mean, times gradient per unit and sample, squared: batches",
    "stream_turn": "how far each block turns the stream that passes through it: batches without labels",
    "unit_macs": "the multiplications that a unit costs, counted on the recorded forward",
    "input_absolute": "what the layers that read a unit get, its mean size: batches without labels",
    "input_square": "what the layers that read a unit get, its mean square: batches without labels",
    "input_variance": "what the layers that read a unit get, its variance: batches without labels",
    "input_nonzero": "what the layers that read a unit get, how often it is not zero: batches without labels",
}


@dataclass(frozen=True)
class Option:
    """One option of a part; ``default`` is ``None`` where it is required."""

    name: str
    type: str
    required: bool
    default: Any
    description: str


@dataclass(frozen=True)
class Card:
    """All that is known of a part.

    Attributes:
        axis: Its axis.
        name: Its name in a recipe.
        summary: One line.
        body: Paragraphs, formulas and tables, as written in the docstring.
        options: Its options.
        needs: What must be collected first.
        refuses: When it is refused.
        recipe: Lines of a recipe that use it.
        references: Its sources.
        cost: Time and memory beyond a forward pass of the network.
        pitfalls: What it does not see, and where it goes wrong.
    """

    axis: str
    name: str
    summary: str
    body: tuple[str, ...]
    options: tuple[Option, ...]
    needs: tuple[str, ...]
    refuses: tuple[str, ...]
    recipe: str
    references: str
    cost: str
    pitfalls: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; formulas stay LaTeX."""
        values = asdict(self)
        del values["body"]
        return {
            **values,
            "summary": to_text(self.summary),
            "formulas": [formula(block) for block in self.body if is_formula(block)],
            "text": [to_text(block) for block in self.body if not is_formula(block) and not is_table(block)],
        }


def find(name: str) -> Card:
    """Return the card of a part.

    Args:
        name: ``NAME``, or ``AXIS/NAME`` where two axes have it.

    Returns:
        The card.

    Raises:
        UnknownNameError: When there is none, or more than one.
    """
    wanted, slash, part = name.rpartition("/")
    if slash:
        axis = axis_named(wanted)
        if part not in list(axis.parts):
            raise UnknownNameError(f"unknown {axis.name} {part!r}; {nearest(part, axis.parts)}")
        return card(axis, part)
    known = axes().values()
    holders = [axis for axis in known if name in list(axis.parts)]
    if not holders:
        everything = {part for axis in known for part in axis.parts}
        raise UnknownNameError(f"unknown name {name!r}; {nearest(name, everything)} (all of them: secateur ls)")
    if len(holders) > 1:
        raise UnknownNameError(f"{name!r} is ambiguous; say " + " or ".join(f"{a.name}/{name}" for a in holders))
    return card(holders[0], name)


def card(axis: Axis, name: str) -> Card:
    """Build the card of one part from its docstring and signature."""
    factory = axis.parts[name]
    doc = parse(factory.__doc__)
    foreign = not axis.committed
    options = () if axis.name in ("target", "batch-norm") else tuple(_options(factory, doc))
    summary, body = doc.summary, doc.body
    if axis.name == "target":
        summary = TARGETS[name][1]
    if foreign:
        body = (f"This is ``torch.optim.{factory.__name__}``; torch documents its options.",)
    return Card(
        axis.name,
        name,
        summary,
        body,
        options,
        tuple(_needs(factory, options)) if axis.name in ("score", "unit-score", "solver") else (),
        () if foreign else (*doc.raises.values(), *_checks(factory)),
        _recipe(axis, name, options),
        "" if foreign else doc.references,
        "" if foreign else doc.cost,
        "" if foreign else doc.pitfalls,
    )


def _options(factory: Callable[..., Any], doc: Docstring) -> Iterator[Option]:
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


def _checks(factory: Callable[..., Any]) -> tuple[str, ...]:
    """Say which weights a pattern refuses: its ``check`` documents that."""
    doc = parse(getattr(getattr(factory, "check", None), "__doc__", None))
    what = doc.summary.removeprefix("Refuse ")
    return (what[:1].upper() + what[1:],) if doc.raises else ()


def _needs(factory: Callable[..., Any], options: tuple[Option, ...]) -> list[str]:
    """Say what a score must have collected, by the values of the option that it depends on, if one does."""
    required = {o.name: _EXAMPLES.get(o.name) for o in options if o.required}
    hints = typing.get_type_hints(factory)
    words = {name: typing.get_args(h) for name, h in hints.items() if typing.get_origin(h) is Literal}
    by_needs: dict[str, list[str]] = {}
    for name, choices in words.items():
        found: dict[str, list[str]] = {}
        for value in choices:
            found.setdefault(_needed(factory(**{**required, name: value}).needs), []).append(json.dumps(value))
        if len(found) > 1:
            by_needs = {needs: [f"{name} = {values[0]}", *values[1:]] for needs, values in found.items()}
            break
    by_needs = by_needs or {_needed(factory(**required).needs): []}
    return [f"{what} ({' or '.join(when)})" if when else what for what, when in by_needs.items()]


def _needed(needs: Iterable[Need]) -> str:
    """Say what is collected."""
    words = dict.fromkeys(_need_words(need) for need in sorted(needs, key=repr))
    return ", ".join(words) or "nothing but the weights"


def _example(axis: Axis, option: str) -> Any:
    return _EXAMPLES.get(f"{axis.name}.{option}", _EXAMPLES.get(option, 1))


def _need_words(need: Any) -> str:
    """Say what a need is: a simple statistic by name, one with options by its docstring's first line."""
    if isinstance(need, str):
        return _STATISTICS.get(need, need)
    supplied = {"loss": "loss_fn", "batches": "batches", "example_inputs": "example_inputs"}
    supply = [
        supplied.get(use, "a training that is watched") for use in supplied | {"trajectory": ""} if use in need.uses
    ]
    line = parse(type(need).__doc__).summary.rstrip(".")
    words = f"{type(need).__name__}: {line[:1].lower()}{line[1:]}"
    return f"{words} ({' and '.join(supply)})" if supply else words


def _recipe(axis: Axis, name: str, options: tuple[Option, ...]) -> str:
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


def toml(value: Any) -> str:
    """Write a number, a word, a list or an inline table as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return json.dumps(value)


def markdown(shown: Card) -> str:
    """Return a card as Markdown.

    Args:
        shown: The card.

    Returns:
        The text of ``docs/methods/AXIS-NAME.md``.
    """
    parts = [f"# {shown.axis}: {shown.name}", paragraph(shown.summary)]
    parts += [_block(block) for block in shown.body]
    title, language = ("Recipe", "toml") if axis_named(shown.axis).field else ("In Python", "python")
    parts += [f"## {title}", f"```{language}\n{shown.recipe}\n```"]
    if shown.options:
        rows = [
            f"| `{o.name}` | {_cell(o.type)} | {'required' if o.required else _default(o)} "
            f"| {_cell(paragraph(o.description))} |"
            for o in shown.options
        ]
        parts += ["## Options", "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *rows])]
    for title, lines in (("Needs", shown.needs), ("Refused", shown.refuses)):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {paragraph(line)}" for line in lines)]
    for title, text in (("Pitfalls", shown.pitfalls), ("Cost", shown.cost), ("References", shown.references)):
        if text:
            parts += [f"## {title}", paragraph(text)]
    return "\n\n".join(parts) + "\n"


def _default(option: Option) -> str:
    return "left out" if option.default is None else f"`{toml(option.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _block(block: str) -> str:
    if is_formula(block):
        text = formula(block)
        return f"```math\n{_aligned(text)}\n```"
    if is_table(block):
        head, *rows = [[_cell(paragraph(cell)) for cell in row] for row in table(block)]
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return paragraph(block)


def _aligned(latex: str) -> str:
    return f"\\begin{{aligned}}\n{latex}\n\\end{{aligned}}" if "&" in latex else latex


def plain(shown: Card) -> Iterator[tuple[str, str]]:
    """Yield a card as (kind, text): title, text, paragraph, formula, table, heading, code or options.

    Args:
        shown: The card.

    Yields:
        What to print, in order.
    """
    yield "title", f"{shown.axis}: {shown.name}"
    yield "text", to_text(shown.summary)
    for block in shown.body:
        if is_formula(block):
            yield "formula", math_to_text(formula(block))
        elif is_table(block):
            yield "table", block
        else:
            yield "paragraph", to_text(block)
    yield "heading", "Recipe" if axis_named(shown.axis).field else "In Python"
    yield "code", shown.recipe
    if shown.options:
        yield "heading", "Options"
        yield "options", ""
    for title, lines in (("Needs", shown.needs), ("Refused", shown.refuses)):
        if lines:
            yield "heading", title
            yield from (("text", to_text(line)) for line in lines)
    for title, text in (("Pitfalls", shown.pitfalls), ("Cost", shown.cost), ("References", shown.references)):
        if text:
            yield "heading", title
            yield "text", to_text(text)


def files() -> dict[str, str]:
    """Return the content of every file of ``docs/methods``, by name."""
    out = {}
    index = [
        "# Method cards",
        "One page per part, written by `make cards` from the docstrings; do not edit them. The same text in a "
        "terminal: `secateur explain NAME`. Optimizers are torch's own; `secateur explain optimizer/adam` lists their "
        "options.",
    ]
    for axis in axes().values():
        if not axis.committed:
            continue
        where = f"In a recipe: `{axis.where}`" if axis.field else f"In Python: `{axis.where}`"
        rows = []
        for name in _own(axis):
            shown = card(axis, name)
            out[f"{axis.name}-{name}.md"] = markdown(shown)
            rows.append(f"| [{name}]({axis.name}-{name}.md) | {_cell(paragraph(shown.summary))} |")
        index += [
            f"## {axis.name}: {axis.question}",
            where,
            "\n".join(["| name | |", "|---|---|", *rows]),
        ]
    out["README.md"] = "\n\n".join(index) + "\n"
    return out


def _own(axis: Axis) -> list[str]:
    """Return the library's own parts; those of other packages have their cards elsewhere."""
    return [name for name in axis.parts if axis.parts[name].__module__.partition(".")[0] == "secateur"]


def main(argv: list[str]) -> int:
    """Write the files of a folder and remove cards of parts that are gone.

    Args:
        argv: The folder.

    Returns:
        The exit code.
    """
    if len(argv) != 1:
        print("usage: python -m secateur.cli.cards FOLDER", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    wanted = files()
    for stale in sorted(set(folder.glob("*.md")) - {folder / name for name in wanted}):
        stale.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{len(wanted)} files in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
