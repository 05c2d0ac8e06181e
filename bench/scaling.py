"""How the time of a 3x3 convolution, forward and backward, follows sparsity, batch, threads and width.

    python bench/scaling.py                          # all four axes, some ten minutes on two cores
    python bench/scaling.py --axes sparsity,threads  # two of them; points measured before stay in the file
    python bench/scaling.py --quick                  # few points and rounds, written nowhere

One thing varies along an axis, the rest stays at ``--batch``, ``--sparsity``, ``--width`` and ``--threads``. A point is
what a training step does with the layer, as in layers.py: compression, forward and both gradients through autograd, and
its share of one selection every ``--topk-period`` steps. Dense PyTorch is timed in both layouts in the same interleaved
rounds of the same point, and the faster one counts; the C
library keeps freed memory for all of them (``--allocator``).
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from layer_calls import Layer, dense_calls, swat_calls, tensors_of
from tqdm import tqdm

AXES = ("sparsity", "batch", "threads", "width")
_UNITS = {"sparsity": "zeros in weights and activations", "batch": "images", "threads": "", "width": "channels"}


def values(axis: str, quick: bool) -> list[Any]:
    """Where an axis is measured."""
    if axis == "sparsity":
        return [0.5, 0.9, 0.99] if quick else [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99]
    if axis == "batch":
        return [1, 16] if quick else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    if axis == "threads":
        most = os.cpu_count() or 1
        return sorted({1, most} | {2**power for power in range(most.bit_length()) if 2**power < most})
    return [32, 64] if quick else [16, 32, 64, 128, 256, 512]


def measure(point: dict[str, Any], *, rounds: int, period: int) -> dict[str, float]:
    """Milliseconds at one point: dense in both layouts, sparse, and the share of the selection in it."""
    layer = Layer(point["width"], point["width"], point["size"], 3, 1, 1)
    contiguous = tensors_of(layer, point["batch"], "magnitudes").contiguous(torch.contiguous_format)
    channels_last = contiguous.contiguous(torch.channels_last)
    label = f"{point['sparsity']:.2f}"
    dense = dense_calls(layer, contiguous, "NCHW") | dense_calls(layer, channels_last, "channels_last")
    calls = {name: call for name, call in dense.items() if name.endswith("step")}
    swat = swat_calls(layer, channels_last, point["sparsity"])
    calls |= {name: swat[f"{label} {name}"] for name in ("step", "select")}
    before = torch.get_num_threads()
    torch.set_num_threads(point["threads"])
    try:
        timings = common.interleaved(calls, rounds=rounds)
    finally:
        torch.set_num_threads(before)
    median = {name: timing.median for name, timing in timings.items()}
    layouts = ("NCHW", "channels_last")
    fastest = min(layouts, key=lambda layout: median[f"dense {layout} step"])
    sparse = median["step"] + median["select"] / period
    return {
        **{f"dense_{layout}_ms": median[f"dense {layout} step"] for layout in layouts},
        "dense_ms": median[f"dense {fastest} step"],
        "dense_layout": fastest,
        "sparse_ms": sparse,
        "select_share": median["select"] / period / sparse,
        "ratio": median[f"dense {fastest} step"] / sparse,
    }


def _show(axis: str, value: Any) -> str:
    return f"{value:.0%}" if axis == "sparsity" else str(value)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each axis, in Markdown."""
    lines = ["# Scaling of a 3x3 convolution", "", common.describe(rows, lambda row: row["axis"])]
    for axis in AXES:
        chosen = [row for row in rows if row["axis"] == axis]
        if not chosen:
            continue
        fixed = ", ".join(f"{name} {_show(name, chosen[0][name])}" for name in (*AXES, "size") if name != axis)
        cells = [
            [
                _show(axis, row[axis]),
                row["dense_ms"],
                row["dense_layout"],
                row["sparse_ms"],
                f"{row['select_share']:.0%}",
                f"{row['ratio']:.2f}x",
            ]
            for row in chosen
        ]
        header = [axis, "dense ms", "layout", "sparse ms", "selection", "ratio"]
        lines += ["", f"## {axis.capitalize()}", "", f"At {fixed}:", "", common.markdown(header, cells)]
    return "\n".join([*lines, ""])


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each axis: milliseconds, dense and sparse, and the ratio at each point."""
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    with common.picture(path, 1, len(axes), (3.6 * len(axes) + 0.5, 3.8)) as (figure, panels):
        for panel, axis in zip(panels, axes, strict=True):
            _draw(panel, axis, [row for row in rows if row["axis"] == axis])
        machine = rows[-1]["conditions"]
        figure.suptitle(f"3x3 convolution on {machine['cpu']}, {machine['isa']}", fontsize=10)


def _draw(panel: Any, axis: str, chosen: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import NullFormatter

    places = range(len(chosen))
    panel.plot(places, [row["dense_ms"] for row in chosen], "o-", color="0.5", label="dense PyTorch, faster layout")
    panel.plot(places, [row["sparse_ms"] for row in chosen], "o-", color="C0", label="sparse")
    for place, row in enumerate(chosen):
        text = f"{row['ratio']:.1f}x"
        panel.annotate(text, (place, row["sparse_ms"]), (0, -13), textcoords="offset points", ha="center", size=8)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    times = [row[key] for row in chosen for key in ("dense_ms", "sparse_ms")]
    # Over a decade or more the labels between its ends would run into each other.
    panel.yaxis.set_minor_formatter("{x:g}" if max(times) < 20 * min(times) else NullFormatter())
    panel.tick_params(axis="y", which="both", labelsize=7)
    panel.margins(x=0.1, y=0.18)
    panel.set_xticks(places, [_show(axis, row[axis]) for row in chosen], fontsize=8)
    panel.set_xlabel(" ".join(filter(None, (axis, f"({_UNITS[axis]})" if _UNITS[axis] else ""))))
    panel.set_ylabel("forward + backward, ms")
    fixed = ", ".join(f"{name} {_show(name, chosen[0][name])}" for name in AXES if name != axis)
    panel.set_title(fixed, fontsize=8)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = common.parser(__doc__, quick="few points and rounds, no file")
    parser.add_argument(
        "--axes", type=common.names(AXES), default=list(AXES), help=f"some of {','.join(AXES)}; default: all"
    )
    parser.add_argument("--sparsity", type=common.percentages, default=[0.9], help="off its axis; default: 90")
    parser.add_argument("--batch", type=common.positives, default=[32], help="off its axis; default: 32")
    parser.add_argument("--width", type=common.positives, default=[128], help="channels off their axis; default: 128")
    parser.add_argument("--size", type=int, default=16, help="pixels along each side; default: 16")
    parser.add_argument("--topk-period", type=int, default=10, help="steps that share one selection")
    parser.add_argument("--rounds", type=int, help="default: 9, or 3 with --quick")
    options = parser.parse_args(arguments)
    common.begin(options, "scaling")
    rounds = options.rounds or (3 if options.quick else 9)
    base = {
        "sparsity": options.sparsity[0],
        "batch": options.batch[0],
        "threads": torch.get_num_threads(),
        "width": options.width[0],
        "size": options.size,
    }
    conditions = {name: value for name, value in common.conditions().items() if name != "threads"}
    points = [(axis, {**base, axis: value}) for axis in options.axes for value in values(axis, options.quick)]
    rows: list[dict[str, Any]] = []
    with tqdm(points, unit="point") as progress:
        for axis, point in progress:
            progress.set_description(f"{axis} {_show(axis, point[axis])}")
            measured = measure(point, rounds=rounds, period=options.topk_period)
            rows.append({"axis": axis, **point, "rounds": rounds, "conditions": conditions, **measured})
    if options.out is not None:
        rows = common.merge_rows(options.out, rows, ("axis",))
        rows.sort(key=lambda row: (AXES.index(row["axis"]), row[row["axis"]]))
        common.write(options.out, {"rows": rows}, report(rows), functools.partial(plot, rows))
    common.finish(report(rows), options.out)
    return rows


if __name__ == "__main__":
    main()
