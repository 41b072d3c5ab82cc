"""Method cards: what is registered on every axis, read off docstrings and signatures.

``python -m secateur.cli.cards docs/methods`` writes one Markdown file per part; a test fails when one is out of date.
"""

from secateur.cli.cards.build import Card, card, find
from secateur.cli.cards.folder import files, main
from secateur.cli.cards.options import Option, type_words
from secateur.cli.cards.recipe import toml
from secateur.cli.cards.text import markdown, plain

__all__ = ["Card", "Option", "card", "files", "find", "main", "markdown", "plain", "toml", "type_words"]
