"""Results and gradients of the layers around the convolutions lie in memory as those of PyTorch's layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from swat_ext import SWATAvgPool2d, SWATBatchNorm2d, SWATMaxPool2d, SWATReLU


def _randn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def _last(*size: int) -> Tensor:
    return _randn(*size).to(memory_format=torch.channels_last)


IMAGES: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: _randn(2, 6, 5, 7),
    "channels_last": lambda: _last(2, 6, 5, 7),
    "contiguous, sliced by channel": lambda: _randn(2, 12, 5, 7)[:, 3:9],
    "channels_last, sliced by channel": lambda: _last(2, 12, 5, 7)[:, 3:9],
    "contiguous, sliced by row": lambda: _randn(2, 6, 8, 7)[:, :, 1:6],
    "contiguous, every other column": lambda: _randn(2, 6, 5, 14)[..., ::2],
    "channels_last, every other column": lambda: _last(2, 6, 5, 14)[..., ::2],
    "channels_last, sliced by column": lambda: _last(2, 6, 5, 14)[..., 2:9],
    "[C, N, H, W]": lambda: _randn(6, 2, 5, 7).transpose(0, 1),
    "[C, N, H, W], sliced": lambda: _randn(6, 4, 5, 7).transpose(0, 1)[1:3],
    "[N, W, H, C]": lambda: _randn(2, 7, 5, 6).transpose(1, 3),
    "[N, C, W, H]": lambda: _randn(2, 6, 7, 5).transpose(2, 3),
    "expanded over samples": lambda: _randn(1, 6, 5, 7).expand(2, 6, 5, 7),
    "expanded over channels": lambda: _randn(2, 1, 5, 7).expand(2, 6, 5, 7),
    "expanded over columns": lambda: _randn(2, 6, 5, 1).expand(2, 6, 5, 7),
    "channels_last, expanded over samples": lambda: _last(1, 6, 5, 7).expand(2, 6, 5, 7),
    "one channel": lambda: _randn(2, 1, 5, 7),
    "one channel, channels_last": lambda: _last(2, 1, 5, 7),
    "one sample": lambda: _randn(1, 6, 5, 7),
    "one sample, channels_last": lambda: _last(1, 6, 5, 7),
    "one sample of a view": lambda: _last(1, 6, 5, 7).view(1, 6, 5, 7),
    "one pixel": lambda: _randn(4, 6, 1, 1),
    "one pixel, channels_last": lambda: _last(4, 6, 1, 1),
    "one pixel, sliced by channel": lambda: _randn(4, 12, 1, 1)[:, 3:9],
    "one pixel, sliced by column": lambda: _last(4, 6, 1, 3)[..., :1],
    "one column": lambda: _randn(2, 6, 5, 1),
    "one column, channels_last": lambda: _last(2, 6, 5, 1),
    "one sample and channel": lambda: _randn(1, 1, 5, 7),
}
OTHERS: dict[str, Callable[[], Tensor]] = {
    "a number": lambda: _randn(1)[0],
    "transposed": lambda: _randn(4, 5).t(),
    "three dimensions, reversed": lambda: _randn(4, 5, 6).transpose(0, 2),
    "three dimensions, with gaps": lambda: _randn(4, 5, 12)[..., ::2].transpose(0, 2),
    "channels_last_3d": lambda: _randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "no elements": lambda: _randn(3, 0, 4).transpose(0, 2),
}
LAYERS = {
    "ReLU": (nn.ReLU, SWATReLU, {}),
    "MaxPool2d": (nn.MaxPool2d, SWATMaxPool2d, {"kernel_size": 2, "ceil_mode": True}),
    "AvgPool2d": (nn.AvgPool2d, SWATAvgPool2d, {"kernel_size": 2, "ceil_mode": True}),
    "BatchNorm2d": (nn.BatchNorm2d, SWATBatchNorm2d, {}),
}


def _gradients(output: Tensor) -> list[Tensor]:
    """Ones as the output lies, contiguous, expanded, and in channels_last."""
    ones = torch.ones(output.shape)
    last = [ones.to(memory_format=torch.channels_last)] if output.dim() == 4 else []
    return [torch.ones_like(output), ones, torch.ones(()).expand(output.shape), *last]


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Strides that mean something: of more than one element."""
    return tuple(step if size > 1 else 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


# Of this one PyTorch's own batch normalisation has a channels_last output and a contiguous gradient.
_OPEN = ("BatchNorm2d", "one sample of a view")
_CASES = [(layer, layout) for layer in LAYERS for layout in IMAGES if (layer, layout) != _OPEN]
_CASES += [("ReLU", layout) for layout in OTHERS]


@pytest.mark.parametrize(("layer", "layout"), _CASES)
def test_it_lies_as_pytorchs(layer: str, layout: str) -> None:
    x = {**IMAGES, **OTHERS}[layout]().requires_grad_()
    dense, lean, settings = LAYERS[layer]
    if layer == "BatchNorm2d":
        settings = {"num_features": x.shape[1]}
    theirs, ours = dense(**settings)(x), lean(**settings)(x)
    torch.testing.assert_close(ours, theirs)
    # Poolings hand on a layout that sizes of 1 leave open.
    strides = Tensor.stride if "Pool" in layer else _order
    assert strides(ours) == strides(theirs)
    for grad in _gradients(theirs):
        (expected,) = torch.autograd.grad(theirs, x, grad, retain_graph=True)
        (got,) = torch.autograd.grad(ours, x, grad, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert strides(got) == strides(expected)


@pytest.mark.parametrize("layout", [name for name in (*IMAGES, *OTHERS) if "expanded" not in name])
def test_relu_in_place_leaves_its_input_where_it_lies(layout: str) -> None:
    x = {**IMAGES, **OTHERS}[layout]()
    length = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    results = []
    for relu in (nn.ReLU(inplace=True), SWATReLU(inplace=True)):
        leaf = x.as_strided((length,), (1,)).clone().requires_grad_()
        memory = leaf * 1
        output = relu(memory.as_strided(x.shape, x.stride(), 0))
        assert output.stride() == x.stride()
        grads = [torch.autograd.grad(output, leaf, grad, retain_graph=True)[0] for grad in _gradients(output)]
        results.append([output, memory, *grads])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)
