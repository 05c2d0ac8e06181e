"""Running statistics of BatchNorm, estimated anew from training batches before an evaluation."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["update_batchnorm_"]


def update_batchnorm_(model: nn.Module, batches: Iterable[Any], *, limit: int = 20) -> int:
    """Estimate the running statistics of every BatchNorm anew, in place.

    While the kept weights move fast, running averages describe networks of earlier steps, and evaluation is wrongly
    low. Here they become the mean over the batches of each batch's mean and unbiased variance, as
    :func:`torch.optim.swa_utils.update_bn` makes them, for the network that is evaluated: all but the BatchNorms is in
    evaluation mode, so that sparse layers select exactly and keep their thresholds and counts of steps, and dropout
    drops nothing. No gradients are made.

    Every subclass of PyTorch's BatchNorm that tracks running statistics takes part, but one that is frozen: in
    evaluation mode inside of a model in training mode. One that ``forward`` does not reach keeps its statistics. Modes
    and momenta are afterwards as before. ``num_batches_tracked`` is too, so that what follows in training does not
    depend on this call; but where momentum is None it becomes the number of forwards here, for the cumulative average
    goes on from them.

    Args:
        model: called as usual, hooks included. A parallel one needs as many batches on every rank. In place of one that
            is compiled with ``fullgraph=True`` give the module that was compiled: PyTorch's BatchNorm breaks the graph.
        batches: each a tensor, a tuple or list whose first item is one, for ``model(tensor)``, or a mapping, for
            ``model(**mapping)``; on the model's device. Large, shuffled and augmented as in training is best.
        limit: how many batches to take, at most; no more are asked of ``batches``.

    Returns:
        The number of batches used; 0, with nothing taken or run, where ``model`` has no such BatchNorm.

    Raises:
        TypeError: an argument or a batch of another type. ValueError: ``limit`` below 1, or no batch. After these and
            any error in ``model`` or ``batches`` the statistics are as before.
    """
    _check_arguments(model, batches, limit)
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and _statistics(module) and not (model.training and not module.training)
    ]
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    before = [(norm, norm.momentum, [statistic.clone() for statistic in _statistics(norm)]) for norm in norms]
    used, done = 0, False
    try:
        model.eval()
        for norm in norms:
            norm.training = True  # not train(): a subclass may hold a dropout of its own
            norm.momentum = None  # a cumulative average
            norm.reset_running_stats()
        for batch in islice(batches, limit):
            with torch.no_grad():
                _run(model, batch)
            used += 1
        if not used:
            raise ValueError("batches: expected at least one batch, got none")
        done = True
    finally:
        model.train(modes[0][1])  # for a train() that does more than to set modes
        for module, training in modes:
            module.training = training
        for norm, momentum, statistics in before:
            _settle(norm, statistics, momentum, done)
    return used


def _check_arguments(model: object, batches: object, limit: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # Tensors and mappings are iterable, but over samples and names.
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit: expected an integer of at least 1, got {limit!r}")
    if limit < 1:
        raise ValueError(f"limit: expected an integer of at least 1, got {limit!r}")


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    """Its running mean, its running variance and its count of batches; nothing where it does not track them all."""
    found = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    statistics = [statistic for statistic in found if statistic is not None]
    return statistics if norm.track_running_stats and len(statistics) == len(found) else []


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
        return
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        found = type(batch).__name__ if first is batch else f"{type(batch).__name__} of {type(first).__name__}"
        raise TypeError(
            f"batches: expected tensors, tuples or lists whose first item is a tensor, or mappings, got a {found}"
        )
    model(first)


def _settle(norm: _BatchNorm, before: list[Tensor], momentum: float | None, done: bool) -> None:
    """Keep what was estimated, if it was ``done`` and reached ``norm``; else go back to the statistics ``before``."""
    norm.momentum = momentum
    mean, variance, count = _statistics(norm)
    if not done or not count:
        mean.copy_(before[0])
        variance.copy_(before[1])
    if not done or not count or momentum is not None:
        count.copy_(before[2])
