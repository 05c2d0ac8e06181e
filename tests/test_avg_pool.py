"""SWATAvgPool2d: PyTorch's results and gradients, bit for bit, with nothing held."""

import itertools

import pytest
import torch
from held import saved_bytes
from torch import nn

import swat_ext
from swat_ext import SWATAvgPool2d, SWATConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_agrees_with_pytorch(dtype, channels_last, generator):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for kernel, stride, padding, ceil_mode, include, divisor in itertools.product(
        (2, (3, 2)), (None, (1, 2)), (0, 1), (False, True), (False, True), (None, 3)
    ):
        arguments = (kernel, stride, padding, ceil_mode, include, divisor)
        x = torch.randn(2, 5, 7, 6, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        results = []
        for pool in (SWATAvgPool2d(*arguments), nn.AvgPool2d(*arguments)):
            leaf = x.clone().requires_grad_()
            output = pool(leaf)
            output.backward(torch.arange(output.numel()).view(output.shape).to(dtype))
            results += [(output.detach(), leaf.grad)]
        for mine, other in zip(*results, strict=True):
            assert torch.equal(mine, other)
            assert mine.is_contiguous(memory_format=memory_format) == other.is_contiguous(memory_format=memory_format)


def test_holds_nothing_and_is_swapped_both_ways():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3))
    found = swat_ext.sparsify_(model, SWATConfig(0.5))
    assert type(model[1]) is SWATAvgPool2d
    assert "1" in found.around
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    assert saved_bytes(lambda: model[1](x)) == 0
    assert saved_bytes(lambda: nn.AvgPool2d(2)(x)) == x.nbytes
    assert type(swat_ext.to_dense(model)[1]) is nn.AvgPool2d


def test_what_does_not_fit_is_refused_as_by_pytorch():
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        SWATAvgPool2d(2, padding=2)(torch.randn(1, 1, 4, 4, requires_grad=True))
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(SWATAvgPool2d(2)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
