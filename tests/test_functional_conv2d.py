"""swat_ext.functional.conv2d as a differentiable function: its derivative, its layouts, sizes that are nothing."""

import random

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, in_double
from geometries import LAYOUTS, in_layout, random_tensor
from torch import Tensor

from swat_ext import functional, reference

_SMALL: list[dict[str, object]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": (1, 2)},
    {"groups": 2, "padding": (0, 2)},
    {"stride": (1, 3), "padding": 2, "dilation": 2, "groups": 2},
]


def _small(groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    input = torch.randn(2, 4, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // groups, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    return input, weight, torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("keywords", _SMALL)
def test_gradcheck_at_threshold_zero(keywords: dict[str, object], isa: str, generator: torch.Generator) -> None:
    def function(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv2d(input, weight, bias, **keywords, weight_threshold=0, activation_threshold=0)

    assert torch.autograd.gradcheck(function, _small(keywords.get("groups", 1), generator))


@pytest.mark.parametrize("keywords", _SMALL)
def test_gradcheck_at_positive_thresholds(keywords: dict[str, object], isa: str, generator: torch.Generator) -> None:
    """In the input and the bias SWAT's gradient is the exact derivative of its forward."""
    input, weight, bias = _small(keywords.get("groups", 1), generator)

    def function(input: Tensor, bias: Tensor) -> Tensor:
        return functional.conv2d(
            input, weight.detach(), bias, **keywords, weight_threshold=0.7, activation_threshold=0.9
        )

    assert torch.autograd.gradcheck(function, (input, bias))


def test_gradient_reaches_dropped_weights(isa: str, generator: torch.Generator) -> None:
    weight = torch.randn(8, 8, 3, 3, generator=generator, requires_grad=True)
    input = torch.rand(4, 8, 6, 6, generator=generator) + 0.1
    functional.conv2d(input, weight, weight_threshold=100.0, activation_threshold=0.0).sum().backward()
    assert weight.grad is not None
    assert weight.grad.min() > 1


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_second_derivative_is_refused(backend: str, isa: str, generator: torch.Generator) -> None:
    input, weight, bias = _small(1, generator)
    packed = functional.compress(weight, 0), functional.compress(input, 0)
    output = functional.conv2d_packed(input, weight, bias, *packed, backend=backend)
    for variable in (input, weight):
        (gradient,) = torch.autograd.grad(output.square().sum(), variable, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.square().sum().backward()


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_what_is_asked_for(wanted: tuple[bool, bool, bool], isa: str, generator: torch.Generator) -> None:
    tensors = [t.detach().requires_grad_(want) for t, want in zip(_small(1, generator), wanted, strict=True)]
    doubles = [t.detach().clone().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    thresholds = {"weight_threshold": 0.6, "activation_threshold": 0.6}
    functional.conv2d(*tensors, padding=1, **thresholds).square().sum().backward()
    reference.conv2d(*doubles, padding=1, **thresholds).square().sum().backward()
    for tensor, double, want in zip(tensors, doubles, wanted, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            assert_close(tensor.grad, double.grad, "gradient")


def test_backends_have_the_same_gradients(isa: str, generator: torch.Generator) -> None:
    results = []
    input = torch.randn(9, 12, 7, 6, generator=generator)
    weight = torch.randn(10, 6, 3, 2, generator=generator)
    bias = torch.randn(10, generator=generator)
    for backend in ("sparse", "dense"):
        tensors = [tensor.clone().requires_grad_() for tensor in (input, weight, bias)]
        output = functional.conv2d_packed(
            *tensors,
            functional.compress(weight, 0.8),
            functional.compress(input, 1.1),
            stride=(2, 1),
            padding=(1, 2),
            groups=2,
            backend=backend,
        )
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    for sparse, dense in zip(*results, strict=True):
        assert_close(sparse, dense, "sparse against dense backend")
        assert sparse.stride() == dense.stride()


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_empty_batch(backend: str, isa: str, generator: torch.Generator) -> None:
    input = torch.randn(0, 6, 9, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, generator=generator, requires_grad=True)
    bias = torch.randn(4, generator=generator, requires_grad=True)
    packed = functional.compress(weight, 0.5), functional.compress(input, 0.5)
    output = functional.conv2d_packed(input, weight, bias, *packed, stride=2, groups=2, backend=backend)
    assert output.shape == (0, 4, 4, 3)
    output.sum().backward()
    assert input.grad.shape == input.shape
    assert weight.grad.shape == weight.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_no_input_channels(isa: str, generator: torch.Generator) -> None:
    """A sum of nothing: the bias alone. (PyTorch's own convolution returns no channels here.)"""
    input, weight = torch.randn(2, 0, 5, 4, requires_grad=True), torch.randn(3, 0, 3, 3, requires_grad=True)
    bias = torch.randn(3, generator=generator, requires_grad=True)
    output = functional.conv2d(input, weight, bias, weight_threshold=0, activation_threshold=0)
    torch.testing.assert_close(output, bias[None, :, None, None].expand(2, 3, 3, 2), rtol=0, atol=0)
    output.sum().backward()
    assert input.grad.shape == input.shape
    assert weight.grad.shape == weight.shape
    assert bias.grad.tolist() == [12.0] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unbatched(layout: str, isa: str) -> None:
    rng = random.Random(layout)
    tensors = [random_tensor(size, torch.float32, rng) for size in ((6, 9, 8), (8, 3, 3, 2), (8,))]
    tensors[0] = in_layout(tensors[0], layout, rng)
    variables = [tensor.detach().requires_grad_() for tensor in tensors]
    doubles = in_double(*tensors)
    keywords = {"stride": 2, "padding": 1, "groups": 2, "weight_threshold": 0.5, "activation_threshold": 0.8}
    output, expected = functional.conv2d(*variables, **keywords), reference.conv2d(*doubles, **keywords)
    assert_close(output, expected, "unbatched output")
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, variables, grad_output)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, doubles, grad_output.double()), strict=True):
        assert_close(got, wanted, "unbatched gradient")


def test_output_layout_is_that_of_pytorch(isa: str, generator: torch.Generator) -> None:
    input = torch.randn(4, 16, 6, 6, generator=generator)
    weight = torch.randn(8, 16, 3, 3, generator=generator)
    for input_format in (torch.contiguous_format, torch.channels_last):
        for weight_format in (torch.contiguous_format, torch.channels_last):
            x, w = input.contiguous(memory_format=input_format), weight.contiguous(memory_format=weight_format)
            x.requires_grad_()
            output = functional.conv2d(x, w, weight_threshold=0.5, activation_threshold=0.5)
            dense = F.conv2d(x, w)
            assert output.stride() == dense.stride()
            (gradient,) = torch.autograd.grad(output.sum(), x)
            (dense_gradient,) = torch.autograd.grad(dense.sum(), x)
            assert gradient.stride() == dense_gradient.stride()


def test_device(device: torch.device) -> None:
    rng = random.Random(0)
    tensors = [random_tensor(size, torch.float32, rng) for size in ((3, 8, 9, 9), (16, 8, 3, 3), (16,))]
    variables = [tensor.to(device).requires_grad_() for tensor in tensors]
    doubles = in_double(*tensors)
    keywords = {"padding": 1, "weight_threshold": 0.5, "activation_threshold": 0.8}
    output, expected = functional.conv2d(*variables, **keywords), reference.conv2d(*doubles, **keywords)
    assert_close(output.cpu(), expected, "output")
    grads, wanted = (torch.autograd.grad(y.square().sum(), v) for y, v in ((output, variables), (expected, doubles)))
    for got, want in zip(grads, wanted, strict=True):
        assert_close(got.cpu(), want, "gradient")
