"""Whole training steps: forward, loss, backward and SGD with momentum, dense in both layouts and sparse.

    python bench/train_step.py                                  # every network, about an hour on two cores
    python bench/train_step.py --models resnet18 --batch 64     # one row; rows measured before stay in the file
    python bench/train_step.py --quick                          # one period of two small networks, written nowhere

Each network of a row has a process of its own, and they take their steps in turns. A sparse time is the mean over a
whole selection period (``--topk-period`` steps, each of which selects weights and one activations too), a dense time is
that of the faster layout; both are medians over the rounds. Weights and saved activations have the same sparsity. Where
the time goes is profiled afterwards, in steps that select activations and steps that do not, weighted as they occur;
"rest" is what no category names, Python included. The C library keeps freed memory in all of the processes, or in none
(``--allocator default``).
"""

import contextlib
import dataclasses
import functools
import os
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch is loaded: its profiler says on every start and stop that it does.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import common
import torch
from paper_networks import LAYOUTS, NETWORKS, Network, Trainee, make_sparse
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from workers import Worker

from swat_ext.config import BATCHNORMS

_WARM_UP = 2
# Steps of each dense network in one period.
_DENSE_STEPS = 2
_PROFILED = 3

# By the first pattern that an event's name matches; what lies inside such an event belongs to it.
_CATEGORIES = {
    "input gradient": re.compile(r"^input gradient$|conv2d_input_grad"),
    "weight gradient": re.compile(r"^weight gradient$|conv2d_weight_grad"),
    "select and compress": re.compile(r"^swat_ext::(select|compress|kth_magnitude|decompress|take)"),
    "convolution forward": re.compile(r"^(aten|swat_ext)::(masked_)?conv(2d|olution)$"),
    "BatchNorm": re.compile(r"batch_?norm", re.IGNORECASE),
    "ReLU": re.compile(r"relu", re.IGNORECASE),
    "optimizer": re.compile(r"^Optimizer\."),
}
CATEGORIES = (
    "convolution forward",
    "input gradient",
    "weight gradient",
    "select and compress",
    "BatchNorm",
    "ReLU",
    "optimizer",
    "rest",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """How one network of a row is trained; dense where ``sparsity`` is None."""

    layout: str
    sparsity: float | None
    batchnorm: str


class _SplitGradients(TorchDispatchMode):
    """Computes the two gradients of PyTorch's convolution one after the other, so that each has its own event."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.convolution_backward.default:
            return func(*args, **(kwargs or {}))
        *others, (wants_input, wants_weight, wants_bias) = args
        grad_input = grad_weight = grad_bias = None
        if wants_input:
            with record_function("input gradient"):
                grad_input = func(*others, [True, False, False])[0]
        if wants_weight or wants_bias:
            with record_function("weight gradient"):
                _, grad_weight, grad_bias = func(*others, [False, wants_weight, wants_bias])
        return grad_input, grad_weight, grad_bias


def _profiled(trainee: Trainee) -> dict[str, float]:
    """Milliseconds of one step in each category."""
    # Only PyTorch's own convolutions need splitting, and the mode costs time at every operator.
    splitting = contextlib.nullcontext() if trainee.layers else _SplitGradients()
    with profile(activities=[ProfilerActivity.CPU]) as profiler, splitting:
        started = time.perf_counter()
        trainee.step()
        total = 1e3 * (time.perf_counter() - started)
    taken = dict.fromkeys(CATEGORIES, 0.0)
    stack = [event for event in profiler.events() if event.cpu_parent is None]
    while stack:
        event = stack.pop()
        category = next((name for name, pattern in _CATEGORIES.items() if pattern.search(event.name)), None)
        if category is None:
            stack.extend(event.cpu_children)
        else:
            taken[category] += event.cpu_time_total / 1e3
    taken["rest"] = max(0.0, total - sum(taken.values()))
    return taken


def breakdown(trainee: Trainee, period: int) -> dict[str, float]:
    """Milliseconds of a mean step in each category, one in ``period`` selecting; medians of a few."""
    trainee.step()  # warm again, after the other processes
    selecting, other = [], []
    for _ in range(_PROFILED):
        trainee.select_next()
        selecting.append(_profiled(trainee))
        other.append(_profiled(trainee))

    def median(steps: list[dict[str, float]], name: str) -> float:
        return statistics.median(step[name] for step in steps)

    return {name: (median(selecting, name) + (period - 1) * median(other, name)) / period for name in CATEGORIES}


class Runner:
    """What the process of one network does."""

    def __init__(self, name: str, batch: int, width: float, run: Run, period: int, allocator: str) -> None:
        common.use_allocator(allocator)
        network = NETWORKS[name]
        model = network.build(width=width)
        if run.sparsity is None:
            model = model.to(memory_format=LAYOUTS[run.layout])
        else:
            model = make_sparse(model, run.sparsity, run.batchnorm, period)
        self._trainee = Trainee(model, network.data(batch, run.layout))
        self._period = period
        for _ in range(_WARM_UP):
            self._trainee.step()

    def step(self) -> float:
        """Milliseconds of one step."""
        started = time.perf_counter()
        self._trainee.step()
        return 1e3 * (time.perf_counter() - started)

    def select_next(self) -> None:
        self._trainee.select_next()

    def breakdown(self) -> dict[str, float]:
        """Where the time of a step goes, after a check that training went well."""
        self._trainee.check()
        return breakdown(self._trainee, self._period)


def measure(
    network: Network,
    batch: int,
    sparsities: Sequence[float],
    batchnorms: Sequence[str],
    *,
    rounds: int,
    period: int,
    width: float,
    allocator: str,
    progress: tqdm,
) -> dict[str, Any]:
    """One row: every network's time, the ratios, and where the time goes."""
    progress.set_description(f"{network.title}, batch {batch}")
    conditions = common.conditions()
    runs = {
        _label(sparsity, name): Run("channels_last", sparsity, name) for name in batchnorms for sparsity in sparsities
    }
    runs |= {f"dense {layout}": Run(layout, None, "exact") for layout in LAYOUTS}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(Runner, network.name, batch, width, run, period, allocator))
            for name, run in runs.items()
        }
        samples: dict[str, list[float]] = {name: [] for name in runs}
        order = list(runs)
        dense_at = {number * period // _DENSE_STEPS for number in range(min(_DENSE_STEPS, period))}
        for number in range(rounds):
            for worker in workers.values():
                worker.call("select_next")  # a round is one whole period
            taken: dict[str, list[float]] = {name: [] for name in runs}
            for step in range(period):
                first = (number + step) % len(order)
                for name in order[first:] + order[:first]:
                    if runs[name].sparsity is not None or step in dense_at:
                        taken[name].append(workers[name].call("step"))
                progress.update()
            for name, times in taken.items():
                samples[name].append(sum(times) / len(times))
        timings = {name: common.Timing(tuple(times)) for name, times in samples.items()}
        layout = min(LAYOUTS, key=lambda name: timings[f"dense {name}"].median)
        sparse = [name for name, run in runs.items() if run.sparsity is not None]
        parts = {"dense": workers[f"dense {layout}"].call("breakdown")}
        parts |= {name: workers[name].call("breakdown") for name in sparse}
    fastest = timings[f"dense {layout}"].median
    return {
        "model": network.name,
        "title": network.title,
        "batch": batch,
        "size": network.size,
        "width": width,
        "topk_period": period,
        "allocator": allocator,
        "conditions": conditions,
        "dense_layout": layout,
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
        "ratios": {name: fastest / timings[name].median for name in sparse},
        "ratio_ranges": {name: _range(timings[f"dense {layout}"], timings[name]) for name in sparse},
        "breakdown": parts,
    }


def _range(dense: common.Timing, sparse: common.Timing) -> list[float]:
    """The least and the most of the ratios of single rounds."""
    ratios = [one / other for one, other in zip(dense.samples, sparse.samples, strict=True)]
    return [min(ratios), max(ratios)]


def _label(sparsity: float, batchnorm: str) -> str:
    return f"{sparsity:.0%}" + ("" if batchnorm == "exact" else f" {batchnorm}")


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables, in Markdown."""
    labels = list(dict.fromkeys(label for row in rows for label in row["ratios"]))
    header = ["network", "batch", "freed memory", "dense ms", "least to most", "layout", *labels]
    lines: list[list[object]] = []
    for row in rows:
        dense = row["timings"][f"dense {row['dense_layout']}"]
        cells = [_cell(row, label) if label in row["ratios"] else "-" for label in labels]
        # Rows of one round have no spread, and older files hold none.
        several = dense["rounds"] > 1 and "most_ms" in dense
        spread = f"{dense['best_ms']:.0f}-{dense['most_ms']:.0f}" if several else "-"
        start = [row["title"], row["batch"], row["allocator"], f"{dense['median_ms']:.0f}", spread, row["dense_layout"]]
        lines.append([*start, *cells])
    parts = [
        [row["title"], row["batch"], name, *(f"{part[category]:.0f}" for category in CATEGORIES)]
        for row in rows
        for name, part in row["breakdown"].items()
    ]
    return "\n".join(
        [
            "# Whole training steps",
            "",
            common.describe(rows, lambda row: f"{row['title']}, batch {row['batch']}, {row['allocator']}"),
            "",
            "Milliseconds a step, and how many times as fast as dense PyTorch in its faster layout; medians of",
            "rounds, and where there are several the least and the most of a round:",
            "",
            common.markdown(header, lines),
            "",
            "Where the time goes, milliseconds a step (profiled, so that the sums differ a little from the above):",
            "",
            common.markdown(["network", "batch", "run", *CATEGORIES], parts),
            "",
        ]
    )


def _cell(row: dict[str, Any], label: str) -> str:
    """The time of a sparse run, its ratio, and the least and most ratio of a round where there were several."""
    timing = row["timings"][label]
    ratio = f"{row['ratios'][label]:.2f}x"
    if timing["rounds"] > 1 and label in row.get("ratio_ranges", {}):
        least, most = row["ratio_ranges"][label]
        ratio += f", {least:.2f}-{most:.2f}"
    return f"{timing['median_ms']:.0f} ({ratio})"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar for each run, as a share of its dense step, by category."""
    with common.picture(path, 1, 1, (2 + 2.1 * len(rows), 4.8)) as (_, (axes,)):
        _draw(axes, rows)


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    place, ticks = 0.0, []
    for row in rows:
        dense = sum(row["breakdown"]["dense"].values())
        start = place
        runs = {"dense": 1.0, **row["ratios"]}
        for name, ratio in runs.items():
            part, bottom = row["breakdown"][name], 0.0
            # Heights are the timed ratios; the profile shares them out.
            scale = 1 / ratio / sum(part.values()) if dense else 0.0
            for number, category in enumerate(CATEGORIES):
                height = part[category] * scale
                axes.bar(place, height, 0.85, bottom, color=f"C{number}" if category != "rest" else "0.7")
                bottom += height
            axes.text(place, bottom, name if name == "dense" else f"{name}\n{ratio:.1f}x", ha="center", va="bottom")
            place += 1
        kept = "" if row["allocator"] == "kept" else f"\n{row['allocator']} allocator"
        ticks.append(((start + place - 1) / 2, f"{row['title']}\nbatch {row['batch']}{kept}"))
        place += 0.7
    for number, category in enumerate(CATEGORIES):
        axes.bar(0, 0, color=f"C{number}" if category != "rest" else "0.7", label=category)
    axes.set_xticks([tick for tick, _ in ticks], [text for _, text in ticks])
    axes.set_ylabel("time of a step, dense = 1")
    axes.set_ylim(top=max(1.0, *(1 / ratio for row in rows for ratio in row["ratios"].values())) * 1.3)
    axes.legend(fontsize=8, ncols=4, loc="upper center")
    machine = rows[-1]["conditions"]
    axes.set_title(f"{machine['threads']} threads, {machine['cpu']}, {machine['isa']}", fontsize=9)


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    return (common.ALLOCATORS.index(row["allocator"]), list(NETWORKS).index(row["model"]), row["batch"])


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = common.parser(__doc__, quick="ResNet-18 and VGG-16, batch 64, 90%%, one round, no file")
    parser.add_argument("--models", type=common.names(list(NETWORKS)), help=f"default: {','.join(NETWORKS)}")
    parser.add_argument("--batch", type=common.positives, help="default: 64,128, or 16 at 224 pixels")
    parser.add_argument("--sparsity", type=common.percentages, help="default: 80,90,95")
    forms = common.names(BATCHNORMS)
    parser.add_argument("--batchnorm", type=forms, default=["exact"], help=f"some of {','.join(BATCHNORMS)}")
    parser.add_argument("--topk-period", type=int, default=10, help="steps from one selection to the next")
    parser.add_argument("--rounds", type=int, help="selection periods; default: 3, or 1 with --quick")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the channels, for trials")
    options = parser.parse_args(arguments)
    common.begin(options, "train_step")
    models = options.models or (["resnet18", "vgg16"] if options.quick else list(NETWORKS))
    sparsities = options.sparsity or ([0.9] if options.quick else [0.8, 0.9, 0.95])
    rounds = options.rounds or (1 if options.quick else 3)
    cases = []
    for name in models:
        batches = options.batch or NETWORKS[name].batches[: 1 if options.quick else None]
        cases += [(NETWORKS[name], batch) for batch in batches]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * rounds * options.topk_period, unit="step") as progress:
        for network, batch in cases:
            row = measure(
                network,
                batch,
                sparsities,
                options.batchnorm,
                rounds=rounds,
                period=options.topk_period,
                width=options.width,
                allocator=options.allocator,
                progress=progress,
            )
            rows.append(row)
            if options.out is not None:  # after each row, so that an interrupted run keeps what it measured
                merged = common.merge_rows(options.out, rows, ("model", "batch", "width", "allocator"))
                merged.sort(key=_place)
                common.write(options.out, {"rows": merged}, report(merged), functools.partial(plot, merged))
    common.finish(report(rows), options.out)
    return rows


if __name__ == "__main__":
    main()
