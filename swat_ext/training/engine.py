"""The training loop: epochs, evaluation, and a state from which it goes on bit for bit."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swat_ext.batchnorm import update_batchnorm_
from swat_ext.data.base import Batch, Data
from swat_ext.data.extras import require
from swat_ext.modules import SWATLayer
from swat_ext.scheduler import SWATScheduler
from swat_ext.training.files import CHECKPOINT, LOG, save_checkpoint, write_log
from swat_ext.training.recipe import Recipe, build_optimizer

__all__ = ["Diverged", "Trainer", "evaluate"]


class Diverged(RuntimeError):
    """The loss became NaN or infinite."""


class _Bar(Protocol):
    def update(self, n: int = ...) -> Any: ...

    def set_postfix_str(self, s: str, refresh: bool = ...) -> Any: ...


class _NoBar:
    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        pass


@contextmanager
def _progress(show: bool, total: int, description: str) -> Iterator[_Bar]:
    if not show:
        yield _NoBar()
        return
    tqdm = require("tqdm", "tqdm", "a progress bar").tqdm
    # disable=None: no bar where standard error is not a terminal, such as a log file.
    with tqdm(total=total, desc=description, unit="step", leave=False, disable=None, dynamic_ncols=True) as bar:
        yield bar


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _to(batch: Batch, memory_format: torch.memory_format) -> Batch:
    images, labels = batch
    return images.contiguous(memory_format=memory_format), labels


def evaluate(
    model: nn.Module,
    data: Data,
    batch_size: int,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    workers: int = 0,
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (in [0, 1]) of ``model``, in evaluation mode, over the test set of
    ``data``."""
    loss, correct = 0.0, 0
    with _mode(model, False), torch.no_grad():
        for batch in data.test_batches(batch_size, workers=workers):
            images, labels = _to(batch, memory_format)
            outputs = model(images)
            loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
            correct += int((outputs.argmax(1) == labels).sum())
    return loss / data.test_size, correct / data.test_size


