"""What swat_ext.keep_freed_memory() changes in a training step, dense and sparse: time, page faults, peak memory.

    python bench/allocator.py           # ResNet-18 at batch 64, ResNet-50 at 224 and batch 8: minutes on two cores
    python bench/allocator.py --quick   # ResNet-18 at a batch of 8, one round, written nowhere

Each run has a process of its own, as in train_step.py, and they take their steps in turns. Figures are means over a
selection period, of which dense networks take but a few steps, and medians over the rounds. The time of the processor,
in the process and in the system, is less troubled by other work on the machine than the time that passes.
"""

import contextlib
import resource
import statistics
from collections.abc import Sequence
from typing import Any

import common
from paper_networks import LAYOUTS, NETWORKS
from tqdm import tqdm
from train_step import Run, Runner
from workers import Worker

_CASES = (("resnet18", 64), ("resnet50", 8))
_SPARSITY, _PERIOD, _DENSE_STEPS = 0.9, 10, 2
_RUNS = {f"dense {layout}": Run(layout, None, "exact") for layout in LAYOUTS}
_RUNS |= {f"{_SPARSITY:.0%}": Run("channels_last", _SPARSITY, "exact")}
_FIELDS = ("step_ms", "user_ms", "system_ms", "faults")


class Counter(Runner):
    """A network in its process, with what its steps cost."""

    def counted_step(self) -> list[float]:
        """One step: what :data:`_FIELDS` name."""
        before = resource.getrusage(resource.RUSAGE_SELF)
        took = self.step()
        after = resource.getrusage(resource.RUSAGE_SELF)
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        return [took, 1e3 * user, 1e3 * system, after.ru_minflt - before.ru_minflt]

    def peak(self) -> int:
        """Most bytes that were resident in this process so far."""
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(name: str, batch: int, *, rounds: int, width: float, progress: tqdm) -> list[dict[str, Any]]:
    """A row for each run with each allocator."""
    network, conditions = NETWORKS[name], common.conditions()
    del conditions["freed_memory"]  # it differs by row
    rows = [(run, allocator) for run in _RUNS for allocator in reversed(common.ALLOCATORS)]
    progress.set_description(f"{network.title}, batch {batch}")
    with contextlib.ExitStack() as stack:
        workers = {
            row: stack.enter_context(Worker(Counter, name, batch, width, _RUNS[row[0]], _PERIOD, row[1]))
            for row in rows
        }
        means: dict[tuple[str, str], list[list[float]]] = {row: [] for row in rows}
        for _ in range(rounds):
            for worker in workers.values():
                worker.call("select_next")
            steps: dict[tuple[str, str], list[list[float]]] = {row: [] for row in rows}
            for step in range(_PERIOD):
                for row in rows[step % len(rows) :] + rows[: step % len(rows)]:
                    if _RUNS[row[0]].sparsity is not None or step < _DENSE_STEPS:
                        steps[row].append(workers[row].call("counted_step"))
                progress.update()
            for row, taken in steps.items():
                means[row].append([statistics.mean(column) for column in zip(*taken, strict=True)])
        measured = []
        for row in rows:
            figures = [statistics.median(column) for column in zip(*means[row], strict=True)]
            measured.append(
                {
                    "model": name,
                    "title": network.title,
                    "batch": batch,
                    "run": row[0],
                    "allocator": row[1],
                    **dict(zip(_FIELDS, figures, strict=True)),
                    "peak": workers[row].call("peak"),
                    "rounds": rounds,
                    "conditions": conditions,
                }
            )
    return measured


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    header = ["network", "batch", "run", "freed memory", "step ms", "user ms", "system ms", "faults", "peak MiB"]
    lines = [
        [row["title"], row["batch"], row["run"], row["allocator"]]
        + [f"{row[field]:.0f}" for field in _FIELDS]
        + [f"{row['peak'] / 2**20:.0f}"]
        for row in rows
    ]
    text = "Means of a step, medians over the rounds; the peak is that of the whole process, from its start."
    described = common.describe(rows, lambda row: f"{row['title']}, batch {row['batch']}")
    return f"# What keeping freed memory changes\n\n{described}\n\n{text}\n\n{common.markdown(header, lines)}\n"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = common.parser(__doc__, quick="ResNet-18 at batch 8, one round, no file", allocator=None)
    parser.add_argument("--rounds", type=int, help="selection periods; default: 3, or 1 with --quick")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the channels, for trials")
    options = parser.parse_args(arguments)
    common.begin(options, "allocator")
    cases = (("resnet18", 8),) if options.quick else _CASES
    rounds = options.rounds or (1 if options.quick else 3)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * rounds * _PERIOD, unit="step") as progress:
        for name, batch in cases:
            rows += measure(name, batch, rounds=rounds, width=options.width, progress=progress)
            if options.out is not None:
                common.write(options.out, {"rows": rows}, report(rows))
    common.finish(report(rows), options.out)
    return rows


if __name__ == "__main__":
    main()
