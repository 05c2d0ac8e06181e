"""Test accuracy in the middle of training by what BatchNorm takes for statistics, dense and sparse, and what it costs.

    python bench/batchnorm.py                            # two seeds, twenty minutes on one core
    python bench/batchnorm.py --forms swat --seeds 3     # one network; other rows in the file stay
    python bench/batchnorm.py --quick                    # some steps of a thin network, written nowhere

One training run gives all columns, for training itself reads no running statistics: the running averages of every
momentum are kept beside it, and after some steps the test set is evaluated with each, with the statistics of each test
batch itself, and with those that swat_ext.update_batchnorm_ estimates from training batches.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import common
import torch
from torch import nn
from tqdm import tqdm

from swat_ext import SWATConfig, sparsify_, update_batchnorm_
from swat_ext.data import Data, Textures
from swat_ext.models import resnet18
from swat_ext.training import RECIPES, build_optimizer, evaluate

_FORMS = ("dense", "swat")
_MOMENTA = (0.1, 0.3)
_COUNTS = (5, 20, 50)
_KEY = ("form", "seed", "step")


class Averages:
    """Running averages of one model's statistics by each of :data:`_MOMENTA`, beside its training."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: list[Any] = [
            module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        for norm in self.norms:
            norm.momentum = 1.0  # so that it holds what the last batch had
        self._kept = {momentum: [_clone(norm) for norm in self.norms] for momentum in _MOMENTA}

    def note(self) -> None:
        """Take in the training step that was just made."""
        for momentum, averages in self._kept.items():
            for norm, (mean, variance) in zip(self.norms, averages, strict=True):
                mean.lerp_(norm.running_mean, momentum)
                variance.lerp_(norm.running_var, momentum)

    def use(self, momentum: float) -> None:
        """Let the model evaluate with the averages of this momentum."""
        for norm, (mean, variance) in zip(self.norms, self._kept[momentum], strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

    @contextlib.contextmanager
    def none(self) -> Iterator[None]:
        """Let the model evaluate with the statistics of each batch, as a BatchNorm without running ones does."""
        before = [(norm.running_mean, norm.running_var) for norm in self.norms]
        for norm in self.norms:
            norm.running_mean = norm.running_var = None
        yield
        for norm, (mean, variance) in zip(self.norms, before, strict=True):
            norm.running_mean, norm.running_var = mean, variance


def _clone(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.running_mean.clone(), norm.running_var.clone()


def measure(
    model: nn.Module, data: Data, averages: Averages, options: argparse.Namespace, seed: int, epoch: int
) -> dict[str, Any]:
    """Accuracies in [0, 1] by each kind of statistics, and the seconds that each estimate took."""

    def accuracy() -> float:
        return evaluate(model, data, options.batch)[1]

    found: dict[str, Any] = {"accuracies": {}, "seconds": {}}
    for momentum in _MOMENTA:
        averages.use(momentum)
        found["accuracies"][f"running, {momentum}"] = accuracy()
    with averages.none():
        found["accuracies"]["test batch"] = accuracy()
    for count in _COUNTS:
        started = time.perf_counter()
        batches = data.train_batches(options.batch, seed=seed, epoch=epoch + 1)
        ordered = (images.contiguous(memory_format=torch.channels_last) for images, _ in batches)
        update_batchnorm_(model, ordered, limit=count)
        found["seconds"][str(count)] = time.perf_counter() - started
        found["accuracies"][f"{count} batches"] = accuracy()
    return found


def train(form: str, seed: int, data: Data, options: argparse.Namespace, progress: tqdm) -> Iterator[dict[str, Any]]:
    """One run; a row at each of ``options.steps``, with the seconds of an epoch at the median step until then."""
    # As epochs of one step, so that warm-up and cosine are planned in steps.
    recipe = RECIPES["small"].with_epochs(options.planned)
    torch.manual_seed(seed)
    model = resnet18(data.num_classes, in_channels=data.shape[0], width=options.width)
    if form == "swat":
        sparsify_(model, SWATConfig(options.sparsity))
    model = model.to(memory_format=torch.channels_last).train()
    averages, optimizer = Averages(model), build_optimizer(model, recipe)
    times: list[float] = []
    epoch = 0
    while True:
        started = time.perf_counter()
        for images, labels in data.train_batches(options.batch, seed=seed, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(len(times), 1) * options.lr / recipe.lr
            outputs = model(images.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            nn.functional.cross_entropy(outputs, labels).backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
            averages.note()
            progress.update()
            if len(times) in options.steps:
                epoch_seconds = statistics.median(times) * data.train_steps(options.batch)
                found = measure(model, data, averages, options, seed, epoch)
                yield {"form": form, "seed": seed, "step": len(times), "epoch_seconds": epoch_seconds, **found}
            if len(times) == max(options.steps):
                return
            started = time.perf_counter()
        epoch += 1


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies, then costs, means over the seeds."""
    accuracies: list[list[object]] = []
    costs: list[list[object]] = []
    for form in dict.fromkeys(row["form"] for row in rows):
        own = [row for row in rows if row["form"] == form]
        for step in sorted({row["step"] for row in own}):
            found = [row["accuracies"] for row in own if row["step"] == step]
            means = [100 * statistics.mean(one[name] for one in found) for name in found[0]]
            accuracies.append([form, step, len(found), *(f"{mean:.1f}" for mean in means)])
        shares = [
            100 * statistics.median(row["seconds"][str(count)] / row["epoch_seconds"] for row in own)
            for count in _COUNTS
        ]
        seconds = statistics.median(row["epoch_seconds"] for row in own)
        costs.append([form, f"{seconds:.1f}", *(f"{share:.1f}" for share in shares)])
    names = list(rows[0]["accuracies"])
    return (
        "Test accuracy, %, by the statistics that BatchNorm evaluates with: running averages by their momentum, those\n"
        "of the test batch itself, and those estimated anew over training batches; means over the seeds.\n\n"
        + common.markdown(["network", "step", "seeds", *names], accuracies)
        + "\n\nTime of an estimate, % of an epoch of training:\n\n"
        + common.markdown(["network", "epoch, s", *(f"{count} batches" for count in _COUNTS)], costs)
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    parser = common.parser(__doc__, quick="some steps of a thin network, one seed, no file")
    parser.add_argument("--forms", type=common.names(_FORMS), default=["swat", "dense"], help="default: swat,dense")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=common.positives, default=[100, 200, 400], help="when to evaluate")
    parser.add_argument("--planned", type=int, default=640, help="steps that the cosine is planned for")
    parser.add_argument("--lr", type=float, default=RECIPES["small"].lr, help="learning rate at its highest")
    parser.add_argument("--samples", type=int, default=4096, help="patches in an epoch")
    parser.add_argument("--test-samples", type=int, default=1024, help="patches that test")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=float, default=0.5, help="factor on ResNet-18's channels")
    parser.add_argument("--sparsity", type=float, default=0.9)
    options = parser.parse_args(arguments)
    common.begin(options, "batchnorm")
    if options.quick:
        options.seeds, options.steps, options.planned = 1, [2, 4], 6
        options.samples, options.test_samples, options.batch, options.width = 48, 32, 16, 0.0625
    if options.seeds < 1 or options.planned < max(options.steps):
        parser.error(
            "--seeds, --planned: expected at least 1 and the last of --steps, "
            f"got {options.seeds} and {options.planned}"
        )
    names = ("planned", "lr", "samples", "test_samples", "batch", "width", "sparsity")
    settings = {name: getattr(options, name) for name in names}
    data = Textures(options.samples, options.test_samples)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    text = ""
    with tqdm(total=len(options.forms) * options.seeds * max(options.steps), unit="step") as progress:
        for seed in range(options.seeds):
            for form in options.forms:
                progress.set_description(f"{form}, seed {seed}")
                conditions = common.conditions()
                for row in train(form, seed, data, options, progress):
                    rows.append({**row, "settings": settings, "conditions": conditions})
                    shown = rows if options.out is None else common.merge_rows(options.out, rows, _KEY)
                    # What was measured with other settings has no place in the same tables.
                    shown = [row for row in shown if row["settings"] == settings]
                    result = {"rows": shown}
                    text = (
                        f"ResNet-18 at {options.width} of its width on textures, batch {options.batch}, SWAT at "
                        f"{options.sparsity:.0%}, learning rate {options.lr:g} at its highest, a cosine of "
                        f"{options.planned} steps,\n{options.samples} patches an epoch, {options.test_samples} that "
                        f"test\n\n{common.describe(shown)}\n\n{tables(shown)}"
                    )
                    if options.out is not None:
                        common.write(options.out, result, text)
    common.finish(text, options.out)
    return result


if __name__ == "__main__":
    main()
