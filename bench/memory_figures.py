"""The tables and the picture of memory.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from paper_networks import NETWORKS

from swat_ext.inspect.table import human_bytes

_Row = dict[str, Any]


def _dense(rows: Sequence[_Row], row: _Row) -> _Row:
    """The dense run beside a row; empty if there is none."""
    same = ("model", "batch", "width", "allocator")
    found = (other for other in rows if other["run"] == "dense" and all(other[key] == row[key] for key in same))
    return next(found, {})


def _ratio(row: _Row, dense: _Row, field: str) -> float | None:
    """A field as a ratio to the dense run's, None where one of them was not measured."""
    return row[field] / dense[field] if row.get(field) and dense.get(field) else None


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def ordered(rows: Sequence[_Row]) -> list[_Row]:
    """By network, batch and allocator, dense first."""
    models = list(NETWORKS)
    order = {"dense": 0, "checkpoint": 1}
    return sorted(
        rows,
        key=lambda row: (
            models.index(row["model"]),
            row["batch"],
            row["allocator"],
            order.get(row["run"], 2),
            row["batchnorm"],
            row["sparsity"],
        ),
    )


def report(rows: Sequence[_Row]) -> str:
    """The tables, in Markdown."""
    rows = ordered(rows)
    lines: list[list[object]] = []
    for row in rows:
        dense = _dense(rows, row)
        step = f"{row['step_ms']:.0f}" if "step_ms" in row else "-"
        cells: list[object] = [row["title"], row["batch"], row["allocator"], row["run"]]
        for field in ("held", "peak", "growth"):
            cells += [human_bytes(row.get(field)), _times(_ratio(row, dense, field))]
        cells[6:6] = [human_bytes(row.get("idle")), human_bytes(row.get("ready"))]
        cells += [step, _times(_ratio(row, dense, "step_ms"))]
        if row.get("largest_batch") is not None:
            cells += [row["largest_batch"], _times(_ratio(row, dense, "largest_batch"))]
        else:
            cells += ["-", "-"]
        lines.append(cells)
    limits = sorted({row["limit"] for row in rows if row.get("limit")})
    largest = f"largest batch in {' or '.join(human_bytes(limit) for limit in limits)}" if limits else "largest batch"
    header = [
        "network",
        "batch",
        "allocator",
        "run",
        "held",
        "of dense",
        "idle",
        "ready",
        "peak",
        "of dense",
        "growth",
        "of dense",
    ]
    header += ["step ms", "of dense", largest, "of dense"]
    notes = []
    if any(row.get("peak_is_of_steps") is False for row in rows):
        notes.append("Peaks are those since the start of the process: its high-water mark could not be set back.")
    if any(row["out_of_memory"] for row in rows):
        runs = [f"{row['title']} {row['run']}" for row in rows if row["out_of_memory"]]
        notes.append(f"Ran out of memory: {', '.join(runs)}.")
    device = "allocated on the GPU" if any(row["device"] == "cuda" for row in rows) else "resident, whole process"
    return "\n".join(
        [
            "# Memory of training",
            "",
            common.describe(rows, lambda row: f"{row['title']}, batch {row['batch']}, {row['allocator']}"),
            "",
            f"held: for the backward pass, parameters and images aside. idle, ready, peak ({device}): before the",
            "model is built, after its first small step, and the most during the steps. growth: peak less idle, so",
            "weights, gradients, momentum, held tensors and all that is short-lived. Each run is a process of its own.",
            "allocator kept: all freed memory stays in the process, of dense runs too (faster steps).",
            "",
            common.markdown(header, lines),
            *(f"\n{note}" for note in notes),
            "",
        ]
    )


def plot(rows: Sequence[_Row], path: Path) -> None:
    """Held bytes, growth to the peak, and the largest batch, each as a ratio to the dense run."""
    rows = ordered(rows)
    groups = list(dict.fromkeys((row["model"], row["batch"], row["width"], row["allocator"]) for row in rows))
    runs = list(dict.fromkeys(row["run"] for row in rows))
    panels = {"held": "held for the backward pass", "growth": "peak of the process, less what it began with"}
    if any(row.get("largest_batch") for row in rows):
        panels["largest_batch"] = "largest batch"
    width = 0.84 / len(runs)
    size = (len(panels) * (1.6 + 1.1 * len(groups)), 4.0)
    with common.picture(path, 1, len(panels), size) as (figure, axes):
        for panel, (field, title) in zip(axes, panels.items(), strict=True):
            for number, run in enumerate(runs):
                heights = []
                for group in groups:
                    fields = ("model", "batch", "width", "allocator", "run")
                    found = (row for row in rows if tuple(row[field] for field in fields) == (*group, run))
                    row = next(found, None)
                    heights.append(0.0 if row is None else _ratio(row, _dense(rows, row), field) or 0.0)
                places = [place + number * width for place in range(len(groups))]
                color = {"dense": "0.6", "checkpoint": "0.8"}.get(run, f"C{number - 2}")
                bars = panel.bar(places, heights, width, color=color, label=run)
                panel.bar_label(
                    bars, [f"{height:.2f}" if height else "" for height in heights], fontsize=7, rotation=90
                )
            titles = [
                f"{NETWORKS[model].title}\nbatch {batch}" + ("" if allocator == "default" else f", {allocator}")
                for model, batch, _, allocator in groups
            ]
            panel.set_xticks([place + 0.42 - width / 2 for place in range(len(groups))], titles, fontsize=7)
            panel.set_title(f"{title}, dense = 1", fontsize=9)
            panel.margins(y=0.15)
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), fontsize=8)
