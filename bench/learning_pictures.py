"""Pictures of bench/learning.py: accuracy against seconds of steps and against training FLOPs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from learning_report import Cell, Results, title
from learning_runs import NARROW

# Few enough to read, each with its colour.
_CURVES = {
    "dense": "0.35",
    "narrow90": "0.65",
    "u80": "#4e9a57",
    "u90": "#d1495b",
    "u95": "#3b6fb6",
    "erk90": "#e08e2b",
}
# Of the height of a panel, between two labels.
_LABEL_GAP = 0.055


def _curve(cell: Cell, across: Callable[[Mapping[str, Any]], float]) -> tuple[list[float], list[list[float]]]:
    """Where each epoch ends, and the accuracies of all seeds there, in percent; runs that diverged are left out."""
    lines = [line for line in cell.lines.values() if len(line["history"]) == line["epochs"]]
    if not lines:
        return [], []
    epochs = range(lines[0]["epochs"])
    places = [statistics.mean(across(line["history"][i]) for line in lines) for i in epochs]
    return places, [[100 * line["history"][i]["test_accuracy"] for line in lines] for i in epochs]


def _across(results: Results, cell: Cell, by_seconds: bool) -> Callable[[Mapping[str, Any]], float] | None:
    """What turns an epoch's record into its place on the axis; None where a step was not timed."""
    if not by_seconds:
        return lambda record: record["flops"]
    step_ms = results.step_ms(cell)
    return None if step_ms is None else lambda record: step_ms * record["steps"] / 1e3


def _draw(axes: Any, results: Results, by_seconds: bool) -> None:
    """A panel: the mean over seeds of each variant, in a band from the least to the most."""
    ends: list[tuple[float, float, str, str]] = []
    for variant, colour in _CURVES.items():
        if by_seconds and variant in NARROW:
            continue
        cell = results.cell(variant, "clock" if by_seconds else "epochs")
        if cell is None and variant == "dense":
            cell = results.cell(variant, "epochs")
        across = None if cell is None else _across(results, cell, by_seconds)
        if cell is None or across is None:
            continue
        places, values = _curve(cell, across)
        if not places:
            continue
        means = [statistics.mean(found) for found in values]
        axes.plot(places, means, color=colour, linewidth=1.8, marker="o", markersize=2.5)
        axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0)
        ends.append((means[-1], places[-1], f"{title(variant)}  {means[-1]:.1f}", colour))
    axes.set_title(results.name, fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not by_seconds:
        axes.set_xscale("log")
    _label(axes, ends)


def _label(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each curve beside its end, all in one column, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap, last = _LABEL_GAP * (high - low), high + _LABEL_GAP * (high - low)
    for value, place, name, colour in sorted(ends, reverse=True):
        last = min(value, last - gap)  # downwards, where there is room
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6}
        axes.annotate(
            name,
            (place, value),
            xytext=(1.02, last),
            textcoords=("axes fraction", "data"),
            arrowprops=line,
            color=colour,
            fontsize=8,
            va="center",
        )


def plot(results: Sequence[Results], by_seconds: bool, path: Path) -> None:
    """Accuracy against seconds of steps, or against training FLOPs; a panel for each network and data set."""
    shown = [case for case in results if case.lines]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    with common.picture(path, rows, columns, (6.4 * columns, 4 * rows)) as (_, panels):
        for axes, case in zip(panels, shown, strict=False):
            _draw(axes, case, by_seconds)
            axes.set_xlabel("seconds of steps" if by_seconds else "training FLOPs")
            axes.set_ylabel("test accuracy, %")
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
