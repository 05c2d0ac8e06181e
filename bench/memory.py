"""Memory of training: bytes held for the backward pass, peak of the process, and the largest batch that a limit allows.

    python bench/memory.py                                        # every network, about an hour on two cores
    python bench/memory.py --models resnet18 --batchnorm exact,bf16,int8
    python bench/memory.py --models resnet18 --allocator kept     # with all freed memory kept, as fast steps need
    python bench/memory.py --quick                                # ResNet-18 at batch 32, no largest batch, no file

Each run is a process of its own: it imports, trains one small layer, which loads what torch loads late, then builds the
model and its optimizer and trains a few steps. Its peak is the high-water mark of its resident memory from then on
(``VmHWM``, set back by ``/proc/self/clear_refs`` where allowed), or on CUDA the most that torch's allocator had given
out. "dense" is PyTorch in the layout in which its steps take less time here; "checkpoint" is the same with
torch.utils.checkpoint around each block. The largest batch is found by running: a line through the measured peaks
proposes a batch, a run says whether it fits. Step times come from separate processes, so read them as an indication;
train_step.py compares times.
"""

import argparse
import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import memory_figures
import torch
from paper_networks import LAYOUTS, NETWORKS, Trainee, checkpoint_blocks_, make_sparse
from tqdm import tqdm

import swat_ext
from swat_ext.config import BATCHNORMS

_PERIOD = 10
# A batch is the largest once the next one known not to fit is within this share of it.
_PRECISION = 0.02
_MOST_PROBES = 10
# What CUDA and the system say, PyTorch's CPU allocator, this library, C++ and Python.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate",
    "Cannot allocate memory",
    "std::bad_alloc",
    "MemoryError",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process trains."""

    model: str
    batch: int
    width: float
    run: str  # "dense", "checkpoint" or "sparse"
    layout: str
    sparsity: float
    batchnorm: str
    steps: int
    threads: int
    device: str
    allocator: str

    @property
    def label(self) -> str:
        if self.run != "sparse":
            return self.run
        return f"{self.sparsity:.0%}" + ("" if self.batchnorm == "exact" else f" {self.batchnorm}")


# --- In the process of a case


def _status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _reset_peak() -> bool:
    """Set the high-water mark back to what is resident now; whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    now, peak = _status("VmRSS"), _status("VmHWM")
    return now is not None and peak is not None and peak < now + 2**24


def _peak() -> int:
    peak = _status("VmHWM")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak is None else peak


def _load_everything(device: str) -> None:
    """Train one small layer: what torch allocates and imports for the first one is no cost of a network."""
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 3, 8, 8, device=device)).sum().backward()
    optimizer.step()


def run_case(case: Case) -> dict[str, Any]:
    """Train the case's network in this process; bytes and milliseconds."""
    torch.set_num_threads(case.threads)
    common.use_allocator(case.allocator)
    cuda = case.device == "cuda"
    _load_everything(case.device)
    idle = torch.cuda.memory_allocated() if cuda else _status("VmRSS")
    network = NETWORKS[case.model]
    model = network.build(width=case.width)
    if case.run == "sparse":
        model = make_sparse(model, case.sparsity, case.batchnorm, _PERIOD)
    elif case.run == "checkpoint":
        checkpoint_blocks_(model)
    model = model.to(case.device).to(memory_format=LAYOUTS[case.layout])
    # A small step first: gradients and momentum are there, and kernels chosen, before the peak is measured.
    trainee = Trainee(model, network.data(2, case.layout, 1, case.device))
    trainee.step()
    ready = torch.cuda.memory_allocated() if cuda else _status("VmRSS")
    trainee.use(network.data(case.batch, case.layout, 1, case.device))
    trainee.select_next()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    exact = cuda or _reset_peak()
    times = []
    for _ in range(case.steps):
        started = time.perf_counter()
        trainee.step()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() if cuda else _peak()
    trainee.check()
    result = {"idle": idle, "ready": ready, "peak": peak, "peak_is_of_steps": exact}
    # The first step selects, for all layers at once: no time of a step.
    result["first_step_ms"] = times[0]
    if len(times) > 1:
        result["step_ms"] = statistics.median(times[1:])
    with swat_ext.profile_memory(model, dense=False) as profile:
        trainee.step()
    result["held"] = profile.held_bytes
    result["held_by_kind"] = {kind: held for kind, (_, held, _) in profile.by_kind().items()}
    return result


