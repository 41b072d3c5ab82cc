"""The plots of the report, as inline SVG that takes its colours and its type from the page.

Matplotlib draws with marker colours; those become CSS variables, so that one drawing serves both the light and the
dark page.
"""

from __future__ import annotations

import html
import importlib
import math
import re
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from secateur.errors import MissingExtraError
from secateur.report.words import NARROW

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT, BASE, SHADE = (f"#01020{i}" for i in range(1, 7))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", ACCENT: "accent", BASE: "base", SHADE: "shade"}

_DPI = 72
"""One SVG unit per point, so that sizes below are CSS pixels at natural size."""

_WIDTH, _HEIGHT, _FONT = 460, 250, 11
_LAYERS_WIDTH = 420
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "font.size": _FONT,
    "axes.edgecolor": GRID,
    "axes.linewidth": 1,
    "axes.labelcolor": MUTED,
    "axes.labelsize": _FONT,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": _FONT,
    "ytick.labelsize": _FONT,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.solid_capstyle": "round",
    "path.simplify": False,
    "text.parse_math": False,  # a layer's name is never a formula
}


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        x: Epochs.
        y: Values.
        role: Marker colour.
        dashed: Drawn with dashes.
    """

    x: Sequence[float]
    y: Sequence[float]
    role: str = ACCENT
    dashed: bool = False


@dataclass(frozen=True)
class Course:
    """What one quantity did over a run.

    Attributes:
        name: Of the quantity.
        lines: Its curves.
        prunings: (epoch, sparsity afterwards) of every pruning step, in order.
        last: Last epoch.
        share: Whether values are fractions, shown as percentages.
        reference: The dense network's value.
        label: Text for those who cannot see the plot.
    """

    name: str
    lines: Sequence[Line]
    prunings: Sequence[tuple[float, float]]
    last: float
    share: bool = False
    reference: float | None = None
    label: str = ""


def require() -> None:
    """Check that plots can be drawn.

    Raises:
        MissingExtraError: When matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.backends.backend_svg")
    except ImportError:
        raise MissingExtraError("matplotlib", "plots") from None


def course_plot(course: Course, prefix: str) -> str:
    """Draw a quantity over the epochs, with every pruning step and the sparsity.

    Args:
        course: What to draw.
        prefix: For the drawing's ids; must differ between drawings of one page.

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtraError: When matplotlib is not installed.
    """
    with _drawing(_WIDTH, _HEIGHT) as figure:
        axes = _axes(figure, left=52, right=44, top=24, bottom=38)
        right: Axes = axes.twinx()
        axes.set_zorder(right.get_zorder() + 1)
        _draw_sparsity(right, course)
        first = course.prunings[0][0] if course.prunings else course.last
        if first > 0:
            axes.axvspan(0, first, color=SHADE, linewidth=0)
            if first > 0.2 * course.last:
                axes.text(first / 2, 0.03, "dense", transform=axes.get_xaxis_transform(), ha="center", color=MUTED)
        if course.reference is not None:
            axes.axhline(course.reference, color=MUTED, linewidth=1, dashes=(1, 2))
        for line in course.lines:
            style: dict[str, Any] = {"dashes": (4, 2)} if line.dashed else {}
            marker = "o" if len(line.x) <= 60 else None
            axes.plot(line.x, line.y, color=line.role, linewidth=1.8, marker=marker, markersize=3, **style)
        _draw_prunings(axes, course)
        axes.set_xlim(0, course.last * 1.02 or 1)
        axes.set_xlabel("epoch")
        _whole_epochs(axes)
        _scale_y(axes, course)
        return _svg(figure, course.label, prefix)


def layer_plot(
    names: Sequence[str], sparsities: Sequence[float], overall: float | None, label: str, prefix: str
) -> str:
    """Draw one bar per layer: how much of it was removed.

    Args:
        names: Layers, top to bottom.
        sparsities: Fraction removed from each.
        overall: Fraction removed from all of them together.
        label: Text for those who cannot see the plot.
        prefix: For the drawing's ids; must differ between drawings of one page.

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtraError: When matplotlib is not installed.
    """
    short = [_short(name) for name in names]
    left = 12 + 6.2 * max((len(name) for name in short), default=0)
    rows = len(names)
    with _drawing(_LAYERS_WIDTH, 22 * rows + 62) as figure:
        axes = _axes(figure, left=left, right=52, top=20, bottom=38)
        places = list(range(rows))
        axes.barh(places, [1.0] * rows, height=0.62, color=SHADE, linewidth=0)
        axes.barh(places, list(sparsities), height=0.62, color=ACCENT, linewidth=0)
        for place, value in zip(places, sparsities, strict=True):
            axes.text(1.015, place, f"{100 * value:.1f}{NARROW}%", va="center", color=INK)
        if overall is not None:
            axes.axvline(overall, color=INK, linewidth=1, dashes=(1, 2))
            axes.text(overall, -0.8, f"overall {100 * overall:.1f}{NARROW}%", ha="center", color=MUTED)
        axes.set_yticks(places, short)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], [f"{p}{NARROW}%" for p in (0, 25, 50, 75, 100)])
        axes.set_xlabel("share of the layer's weights removed")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        return _svg(figure, label, prefix)


