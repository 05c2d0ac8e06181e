"""Step times of the networks of bench/learning.py, measured in turns: what its budget by the clock is made of."""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
from learning_runs import SPARSE_FIELDS, Plan, build, data_of
from paper_networks import LAYOUTS
from tqdm import tqdm
from workers import Worker

from swat_ext.data import Data
from swat_ext.training import Trainer

Row = Mapping[str, Any]

_BATCHES = 40


class Runner:
    """What the process of one timed network does."""

    def __init__(self, run: Plan, images: Data, layout: str, allocator: str) -> None:
        common.use_allocator(allocator)
        memory_format = LAYOUTS[layout]
        self._trainer = Trainer(build(run, images, 0), images, run.recipe, memory_format=memory_format, progress=False)
        for group in self._trainer.optimizer.param_groups:
            group["lr"] = run.recipe.lr / 2  # about the mean of its schedule: thresholds age as they do in training
        self._trainer.model.train()
        batches = itertools.islice(images.train_batches(run.recipe.batch_size, seed=0, epoch=0), _BATCHES)
        taken = [(image.contiguous(memory_format=memory_format), label) for image, label in batches]
        self._batches = itertools.cycle(taken)

    def steps(self, count: int) -> None:
        """So many whole steps: forward, backward and update."""
        trainer = self._trainer
        for images, labels in itertools.islice(self._batches, count):
            loss = trainer.criterion(trainer.model(images), labels)
            trainer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            trainer.optimizer.step()
        if not loss.isfinite():
            raise RuntimeError("the loss became NaN or infinite; what was timed means nothing")


def measure(
    plans: Sequence[Plan], *, rounds: int, allocator: str, progress: tqdm | None = None
) -> list[dict[str, Any]]:
    """Milliseconds of a training step of each of ``plans``, all of one network and data set, measured in turns.

    Each network has a process of its own. A call is a whole selection period, and so selection is in it as often as in
    training. What "set" and "rigl" do every hundredth step is not.

    Args:
        plans: one is dense. Dense networks are timed in both layouts, and the faster counts.
        rounds: calls of each network.

    Returns:
        for each of them its median, least and most milliseconds, those of the dense network beside it, and how many
        times as fast as that it is ("ratio").
    """
    conditions = common.conditions()
    period = max(run.recipe.topk_period for run in plans)
    images = data_of(plans[0].data, plans[0].recipe.batch_size)
    with contextlib.ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for run in plans:
            for layout in LAYOUTS if run.config is None else ("channels_last",):
                worker = stack.enter_context(Worker(Runner, run, images, layout, allocator))
                calls[f"{run.variant} {layout}"] = functools.partial(worker.call, "steps", period)
        timings = common.interleaved(calls, rounds=rounds, progress=progress)
    rows = []
    for run in plans:
        layouts = {name.split()[1]: timing for name, timing in timings.items() if name.split()[0] == run.variant}
        layout, timing = min(layouts.items(), key=lambda item: item[1].median)
        rows.append(
            {
                "variant": run.variant,
                "ms": timing.median / period,
                "least_ms": timing.best / period,
                "most_ms": max(timing.samples) / period,
                "rounds": rounds,
                "layout": layout,
                "settings": _time_settings(run.settings()),
                "conditions": conditions,
                "load_after": round(os.getloadavg()[0], 2),
            }
        )
    dense = next(row["ms"] for row in rows if row["variant"] == "dense")
    return [{**row, "dense_ms": dense, "ratio": dense / row["ms"]} for row in rows]


def _time_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a step's time depends on, of the settings of a run: not on its length, nor on rates."""
    recipe = {name: settings["recipe"][name] for name in ("batch_size", *SPARSE_FIELDS) if name in settings["recipe"]}
    return {**settings, "recipe": recipe}


def find_row(rows: Sequence[Row], variant: str, settings: Mapping[str, Any]) -> Row | None:
    """That of ``rows`` which was measured for ``variant`` with the ``settings`` of a run; None if there is none."""
    wanted = (variant, _time_settings(settings))
    return next((row for row in rows if (row["variant"], row["settings"]) == wanted), None)


def replace_rows(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``new``, and before them those of ``rows`` that are not measured anew by them."""
    measured = [(row["variant"], row["settings"]) for row in new]
    return [row for row in rows if (row["variant"], row["settings"]) not in measured] + list(new)


def clock_epochs(epochs: int, row: Row) -> int:
    """Whole epochs, at least one, that take no longer than ``epochs`` of the dense network."""
    return max(1, math.floor(epochs * row["ratio"] + 1e-9))
