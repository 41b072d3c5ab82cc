"""The card of one part: what its docstring and its signature say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from secateur.cli.axes import TARGETS, Axis, axes, axis_named
from secateur.cli.cards.needs import needs_of
from secateur.cli.cards.options import Option, options_of
from secateur.cli.cards.recipe import recipe_of
from secateur.cli.docstrings import formula, is_formula, is_table, parse, to_text
from secateur.errors import UnknownNameError, nearest


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
    options = () if axis.name in ("target", "batch-norm") else tuple(options_of(factory, doc))
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
        tuple(needs_of(factory, options)) if axis.name in ("score", "unit-score", "solver") else (),
        () if foreign else (*doc.raises.values(), *_checks(factory)),
        recipe_of(axis, name, options),
        "" if foreign else doc.references,
        "" if foreign else doc.cost,
        "" if foreign else doc.pitfalls,
    )


def _checks(factory: Callable[..., Any]) -> tuple[str, ...]:
    """Say which weights a pattern refuses: its ``check`` documents that."""
    doc = parse(getattr(getattr(factory, "check", None), "__doc__", None))
    what = doc.summary.removeprefix("Refuse ")
    return (what[:1].upper() + what[1:],) if doc.raises else ()
