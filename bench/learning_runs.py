"""The runs of bench/learning.py: what a variant is, how it is trained, and the file that keeps what came out."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from torch import nn

from swat_ext import SWATConfig, sparsify_
from swat_ext.data import Data, Textures, load_data
from swat_ext.inspect.report import report
from swat_ext.models import build_model, parts
from swat_ext.training import RECIPES, Diverged, Recipe, Trainer
from swat_ext.training.engine import evaluate

# Factor on the channels that lets two cores train a thousand steps in some two minutes.
WIDTHS = {"resnet18": 0.5, "vgg16": 0.5, "wrn16_8": 0.25, "densenet121": 0.25}
DATA = ("textures", "mnist", "digits")
BUDGETS = ("epochs", "clock")
# An epoch of textures is as long as we like; a short one wastes little where time is cut to whole epochs.
EPOCH_STEPS = 200
# Test patches of textures after each epoch, and after the last: one accuracy of 70% then has an error of 0.5 points.
_WATCHING, _JUDGING = 1024, 8192

# What a variant changes: arguments of SWATConfig, or fields of Recipe. None is the dense network.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "narrow80": None,
    "narrow90": None,
    "narrow95": None,
    "u80": {"sparsity": 0.8},
    "u90": {"sparsity": 0.9},
    "u95": {"sparsity": 0.95},
    "erk80": {"sparsity": 0.8, "distribution": "erk"},
    "erk90": {"sparsity": 0.9, "distribution": "erk"},
    "erk95": {"sparsity": 0.95, "distribution": "erk"},
    "m80": {"sparsity": 0.8, "distribution": "momentum"},
    "m90": {"sparsity": 0.9, "distribution": "momentum"},
    "m95": {"sparsity": 0.95, "distribution": "momentum"},
    "kernel50": {"sparsity": 0.5, "granularity": "kernel"},
    "kernel70": {"sparsity": 0.7, "granularity": "kernel"},
    "filter50": {"sparsity": 0.5, "granularity": "filter"},
    "filter70": {"sparsity": 0.7, "granularity": "filter"},
    "block50": {"sparsity": 0.5, "granularity": "block"},
    "block70": {"sparsity": 0.7, "granularity": "block"},
    # At the activation sparsity of u90, and so at its FLOPs.
    "static90": {"sparsity": 0.9, "activation_sparsity": 0.9, "method": "static"},
    "set90": {"sparsity": 0.9, "activation_sparsity": 0.9, "method": "set"},
    "rigl90": {"sparsity": 0.9, "activation_sparsity": 0.9, "method": "rigl"},
    # As published: activations stay dense.
    "static90d": {"sparsity": 0.9, "activation_sparsity": 0.0, "method": "static"},
    "set90d": {"sparsity": 0.9, "activation_sparsity": 0.0, "method": "set"},
    "rigl90d": {"sparsity": 0.9, "activation_sparsity": 0.0, "method": "rigl"},
    # At the FLOPs of erk90: activations follow their layer's weights.
    "static90erk": {"sparsity": 0.9, "method": "static", "distribution": "erk"},
    "set90erk": {"sparsity": 0.9, "method": "set", "distribution": "erk"},
    "rigl90erk": {"sparsity": 0.9, "method": "rigl", "distribution": "erk"},
}
# What each narrow network's FLOPs are those of.
NARROW = {"narrow80": "u80", "narrow90": "u90", "narrow95": "u95"}

# Fields of Recipe that mean nothing to a dense network.
SPARSE_FIELDS = ("topk_period", "weight_topk_period", "topk_warmup_epochs", "ramp", "topk_warmup")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What holds for all runs of one call of the bench.

    Attributes:
        batch: images in a step.
        steps: least number of steps of a run by epochs.
        width: factor on the channels; None means :data:`WIDTHS`.
        changes: arguments of SWATConfig and fields of Recipe, over those of the variants.
        validate: whether accuracy is that on a part of the training pictures.
    """

    batch: int = 32
    steps: int = 1000
    width: float | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validate: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run, but for its seed.

    Attributes:
        network, data, variant, budget: by their names.
        width: factor on the channels.
        narrow: whether channels are any number, not multiples of 8 alone.
        config: None for a dense network.
        recipe: its epochs are those of the budget.
        changes: what was asked for beside the variant.
    """

    network: str
    data: str
    variant: str
    budget: str
    width: float
    narrow: bool
    config: SWATConfig | None
    recipe: Recipe
    changes: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.network}-{self.data}"

    def settings(self) -> dict[str, Any]:
        """All that decides the outcome beside names and seed, as JSON reads it back."""
        config = None if self.config is None else dataclasses.asdict(self.config)
        found = {"width": self.width, "config": config, "recipe": dataclasses.asdict(self.recipe)}
        return json.loads(json.dumps(found, default=str))


@functools.cache
def data_of(name: str, batch: int, validate: bool = False, judge: bool = False) -> Data:
    """The data set called ``name``; an epoch of textures has :data:`EPOCH_STEPS` steps.

    Its test set is for the curve after each epoch; with ``judge`` it is for the accuracy that counts, after the last.
    """
    if name == "textures":
        data: Data = Textures(EPOCH_STEPS * batch, _JUDGING if judge else _WATCHING)
    else:
        data = load_data(name)
    return data.validation() if validate else data


def _split(changes: Mapping[str, Any], dense: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """``changes`` as arguments of SWATConfig and as fields of Recipe; some are both, as the Trainer sets them anew.

    Raises:
        ValueError: a name that is neither.
    """
    known = [{field.name for field in dataclasses.fields(of)} for of in (SWATConfig, Recipe)]
    unknown = [name for name in changes if not any(name in names for names in known)]
    if unknown:
        raise ValueError(
            f"this version's SWATConfig and Recipe have no {', '.join(unknown)}; they have "
            f"{', '.join(sorted(known[0] | known[1]))}"
        )
    config, recipe = ({name: value for name, value in changes.items() if name in names} for names in known)
    if dense:
        recipe = {name: value for name, value in recipe.items() if name not in SPARSE_FIELDS}
    return config, recipe


def plan(network: str, data: str, variant: str, budget: str, setup: Setup, epochs: int | None = None) -> Plan:
    """The run of that name.

    Args:
        epochs: None means as many as ``setup.steps`` need.

    Raises:
        ValueError, TypeError, NotImplementedError: the variant, or a change, is not what this version can do.
    """
    images = data_of(data, setup.batch, setup.validate)
    if epochs is None:
        epochs = math.ceil(setup.steps / images.train_steps(setup.batch))
    asked = VARIANTS[variant]
    width = WIDTHS[network] if setup.width is None else setup.width
    try:
        config, recipe = _split({**(asked or {}), **setup.changes}, dense=asked is None)
        made = None if asked is None else SWATConfig(**config)
        if variant in NARROW:
            width = narrow_width(network, data, NARROW[variant], setup)
        schedule = RECIPES["small"].with_epochs(epochs)
        schedule = dataclasses.replace(schedule, **{**recipe, "batch_size": setup.batch, "epochs": epochs})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise type(error)(f"variant {variant!r}: {error}") from error
    return Plan(network, data, variant, budget, width, variant in NARROW, made, schedule, dict(setup.changes))


def _network(network: str, images: Data, width: float, narrow: bool) -> nn.Module:
    # Multiples of 8 are too coarse to meet given FLOPs.
    finer = mock.patch.object(parts, "CHANNEL_MULTIPLE", 1) if narrow else contextlib.nullcontext()
    with finer:
        return build_model(network, images.num_classes, in_channels=images.shape[0], stem="cifar", width=width)


def build(run: Plan, images: Data, seed: int) -> nn.Module:
    """The network of ``run``; the same weights for each seed where shapes agree."""
    torch.manual_seed(seed)
    model = _network(run.network, images, run.width, run.narrow)
    if run.config is not None:
        sparsify_(model, run.config)
    return model


def step_flops(model: nn.Module, images: Data, batch: int) -> float:
    """FLOPs of a training step at the sparsity that the layers have now."""
    found = report(model, input_size=(batch, *images.shape)).swat_flops
    assert found is not None
    return found


def narrow_width(network: str, data: str, variant: str, setup: Setup) -> float:
    """The factor on the channels that gives a dense network most nearly the training FLOPs of ``variant``.

    Raises:
        ValueError: not even one channel a layer is that few.
    """
    sparse = plan(network, data, variant, "epochs", setup)
    images = data_of(data, setup.batch, setup.validate)
    return _width_of(network, images, sparse.width, step_flops(build(sparse, images, 0), images, 2))


@functools.cache
def _width_of(network: str, images: Data, most: float, wanted: float) -> float:
    def flops(width: float) -> float:
        return step_flops(_network(network, images, width, True), images, 2)

    low, high = 1 / 1024, most
    if flops(low) > wanted:
        raise ValueError(f"{network} has more than those FLOPs with one channel a layer")
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if flops(middle) <= wanted else (low, middle)
    return min((low, high), key=lambda width: abs(flops(width) - wanted))


# --- Training ---------------------------------------------------------------------------------------------------------


def train(
    run: Plan, seed: int, *, validate: bool = False, on_step: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Train ``run``, and say how it went: the line that is kept of it.

    A run that diverges counts as guessing from there on.
    """
    batch = run.recipe.batch_size
    images = data_of(run.data, batch, validate)
    conditions = common.conditions()
    model = build(run, images, seed)
    seconds: list[float] = []
    flops = [step_flops(model, images, batch)]

    def after_step(loss: float, taken: float) -> None:
        seconds.append(taken)
        if len(seconds) % trainer.steps_per_epoch == 0:
            flops.append(step_flops(model, images, batch))  # budgets may have moved
        on_step()

    memory_format = torch.channels_last
    trainer = Trainer(
        model, images, run.recipe, seed=seed, memory_format=memory_format, progress=False, on_step=after_step
    )
    diverged, accuracy = None, 1 / images.num_classes
    try:
        trainer.run()
        _, accuracy = evaluate(model, data_of(run.data, batch, validate, judge=True), batch)
    except Diverged as error:
        diverged = str(error)
    history: list[dict[str, Any]] = []
    spent = total = 0.0
    for record in trainer.history:
        first, last = record["steps"] - trainer.steps_per_epoch, record["steps"]
        spent += sum(seconds[first:last])
        total += (last - first) * (flops[record["epoch"] - 1] + flops[record["epoch"]]) / 2
        kept = {name: record[name] for name in ("epoch", "steps", "lr", "train_loss", "test_loss", "test_accuracy")}
        others = record["seconds"] - sum(seconds[first:last])
        history.append({**kept, "flops": total, "step_seconds": round(spent, 3), "other_seconds": round(others, 3)})
    if history and diverged is None:
        history[-1]["test_accuracy"] = accuracy
    return {
        "network": run.network,
        "data": run.data,
        "variant": run.variant,
        "seed": seed,
        "budget": run.budget,
        "accuracy": accuracy,
        "epochs": run.recipe.epochs,
        "steps": len(seconds),
        "flops": total,
        "step_seconds": round(sum(seconds), 3),
        "diverged": diverged,
        "changes": dict(run.changes),
        "settings": run.settings(),
        "conditions": conditions,
        "load_after": round(os.getloadavg()[0], 2),
        "history": history,
    }


# --- Files ------------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The runs in ``path``, none where there is no such file; a line that a kill cut off is left out, and said."""
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{path}: line {number} is cut off and left out", file=sys.stderr)
    return lines


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add ``line`` to ``path``, in one write that is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def find(lines: Sequence[Mapping[str, Any]], run: Plan, seed: int) -> Iterator[Mapping[str, Any]]:
    """Those of ``lines`` that are ``run`` with ``seed``, of either budget: with the same epochs it is the same run."""
    wanted = (run.network, run.data, run.variant, seed, run.settings())
    for line in lines:
        if tuple(line[name] for name in ("network", "data", "variant", "seed", "settings")) == wanted:
            yield line
