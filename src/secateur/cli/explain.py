"""``secateur explain NAME``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from secateur.cli.cards import Card


def explain(
    name: str = typer.Argument(..., help="As in secateur ls; AXIS/NAME where two axes have it.", metavar="NAME"),
    as_markdown: bool = typer.Option(False, "--markdown", help="Print the method card as Markdown."),
    as_json: bool = typer.Option(False, "--json", help="Print it as JSON, formulas in LaTeX."),
) -> None:
    """Print a method card: formula, options, needs, a recipe, references.

    For example:
    secateur explain magnitude
    secateur explain schedule/linear --markdown
    """
    from secateur.cli.cards import find, markdown
    from secateur.cli.show import console, print_json

    shown = find(name)
    if as_json:
        print_json(shown.to_dict())
    elif as_markdown:
        print(markdown(shown), end="")
    else:
        show(shown, console())


def show(shown: Card, out: Console) -> None:
    """Print a card for people.

    Args:
        shown: The card.
        out: Where to print.
    """
    from rich.text import Text

    from secateur.cli.cards import plain
    from secateur.cli.show import indented, put

    gap = False  # whether a blank line was just printed
    for kind, text in plain(shown):
        if kind in ("paragraph", "formula", "table", "heading") and not gap:
            put(out, Text())
        gap = kind in ("formula", "table")
        if kind == "options":
            put(out, indented(_options(shown), 2))
        elif kind == "table":
            put(out, indented(_table(text), 4), Text())
        elif kind in ("title", "heading"):
            put(out, Text(text, style="bold"))
        else:
            put(out, indented(Text(text), 2 if kind in ("text", "paragraph") else 4))
            if kind == "formula":
                put(out, Text())


def _table(block: str) -> Table:
    from secateur.cli.docstrings import table, to_text
    from secateur.cli.show import plain_table

    head, *rows = [[to_text(cell) for cell in row] for row in table(block)]
    out = plain_table()
    for name in head:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def _options(shown: Card) -> Table:
    from rich.text import Text

    from secateur.cli.cards import toml
    from secateur.cli.docstrings import to_text
    from secateur.cli.show import plain_table

    table = plain_table()
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for option in shown.options:
        default = "required" if option.required else "left out by default"
        if option.default is not None:
            default = f"default {toml(option.default)}"
        lines = [f"{option.type}, {default}"]
        if option.description:
            lines.append(to_text(option.description))
        table.add_row(Text(option.name, style="bold"), Text("\n".join(lines)))
    return table
