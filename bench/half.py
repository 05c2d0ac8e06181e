"""Training steps in bfloat16 beside float32: time, and what is held for the backward pass.

    python bench/half.py                               # ResNet-18 at half width, batch 32, 80, 90, 95%
    python bench/half.py --sparsity 90 --batch 64

"bfloat16" is a model whose parameters are that too, "autocast" one in float32 under ``torch.autocast``. Each has a
process of its own, and they take their steps in turns. Dense networks are in channels_last, as sparse ones are. *held*
is what autograd keeps from forward to backward, distinct storages, without parameters.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import common
import torch
from paper_networks import NETWORKS, Trainee, make_sparse
from torch import Tensor, nn
from tqdm import tqdm
from workers import Worker

from swat_ext import profile_memory

FORMS = ("float32", "bfloat16", "autocast")
_PERIOD = 10  # steps from one selection of activations to the next; a sparse sample has as many


@dataclasses.dataclass(frozen=True)
class Run:
    """How the network is trained; dense where ``sparsity`` is 0."""

    form: str
    sparsity: float
    batchnorm: str = "exact"

    @property
    def name(self) -> str:
        kind = "dense" if not self.sparsity else f"{self.sparsity:.0%}"
        return kind if self.batchnorm == "exact" else f"{kind}, {self.batchnorm} BatchNorm"


class _Autocast(nn.Module):
    """A model whose forward is under autocast, if it is to be, and whose result is float32."""

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.model, self.enabled = model, enabled

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            output: Tensor = self.model(input)
        return output.float()


class Runner(Trainee):
    """What the process of one run does."""

    def __init__(self, run: Run, batch: int, width: float, allocator: str) -> None:
        common.use_allocator(allocator)
        network = NETWORKS["resnet18"]
        dtype = torch.bfloat16 if run.form == "bfloat16" else torch.float32
        model = network.build(width=width).to(dtype)
        if run.sparsity:
            model = make_sparse(model, run.sparsity, run.batchnorm, _PERIOD)
        model = model.to(memory_format=torch.channels_last)
        data = [(images.to(dtype), labels) for images, labels in network.data(batch, "channels_last")]
        super().__init__(_Autocast(model, run.form == "autocast"), data)

    def held(self) -> int:
        """Bytes that autograd keeps of one step."""
        with profile_memory(self.model, dense=False) as profile:
            self.step()
        return profile.held_bytes


def measure(
    runs: Sequence[Run], batch: int, width: float, rounds: int, allocator: str, progress: tqdm | None = None
) -> list[dict[str, Any]]:
    """A row for each of ``runs``."""
    conditions = common.conditions()
    with contextlib.ExitStack() as stack:
        workers = {run: stack.enter_context(Worker(Runner, run, batch, width, allocator)) for run in runs}
        counts = {run: _PERIOD if run.sparsity else 1 for run in runs}
        calls = {
            f"{run.form} {run.name}": functools.partial(worker.call, "steps", counts[run])
            for run, worker in workers.items()
        }
        timings = common.interleaved(calls, rounds=rounds, progress=progress)
        held = {run: worker.call("held") for run, worker in workers.items()}
    return [
        {
            **dataclasses.asdict(run),
            "name": run.name,
            "batch": batch,
            "width": width,
            "ms": timings[f"{run.form} {run.name}"].median / counts[run],
            "held_bytes": held[run],
            "conditions": conditions,
        }
        for run in runs
    ]


def summarise(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    dense = next(row for row in rows if row["form"] == "float32" and not row["sparsity"])
    lines = []
    for name, group in itertools.groupby(sorted(rows, key=lambda row: row["name"]), key=lambda row: row["name"]):
        found = {row["form"]: row for row in group}
        cells = []
        for form in FORMS:
            row = found.get(form)
            cells.append("-" if row is None else f"{row['ms']:.0f} ms, {row['held_bytes'] / 2**20:.1f} MiB")
        lines.append([name, *cells])
    title = f"ResNet-18 at {dense['width']:g} of its width, 32x32, batch {dense['batch']}, channels_last"
    return "\n".join(
        [
            "# bfloat16 on the CPU",
            "",
            common.describe(rows),
            f"{title}: a training step, and what is held for the backward pass",
            "",
            common.markdown(["network", *FORMS], lines),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The command line; returns the rows."""
    parser = common.parser(__doc__, quick="a thin network, 90%% alone, one round, no file")
    parser.add_argument("--sparsity", type=common.percentages, help="default: 80,90,95")
    parser.add_argument("--batch", type=int, help="default: 32")
    parser.add_argument("--width", type=float, help="factor on the channels; default: 0.5")
    parser.add_argument("--rounds", type=int, help="default: 3")
    options = parser.parse_args(arguments)
    common.begin(options, "half")
    quick = options.quick
    sparsities = options.sparsity or ([0.9] if quick else [0.8, 0.9, 0.95])
    runs = [Run(form, sparsity) for sparsity in (0.0, *sparsities) for form in FORMS]
    runs += [Run(form, sparsities[-1], "int8") for form in FORMS]
    batch, width = options.batch or (4 if quick else 32), options.width or (0.125 if quick else 0.5)
    rounds = options.rounds or (1 if quick else 3)
    with tqdm(total=rounds, unit="round") as progress:
        rows = measure(runs, batch, width, rounds, options.allocator, progress)
    text = summarise(rows)
    if options.out is not None:
        common.write(options.out, {"rows": rows}, text)
    common.finish(text, options.out)
    return rows


if __name__ == "__main__":
    main()
