"""A small network that has every kind of layer, and an ordinary training loop, for tests of the layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import swat_ext


def small_network(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Sequential:
    """Dense; takes ``[N, 3, 8, 8]`` and returns ``[N, 5]``."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1, stride=2),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=3),
        nn.Flatten(),
        nn.Linear(24 * 16, 5),
    ).to(dtype)


def sparse_network(*, seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> nn.Sequential:
    """:func:`small_network`, made sparse at 0.8 unless told otherwise.

    Both periods are longer than a step and differ, so that thresholds grow old and none is taken for the other.
    """
    model = small_network(dtype, seed=seed)
    settings = {"sparsity": 0.8, "topk_period": 3, "weight_topk_period": 4, **config}
    swat_ext.sparsify_(model, swat_ext.SWATConfig(**settings))  # type: ignore[arg-type]
    return model


def batches(
    count: int, *, first: int = 0, size: int = 4, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Batches number ``first`` to ``first + count``, each the same whenever it is made."""
    made = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(size, 3, 8, 8, generator=generator, dtype=dtype)
        made.append((x, torch.randint(5, (size,), generator=generator)))
    return made


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    accumulate: int = 1,
) -> list[Tensor]:
    """The usual loop; returns the losses. ``accumulate`` backwards to each step."""
    losses = []
    for number, (x, y) in enumerate(data, start=1):
        loss = nn.functional.cross_entropy((model if forward is None else forward)(x), y)
        loss.backward()
        losses.append(loss.detach())
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def sparse_layers(model: nn.Module) -> list[swat_ext.SWATLayer]:
    return [module for module in model.modules() if isinstance(module, swat_ext.SWATLayer)]


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    """Parameters and buffers equal, bit for bit."""
    mine, other = left.state_dict(), right.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name
