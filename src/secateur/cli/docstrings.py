"""Docstrings as data, and as readable text or Markdown: the one source of every method card."""

from __future__ import annotations

import inspect
import re
import textwrap
import unicodedata
from dataclasses import dataclass, field

_SECTIONS = (
    "Args",
    "Attributes",
    "Returns",
    "Raises",
    "Yields",
    "Pitfalls",
    "Cost",
    "Example",
    "Examples",
    "References",
)

# LaTeX to characters; longest first, so that \leq is not read as \le and a q.
_SYMBOLS = {
    r"\lfloor": "⌊", r"\rfloor": "⌋", r"\lceil": "⌈", r"\rceil": "⌉", r"\cdot": "·", r"\times": "×", r"\odot": "⊙",
    r"\leq": "≤", r"\geq": "≥", r"\le": "≤", r"\ge": "≥", r"\neq": "≠", r"\ne": "≠", r"\succeq": "⪰",
    r"\approx": "≈", r"\sim": "~", r"\in": "∈", r"\top": "T", r"\lVert": "‖", r"\rVert": "‖", r"\leftarrow": "←",
    r"\to": "→", r"\partial": "∂", r"\nabla": "∇", r"\infty": "∞", r"\dots": "…", r"\ldots": "…", r"\cdots": "…",
    r"\sum": "Σ", r"\prod": "Π", r"\max": "max", r"\min": "min", r"\log": "log", r"\exp": "exp", r"\pm": "±",
    r"\alpha": "α", r"\beta": "β", r"\gamma": "γ", r"\delta": "δ", r"\epsilon": "ε", r"\varepsilon": "ε", r"\zeta": "ζ",
    r"\eta": "η", r"\theta": "θ", r"\lambda": "λ", r"\mu": "μ", r"\pi": "π", r"\rho": "ρ", r"\sigma": "σ",
    r"\tau": "τ", r"\phi": "φ", r"\omega": "ω", r"\Delta": "Δ", r"\Sigma": "Σ", r"\Omega": "Ω", r"\ell": "ℓ",
    r"\qquad": "   ", r"\quad": "  ", r"\,": "\u2009", r"\;": "\u2009", r"\:": "\u2009", r"\!": "",
    r"\ ": " ", r"\|": "‖", r"\{": "{", r"\}": "}", r"\_": "_", r"\%": "%", r"\#": "#", r"\&": "&",
}  # fmt: skip
_SIZES = re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|displaystyle|textstyle)(?![A-Za-z])\.?")
_WORDS = re.compile(r"\\(?:text|texttt|textbf|mathrm|mathbf|mathit|operatorname)\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[td]?frac(?:\{([^{}]*)\}|(\w))(?:\{([^{}]*)\}|(\w))")
_UNDER = re.compile(r"\\underset\{([^{}]*)\}\{([^{}]*)\}(?:\\;)?")
_ACCENT = re.compile(r"\\(bar|hat)(?:\{(\w)\}| ?(\w))")
_ACCENTS = {"bar": "\u0304", "hat": "\u0302"}
_ROOT = re.compile(r"\\sqrt\{([^{}]*)\}")
_SCRIPT = re.compile(r"([_^])\{([^{}]*)\}")
_SUPERSCRIPT = str.maketrans("0123456789+-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻")


@dataclass(frozen=True)
class Docstring:
    """A docstring, taken apart.

    Attributes:
        summary: Its first paragraph.
        body: What follows, up to the first section: one block per paragraph, formula or table.
        arguments: Name to description, from ``Args`` or ``Attributes``.
        raises: Name to description, from ``Raises``.
        references: The text of ``References``.
        cost: The text of ``Cost``.
        pitfalls: The text of ``Pitfalls``.
    """

    summary: str
    body: tuple[str, ...] = ()
    arguments: dict[str, str] = field(default_factory=dict)
    raises: dict[str, str] = field(default_factory=dict)
    references: str = ""
    cost: str = ""
    pitfalls: str = ""


