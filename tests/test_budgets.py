"""Every call of every layer keeps between 0.8 and 1.25 times its budget, or selects anew for that call."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from swat_ext import SWATConfig, SWATConv2d, SWATLayer, SWATLinear, functional, reference, sparsify_


def slack(numel: int) -> int:
    """Elements by which any budget may be missed: a 64th of all, at most 64."""
    return min(-(-numel // 64), 64)


def kept_weights(layer: SWATLinear) -> int:
    """Weights that take part in a training forward, counted by what unit vectors give."""
    with torch.no_grad():
        return int((layer(torch.eye(layer.in_features)) != 0).sum())


def kept_activations(layer: nn.Module, x: Tensor) -> int:
    """Non-zero values that a training forward saves of its input, beside parameters and integers."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    return sum(int((t != 0).sum()) for t in saved if t.is_floating_point() and t.data_ptr() not in parameters)


def assert_within(kept: int, budget: int, numel: int) -> None:
    assert min(0.8 * budget, budget - slack(numel)) <= kept <= max(1.25 * budget, budget + slack(numel)), (kept, budget)


def exact_weight_grad(layer: SWATConv2d, x: Tensor, grad: Tensor) -> Tensor:
    """The oracle's, for activations selected from ``x`` itself."""
    weight = layer.weight.detach().double().requires_grad_()
    keep = functional.keep_count(x.numel(), layer.activation_sparsity)
    threshold = reference.kth_magnitude(x.double(), keep)
    top = torch.where(x.abs() >= threshold, x, 0).double()
    nn.functional.conv2d(top, weight, None, layer.stride, layer.padding).backward(grad.double())
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("scale", [0.05, 0.1, 20.0])
@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_a_second_image_of_another_scale_gets_its_own_selection(scale: float, backend: str) -> None:
    """As a detection head meets feature maps of several sizes."""
    torch.manual_seed(0)
    layer = SWATConv2d(16, 8, 3, padding=1, bias=False, sparsity=0.9, backend=backend)  # type: ignore[arg-type]
    layer(torch.randn(4, 16, 12, 12)).sum().backward()
    layer.weight.grad = None
    small = torch.randn(4, 16, 7, 5) * scale
    output = layer(small)
    grad = torch.randn_like(output)
    output.backward(grad)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.double(), exact_weight_grad(layer, small, grad), rtol=1e-4, atol=1e-4)


def _initialise(layer: SWATLinear) -> None:
    nn.init.trunc_normal_(layer.weight, std=1e-3)


def _load(layer: SWATLinear) -> None:
    layer.load_state_dict({name: value * 50 for name, value in layer.state_dict().items()})


def _copy(layer: SWATLinear) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * 1e-2)


def _data(layer: SWATLinear) -> None:
    layer.weight.data = torch.randn_like(layer.weight) * 7


@pytest.mark.parametrize("rewrite", [_initialise, _load, _copy, _data])
def test_weights_rewritten_after_a_forward_keep_their_budget(rewrite: Callable[[SWATLinear], None]) -> None:
    torch.manual_seed(0)
    layer = SWATLinear(200, 50, bias=False, sparsity=0.8)
    assert kept_weights(layer) == 2000
    rewrite(layer)
    assert_within(kept_weights(layer), 2000, 10000)


def test_other_parameters_by_functional_call_keep_the_budget() -> None:
    torch.manual_seed(0)
    layer = SWATLinear(200, 50, bias=False, sparsity=0.9)
    layer(torch.randn(3, 200))
    for scale in (1e-3, 1.0, 1e3):
        weight = torch.randn(50, 200) * scale
        output = torch.func.functional_call(layer, {"weight": weight}, (torch.eye(200),))
        assert_within(int((output != 0).sum()), 1000, 10000)


def test_a_large_learning_rate_moves_no_layer_off_its_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 100, bias=False))
    sparsify_(model, SWATConfig(sparsity=0.8, topk_period=1000, weight_topk_period=1000, skip=()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(64, 100)).square().mean().backward()
        optimizer.step()
        for layer in (model[0], model[2]):
            assert_within(kept_weights(layer), 2000, 10000)


@given(
    scales=st.lists(st.sampled_from([0.0, 1e-20, 0.01, 0.5, 0.8, 1.0, 1.2, 3.0, 1e20]), min_size=1, max_size=6),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95, 0.99]),
    zeros=st.sampled_from([0.0, 0.5, 0.97]),
    rows=st.integers(1, 40),
)
def test_any_sequence_of_scales_keeps_every_budget(
    scales: list[float], sparsity: float, zeros: float, rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = SWATLinear(30, 20, sparsity=0.5, activation_sparsity=sparsity)
    for scale in scales:
        x = torch.randn(rows, 30, generator=generator) * scale
        x = x * (torch.rand(x.shape, generator=generator) >= zeros)
        there = int((x != 0).sum())
        budget = functional.keep_count(x.numel(), sparsity)
        kept = kept_activations(layer, x)
        assert kept <= max(1.25 * budget, budget + slack(x.numel()))
        # Exact zeros are not stored: where fewer elements differ from zero than the budget, all of those are kept.
        assert kept >= min(there, 0.8 * budget, budget - slack(x.numel()))


def test_a_threshold_that_is_not_a_number_is_replaced() -> None:
    torch.manual_seed(0)
    layer = SWATLinear(100, 10, sparsity=0.9)
    with torch.no_grad():
        layer(torch.full((5, 100), torch.nan))
    x = torch.randn(50, 100)
    assert_within(kept_activations(layer, x), 500, 5000)


def test_selecting_for_one_call_leaves_the_threshold_for_the_next() -> None:
    """So that a checkpoint, which calls again in another order, finds what it found the first time."""
    torch.manual_seed(0)
    layer = SWATConv2d(8, 8, 3, sparsity=0.9)
    large, small = torch.randn(2, 8, 9, 9), torch.randn(2, 8, 9, 9) * 0.02
    alone = copy.deepcopy(layer)
    first = [kept_activations(layer, large), kept_activations(layer, small)]
    assert [kept_activations(layer, small), kept_activations(layer, large)] == first[::-1]
    assert kept_activations(alone, large) == first[0]


def test_the_realised_sparsity_is_told() -> None:
    torch.manual_seed(0)
    layer: SWATLayer = SWATLinear(100, 40, sparsity=0.9, activation_sparsity=0.75)
    assert layer.realised_sparsity == (None, None)
    assert layer.steps_since_selection == (None, None)
    x = torch.randn(20, 100)
    layer(x)
    assert layer.realised_sparsity == pytest.approx((0.9, 0.75))
    layer(x * 1.05)
    kept = kept_activations(layer, x * 1.05)
    assert 500 < kept < 625
    assert layer.realised_sparsity[1] == pytest.approx(1 - kept / 2000)
    assert layer.steps_since_selection == (0, 0)
