"""``secateur ls``."""

from __future__ import annotations

import typer


def ls(
    axis: str | None = typer.Argument(None, help="One axis only: score, pattern, ...", metavar="AXIS"),
    as_json: bool = typer.Option(False, "--json", help="Print names and summaries as JSON."),
) -> None:
    """List the parts that a recipe can name, by axis: scores, patterns, schedules.

    For example:
    secateur ls
    secateur ls score
    """
    from rich.text import Text

    from secateur.cli.axes import axes, axis_named
    from secateur.cli.cards import card
    from secateur.cli.docstrings import to_text
    from secateur.cli.show import console, indented, plain_table, print_json, put

    chosen = list(axes().values()) if axis is None else [axis_named(axis)]
    summaries = {a.name: {name: to_text(card(a, name).summary) for name in a.parts} for a in chosen}
    if as_json:
        print_json({a: [{"name": n, "summary": s} for n, s in parts.items()] for a, parts in summaries.items()})
        return
    out = console()
    width = max(len(name) for parts in summaries.values() for name in parts)
    for one in chosen:
        put(out, Text.assemble((one.name, "bold"), f": {one.question} ", (f"({one.where})", "dim")))
        table = plain_table()
        table.show_header = False
        table.add_column(min_width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for name, summary in summaries[one.name].items():
            table.add_row(name, summary)
        put(out, indented(table, 2))
    put(out, Text("\nMore on one of them: secateur explain NAME", style="dim"))
