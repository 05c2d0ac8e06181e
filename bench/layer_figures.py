"""The tables and the picture of layers.py."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

_Row = dict[str, Any]

_TITLES = {"resnet18": "Convolutions of ResNet-18, one by one", "others": "Layers of other networks"}
_PASSES = ("forward", "input grad", "weight grad")
# What the layers of one table have in common; the others have batches of their own.
_SETTINGS = ("inputs", "layout", "topk_period", "sparsities")
_KEY = ("group", "name", "batch", "inputs", "layout")


def summarise(row: _Row, sparsity: float) -> dict[str, float]:
    """Milliseconds of one layer at one sparsity; dense passes are each the faster of the two layouts."""
    median = {name: timing["median_ms"] for name, timing in row["timings"].items()}
    prefix = f"{sparsity:.2f}"

    def dense(name: str) -> float:
        layouts = (f"dense {layout} {name}" for layout in ("NCHW", "channels_last"))
        return min(median[key] for key in layouts if key in median)  # a linear layer has one

    limit = 2 * row["macs"] * (1 - sparsity) / row["peak_gflops"] / 1e6
    result: dict[str, float] = {"limit": limit}
    for name in _PASSES:
        result[name] = median[f"{prefix} {name}"]
        result[f"dense {name}"] = dense(name)
        result[f"fraction of limit, {name}"] = limit / result[name]
    for name in ("compress", "select"):
        result[name] = median[f"{prefix} {name}"]
    result["step"] = median[f"{prefix} step"] + result["select"] / row["topk_period"]
    result["dense step"] = dense("step")
    result["ratio"] = result["dense step"] / result["step"]
    others = [time for name, time in median.items() if name.startswith(f"{prefix} sparseprop")]
    if others:
        result["sparseprop"] = min(others)
    return result


def table(rows: Sequence[_Row]) -> str:
    """A line for each layer and sparsity."""
    summaries = [(row, sparsity, summarise(row, sparsity)) for row in rows for sparsity in row["sparsities"]]
    with_sparseprop = any("sparseprop" in summary for *_, summary in summaries)
    with_batch = len({row["batch"] for row in rows}) > 1
    header = ["layer", *(["batch"] if with_batch else []), "sparsity", "dense ms", "step ms", "ratio"]
    header += [*(f"{name} (dense) ms" for name in _PASSES), "of limit", "compress", "select"]
    header += ["sparseprop"] if with_sparseprop else []
    lines: list[list[object]] = []
    for row, sparsity, summary in summaries:
        cells: list[object] = [row["name"], *([row["batch"]] if with_batch else []), f"{sparsity:.0%}"]
        cells += [summary["dense step"], summary["step"], f"{summary['ratio']:.2f}x"]
        cells += [f"{summary[key]:.2f} ({summary[f'dense {key}']:.1f})" for key in _PASSES]
        cells += [" / ".join(f"{summary[f'fraction of limit, {key}']:.2f}" for key in _PASSES)]
        cells += [summary["compress"], summary["select"]]
        lines.append(cells + ([summary.get("sparseprop", "-")] if with_sparseprop else []))
    return common.markdown(header, lines)


def totals(rows: Sequence[_Row]) -> list[dict[str, float]]:
    """Forward and backward of all 3x3 layers of a table of ResNet-18, each as often as the network has it."""
    chosen = [row for row in rows if row["group"] == "resnet18" and row["kernel"] == 3]
    result = []
    for sparsity in chosen[0]["sparsities"] if chosen else []:
        summaries = [(row["count"], summarise(row, sparsity)) for row in chosen]
        total = {"sparsity": sparsity}
        for key in ("step", "dense step", "sparseprop"):
            if all(key in summary for _, summary in summaries):
                total[key] = sum(count * summary[key] for count, summary in summaries)
        result.append({**total, "ratio": total["dense step"] / total["step"]})
    return result


def _tables(rows: Sequence[_Row]) -> list[list[_Row]]:
    """The rows of each table: of a group, measured alike."""
    tables: dict[str, list[_Row]] = {}
    for row in sorted(rows, key=lambda row: list(_TITLES).index(row["group"])):
        batch = row["batch"] if row["group"] == "resnet18" else None
        key = json.dumps([row["group"], batch, *(row[name] for name in _SETTINGS)])
        tables.setdefault(key, []).append(row)
    return list(tables.values())


def result_of(rows: Sequence[_Row]) -> dict[str, Any]:
    """What the JSON file holds: the rows, and the sums of the first table of ResNet-18."""
    return {"layers": list(rows), "totals": next(filter(None, map(totals, _tables(rows))), [])}


def _section(rows: Sequence[_Row]) -> str:
    """The conditions, the table and the sum over the 3x3 layers, in Markdown."""
    first = rows[0]
    rounds = sorted({timing["rounds"] for row in rows for timing in row["timings"].values()})
    batches = sorted({row["batch"] for row in rows})
    batch = f"batch {batches[0]}" if len(batches) == 1 else "each at its own batch"
    lines = [
        f"# {_TITLES[first['group']]}",
        "",
        common.describe(rows, lambda row: row["name"]),
        f"float32, {batch}, activations {first['inputs']}, sparse layers {first['layout']}, "
        f"medians of {' or '.join(map(str, rounds))}",
        "",
        table(rows),
    ]
    sums = totals(rows)
    if sums:
        count = sum(row["count"] for row in rows if row["kernel"] == 3)
        lines += ["", f"3x3 layers, forward + backward, {count} in the network:", ""]
    for total in sums:
        others = f", SparseProp {total['sparseprop']:.0f} ms" if "sparseprop" in total else ""
        lines.append(
            f"- {total['sparsity']:.0%}: dense {total['dense step']:.0f} ms, sparse {total['step']:.0f} ms: "
            f"{total['ratio']:.2f} times as fast{others}"
        )
    return "\n".join(lines)


def report(rows: Sequence[_Row]) -> str:
    """A table for each group of layers measured alike, in Markdown."""
    return "\n\n".join(_section(chosen) for chosen in _tables(rows))


def _draw(axes: Any, rows: Sequence[_Row]) -> None:
    """Dense, then each sparsity: milliseconds of ResNet-18's layers, of others the share of their dense step."""
    sparsities, relative = rows[0]["sparsities"], rows[0]["group"] != "resnet18"
    width = 0.8 / (1 + len(sparsities))
    for number, row in enumerate(rows):
        summaries = [summarise(row, sparsity) for sparsity in sparsities]
        unit = summaries[0]["dense step"] if relative else 1.0
        label = "dense PyTorch" if not number else None
        axes.bar(number, summaries[0]["dense step"] / unit, width, color="0.6", label=label)
        for place, (sparsity, summary) in enumerate(zip(sparsities, summaries, strict=True), 1):
            label = f"{sparsity:.0%} sparse" if not number else None
            height = summary["step"] / unit
            bars = axes.bar(number + place * width, height, width, color=f"C{place - 1}", label=label)
            axes.bar_label(bars, [f"{summary['ratio']:.1f}x"], fontsize=8 if len(rows) < 8 else 6)
            left = number + (place - 0.5) * width
            axes.hlines(3 * summary["limit"] / unit, left, left + width, "k", lw=1)
    axes.plot([], [], "k", lw=1, label="kept multiply-adds at the speed of a matrix product")
    names = [row["name"] for row in rows]
    if relative:  # in short lines, for there are many
        names = [row["name"].replace(" @", "\n@") + f"\nbatch {row['batch']}" for row in rows]
    places = [number + width * len(sparsities) / 2 for number in range(len(rows))]
    axes.set_xticks(places, names, fontsize=9 if len(rows) < 8 else 7)
    axes.set_ylabel("forward + backward, dense = 1" if relative else "forward + backward, ms")
    machine = rows[0]["conditions"]
    batch = "" if relative else f"batch {rows[0]['batch']}, "
    title = f"{batch}{machine['threads']} threads, {machine['cpu']}, {machine['isa']}"
    axes.set_title(title, fontsize=9)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.12)
    axes.legend(fontsize=8, ncols=3, loc="upper center")


def plot(rows: Sequence[_Row], path: Path) -> None:
    """A panel for each table: forward and backward of each layer, with the time at the limit marked."""
    tables = _tables(rows)
    width = max(7.0, *(1.5 + (2.2 if len(chosen) < 8 else 1.2) * len(chosen) for chosen in tables))
    with common.picture(path, len(tables), 1, (width, 4.2 * len(tables))) as (_, panels):
        for axes, chosen in zip(panels, tables, strict=True):
            _draw(axes, chosen)


def merged(path: Path, rows: list[_Row]) -> list[_Row]:
    """``rows``, and with them the layers in the file at ``path`` that were not measured again."""
    if not path.is_file():
        return rows
    before = json.loads(path.read_text(encoding="utf-8"))["layers"]
    # A layer measured again stays at its place.
    return list({tuple(row[name] for name in _KEY): row for row in [*before, *rows]}.values())


def write(path: Path, rows: Sequence[_Row]) -> None:
    """The JSON file, and the tables and the picture beside it."""
    common.write(path, result_of(rows), report(rows), functools.partial(plot, rows))