def histogram_plot(edges: Sequence[float], dense: Sequence[int], pruned: Sequence[int], label: str, prefix: str) -> str:
    """Draw a layer's weights before, and the kept ones after, on a logarithmic count.

    Args:
        edges: Edges of the bins.
        dense: Weights per bin before.
        pruned: Kept weights per bin after.
        label: Text for those who cannot see the plot.
        prefix: For the drawing's ids; must differ between drawings of one page.

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtraError: When matplotlib is not installed.
    """
    with _drawing(210, 132) as figure:
        axes = _axes(figure, left=34, right=8, top=8, bottom=24)
        floor = 0.7  # below one weight, so that a bin of one shows on a logarithmic axis
        axes.set_yscale("log")
        axes.stairs([max(n, floor) for n in dense], edges, baseline=floor, fill=True, color=BASE, linewidth=0)
        axes.stairs([max(n, floor) for n in pruned], edges, baseline=floor, fill=True, color=ACCENT, alpha=0.35)
        axes.stairs([max(n, floor) for n in pruned], edges, baseline=floor, color=ACCENT, linewidth=1.2)
        top = max([*dense, *pruned, 1])
        axes.set_ylim(floor, top * 1.6)
        powers = range(0, math.floor(math.log10(top)) + 1, 2 if top >= 10_000 else 1)
        axes.set_yticks([10**p for p in powers], [_power(p) for p in powers])
        axes.minorticks_off()
        axes.set_xlim(edges[0], edges[-1])
        _few_ticks(axes)
        return _svg(figure, label, prefix)


# Parts of the course


def _draw_sparsity(right: Axes, course: Course) -> None:
    right.set_ylim(0, 1.08)
    right.spines["right"].set_visible(True)
    right.set_yticks([0, 0.5, 1], [f"{p}{NARROW}%" for p in (0, 50, 100)])
    if course.prunings:
        x = [0.0, *(epoch for epoch, _ in course.prunings), course.last]
        y = [0.0, *(sparsity for _, sparsity in course.prunings)]
        right.step(x, [*y, y[-1]], where="post", color=BASE, linewidth=2)


def _draw_prunings(axes: Axes, course: Course) -> None:
    room = 0.11 * course.last
    many = len(course.prunings) > 12
    labelled = math.inf
    # From the last backwards: the final sparsity always has its label.
    for epoch, sparsity in reversed(course.prunings):
        axes.axvline(epoch, color=MUTED, linewidth=0.5 if many else 1, alpha=0.4 if many else 0.9)
        if labelled - epoch >= room:
            labelled = epoch
            text = f"{100 * sparsity:.0f}{NARROW}%"
            axes.text(epoch, 1.02, text, transform=axes.get_xaxis_transform(), ha="center", color=INK)


def _scale_y(axes: Axes, course: Course) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = [y for line in course.lines for y in line.y if math.isfinite(y)]
    if course.share:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{round(100 * y, 3):g}{NARROW}%"))
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.0 + 0.02 * (1 - min(values, default=0))))
    elif values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        narrow = max(values) < 300 * min(values)  # fewer than three powers of ten: mark some values between them
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _whole_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _few_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("-", "\u2212")))


def _power(power: int) -> str:
    return ("1", "10", "100", "1k", "10k", "100k", "1M", "10M", "100M", "1G")[power] if power < 10 else f"1e{power}"


def _short(name: str, width: int = 24) -> str:
    if len(name) <= width:
        return name
    return f"{name[:4]}…{name[5 - width :]}"  # the end tells layers of one block apart


# From matplotlib to the page


@contextmanager
def _drawing(width: float, height: float) -> Iterator[Figure]:
    require()
    from matplotlib import style
    from matplotlib.figure import Figure

    # From the defaults, not from the user's settings: the same run gives the same page everywhere.
    with style.context(["default", _STYLE]):
        yield Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)


def _axes(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> Axes:
    """Place axes with margins in pixels: layout engines measure text in a font that the page will not use."""
    width, height = (size * _DPI for size in figure.get_size_inches())
    axes: Axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    )
    return axes


def _svg(figure: Figure, label: str, prefix: str) -> str:
    text = StringIO()
    with warnings.catch_warnings():
        # The page's own font draws the text: what matplotlib's lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return page_svg(text.getvalue(), label, prefix)


def page_svg(svg: str, label: str, prefix: str) -> str:
    """Turn matplotlib's SVG file into an element for a page.

    Args:
        svg: The file's text.
        label: Text for those who cannot see the plot.
        prefix: For its ids.

    Returns:
        The element: no namespaces or metadata, ids of its own, the page's colours and type, sized by the page.
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', svg)
    shape = f' viewBox="{box[1]}"' if box else ""
    svg = re.sub(r"^<svg[^>]*>", f'<svg{shape} role="img" aria-label="{html.escape(label)}">', svg)
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    # Matplotlib 3.9 writes the shorthand, later versions the single properties.
    svg = re.sub(r"font: (?:[\w.%]+ )*?([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", " ", svg)
