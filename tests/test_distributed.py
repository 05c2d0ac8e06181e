"""Steps and selections on several ranks: gloo processes of this machine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from networks import batches, sparse_layers, sparse_network
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

STEPS = 8


def _rank(rank: int, work: Callable[[], object], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save(work(), folder / f"{rank}.pt")
        dist.barrier()  # gloo aborts a rank whose peer has left in the middle of an exchange
    finally:
        dist.destroy_process_group()


def run_ranks(work: Callable[[], object], folder: Path) -> list[dict[str, object]]:
    """What ``work`` returns on each of two ranks."""
    torch.multiprocessing.spawn(_rank, (work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number in range(STEPS):
        (x, y) = batches(1, first=2 * number + dist.get_rank())[0]
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def _found(model: nn.Module) -> dict[str, object]:
    layers = sparse_layers(model)
    return {
        "steps": [layer.steps for layer in layers],
        "ages": [layer.steps_since_selection for layer in layers],
        "weight thresholds": [layer.selection_state()["weight"]["threshold"] for layer in layers],
    }


def _zero() -> dict[str, object]:
    model = DistributedDataParallel(sparse_network())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.SGD, lr=0.05, parameters_as_bucket_view=False
    )
    _train(model, optimizer)
    return _found(model) | {"weights": [parameter.detach() for parameter in model.parameters()]}


def _sharded() -> dict[str, object]:
    model = sparse_network()
    for layer in sparse_layers(model):
        fully_shard(layer)
    fully_shard(model)
    _train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))
    return _found(model) | {"weights": [parameter.full_tensor().detach() for parameter in model.parameters()]}


@pytest.mark.parametrize("work", [_zero, _sharded])
def test_ranks_count_each_step_once_and_select_the_same_weights(
    work: Callable[[], dict[str, object]], tmp_path: Path
) -> None:
    first, second = run_ranks(work, tmp_path)
    assert first["steps"] == second["steps"] == [STEPS] * 4
    # Selected at the forwards after 0 and 4 steps, activations after 0, 3 and 6.
    assert first["ages"] == second["ages"] == [(STEPS - 4, STEPS - 6)] * 4
    for name in ("weight thresholds", "weights"):
        for mine, theirs in zip(first[name], second[name], strict=True):
            assert torch.equal(mine, theirs)
