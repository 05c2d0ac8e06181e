"""A run that is broken off, saved and gone on with in another process' shoes, for tests of exact resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from networks import assert_same_state, batches, sgd, sparse_layers, sparse_network, train
from torch import Tensor, nn

import swat_ext
from swat_ext.train import main
from swat_ext.training import Trainer


class Run(NamedTuple):
    """A model in training; the fields are named as :func:`assert_resumes` loads them."""

    m: nn.Module
    o: torch.optim.Optimizer
    s: swat_ext.SWATScheduler


def run_of(
    seed: int,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    plan: dict[str, object] | None = None,
    **config: object,
) -> Run:
    """:func:`networks.sparse_network`, an optimizer and a scheduler made with ``plan``."""
    model = sparse_network(seed=seed, **config)
    made = optimizer(model)
    return Run(model, made, swat_ext.SWATScheduler(model, made, **(plan or {})))  # type: ignore[arg-type]


def assert_resumes(make: Callable[[int], Run], order: str, break_at: int, path: Path, steps: int = 12) -> None:
    """A run broken off after ``break_at`` steps and loaded in ``order`` ends as the straight one, bit for bit.

    Args:
        make: a run from a seed of its weights.
        order: letters of :class:`Run`, such as "mos".
        path: of a file to write.
    """
    straight = make(0)
    losses = train(straight.m, straight.o, batches(steps))
    first = make(0)
    train(first.m, first.o, batches(break_at))
    torch.save({name: part.state_dict() for name, part in first._asdict().items()}, path)

    second = make(9)
    train(second.m, second.o, batches(2, first=70))  # a past of its own, to be forgotten
    second.o.zero_grad()
    state = torch.load(path, weights_only=True)
    for name in order:
        getattr(second, name).load_state_dict(state[name])
    later = train(second.m, second.o, batches(steps - break_at, first=break_at))
    assert_equal(losses[break_at:], later)
    assert_same_state(straight.m, second.m)
    for mine, other in zip(sparse_layers(straight.m), sparse_layers(second.m), strict=True):
        assert (mine.budget, mine.activation_budget) == (other.budget, other.activation_budget)
        assert (mine.steps, mine.steps_since_selection) == (other.steps, other.steps_since_selection)
    with torch.no_grad():
        x = batches(1, first=steps)[0][0]
        assert torch.equal(straight.m.eval()(x), second.m.eval()(x))


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    """Bit for bit."""
    assert torch.equal(torch.stack(left), torch.stack(right))


def interrupt_train(arguments: list[str], epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``swat-train``, and press Ctrl-C where epoch number ``epoch`` begins."""
    train_epoch = Trainer._train_epoch

    def interrupt(self: Trainer, number: int) -> dict[str, Any]:
        if number == epoch:
            raise KeyboardInterrupt
        return train_epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", interrupt)
        assert main(arguments) == 130
