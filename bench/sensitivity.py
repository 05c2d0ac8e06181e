"""What training tolerates: test accuracy against the sparsity of one operand at a time, top-K and random choice.

    python bench/sensitivity.py                          # all that is missing in results/sensitivity.json: an hour
    python bench/sensitivity.py --runs vgg16-mnist --operands gradients --seeds 3
    python bench/sensitivity.py --report                 # tables and picture of what is there, no training
    python bench/sensitivity.py --quick                  # a thin network on digits, one epoch, written nowhere

The analysis that SWAT rests on (Raihan and Aamodt, arXiv 2001.01969, section 2), on small networks. Each finished run
is kept at once, and one that is there with the same settings is not run again: stop it at any time and give the same
command. Runs of a seed start from the same weights and see the same batches, and nothing is tuned for any of them.
BatchNorm's running averages lag behind a pattern that moves, so before the one evaluation, at the end, all runs
estimate them anew over training batches. sensitivity_layers.py says what exactly is dropped.
"""

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import common
import sensitivity_report
import torch
from sensitivity_layers import CHOICES, OPERANDS, Rule, emulate_
from torch import nn
from tqdm import tqdm

from swat_ext.data import Data, load_data
from swat_ext.models import build_model
from swat_ext.training import RECIPES, Recipe, build_optimizer, evaluate

_FORMAT = torch.channels_last
_STATISTICS_BATCHES = 20
_KEY = ("run", "operand", "choice", "sparsity", "seed")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, a data set, and how long the one is trained on the other.

    Attributes:
        network: a name in ``swat_ext.models.MODELS``.
        data: a name in ``swat_ext.data.DATA``.
        width: factor on the network's channels.
        epochs: of the recipe "small".
        batch: images in a step.
        samples: images in an epoch, for textures.
    """

    network: str
    data: str
    width: float
    epochs: int
    batch: int = 32
    samples: int | None = None

    @property
    def name(self) -> str:
        return f"{self.network}-{self.data}"

    def recipe(self) -> Recipe:
        return dataclasses.replace(RECIPES["small"].with_epochs(self.epochs), batch_size=self.batch)


SETTINGS = (
    Setting("resnet18", "textures", 0.125, epochs=4, samples=1536),
    Setting("vgg16", "mnist", 0.125, epochs=3),
    Setting("densenet121", "digits", 0.25, epochs=3),
)
_QUICK = (Setting("resnet18", "digits", 0.0625, epochs=1, batch=64),)


def train(setting: Setting, data: Data, rule: Rule | None, seed: int) -> dict[str, Any]:
    """One run from the start to its test accuracy, in [0, 1]; a run whose loss is not finite stops there.

    Its seconds are those of the processor, all threads together: other work on the machine does not count.
    """
    started = time.process_time()
    recipe = setting.recipe()
    torch.manual_seed(seed)
    channels = data.shape[0]
    model = build_model(setting.network, data.num_classes, in_channels=channels, stem="cifar", width=setting.width)
    model = model.to(memory_format=_FORMAT)  # type: ignore[call-overload]
    if rule is not None:
        emulate_(model, rule)
    finite = _train(model, data, recipe, seed)
    _estimate_statistics(model, data, recipe, seed)
    _, accuracy = evaluate(model, data, recipe.batch_size, memory_format=_FORMAT)
    return {"accuracy": accuracy, "diverged": not finite, "seconds": round(time.process_time() - started, 2)}


def _train(model: nn.Module, data: Data, recipe: Recipe, seed: int) -> bool:
    """All steps of ``recipe``, without an evaluation in between; whether every loss was finite."""
    optimizer = build_optimizer(model, recipe)
    steps = data.train_steps(recipe.batch_size)
    model.train()
    for epoch in range(recipe.epochs):
        for step, (images, labels) in enumerate(data.train_batches(recipe.batch_size, seed=seed, epoch=epoch)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(steps * epoch + step, steps)
            loss = nn.functional.cross_entropy(model(images.contiguous(memory_format=_FORMAT)), labels)
            if not math.isfinite(loss.item()):
                return False
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return True


def _estimate_statistics(model: nn.Module, data: Data, recipe: Recipe, seed: int) -> None:
    """BatchNorm's averages anew, over batches of an epoch that was not trained on."""
    batches = data.train_batches(recipe.batch_size, seed=seed, epoch=recipe.epochs)
    images = (images.contiguous(memory_format=_FORMAT) for images, _ in itertools.islice(batches, _STATISTICS_BATCHES))
    torch.optim.swa_utils.update_bn(images, model)