class Trainer:
    """Trains ``model`` on ``data`` by ``recipe``; after every epoch it estimates the statistics of BatchNorm anew,
    evaluates, logs and, given ``out``, saves a checkpoint.

    A run that is resumed from a checkpoint gives bit for bit what one without the break gives, on the same machine
    with the same number of threads: batches depend on (seed, epoch, batch) alone, and everything else is in
    :meth:`state_dict`.

    Args:
        model: takes ``[N, C, H, W]`` images and gives ``[N, num_classes]`` logits; brought to ``memory_format``.
            Its sparse layers, if any, get a :class:`swat_ext.SWATScheduler` and select as often as ``recipe`` says.
        data: see :class:`swat_ext.data.Data`.
        recipe: see :class:`Recipe`.
        seed: of the order of the batches and their augmentation. The caller seeds the model's initial weights.
        out: folder for :data:`CHECKPOINT` and :data:`LOG`, made if missing; None writes nothing.
        settings: what the log's first line and the checkpoint say of this run (JSON values).
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``.
        workers: threads that prepare batches ahead.
        progress: show a bar and print a line an epoch.
        on_step: called after each step with its loss (nats) and the seconds of its forward, backward and update.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        seed: int = 0,
        out: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        workers: int = 0,
        progress: bool = True,
        on_step: Callable[[float, float], None] | None = None,
    ) -> None:
        self.model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.data, self.recipe, self.seed, self.out = data, recipe, seed, out
        self.settings = dict(settings or {})
        self.memory_format, self.workers, self.progress, self.on_step = memory_format, workers, progress, on_step
        self.steps_per_epoch = data.train_steps(recipe.batch_size)
        self.optimizer = build_optimizer(model, recipe)
        self.swat = self._scheduler()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        #: One dict for each finished epoch, as in the log.
        self.history: list[dict[str, Any]] = []

    def _scheduler(self) -> SWATScheduler | None:
        layers = [module for module in self.model.modules() if isinstance(module, SWATLayer)]
        for layer in layers:
            layer.topk_period = self.recipe.topk_period
        if not layers:
            return None
        return SWATScheduler(
            self.model,
            self.optimizer,
            total_steps=self.recipe.epochs * self.steps_per_epoch,
            ramp=self.recipe.ramp,
            topk_warmup=self.recipe.topk_warmup_epochs * self.steps_per_epoch,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, between two epochs."""
        return {
            "settings": self.settings,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "swat": None if self.swat is None else self.swat.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, which :meth:`state_dict` made of a run with the same settings; ``recipe.epochs`` may
        differ.

        Raises:
            ValueError: it is the state of another kind of run.
        """
        if (state["swat"] is None) != (self.swat is None):
            expected, got = ("dense", "sparse") if self.swat is None else ("sparse", "dense")
            raise ValueError(f"state: expected that of a {expected} run, got that of a {got} one")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.swat is not None:
            self.swat.load_state_dict(state["swat"])
        self.history = list(state["history"])
        torch.set_rng_state(state["rng"])

    def run(self) -> list[dict[str, Any]]:
        """Train until ``recipe.epochs`` epochs are done; returns :attr:`history`.

        Raises:
            Diverged: the loss became NaN or infinite.
        """
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._save()
        while len(self.history) < self.recipe.epochs:
            epoch = len(self.history)
            started = time.perf_counter()
            record = {"epoch": epoch + 1, **self._train_epoch(epoch)}
            record["batchnorm_seconds"] = self._update_batchnorm(epoch)
            record["test_loss"], record["test_accuracy"] = evaluate(
                self.model,
                self.data,
                self.recipe.batch_size,
                memory_format=self.memory_format,
                workers=self.workers,
            )
            record["seconds"] = round(time.perf_counter() - started, 3)
            self.history.append(record)
            if self.out is not None:
                self._save()
            if self.progress:
                print(_line(record, self.recipe.epochs), flush=True)
        return self.history

    def _update_batchnorm(self, epoch: int) -> float:
        """Estimate the statistics of BatchNorm for the evaluation after ``epoch``; returns the seconds that it took."""
        started = time.perf_counter()
        if self.recipe.batchnorm_batches:
            # Of the next epoch, so that the order and the augmentation are none that the weights have just met.
            batches = self.data.train_batches(
                self.recipe.batch_size, seed=self.seed, epoch=epoch + 1, workers=self.workers
            )
            ordered = (_to(batch, self.memory_format) for batch in batches)
            update_batchnorm_(self.model, ordered, limit=self.recipe.batchnorm_batches)
        return round(time.perf_counter() - started, 3)

    def _save(self) -> None:
        assert self.out is not None
        # The checkpoint first: on a kill between the two, resuming writes the log again from the checkpoint.
        if self.history:
            save_checkpoint(self.out / CHECKPOINT, self.state_dict())
        write_log(self.out / LOG, [{"config": self.settings}, *self.history])

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        losses, lr, correct, seen = 0.0, 0.0, 0, 0
        times: list[float] = []
        batches = self.data.train_batches(self.recipe.batch_size, seed=self.seed, epoch=epoch, workers=self.workers)
        description = f"epoch {epoch + 1}/{self.recipe.epochs}"
        with _mode(self.model, True), _progress(self.progress, self.steps_per_epoch, description) as bar:
            for step, batch in enumerate(batches):
                images, labels = _to(batch, self.memory_format)
                lr = self.recipe.lr_at(self.steps_per_epoch * epoch + step, self.steps_per_epoch)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                started = time.perf_counter()
                loss, outputs = self._step(images, labels)
                times.append(time.perf_counter() - started)
                value = float(loss)
                if not math.isfinite(value):
                    raise Diverged(
                        f"the loss is {value} at step {step + 1} of epoch {epoch + 1}: try a lower learning rate than "
                        f"{self.recipe.lr:g} or a longer warm-up"
                    )
                losses += value * len(labels)
                correct += int((outputs.argmax(1) == labels).sum())
                seen += len(labels)
                if self.on_step is not None:
                    self.on_step(value, times[-1])
                bar.set_postfix_str(f"loss {losses / seen:.3f}, accuracy {correct / seen:.1%}", refresh=False)
                bar.update()
        return {
            "steps": self.steps_per_epoch * (epoch + 1),
            "lr": lr,
            "train_loss": losses / seen,
            "train_accuracy": correct / seen,
            "step_ms": round(1000 * median(times), 3),
        }

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(images)
        loss = self.criterion(outputs, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), outputs.detach()


def _line(record: Mapping[str, Any], epochs: int) -> str:
    return "  ".join(
        [
            f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
            f"loss {record['train_loss']:.3f}",
            f"train {record['train_accuracy']:6.1%}",
            f"test {record['test_accuracy']:6.1%}",
            f"lr {record['lr']:.4f}",
            f"step {record['step_ms']:.0f} ms",
            f"{record['seconds']:.1f} s",
        ]
    )
