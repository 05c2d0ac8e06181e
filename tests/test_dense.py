"""The dense kernels' own way: activations unpacked in parts, and only what a gradient needs saved."""

import pytest
import torch
from checks import assert_close
from torch import nn

from swat_ext import SWATConv2d, SWATLinear, functional, reference
from swat_ext.ops import dense


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small tiles; collects how many bytes each of them unpacks."""
    seen: list[int] = []
    real = dense._unpacked

    def counted(*arguments: object) -> torch.Tensor:
        part = real(*arguments)  # type: ignore[arg-type]
        seen.append(part.nbytes)
        return part

    monkeypatch.setattr(dense, "_TILE_BYTES", 4096)
    monkeypatch.setattr(dense, "_unpacked", counted)
    return seen


def _train_in_tiles(layer: nn.Module, x: torch.Tensor, tiles: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward and backward, whose tiles are small and cover ``x`` once; the gradient of the output, and top(x)."""
    output = layer(x)
    grad = torch.randn_like(output)
    output.backward(grad)
    assert max(tiles) <= 4096
    assert sum(tiles) == x.nbytes
    threshold = functional.kth_magnitude(x, functional.keep_count(x.numel(), 0.7))
    return grad, reference.top(x.double(), threshold.double())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "groups"), [(3, 1, 1, 1), (1, 1, 0, 1), (3, 2, 2, 4)])
def test_the_weight_gradient_unpacks_a_few_samples_at_a_time(
    tiles: list[int], channels_last: bool, kernel: int, stride: int, padding: int, groups: int
) -> None:
    torch.manual_seed(0)
    layer = SWATConv2d(
        8, 12, kernel, stride, padding, groups=groups, sparsity=0.5, activation_sparsity=0.7, backend="dense"
    )
    x = torch.randn(13, 8, 7, 9)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    grad, top = _train_in_tiles(layer, x, tiles)
    weight = layer.weight.detach().double().requires_grad_()
    nn.functional.conv2d(top, weight, None, stride, padding, 1, groups).backward(grad.double())
    assert layer.weight.grad is not None
    assert weight.grad is not None
    assert_close(layer.weight.grad, weight.grad, "weight gradient in tiles")


def test_a_linear_layer_unpacks_a_few_features_at_a_time(tiles: list[int]) -> None:
    torch.manual_seed(0)
    layer = SWATLinear(37, 5, sparsity=0.5, activation_sparsity=0.7, backend="dense")
    x = torch.randn(3, 50, 37)
    grad, top = _train_in_tiles(layer, x, tiles)
    assert layer.weight.grad is not None
    assert_close(layer.weight.grad, grad.double().flatten(0, 1).T @ top.flatten(0, 1), "weight gradient in tiles")


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_without_a_gradient_of_the_input_the_weight_may_change(backend: str) -> None:
    """As with nn.Linear: only the gradient of the input needs the weight."""
    for layer, size in (
        (SWATLinear(4, 3, sparsity=0.5, backend=backend), (2, 4)),
        (SWATConv2d(4, 3, 1, sparsity=0.5, backend=backend), (2, 4, 3, 3)),
    ):
        output = layer(torch.randn(size))
        with torch.no_grad():
            layer.weight.mul_(2)
        output.sum().backward()
        output = layer(torch.randn(size, requires_grad=True))
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_without_a_gradient_of_the_input_nothing_of_the_weight_is_saved() -> None:
    saved: list[torch.Tensor] = []
    layer = SWATConv2d(4, 3, 1, sparsity=0.5)
    layer(torch.randn(2, 4, 3, 3))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 4, 3, 3))
    assert len(saved) == 2