def parse(text: str | None) -> Docstring:
    r"""Take a Google-style docstring apart.

    Args:
        text: The docstring, indented as in its source.

    Returns:
        Its parts.

    Example:
        >>> parse("Sum.\n\nMore.\n\nArgs:\n    x: First\n        number.\n").arguments
        {'x': 'First number.'}
    """
    lines = inspect.cleandoc(text or "").splitlines()
    parts: dict[str, list[str]] = {"": []}
    name = ""
    for line in lines:
        heading = line.removesuffix(":")
        if line.endswith(":") and heading in _SECTIONS:
            name = heading
            parts.setdefault(name, [])
        else:
            parts[name].append(line)
    blocks = _blocks(parts[""])
    return Docstring(
        summary=" ".join(blocks[0].split()) if blocks else "",
        body=tuple(blocks[1:]),
        arguments=_entries(parts.get("Args", parts.get("Attributes", []))),
        raises=_entries(parts.get("Raises", [])),
        references=" ".join(" ".join(parts.get("References", [])).split()),
        cost=" ".join(" ".join(parts.get("Cost", [])).split()),
        pitfalls=" ".join(" ".join(parts.get("Pitfalls", [])).split()),
    )


def _blocks(lines: list[str]) -> list[str]:
    """Split at blank lines, but keep what is indented under a directive with it."""
    blocks: list[list[str]] = []
    after_blank = True
    for line in lines:
        if not line.strip():
            after_blank = True
            continue
        in_directive = bool(blocks) and blocks[-1][0].startswith(".. ")
        belongs = line.startswith(" ") if in_directive else not after_blank and not line.startswith(".. ")
        if belongs and blocks:
            blocks[-1].append(line)
        else:
            blocks.append([line])
        after_blank = False
    return ["\n".join(block) for block in blocks]


def _entries(lines: list[str]) -> dict[str, str]:
    entries: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        found = re.match(r"(\*{0,2}\w+)(?: \([^)]*\))?: (.*)", line)
        if found:
            name = found[1]
            entries[name] = found[2].strip()
        elif name and line.strip():
            entries[name] += " " + line.strip()
    return entries


def is_formula(block: str) -> bool:
    """Tell whether a block is a displayed formula."""
    return block.startswith(".. math::")


def is_table(block: str) -> bool:
    """Tell whether a block is a table."""
    return block.startswith("===")


def formula(block: str) -> str:
    """Return the LaTeX of a formula block."""
    return textwrap.dedent(block.removeprefix(".. math::")).strip()


def table(block: str) -> list[list[str]]:
    """Return the cells of a table block; the first row is the heading."""
    lines = block.splitlines()
    edges = [found.span() for found in re.finditer(r"=+", lines[0])]
    ends = [start for start, _ in edges[1:]] + [max(map(len, lines))]
    rows = [line for line in lines if not line.startswith("=")]
    return [[line[start:end].strip() for (start, _), end in zip(edges, ends, strict=True)] for line in rows]


