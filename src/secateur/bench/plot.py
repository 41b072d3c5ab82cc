"""Sensitivity curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.bench.sensitivity import Curve, SensitivityResult
from secateur.errors import CheckpointError, MissingExtraError

FEW = 8
"""Up to this many layers get a colour of their own; more share a scale from the first layer to the last."""

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
_MARKERS = "osD^vPX*"


def plot_sensitivity(result: SensitivityResult, folder: str | Path, *, tolerance: float = 0.01) -> list[Path]:
    """Draw one curve per layer over its achieved sparsity, as ``sensitivity.svg`` and ``sensitivity.png``.

    Args:
        result: The curves.
        folder: Where to write; made when missing.
        tolerance: Drawn as a band under the dense figure.

    Returns:
        The two files.

    Raises:
        MissingExtraError: When matplotlib is not installed.
        CheckpointError: When a file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots") from None
    folder = Path(folder)
    # The same curves give the same bytes: no date, no random identifiers.
    with mpl.rc_context({"svg.hashsalt": "secateur", "svg.fonttype": "none", "font.size": 9}):
        picture = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(picture)
        _draw(picture, result, tolerance)
        paths = [folder / "sensitivity.svg", folder / "sensitivity.png"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            picture.savefig(paths[0], metadata={"Date": None})
            picture.savefig(paths[1], dpi=160, metadata={"Software": None})
        except OSError as error:
            raise CheckpointError(f"{folder}: the plot cannot be written: {error.strerror}") from None
    return paths


def _draw(picture: Any, result: SensitivityResult, tolerance: float) -> None:
    axes = picture.add_subplot()
    curves = result.curves
    for number, curve in enumerate(curves):
        axes.plot(
            [0.0, *(point.achieved for point in curve.points)],
            [result.dense, *(point.value for point in curve.points)],
            color=_colour(number, len(curves)),
            marker=_MARKERS[number % len(_MARKERS)] if len(curves) <= FEW else None,
            markersize=3.5,
            linewidth=1.4,
            label=_label(curve),
        )
    drop = tolerance if result.higher_is_better else -tolerance * abs(result.dense)
    axes.axhspan(result.dense, result.dense - drop, color="0.85", zorder=0, linewidth=0)
    axes.axhline(result.dense, color="0.35", linewidth=0.9, linestyle="--", zorder=1)
    axes.annotate(f"dense {result.dense:.4g}", (1.0, result.dense), ha="right", va="bottom", color="0.35", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("sparsity of this layer, all others dense")
    axes.set_ylabel(result.metric.replace("_", " ") + ("" if result.higher_is_better else " (lower is better)"))
    axes.set_title(f"{result.score}, {result.pattern}, no retraining", fontsize=9, loc="left")
    axes.grid(color="0.92", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) <= FEW:
        picture.legend(loc="outside right upper", frameon=False, fontsize=8, title="layer", title_fontsize=8)
    else:
        _depth_scale(picture, axes, curves)


def _colour(number: int, count: int) -> Any:
    if count <= FEW:
        return _COLOURS[number]
    from matplotlib import colormaps

    return colormaps["viridis"](number / (count - 1) * 0.95)


def _label(curve: Curve) -> str:
    return curve.name.removesuffix(".weight") or curve.name


def _depth_scale(picture: Any, axes: Any, curves: tuple[Curve, ...]) -> None:
    """Show which colour is which layer: the first, the last and some between."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last = len(curves) - 1
    bar = picture.colorbar(ScalarMappable(Normalize(0, last / 0.95), colormaps["viridis"]), ax=axes, pad=0.01)
    bar.ax.set_ylim(0, last)
    bar.ax.invert_yaxis()
    ticks = sorted({round(i * last / 7) for i in range(8)})
    bar.set_ticks(ticks, labels=[_label(curves[i]) for i in ticks])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2)
