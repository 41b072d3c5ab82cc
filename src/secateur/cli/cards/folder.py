"""All cards as files of one folder, with an index."""

from __future__ import annotations

import sys
from pathlib import Path

from secateur.cli.axes import Axis, axes
from secateur.cli.cards.build import card
from secateur.cli.cards.text import markdown, table_cell
from secateur.cli.docstrings import to_markdown as paragraph


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
            rows.append(f"| [{name}]({axis.name}-{name}.md) | {table_cell(paragraph(shown.summary))} |")
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
