"""``python -m swat_ext.demo``: a small ResNet-18 trained dense, and sparse for the same time: speed buys epochs.

Every figure in the table and in the picture is measured in this run, or counted by :func:`swat_ext.inspect.report`.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from swat_ext import _C
from swat_ext.allocator import keep_freed_memory
from swat_ext.config import SWATConfig
from swat_ext.data import Data, Textures, check_count
from swat_ext.data.extras import require
from swat_ext.inspect.profile import profile_memory
from swat_ext.inspect.report import report
from swat_ext.models import resnet18
from swat_ext.sparsify import sparsify_
from swat_ext.training import RECIPES, Diverged, Recipe, Trainer
from swat_ext.training.comparison import Comparison, Outcome
from swat_ext.training.figure import draw

__all__ = ["compare", "main"]

# The size of the demo: under six minutes on two cores, for dense epochs are as many as take this long, EPOCHS at most.
WIDTH = 0.5
EPOCHS = 4
_DENSE_SECONDS = 130.0
SAMPLES = 6144
TEST_SAMPLES = 2048
BATCH_SIZE = 64
SPARSITY = 0.9
SEED = 0

_LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# Steps that tell how long each network takes: the first ones warm up, the rest are timed, one selection among them.
_TRIAL_WARMUP, _TRIAL_STEPS = 2, 10


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def _held_bytes(model: nn.Module, data: Data, recipe: Recipe, layout: torch.memory_format) -> int:
    # A copy: measuring must not move the running statistics of the model.
    model = copy.deepcopy(model).train()
    images, labels = next(data.train_batches(recipe.batch_size, seed=SEED, epoch=0))
    images = images.contiguous(memory_format=layout)
    with profile_memory(model, dense=False) as profile:
        nn.functional.cross_entropy(model(images), labels)
    return profile.held_bytes


def _trial(dense: nn.Module, swat: nn.Module, data: Data, recipe: Recipe) -> tuple[str, float, float]:
    """The faster layout of the dense network here, the seconds of its step, and how many sparse steps take as long.

    Whole training steps, measured in turns.
    """
    networks = [(dense, layout) for layout in _LAYOUTS.values()] + [(swat, torch.channels_last)]
    steps = [_stepper(model, data, recipe, layout) for model, layout in networks]
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(_TRIAL_WARMUP + _TRIAL_STEPS):
        for step, taken in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
    *of_dense, of_swat = [median(taken[_TRIAL_WARMUP:]) for taken in times]
    return list(_LAYOUTS)[of_dense.index(min(of_dense))], min(of_dense), min(of_dense) / of_swat


def _stepper(model: nn.Module, data: Data, recipe: Recipe, layout: torch.memory_format) -> Any:
    model = copy.deepcopy(model).to(memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    images, labels = next(data.train_batches(recipe.batch_size, seed=SEED, epoch=0))
    images = images.contiguous(memory_format=layout)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _train(
    name: str, model: nn.Module, data: Data, recipe: Recipe, *, layout: str, seed: int, progress: bool
) -> Outcome:
    memory_format = _LAYOUTS[layout]
    losses: list[float] = []
    seconds: list[float] = []

    def on_step(loss: float, taken: float) -> None:
        losses.append(loss)
        seconds.append(taken)

    trainer = Trainer(model, data, recipe, seed=seed, memory_format=memory_format, progress=progress, on_step=on_step)
    history = trainer.run()
    found = report(model, input_size=(recipe.batch_size, *data.shape))
    assert found.swat_flops is not None
    ends = [record["steps"] for record in history]
    return Outcome(
        name=name,
        layout=layout,
        epochs=recipe.epochs,
        test_accuracy=history[-1]["test_accuracy"],
        flops=found.swat_flops * ends[-1],
        step_ms=1000 * median(seconds),
        held_bytes=_held_bytes(model, data, recipe, memory_format),
        losses=losses,
        seconds=[sum(seconds[:end]) for end in ends],
        test_accuracies=[record["test_accuracy"] for record in history],
    )


def compare(
    *,
    width: float = WIDTH,
    epochs: int | None = None,
    samples: int = SAMPLES,
    test_samples: int = TEST_SAMPLES,
    batch_size: int = BATCH_SIZE,
    sparsity: float = SPARSITY,
    activation_sparsity: float | None = None,
    seed: int = SEED,
    progress: bool = True,
) -> Comparison:
    """Train dense, then sparse from the same weights for as many epochs as fit in the same time, and measure both.

    Both with :func:`swat_ext.keep_freed_memory`, which stays set.

    Args:
        width: factor on ResNet-18's channels.
        epochs, samples, batch_size: passes of the dense run, patches in a pass, patches in a step. None: as many
            passes as take two minutes, at most four.
        test_samples: patches that test.
        sparsity, activation_sparsity: as in :class:`swat_ext.SWATConfig`.
        seed: of weights, order and augmentation.
        progress: show bars and a line an epoch.

    Raises:
        TypeError, ValueError, ModuleNotFoundError, Diverged: as the parts raise them.
    """
    for argument, count in (("epochs", epochs), ("samples", samples), ("test_samples", test_samples)):
        if count is not None:
            check_count(argument, count)
    kept = keep_freed_memory()
    config = SWATConfig(sparsity, activation_sparsity)
    recipe = replace(RECIPES["small"].with_epochs(epochs or EPOCHS), batch_size=batch_size)
    data = Textures(samples, test_samples)
    torch.manual_seed(seed)
    dense = resnet18(data.num_classes, in_channels=data.shape[0], width=width)
    swat = copy.deepcopy(dense)
    sparsify_(swat, config)

    layout, step, ratio = _trial(dense, swat, data, recipe)
    if epochs is None:
        fitting = int(_DENSE_SECONDS / (step * data.train_steps(batch_size)))
        epochs = min(max(fitting, 1), EPOCHS)
        recipe = recipe.with_epochs(epochs)
    longer = recipe.with_epochs(max(1, int(epochs * ratio)))
    activations = config.sparsity if config.activation_sparsity is None else config.activation_sparsity
    name = f"SWAT {100 * config.sparsity:g}/{100 * activations:g}"

    def train(run: str, model: nn.Module, plan: Recipe, its_layout: str) -> Outcome:
        if progress:
            print(f"\n{run}, {plan.epochs} epochs ({its_layout})", flush=True)
        return _train(run, model, data, plan, layout=its_layout, seed=seed, progress=progress)

    outcomes = train("dense", dense, recipe, layout), train(name, swat, longer, "channels_last")
    isa = getattr(_C, "isa", lambda: "unknown")()
    conditions = (
        f"ResNet-18, width {width:g}, batch {batch_size}, epochs of {samples} texture patches, seed {seed}; "
        f"dense in its faster layout, {layout}; freed memory {'kept' if kept else 'left to the system'} in both\n"
        f"{_processor()}, threads: {torch.get_num_threads()}, {isa} kernels, torch {torch.__version__}"
    )
    return Comparison(*outcomes, conditions)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m swat_ext.demo",
        description="Train a small ResNet-18 on texture patches, dense and then sparse for the same time, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--width", type=float, default=WIDTH, help="factor on the channels")
    parser.add_argument("--epochs", type=int, help="passes of the dense run; None: two minutes of them, at most four")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="patches in a pass")
    parser.add_argument("--test-samples", type=int, default=TEST_SAMPLES, help="patches that test")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="patches in a step")
    parser.add_argument("--sparsity", type=float, default=SPARSITY, help="share of zeros in the weights")
    parser.add_argument("--activation-sparsity", type=float, help="in the saved activations; None: as the weights")
    parser.add_argument("--seed", type=int, default=SEED, help="of weights, order and augmentation")
    parser.add_argument("--threads", type=int, help="of the CPU kernels; None: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the picture and the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. ``argv`` is ``sys.argv[1:]`` if None."""
    arguments = vars(_parser().parse_args(argv))
    out: Path = arguments.pop("out")
    threads = arguments.pop("threads")
    started = time.perf_counter()
    try:
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads: expected at least 1, got {threads}")
            torch.set_num_threads(threads)
        # Before minutes of training, not after them.
        require("matplotlib", "matplotlib", "the demo's picture")
        out.mkdir(parents=True, exist_ok=True)
        result = compare(**arguments)
        (out / "demo.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
        draw(result, out / "demo.png")
    except (Diverged, ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    print(f"\n{result}\n\n{out / 'demo.png'} shows it; {time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
