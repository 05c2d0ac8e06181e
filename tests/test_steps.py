"""One clock: a layer counts the steps that optimizers make on its weight, whatever the optimizer."""

import copy

import pytest
import torch
from networks import assert_same_state, batches, sparse_layers, sparse_network, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from swat_ext import SWATConv2d, SWATLinear


def steps(model: nn.Module) -> list[int]:
    return [layer.steps for layer in sparse_layers(model)]


class PastTheCounter(torch.optim.Optimizer):
    """Writes through ``data``, which the weight's version does not show."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "SGD fused": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "past the counter": PastTheCounter,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weight_period", [1, 2])
def test_every_optimizer_is_counted_and_thresholds_follow(name: str, accumulate: int, weight_period: int) -> None:
    model = sparse_network(topk_period=3, weight_topk_period=weight_period)
    optimizer = OPTIMIZERS[name](model.parameters())
    ages = []
    for number in range(7):
        train(model, optimizer, batches(accumulate, first=accumulate * number), accumulate=accumulate)
        ages.append([layer.steps_since_selection for layer in sparse_layers(model)])
    assert steps(model) == [7] * 4
    # Selected at the forwards after 0, 3 and 6 steps, weights at each or each second; looked at after the step.
    weights = [number % weight_period + 1 for number in range(7)]
    assert ages == [[pair] * 4 for pair in zip(weights, (1, 2, 3, 1, 2, 3, 1), strict=True)]


def test_a_dead_layer_of_fused_adam_stays_alive() -> None:
    """The default of many trainers: fused, and nobody else counts."""
    torch.manual_seed(0)
    layer = SWATLinear(64, 64, bias=False, sparsity=0.9, weight_topk_period=10)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=5.0, fused=True)
    for _ in range(200):
        layer(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.steps == 200
    kept = int((layer(torch.eye(64)) != 0).sum())
    assert 0.8 * 410 <= kept <= 1.25 * 410


def test_the_closures_of_lbfgs_are_one_step() -> None:
    model = sparse_network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    x, y = batches(1)[0]
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert calls > 3
    assert steps(model) == [3] * 4


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_is_none(fused: bool) -> None:
    model = sparse_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for number, (x, y) in enumerate(batches(6)):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if number in (1, 4):
            next(model.parameters()).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert steps(model) == [4] * 4


def test_several_optimizers_count_each_for_its_own_weights() -> None:
    model = sparse_network()
    body = torch.optim.SGD(model[:8].parameters(), lr=0.01)
    head = torch.optim.SGD(model[8:].parameters(), lr=0.01)
    for number, (x, y) in enumerate(batches(4)):
        nn.functional.cross_entropy(model(x), y).backward()
        head.step()
        if number % 2:
            body.step()
        model.zero_grad()
    assert steps(model) == [2, 2, 2, 4]


class Sharding(torch.optim.Optimizer):
    """Steps an optimizer of a part of its parameters inside its own step, as ZeroRedundancyOptimizer does."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(parameters[: len(parameters) // 2], lr=0.01)

    def step(self, closure=None):
        self.inner.step()


def test_an_optimizer_inside_another_counts_once() -> None:
    model = sparse_network()
    train(model, Sharding(model.parameters()), batches(5))
    assert steps(model) == [5] * 4


def test_a_step_that_raised_leaves_the_count_right() -> None:
    model = sparse_network()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.01) for _ in range(2))

    def closure() -> float:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        optimizer.step(closure)
    train(model, other, batches(2))
    train(model, optimizer, batches(2))
    assert steps(model) == [4] * 4


def test_copies_count_for_themselves() -> None:
    model = sparse_network()
    twin = copy.deepcopy(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    train(twin, optimizer, batches(3))
    averaged.update_parameters(twin)
    assert (steps(model), steps(twin), steps(averaged)) == ([0] * 4, [3] * 4, [0] * 4)


def test_a_parametrized_weight_is_counted() -> None:
    layer = SWATLinear(20, 10, sparsity=0.5)
    nn.utils.parametrizations.weight_norm(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(3):
        layer(torch.randn(4, 20)).sum().backward()
        optimizer.step()
    assert layer.steps == 3
    bias_only = SWATLinear(20, 10, sparsity=0.5)
    torch.optim.SGD([bias_only.bias], lr=0.01).step()
    assert bias_only.steps == 0


def test_checkpoints_of_a_shared_layer_repeat_their_selections() -> None:
    """One layer on three images of different scale, checkpointed: backward calls it again in the other order."""

    def run(recompute: bool) -> SWATConv2d:
        torch.manual_seed(0)
        layer = SWATConv2d(8, 8, 3, padding=1, sparsity=0.9, topk_period=3, weight_topk_period=3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            images = [
                (torch.randn(2, 8, size, size, generator=generator) * scale).requires_grad_()
                for size, scale in ((9, 1.0), (6, 0.02), (4, 30.0))
            ]
            outputs = [checkpoint(layer, x, use_reentrant=False) if recompute else layer(x) for x in images]
            torch.stack([output.square().mean() for output in outputs]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer

    assert_same_state(run(True), run(False))
