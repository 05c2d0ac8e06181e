"""Test accuracy of what BatchNorm may keep for its backward pass, over several seeds, beside the dense network.

    python bench/accuracy.py                          # textures and mnist, 3 seeds, some ten minutes on two cores
    python bench/accuracy.py --data digits --seeds 5
    python bench/accuracy.py --quick                  # one epoch of two seeds on digits, written nowhere

Every run of a seed starts from the same weights and sees the same batches. The question is whether "bf16" and "int8"
differ from "exact" by more than seeds differ among themselves; nothing is tuned for any of them.
"""

import argparse
import functools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from tqdm import tqdm

from swat_ext import SWATConfig, sparsify_
from swat_ext.config import BATCHNORMS
from swat_ext.data import load_data
from swat_ext.models import resnet18
from swat_ext.training import RECIPES, Trainer

_DATA = ("textures", "mnist", "digits")
_FORMS = ("dense", *BATCHNORMS)


def train(data: str, form: str, seed: int, options: argparse.Namespace) -> float:
    """Test accuracy, in [0, 1], of one run."""
    images = load_data(data, samples=options.samples if data == "textures" else None)
    recipe = replace(RECIPES["small"].with_epochs(options.epochs), batch_size=options.batch)
    torch.manual_seed(seed)
    model = resnet18(images.num_classes, in_channels=images.shape[0], width=options.width)
    if form != "dense":
        sparsify_(model, SWATConfig(options.sparsity, batchnorm=form, backend="sparse"))
    trainer = Trainer(model, images, recipe, seed=seed, memory_format=torch.channels_last, progress=False)
    return float(trainer.run()[-1]["test_accuracy"])


def table(result: dict[str, Any]) -> str:
    """A line for each data set and form: mean, least and most over the seeds."""
    lines: list[list[object]] = []
    for data, forms in result["accuracies"].items():
        for form, found in forms.items():
            values = [100 * value for value in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells = [f"{statistics.mean(values):.2f}", f"{spread:.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]
            lines.append([data, form, *cells])
    return common.markdown(["data", "BatchNorm keeps", "mean, %", "deviation", "least", "most"], lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Every run as a point, a panel for each data set."""
    accuracies = result["accuracies"]
    with common.picture(path, 1, len(accuracies), (1 + 3.2 * len(accuracies), 3.4)) as (_, panels):
        for axes, (data, forms) in zip(panels, accuracies.items(), strict=True):
            for place, (form, values) in enumerate(forms.items()):
                axes.plot([place] * len(values), [100 * value for value in values], "o", alpha=0.6, color=f"C{place}")
                axes.plot(place, 100 * statistics.mean(values), "k_", markersize=16, label=form)
            axes.set_xticks(range(len(forms)), list(forms))
            axes.set_title(data, fontsize=10)
            axes.grid(axis="y", alpha=0.3)
        panels[0].set_ylabel("test accuracy, %")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    parser = common.parser(__doc__, quick="digits, one epoch, two seeds, no file")
    parser.add_argument(
        "--data", type=common.names(_DATA), default=["textures", "mnist"], help="default: textures,mnist"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2048, help="patches in an epoch of textures")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=float, default=0.25, help="factor on ResNet-18's channels")
    parser.add_argument("--sparsity", type=float, default=0.9)
    options = parser.parse_args(arguments)
    common.begin(options, "accuracy")
    if options.quick:
        options.data, options.seeds, options.epochs = ["digits"], 2, 1
    if options.seeds < 1 or options.epochs < 1:
        parser.error(f"--seeds, --epochs: expected at least 1, got {options.seeds} and {options.epochs}")
    result: dict[str, Any] = {
        "conditions": common.conditions(),
        "settings": {
            name: getattr(options, name) for name in ("epochs", "samples", "batch", "width", "sparsity", "seeds")
        },
        "accuracies": {data: {form: [] for form in _FORMS} for data in options.data},
    }
    with tqdm(total=len(options.data) * len(_FORMS) * options.seeds, unit="run") as progress:
        for data in options.data:
            for seed in range(options.seeds):
                for form in _FORMS:
                    progress.set_description(f"{data}, {form}, seed {seed}")
                    result["accuracies"][data][form].append(train(data, form, seed, options))
                    progress.update()
    text = (
        f"ResNet-18 at {options.width} of its width, {options.sparsity:.0%} sparse, {options.epochs} epochs, "
        f"{options.seeds} seeds, batch {options.batch}\n\n{common.describe([result])}\n\n{table(result)}"
    )
    if options.out is not None:
        common.write(options.out, result, text, functools.partial(plot, result))
    common.finish(text, options.out)
    return result


if __name__ == "__main__":
    main()
