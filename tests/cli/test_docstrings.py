"""Docstrings taken apart, and formulas written with characters."""

from __future__ import annotations

import pytest

from secateur.cli.docstrings import formula, is_formula, is_table, math_to_text, parse, table, to_markdown, to_text

DOCSTRING = r"""First line,
    second line.

    With :math:`a`:

    .. math::
        b &= \tfrac12 \\
        c &= d

    Text after
    the formula.

    ==== =========
    name meaning
    ==== =========
    x    ``y`` z
    ==== =========

    Args:
        one: First: with colon
            and more.
        two (int): Second.

    Raises:
        ValueError: When wrong.

    References:
        Someone, Something,
        1999.
    """


def test_parts():
    doc = parse(DOCSTRING)
    assert doc.summary == "First line, second line."
    assert [is_formula(b) for b in doc.body] == [False, True, False, False]
    assert is_table(doc.body[3])
    assert table(doc.body[3]) == [["name", "meaning"], ["x", "``y`` z"]]
    assert formula(doc.body[1]).splitlines()[1] == "c &= d"
    assert doc.arguments == {"one": "First: with colon and more.", "two": "Second."}
    assert doc.raises == {"ValueError": "When wrong."}
    assert doc.references == "Someone, Something, 1999."


@pytest.mark.parametrize("text", [None, "", "   "])
def test_nothing(text):
    assert parse(text).summary == ""


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"|w_{ij}|^p", "|w_ij|^p"),
        (r"\frac{a}{b}", "a/b"),
        (r"\frac{a + 1}{\sqrt{b}}", "(a + 1)/√(b)"),
        (r"\tfrac1B \sum_b g_b", "1/B Σ_b g_b"),
        (r"x^2 + y^{-1}", "x² + y⁻¹"),
        (r"\lfloor x \rfloor \le \lceil x \rceil", "⌊ x ⌋ ≤ ⌈ x ⌉"),
        (r"\sigma^2 = \tfrac1B \sum_b \sigma_b^2", "σ² = 1/B Σ_b σ_b²"),
        (r"\text{absolute:}\quad & S = 1 \\ \text{a:}\quad & S = 2", "absolute: S = 1\na:        S = 2"),
        (r"\partial L / \partial w", "∂L / ∂w"),
        (r"\leq \le \left( x \right)", "≤ ≤ ( x )"),
    ],
)
def test_math(latex, text):
    assert math_to_text(latex) == text


def test_paragraphs():
    rst = "See :class:`~a.b.C`, :func:`f`, ``x | y``, *this* and `a page <https://x.org/y>`_;\n a*b*c stays."
    assert to_text(rst) == "See C, f(), `x | y`, this and a page (https://x.org/y); a*b*c stays."
    assert to_markdown(rst) == "See `C`, `f()`, `x | y`, *this* and [a page](https://x.org/y); a*b*c stays."