def math_to_text(latex: str) -> str:
    r"""Write a formula with characters.

    Args:
        latex: A formula.

    Returns:
        One line per line of the formula.

    Example:
        >>> math_to_text(r"s_i = 1 - (1 - s_f)^{i / n}, \qquad i = 1 \dots n")
        's_i = 1 - (1 - s_f)^(i / n),   i = 1 … n'
        >>> math_to_text(r"S = \tfrac1B \sum_b |w\,g_b|")
        'S = 1/B Σ_b |w g_b|'
        >>> math_to_text(r"\underset{w \in P}{reduce}\; S(w) - \bar a")
        'reduce_(w ∈ P) S(w) - ā'
    """
    text = _SIZES.sub("", latex)
    text = _ACCENT.sub(lambda m: unicodedata.normalize("NFC", (m[2] or m[3]) + _ACCENTS[m[1]]), text)
    before = ""
    while text != before:  # innermost braces first
        before = text
        text = _WORDS.sub(r"\1", text)
        text = _UNDER.sub(r"\2_{\1}", text)
        text = _SCRIPT.sub(lambda m: _script(m[1], m[2]), text)
        text = _ROOT.sub(r"√(\1)", text)
        text = _FRACTION.sub(lambda m: f"{_atom(m[1] or m[2])}/{_atom(m[3] or m[4])}", text)
    text = re.sub(r"([\w)])\^(\d)(?!\w)", lambda m: m[1] + m[2].translate(_SUPERSCRIPT), text)
    lines = [" ".join(line.split()) for line in re.sub(r"(?<!\\)\n", " ", text).split(r"\\")]
    cells = [[_tidy(_symbols(cell)) for cell in line.split("&")] for line in lines]
    width = max(len(row[0]) for row in cells)
    return "\n".join(" ".join([row[0].ljust(width), *row[1:]]) if len(row) > 1 else row[0] for row in cells)


def _tidy(text: str) -> str:
    """Put spaces where the symbols need them."""
    text = re.sub(" *\u2009 *", " ", text)
    text = re.sub(r"([∂∇Δ]) +(?=\w)", r"\1", text)
    return re.sub(r"(?<=[\w)])(?=[ΣΠ])", " ", re.sub(r" {4,}", "   ", text)).strip()


def _script(mark: str, inner: str) -> str:
    if mark == "^" and re.fullmatch(r"[\d+-]+", inner):
        return inner.translate(_SUPERSCRIPT)
    return mark + (inner if re.fullmatch(r"\w+", inner) else f"({inner})")


def _atom(text: str) -> str:
    return text if re.fullmatch(r"\\?\w+|\w+_\w+|√\([^()]*\)", text.strip()) else f"({text.strip()})"


def _symbols(text: str) -> str:
    for latex in sorted(_SYMBOLS, key=len, reverse=True):
        word = latex[-1].isalpha()
        text = re.sub(re.escape(latex) + ("(?![A-Za-z])" if word else ""), _SYMBOLS[latex].replace("\\", ""), text)
    return text


_ROLE = re.compile(r":(\w+):`([^`]*)`")
_LINK = re.compile(r"`([^`<]+?)\s*<([^`>]+)>`_")


def to_text(rst: str) -> str:
    """Write one paragraph as plain text, on one line.

    Args:
        rst: Text with roles, code and links.

    Returns:
        Plain text.

    Example:
        >>> to_text("with :math:`s_0` = ``start``, see :func:`~secateur.prune_`")
        'with s_0 = `start`, see prune_()'
    """
    line = " ".join(rst.split())
    line = _ROLE.sub(lambda m: math_to_text(m[2]) if m[1] == "math" else _short(m[1], m[2]), line)
    line = re.sub(r"(?<![\w*])\*{1,2}(\w[^*]*?)\*{1,2}(?![\w*])", r"\1", line)  # emphasis
    return _LINK.sub(r"\1 (\2)", line).replace("``", "`")


def to_markdown(rst: str) -> str:
    """Write one paragraph as Markdown, on one line.

    Args:
        rst: Text with roles, code and links.

    Returns:
        Markdown; formulas between dollar signs and backquotes, so that Markdown reads nothing into them.

    Example:
        >>> to_markdown("with :math:`s_0` = ``start``")
        'with $`s_0`$ = `start`'
    """
    line = " ".join(rst.split())
    line = _LINK.sub(r"[\1](\2)", line)
    line = line.replace("``", "`")
    return _ROLE.sub(lambda m: f"$`{m[2]}`$" if m[1] == "math" else f"`{_short(m[1], m[2])}`", line)


def _short(role: str, target: str) -> str:
    name = target.rpartition(".")[2] if target.startswith("~") else target
    return name + "()" if role in ("func", "meth") and not name.endswith(")") else name
