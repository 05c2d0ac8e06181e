"""What is not finite spreads by one rule, whichever kernels run (swat_ext/ops/convolution.py)."""

import math

import pytest
import torch
from torch import Tensor

from swat_ext import SWATConv2d, SWATLinear, functional

INFINITE = [math.inf, -math.inf, math.nan]


def products(kept: Tensor, other: Tensor) -> Tensor:
    """``kept * other`` where ``kept`` is not zero, and 0 elsewhere: a dropped element multiplies nothing."""
    return torch.where(kept != 0, kept * other, torch.zeros(()).double())


def oracle(x: Tensor, weight: Tensor, grad: Tensor, top_x: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient of a 3x3 convolution with stride 1, product by product."""
    n, channels, height, width = x.shape
    padded = torch.nn.functional.pad(x, [padding] * 4)
    # Zeros around the output's gradient are multiplied too.
    around = torch.nn.functional.pad(grad, [2] * 4)
    output = torch.zeros_like(grad)
    grad_padded = torch.zeros(n, channels, height + 2 * padding, width + 2 * padding, dtype=torch.float64)
    grad_weight = torch.zeros_like(weight)
    rows, columns = grad.shape[2:]
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + rows, j : j + columns]
            output += products(weight[None, :, :, i, j, None, None], window[:, None]).sum(2)
            back = around[:, :, 2 - i : 2 - i + rows + 2, 2 - j : 2 - j + columns + 2]
            grad_padded += products(weight[None, :, :, i, j, None, None], back[:, :, None]).sum(1)
            # Every kept activation meets every tap; outside the image of the gradient there are zeros.
            begin_i, begin_j = 2 - i + padding, 2 - j + padding
            met = around[:, :, begin_i : begin_i + height, begin_j : begin_j + width]
            grad_weight[:, :, i, j] = products(top_x[:, None], met[:, :, None]).sum((0, 3, 4))
    end = (padding + height, padding + width)
    return output, grad_padded[:, :, padding : end[0], padding : end[1]], grad_weight


@pytest.mark.parametrize("value", INFINITE)
@pytest.mark.parametrize("place", ["input", "weight", "gradient"])
@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_follows_the_rule(value: float, place: str, backend: str, channels_last: bool, isa: str) -> None:
    torch.manual_seed(0)
    layer = SWATConv2d(4, 5, 3, padding=1, bias=False, sparsity=0.6, backend=backend)  # type: ignore[arg-type]
    layer.double()
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        {"input": x, "weight": layer.weight, "gradient": grad}[place].select(0, 1)[2, 1, 2] = value
    x.requires_grad_()
    output = layer(x)
    output.backward(grad)

    def top(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        threshold = functional.kth_magnitude(tensor, functional.keep_count(tensor.numel(), 0.6))
        return torch.where(tensor.abs() < threshold, 0, tensor)

    wanted = oracle(x.detach(), top(layer.weight), grad, top(x), 1)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert any(not tensor.isfinite().all() for tensor in wanted)
    for mine, theirs in zip((output, x.grad, layer.weight.grad), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("value", INFINITE)
def test_a_linear_layer_follows_the_rule(value: float) -> None:
    torch.manual_seed(0)
    results = []
    x = torch.randn(9, 20)
    x[3, 4] = value
    for backend in ("sparse", "dense"):
        torch.manual_seed(1)
        layer = SWATLinear(20, 8, sparsity=0.5, backend=backend)  # type: ignore[arg-type]
        input = x.clone().requires_grad_()
        output = layer(input)
        output.square().sum().backward()
        results.append((output, input.grad, layer.weight.grad, layer.bias.grad))
        weight = layer.weight.detach()
        threshold = functional.kth_magnitude(weight, 80)
        assert torch.equal(output[3].isfinite(), weight[:, 4].abs() < threshold)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
