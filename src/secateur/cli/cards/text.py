"""A card as Markdown, and as the pieces that a terminal shows."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.cli.axes import axis_named
from secateur.cli.cards.build import Card
from secateur.cli.cards.options import Option
from secateur.cli.cards.recipe import toml
from secateur.cli.docstrings import formula, is_formula, is_table, math_to_text, table, to_text
from secateur.cli.docstrings import to_markdown as paragraph


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
            f"| `{o.name}` | {table_cell(o.type)} | {'required' if o.required else _default(o)} "
            f"| {table_cell(paragraph(o.description))} |"
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


def table_cell(text: str) -> str:
    """Write text for a cell of a Markdown table, which a bar would end."""
    return text.replace("|", r"\|")


def _block(block: str) -> str:
    if is_formula(block):
        text = formula(block)
        return f"```math\n{_aligned(text)}\n```"
    if is_table(block):
        head, *rows = [[table_cell(paragraph(cell)) for cell in row] for row in table(block)]
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
