"""How everything here is measured.

Interleaved, by medians, against the faster dense layout, never on zeros, and with the conditions written down.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from swat_ext import _C, functional, keep_freed_memory

# A sample shorter than this is repeated: timers and wake-ups of threads would be a visible part of it.
_SHORTEST_SAMPLE_S = 2e-3


# What the C library does with freed memory, for dense and sparse alike. "default": large blocks go back to the system,
# and fresh ones cost a fault a page. "kept": swat_ext.keep_freed_memory().
ALLOCATORS = ("kept", "default")
_allocator = "default"


def use_allocator(name: str) -> None:
    """Set one of :data:`ALLOCATORS` for this process, which began with "default" and stays so without glibc."""
    global _allocator
    if name == "kept" and keep_freed_memory():
        _allocator = name


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one call in milliseconds, one a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    def to_dict(self) -> dict[str, float | int]:
        return {
            "median_ms": self.median,
            "best_ms": self.best,
            "most_ms": max(self.samples),
            "rounds": len(self.samples),
        }


def interleaved(
    calls: dict[str, Callable[[], object]], *, rounds: int, progress: tqdm | None = None
) -> dict[str, Timing]:
    """Time all ``calls`` in turn, ``rounds`` times, starting each round at another one.

    What changes on the machine while this runs then changes all of them alike, and a ratio of two medians stays right.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # first calls allocate, and choose kernels
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(_SHORTEST_SAMPLE_S / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            call, count = calls[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) * 1e3 / count)
        if progress is not None:
            progress.update()
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


@functools.cache
def commit() -> str | None:
    """Short hash of the commit that is checked out, "+" after it if tracked files differ outside bench/results.

    None outside a repository, or without git. Asked once: a later commit does not change what is loaded already.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def today() -> str:
    """The day by UTC, as 2026-01-31."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def conditions() -> dict[str, Any]:
    """The machine and the software that a result holds for, and when it was measured."""
    return {
        "commit": commit(),
        "date": today(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "freed_memory": _allocator,
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def activations(size: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    """Float32 values of ``size``: "magnitudes" ``|N(0, 1)|``, "gaussian" ``N(0, 1)``, "relu" ``max(N(0, 1), 0)``.

    After selection all three keep the share ``1 - sparsity`` (for "relu" while that is at most a half).
    """
    values = torch.randn(tuple(size), generator=generator)
    if kind == "magnitudes":
        return values.abs_()
    if kind == "relu":
        return values.relu_()
    if kind == "gaussian":
        return values
    raise ValueError(f"kind: expected 'magnitudes', 'gaussian' or 'relu', got {kind!r}")


def select(tensor: Tensor, sparsity: float) -> Tensor:
    """The threshold that keeps exactly the share ``1 - sparsity`` of ``tensor``, as a layer selects it."""
    threshold = functional.kth_magnitude(tensor, functional.keep_count(tensor.numel(), sparsity))
    if not threshold > 0:
        raise ValueError(f"tensor: expected more nonzeros than sparsity {sparsity} keeps: nothing is timed on zeros")
    return threshold


def percentages(text: str) -> list[float]:
    """``"80,90,95"`` as ``[0.8, 0.9, 0.95]``, for :mod:`argparse`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if not all(0 <= value < 100 for value in values):
        raise argparse.ArgumentTypeError(f"expected whole percentages in [0, 100) such as 80,90,95, got {text!r}")
    return [value / 100 for value in values]


def json_file(text: str) -> Path:
    """The path of a file to write, for :mod:`argparse`: a bench should not find out at its end that it cannot."""
    path = Path(text)
    if path.suffix != ".json" or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected the path of a .json file, got {text!r}")
    return path


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A type for :mod:`argparse` that takes a comma-separated list of ``known`` names."""

    def parse(text: str) -> list[str]:
        values = text.split(",")
        for value in values:
            if value not in known:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {value!r}")
        return values

    return parse


def positives(text: str) -> list[int]:
    """``"64,128"`` as ``[64, 128]``, for :mod:`argparse`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected integers of at least 1 such as 64,128, got {text!r}")
    return values


def parser(doc: str | None, *, quick: str, allocator: str | None = "kept") -> argparse.ArgumentParser:
    """With the options that benches share.

    Args:
        doc: of the bench; its first paragraph is shown.
        quick: what ``--quick`` does.
        allocator: the default of ``--allocator``; None leaves the option out.
    """
    made = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    if allocator is not None:
        help_ = f"whether the C library keeps freed memory, for dense and sparse alike; default: {allocator}"
        made.add_argument("--allocator", choices=ALLOCATORS, default=allocator, help=help_)
    made.add_argument("--threads", type=int, help="default: PyTorch's")
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--out", type=json_file, help="JSON file; what is made of it goes beside it")
    return made


def begin(options: argparse.Namespace, name: str | None) -> None:
    """Act on the options of :func:`parser`; without ``--out`` and ``--quick``, ``out`` is the committed ``name``."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    use_allocator(getattr(options, "allocator", "default"))
    if options.out is None and name is not None and not options.quick:
        options.out = Path(__file__).parent / "results" / f"{name}.json"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose columns are aligned, so that it reads well in a terminal too."""
    texts = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join([first.strip().ljust(widths[0]), *others]) + " |"

    rule = line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join([line(texts[0]), rule, *(line(row) for row in texts[1:])])


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write ``result``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def write(path: Path, result: dict[str, Any], text: str, plot: Callable[[Path], None] | None = None) -> None:
    """The JSON file, the tables beside it, and the picture that ``plot`` draws."""
    write_json(path, result)
    path.with_suffix(".md").write_text(text.rstrip() + "\n", encoding="utf-8")
    if plot is not None:
        plot(path.with_suffix(".png"))


def finish(text: str, out: Path | None) -> None:
    """Print the tables, and where they were written."""
    print(text)
    if out is not None:
        files = [out.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
        print(f"written: {', '.join(str(file) for file in files if file.is_file())}")


@contextlib.contextmanager
def picture(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its panels, row by row; it is written at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield figure, list(panels.flat)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def merge_rows(path: Path, rows: list[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """``rows``, and before them those in the JSON file at ``path`` that differ from all of them in a field of ``key``.

    A bench may then be run part by part; each row carries the conditions that it was measured under.
    """
    if not path.is_file():
        return rows
    known = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    new = {tuple(row[name] for name in key) for row in rows}
    return [row for row in known if tuple(row.get(name) for name in key) not in new] + rows


def describe(rows: Sequence[dict[str, Any]], label: Callable[[dict[str, Any]], str] | None = None) -> str:
    """The distinct conditions of ``rows`` in a line each, the load aside, then the commits that they were measured at.

    Args:
        rows: each with its "conditions".
        label: what to call a row where not all are of one commit and day; without it those are listed alone.
    """
    aside = ("load_before", "commit", "date")
    machines: dict[str, None] = {}
    builds: dict[str, dict[str, None]] = {}
    for row in rows:
        found = row["conditions"]
        machines[", ".join(f"{name}: {value}" for name, value in found.items() if name not in aside)] = None
        build = f"commit: {found.get('commit') or 'not noted'}"
        build += f", date: {found['date']}" if "date" in found else ""
        builds.setdefault(build, {})[label(row) if label is not None else ""] = None
    several = label is not None and len(builds) > 1
    lines = [build + (f" ({'; '.join(labels)})" if several else "") for build, labels in builds.items()]
    return "\n".join([*machines, *lines])