def plan(settings: Sequence[Setting], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The key and the settings of every run that ``options`` ask for: a seed after the other, the dense ones first."""
    rules: list[tuple[str, str, float]] = [("dense", "dense", 0.0)]
    rules += itertools.product(options.operands, options.choices, [value for value in options.sparsity if value > 0])
    return [
        {**dict(zip(_KEY, (setting.name, *rule, seed), strict=True)), "settings": dataclasses.asdict(setting)}
        for seed in range(options.seeds)
        for rule in rules
        for setting in settings
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    parser = common.parser(__doc__, quick="digits, one epoch, one seed, 90%% alone, no file", allocator=None)
    add = parser.add_argument
    runs = [setting.name for setting in SETTINGS]
    add("--runs", type=common.names(runs), default=runs, help=f"default: {','.join(runs)}")
    add("--operands", type=common.names(list(OPERANDS)), default=list(OPERANDS), help="default: all")
    add("--choices", type=common.names(list(CHOICES)), default=list(CHOICES), help="default: topk,random")
    add("--sparsity", type=common.percentages, default=[0.5, 0.8, 0.9, 0.95, 0.98], help="default: 50,80,90,95,98")
    add("--seeds", type=int, default=2, help="default: 2")
    add("--report", action="store_true", help="make the tables and the picture of what is there, and train nothing")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    settings = [setting for setting in SETTINGS if setting.name in options.runs]
    if options.quick:
        settings, options.seeds, options.sparsity = list(_QUICK), 1, [0.9]
    common.begin(options, "sensitivity")

    result: dict[str, Any] = {"rows": common.merge_rows(options.out, [], _KEY) if options.out is not None else []}
    known = [{name: row[name] for name in (*_KEY, "settings")} for row in result["rows"]]
    missing = [] if options.report else [run for run in plan(settings, options) if run not in known]
    images: dict[str, Data] = {}
    by_name = {setting.name: setting for setting in settings}
    with tqdm(missing, unit="run", disable=not missing) as progress:
        for run in progress:
            setting = by_name[run["run"]]
            progress.set_description(f"{run['run']}, {run['operand']} {run['choice']} {run['sparsity']:.0%}")
            if setting.name not in images:
                images[setting.name] = load_data(setting.data, samples=setting.samples)
            rule = None if run["operand"] == "dense" else Rule(run["operand"], run["choice"], run["sparsity"])
            conditions = common.conditions()
            row = {**run, **train(setting, images[setting.name], rule, run["seed"]), "conditions": conditions}
            if options.out is None:
                result["rows"].append(row)
            else:
                result["rows"] = common.merge_rows(options.out, [row], _KEY)
                common.write_json(options.out, result)
    # Rows of former settings stay in the file until they are run again, but are not compared with those of today.
    today = {setting.name: dataclasses.asdict(setting) for setting in SETTINGS}
    rows = [row for row in result["rows"] if row["settings"] == today.get(row["run"], row["settings"])]
    text = sensitivity_report.text(rows)
    if options.out is not None and rows:
        common.write(options.out, result, text, lambda path: sensitivity_report.plot(rows, path))
    common.finish(text, options.out)
    return result


if __name__ == "__main__":
    main()
