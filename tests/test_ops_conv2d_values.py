"""Convolution of values that are not ordinary numbers: NaN, infinity, denormals, ties, nothing."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_identical
from torch import Tensor

from swat_ext import functional, reference


def _small(generator: torch.Generator) -> list[Tensor]:
    sizes = ((2, 4, 6, 5), (6, 4, 3, 2), (6,))
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]


def _touched(marked: Tensor, other: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Where a result sums at least one product of a marked element and an element of ``other`` that is not zero."""
    return operation(marked.to(torch.float64), (other != 0).to(torch.float64)) > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channels", [3, 16, 40])
def test_nonfinite_input_shows_in_the_output(bad: float, channels: int, isa: str, generator: torch.Generator) -> None:
    input = torch.randn(17, channels, 6, 7, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    for position in ((0, 0, 0, 0), (16, channels - 1, 5, 6), (8, channels // 2, 3, 3)):
        damaged = input.clone()
        damaged[position] = bad
        kept = reference.top(weight, 0.8)
        output = functional.conv2d(damaged, weight, padding=1, weight_threshold=0.8, activation_threshold=0.8)
        must = _touched(damaged == bad if bad == bad else damaged.isnan(), kept, lambda x, w: F.conv2d(x, w, padding=1))
        assert must.any()
        assert not output[must].isfinite().any(), "a NaN or an infinity was lost"
        # A wrong value may not spread beyond the window of the bad one either.
        window = F.conv2d((damaged != input).float(), torch.ones_like(weight), padding=1) > 0
        assert output[~window].isfinite().all(), "NaN outside of the window"
        assert_close(output[~window], F.conv2d(input.double(), kept.double(), padding=1)[~window], "the rest")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_weight_shows_in_output_and_input_gradient(bad: float, isa: str, generator: torch.Generator) -> None:
    input = torch.rand(9, 20, 8, 8, generator=generator).add(0.1).requires_grad_()
    weight = torch.randn(24, 20, 3, 3, generator=generator)
    weight[5, 7, 1, 1] = bad
    # The threshold is above all finite weights: only the bad one is kept.
    output = functional.conv2d(input, weight, padding=1, weight_threshold=1e6, activation_threshold=0.5)
    output.sum().backward()
    assert not output[:, 5].isfinite().any()
    assert not output[:, :5].any()
    assert not input.grad[:, 7].isfinite().any()
    assert not input.grad[:, 8:].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_activation_shows_in_the_weight_gradient(bad: float, isa: str, generator: torch.Generator) -> None:
    input = torch.rand(9, 20, 8, 8, generator=generator)
    input[3, 7, 4, 4] = bad
    weight = torch.randn(24, 20, 3, 3, generator=generator, requires_grad=True)
    functional.conv2d(input, weight, padding=1, weight_threshold=1.0, activation_threshold=1e6).sum().backward()
    assert not weight.grad[:, 7].isfinite().any()
    assert not weight.grad[:, :7].any()


def test_nan_gradient_passes_through(isa: str, generator: torch.Generator) -> None:
    input, weight, bias = _small(generator)
    output = functional.conv2d(input, weight, bias, padding=1, weight_threshold=0.1, activation_threshold=0.1)
    grad_output = torch.ones_like(output)
    grad_output[1, 2, 3, 3] = torch.nan
    output.backward(grad_output)
    assert weight.grad[2].isnan().any()
    assert not weight.grad[3].isnan().any()
    assert bias.grad.isnan().tolist() == [False, False, True, False, False, False]
    assert input.grad[1].isnan().any()
    assert not input.grad[0].isnan().any()


def test_denormals_are_multiplied(isa: str) -> None:
    tiny = torch.finfo(torch.float32).smallest_normal / 64
    input = torch.full((16, 8, 4, 4), tiny, requires_grad=True)
    weight = torch.full((32, 8, 1, 1), 1024.0, requires_grad=True)
    output = functional.conv2d(input, weight, weight_threshold=0, activation_threshold=0)
    assert (output == 8 * 1024 * tiny).all()
    output.sum().backward()
    assert (weight.grad == 16 * 16 * tiny).all()


def test_all_equal_values(isa: str) -> None:
    """One value for every weight and activation: at any selection that keeps one, ties keep them all."""
    input = torch.full((4, 6, 5, 5), -0.5, requires_grad=True)
    weight = torch.full((6, 6, 3, 3), 0.25, requires_grad=True)
    thresholds = functional.kth_magnitude(weight, 1), functional.kth_magnitude(input, 1)
    output = functional.conv2d(input, weight, weight_threshold=thresholds[0], activation_threshold=thresholds[1])
    output.sum().backward()
    assert (output == -0.125 * 54).all()
    assert (weight.grad == -0.5 * 36).all()
    assert (input.grad[:, :, 2, 2] == 0.25 * 54).all()


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_everything_dropped(backend: str, isa: str, generator: torch.Generator) -> None:
    input, weight, bias = _small(generator)
    packed = functional.compress(weight, 1e9), functional.compress(input, 1e9)
    output = functional.conv2d_packed(input, weight, bias, *packed, padding=1, backend=backend)
    assert_identical(output, bias[None, :, None, None].expand_as(output), "bias alone")
    output.sum().backward()
    assert not input.grad.any()
    assert not weight.grad.any()