# --- In the process of the bench


def _spawn(case: Case) -> dict[str, Any] | None:
    """:func:`run_case` in a process of its own; None if it ran out of memory.

    Raises:
        RuntimeError: it failed otherwise; the message has what it wrote.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(dataclasses.asdict(case))]
    paths = [str(Path(swat_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if ran_out_of_memory(done.returncode, done.stderr):
        return None
    raise RuntimeError(f"{case.model}, {case.label}, batch {case.batch}: exit status {done.returncode}\n{done.stderr}")


def ran_out_of_memory(status: int, errors: str) -> bool:
    """Whether a process that ended with ``status`` and wrote ``errors`` had too little memory."""
    killed = status in (-9, 137)
    return killed or any(message in errors for message in _OUT_OF_MEMORY)


def largest(peak_of: Callable[[int], int | None], limit: int, start: int) -> int:
    """The largest batch whose measured peak is at most ``limit`` bytes, within 2% or 1; 0 if none fits.

    Args:
        peak_of: runs a batch; its peak in bytes, None where it ran out of memory.
        limit: bytes.
        start: the batch to try first.
    """
    peaks: dict[int, int] = {}
    fits, too_large, batch = 0, None, start
    for _ in range(_MOST_PROBES):
        peak = peak_of(batch)
        if peak is not None:
            peaks[batch] = peak
        if peak is not None and peak <= limit:
            fits = max(fits, batch)
        else:
            too_large = batch if too_large is None else min(too_large, batch)
        if too_large is not None and too_large - fits <= max(1, _PRECISION * fits):
            break
        batch = _propose(peaks, limit, fits, too_large)
    return fits


def _propose(peaks: dict[int, int], limit: int, fits: int, too_large: int | None) -> int:
    """A batch between what fits and what does not, on the line through the two measured peaks nearest to the limit."""
    nearest = sorted(peaks, key=lambda batch: abs(peaks[batch] - limit))[:2]
    guess = 2.0 * fits if too_large is None else (fits + too_large) / 2
    if len(nearest) == 2:
        one, two = sorted(nearest)
        slope = (peaks[two] - peaks[one]) / (two - one)
        if slope > 0:
            guess = one + (limit - peaks[one]) / slope
    # Within the bracket, and a little to the side that is still open, so that both ends close in.
    lowest = fits + 1
    highest = max(lowest, 4 * fits if too_large is None else too_large - 1)
    if too_large is None and int(guess) <= fits:
        guess = fits * (1 + _PRECISION) + 1
    elif too_large is not None and int(guess) <= fits:
        guess = fits + max(1.0, min(_PRECISION * fits, (too_large - fits) / 2))
    elif too_large is not None and int(guess) >= too_large:
        guess = too_large - max(1.0, min(_PRECISION * fits, (too_large - fits) / 2))
    return min(max(int(guess), lowest), highest)


def measure_network(options: argparse.Namespace, name: str, batch: int, progress: tqdm) -> list[dict[str, Any]]:
    """A row for each run of one network."""
    network, conditions = NETWORKS[name], common.conditions()
    base = Case(
        model=name,
        batch=batch,
        width=options.width,
        run="dense",
        layout="NCHW",
        sparsity=0.0,
        batchnorm="exact",
        steps=options.steps,
        threads=torch.get_num_threads(),
        device=options.device,
        allocator=options.allocator,
    )

    def result_of(case: Case) -> dict[str, Any] | None:
        progress.set_description(f"{network.title}, {case.label}, batch {case.batch}")
        return _spawn(case)

    dense = {layout: result_of(dataclasses.replace(base, layout=layout)) for layout in LAYOUTS}
    progress.update()
    fields = ("step_ms", "first_step_ms")
    times = {key: [found[field] for field in fields if field in found] for key, found in dense.items() if found}
    layout = min(LAYOUTS, key=lambda key: times.get(key, [float("inf")])[0])
    base = dataclasses.replace(base, layout=layout)
    cases = [base, dataclasses.replace(base, run="checkpoint")]
    for batchnorm in options.batchnorm:
        for sparsity in options.sparsity:
            sparse = {"run": "sparse", "layout": "channels_last", "sparsity": sparsity, "batchnorm": batchnorm}
            cases.append(dataclasses.replace(base, **sparse))
    rows = []
    for case in cases:
        found = dense[layout] if case.run == "dense" else result_of(case)
        row = {**dataclasses.asdict(case), "run": case.label, "title": network.title, "size": network.size}
        row |= {"conditions": conditions, "out_of_memory": found is None, **(found or {})}
        if found is not None and found["idle"] is not None:
            row["growth"] = found["peak"] - found["idle"]
        if options.limit:
            limit = int(options.limit * 2**30)

            def peak_of(size: int, case: Case = case, known: dict[str, Any] | None = found) -> int | None:
                if size == case.batch:
                    return None if known is None else known["peak"]
                probe = result_of(dataclasses.replace(case, batch=size, steps=1))
                return None if probe is None else probe["peak"]

            row |= {"limit": limit, "largest_batch": largest(peak_of, limit, batch)}
        rows.append(row)
        progress.update()
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    quick = "ResNet-18, batch 32, 90%%, no largest batch, no file"
    parser = common.parser(__doc__, quick=quick, allocator="default")
    parser.add_argument("--models", type=common.names(list(NETWORKS)), help=f"default: {','.join(NETWORKS)}")
    parser.add_argument("--batch", type=common.positives, help="default: 64, or 16 at 224 pixels")
    parser.add_argument("--sparsity", type=common.percentages, help="default: 80,90")
    forms = common.names(BATCHNORMS)
    parser.add_argument("--batchnorm", type=forms, default=["exact"], help=f"some of {','.join(BATCHNORMS)}")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; default: 4")
    parser.add_argument("--limit", type=float, help="GiB for the largest batch, 0 for none; default: 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the channels, for trials")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is not None:
        print(json.dumps(run_case(Case(**json.loads(options.case)))))
        return []
    common.begin(options, "memory" if options.device == "cpu" else "memory-cuda")
    models = options.models or (["resnet18"] if options.quick else list(NETWORKS))
    options.sparsity = options.sparsity or ([0.9] if options.quick else [0.8, 0.9])
    options.limit = (0.0 if options.quick else 2.0) if options.limit is None else options.limit
    cases = []
    for name in models:
        cases += [(name, batch) for batch in options.batch or ([32] if options.quick else NETWORKS[name].batches[:1])]
    rows: list[dict[str, Any]] = []
    runs = 3 + len(options.batchnorm) * len(options.sparsity)
    with tqdm(total=len(cases) * runs, unit="run") as progress:
        for name, batch in cases:
            rows += measure_network(options, name, batch, progress)
            if options.out is not None:  # after each network, so that an interrupted bench keeps what it measured
                merged = common.merge_rows(options.out, rows, ("model", "batch", "width", "run", "allocator"))
                merged = memory_figures.ordered(merged)
                plot = functools.partial(memory_figures.plot, merged)
                common.write(options.out, {"rows": merged}, memory_figures.report(merged), plot)
    common.finish(memory_figures.report(rows), options.out)
    return rows


if __name__ == "__main__":
    main()
