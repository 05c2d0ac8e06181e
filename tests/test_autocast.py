"""Under torch.autocast a sparse layer has the dtypes of a dense one, and nothing is cast twice."""

import pytest
import torch
from torch import Tensor, nn

from swat_ext import SWATConv2d, SWATLinear, functional

_HALF = [torch.bfloat16, torch.float16]
# Relative error of a result rounded to the dtype; on CUDA the operands are rounded too.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _layers(kind: str, device: torch.device, backend: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A sparse layer, the dense layer of the same parameters, and an input."""
    torch.manual_seed(3)
    if kind == "conv":
        dense: nn.Module = nn.Conv2d(12, 16, 3, padding=1).to(device)
        sparse: nn.Module = SWATConv2d.from_dense(dense, sparsity=0.0, backend=backend)
        return sparse, dense, torch.randn(3, 12, 8, 8).to(device)
    dense = nn.Linear(24, 16).to(device)
    return SWATLinear.from_dense(dense, sparsity=0.0, backend=backend), dense, torch.randn(5, 24).to(device)


@pytest.mark.parametrize("dtype", _HALF)
@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_dtypes_and_values_are_those_of_the_dense_layer(
    kind: str, backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    sparse, dense, input = _layers(kind, device, backend)
    exact = dense(input)
    results = []
    for layer in (sparse, dense):
        x = input.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            output = layer(x)
        output.float().square().sum().backward()
        results.append([output.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < _TOLERANCE[dtype]
    assert results[0][0].dtype == dtype
    assert (results[0][0].double() - exact.double()).norm() / exact.double().norm() < _TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_half_inputs_of_the_layer_before(kind: str, device: torch.device) -> None:
    sparse, _, input = _layers(kind, device, "sparse")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert sparse(input.bfloat16()).dtype == torch.bfloat16
        sparse.eval()
        with torch.no_grad():
            assert sparse(input.bfloat16()).dtype == torch.bfloat16


def test_float64_is_left_alone(device: torch.device) -> None:
    layer = SWATConv2d(3, 4, 3, sparsity=0.5, dtype=torch.float64).to(device)
    input = torch.randn(2, 3, 6, 6, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer(input).dtype == torch.float64


def test_functions(device: torch.device) -> None:
    thresholds = {"weight_threshold": 0.3, "activation_threshold": 0.5}
    weight = torch.randn(8, 6, 3, 3, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = functional.conv2d(torch.randn(2, 6, 5, 5, device=device), weight, **thresholds)
        flat = functional.linear(output.flatten(1), torch.randn(4, 72, device=device), **thresholds)
    assert output.dtype == flat.dtype == torch.bfloat16
    flat.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_compiles_to_one_graph() -> None:
    layer = SWATLinear(24, 16, sparsity=0.5)
    input = torch.randn(5, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(input), layer(input))


def test_a_threshold_set_in_one_dtype_is_good_in_the_other(device: torch.device) -> None:
    layer = SWATLinear(64, 8, sparsity=0.5, topk_period=100, weight_topk_period=100).to(device)
    input = torch.randn(32, 64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        first = layer(input)
    assert (layer(input) - first.float()).norm() / first.float().norm() < 0.1
