"""The demo's picture: curves of both runs, and one bar for each figure of the table."""

from pathlib import Path
from typing import Any

from swat_ext.data.extras import require
from swat_ext.training.comparison import Comparison, Outcome

__all__ = ["draw"]

_DENSE, _SWAT = "#8a93a0", "#d1495b"
_INK, _FAINT = "#22262b", "#d9dde2"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
}


def _smooth(values: list[float], reach: int) -> list[float]:
    """Mean over up to ``reach`` values to either side, as many on one side as on the other."""
    smooth = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        smooth.append(sum(values[i - side : i + side + 1]) / (2 * side + 1))
    return smooth


def _losses(axes: Any, runs: tuple[tuple[Outcome, str], ...]) -> None:
    curves = [_smooth(run.losses, len(run.losses) // 40) for run, _ in runs]
    top = max(max(curve) for curve in curves)
    for (run, colour), curve in zip(runs, curves, strict=True):
        seconds = [(step + 1) / len(run.losses) * run.seconds[-1] for step in range(len(run.losses))]
        axes.plot(seconds, run.losses, color=colour, alpha=0.22, linewidth=0.7)
        axes.plot(seconds, curve, color=colour, linewidth=2.2, label=run.name)
    axes.set(title="Training loss by training time", xlabel="seconds spent in training steps", ylabel="nats")
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlim(0, None)


def _accuracies(axes: Any, runs: tuple[tuple[Outcome, str], ...]) -> None:
    for run, colour in runs:
        percent = [100 * accuracy for accuracy in run.test_accuracies]
        label = f"{run.name}, {run.epochs} epochs"
        axes.plot(run.seconds, percent, color=colour, linewidth=2.2, marker="o", markersize=4.5, label=label)
        axes.axhline(percent[-1], color=colour, linewidth=0.8, linestyle=":")
    axes.set(title="Test accuracy by training time", ylabel="%")
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.legend(frameon=False, loc="lower right")


def _bars(axes: Any, label: str, values: tuple[float, float], texts: tuple[str, str], change: str) -> None:
    positions, colours = (1, 0), (_DENSE, _SWAT)
    axes.barh(positions, values, color=colours, height=0.72)
    longest = max(*values, 1e-12)
    for position, value, text in zip(positions, values, texts, strict=True):
        # Inside a long bar, beside a short one.
        inside = value > 0.45 * longest
        axes.text(
            value - 0.02 * longest if inside else value + 0.02 * longest,
            position,
            text,
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else _INK,
            fontweight="bold",
        )
    axes.set_title(label)
    axes.set_title(change, loc="right", fontweight="normal", color=_SWAT)
    axes.set_xlim(0, longest)
    axes.set_ylim(-0.5, 1.5)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)


def draw(result: Comparison, path: Path) -> None:
    """Draw ``result`` to ``path``, a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "matplotlib", "the demo's picture")
    figure_module = require("matplotlib.figure", "matplotlib", "the demo's picture")
    require("matplotlib.backends.backend_agg", "matplotlib", "the demo's picture")
    dense, swat = result.dense, result.swat
    runs = ((dense, _DENSE), (swat, _SWAT))
    values = (
        (dense.test_accuracy, swat.test_accuracy),
        (dense.seconds[-1], swat.seconds[-1]),
        (float(dense.epochs), float(swat.epochs)),
        (dense.flops, swat.flops),
        (dense.step_ms, swat.step_ms),
        (float(dense.held_bytes), float(swat.held_bytes)),
    )
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=(11.5, 7.4), dpi=150, facecolor="white")
        columns = figure.add_gridspec(
            1, 2, width_ratios=(1.55, 1), left=0.062, right=0.975, top=0.86, bottom=0.165, wspace=0.23
        )
        curves = columns[0].subgridspec(2, 1, hspace=0.38, height_ratios=(1.7, 1))
        _accuracies(figure.add_subplot(curves[0]), runs)
        _losses(figure.add_subplot(curves[1]), runs)
        bars = columns[1].subgridspec(len(values), 1, hspace=0.85)
        for i, ((label, *texts, change), pair) in enumerate(zip(result.rows(), values, strict=True)):
            axes = figure.add_subplot(bars[i])
            _bars(axes, label[0].upper() + label[1:], pair, (texts[0], texts[1]), change)
            axes.set_yticks((1, 0), (dense.name, swat.name))
        figure.text(0.02, 0.935, result.verdict, fontsize=15, fontweight="bold")
        figure.text(0.02, 0.028, result.conditions, fontsize=8.5, color="#5b636d", linespacing=1.5)
        figure.savefig(path, format="png")
