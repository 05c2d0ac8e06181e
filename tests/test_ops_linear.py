"""Linear layers, which are convolutions of rows, against a float64 reference."""

import random

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_identical, in_double
from geometries import LAYOUTS, in_layout, random_tensor, random_threshold
from torch import Tensor

from swat_ext import functional, reference

ops = torch.ops.swat_ext

_WIDTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 70, 130)
_LEADING = ((), (1,), (2,), (16,), (17,), (35,), (100,), (0,), (3, 5), (2, 0, 3), (1, 1), (4, 3, 2, 2))


def _check(rng: random.Random, dtype: torch.dtype) -> None:
    leading = rng.choice(_LEADING)
    in_features, out_features = rng.choice(_WIDTHS), rng.choice(_WIDTHS)
    layouts = [rng.choice(LAYOUTS) for _ in range(3)]
    sizes = ((*leading, in_features), (out_features, in_features), (*leading, out_features))
    # One long sum may cancel by chance, which would look like an error.
    positive = min(in_features, out_features) <= 2 or not leading
    input, weight, grad_output = (
        in_layout(random_tensor(size, dtype, rng, positive=positive), layout, rng)
        for size, layout in zip(sizes, layouts, strict=True)
    )
    biases = [random_tensor((out_features,), dtype, rng, positive=positive)] if rng.random() < 0.5 else []
    tensors = [tensor.detach().requires_grad_() for tensor in (input, weight, *biases)]
    doubles = in_double(*tensors)
    thresholds = {
        "weight_threshold": random_threshold(weight, rng),
        "activation_threshold": random_threshold(input, rng),
    }
    copies = [tensor.detach().clone() for tensor in (input, weight, grad_output)]

    output = functional.linear(*tensors, **thresholds)
    expected = reference.linear(*doubles, **thresholds)
    described = f"{sizes}, {dtype}, layouts {layouts}, {thresholds}, bias {bool(biases)}"
    assert_close(output.detach(), expected.detach(), f"output of {described}")
    grads = torch.autograd.grad(output, tensors, grad_output)
    wanted = torch.autograd.grad(expected, doubles, grad_output.double())
    for name, got, want in zip(("input", "weight", "bias"), grads, wanted, strict=False):
        assert_close(got, want, f"{name} gradient of {described}")
    for tensor, copy in zip((input, weight, grad_output), copies, strict=True):
        assert_identical(tensor, copy, f"an argument after the calls of {described}")


@pytest.mark.parametrize("seed", range(6))
def test_random_linear_layers(seed: int, isa: str) -> None:
    for number in range(40):
        _check(random.Random(f"linear {seed} {number}"), torch.float64 if number % 4 == 0 else torch.float32)


def _operators(rng: random.Random, dtype: torch.dtype) -> None:
    """The operators themselves: results of their own, contiguous, from any strides; values may be padded."""
    leading, (inputs, outputs) = rng.choice(_LEADING), (rng.choice(_WIDTHS), rng.choice(_WIDTHS))
    sizes = ((*leading, inputs), (outputs, inputs), (*leading, outputs))
    input, weight, grad_output = (
        in_layout(random_tensor(size, dtype, rng, positive=True), rng.choice(LAYOUTS), rng) for size in sizes
    )
    bias = random_tensor((outputs,), dtype, rng, positive=True) if rng.random() < 0.5 else None
    threshold = [torch.tensor(random_threshold(tensor, rng), dtype=dtype) for tensor in (weight, input)]
    rows = input.reshape(-1, inputs)
    packed_weight, packed_input = ops.compress(weight, threshold[0]), ops.compress(rows.t(), threshold[1])
    if rng.random() < 0.5:
        packed_weight, packed_input = (
            (torch.nn.functional.pad(values, (0, 5), value=torch.nan), mask)
            for values, mask in (packed_weight, packed_input)
        )
    got = {
        "output": ops.linear(input, *packed_weight, weight.shape, bias),
        "input gradient": ops.linear_input_grad(grad_output, *packed_weight, weight.shape),
        "weight gradient": ops.linear_weight_grad(grad_output, *packed_input, weight.shape),
    }
    kept_weight, kept_rows = reference.top(weight, threshold[0]).double(), reference.top(rows, threshold[1]).double()
    expected = {
        "output": F.linear(input.double(), kept_weight, None if bias is None else bias.double()),
        "input gradient": grad_output.double() @ kept_weight,
        "weight gradient": grad_output.double().reshape(-1, outputs).t() @ kept_rows,
    }
    for name, result in got.items():
        assert_close(result, expected[name], f"{name} of {sizes}, {dtype}, bias {bias is not None}")
        assert result.is_contiguous()
        assert result._base is None


@pytest.mark.parametrize("seed", range(4))
def test_random_linear_operators(seed: int, isa: str) -> None:
    for number in range(40):
        _operators(random.Random(f"operators {seed} {number}"), torch.float64 if number % 4 == 0 else torch.float32)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 3, 2), (4, 0, 2), (4, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_empty_operators(rows: int, inputs: int, outputs: int, with_bias: bool) -> None:
    input, weight, grad_output = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    bias = torch.randn(outputs) if with_bias else None
    packed_weight, packed_input = (ops.compress(tensor, torch.tensor(0.0)) for tensor in (weight, input.t()))
    output = ops.linear(input, *packed_weight, weight.shape, bias)
    assert_identical(output, F.linear(input, weight, bias), "output")
    assert_identical(ops.linear_input_grad(grad_output, *packed_weight, weight.shape), grad_output @ weight, "input")
    weight_grad = ops.linear_weight_grad(grad_output, *packed_input, weight.shape)
    assert_identical(weight_grad, grad_output.t() @ input, "weight gradient")


def _small(generator: torch.Generator) -> list[Tensor]:
    sizes = ((2, 3, 5), (4, 5), (4,))
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def test_gradcheck_at_threshold_zero(isa: str, generator: torch.Generator) -> None:
    def function(*tensors: Tensor) -> Tensor:
        return functional.linear(*tensors, weight_threshold=0, activation_threshold=0)

    assert torch.autograd.gradcheck(function, _small(generator))


def test_gradcheck_at_positive_thresholds(isa: str, generator: torch.Generator) -> None:
    input, weight, bias = _small(generator)

    def function(input: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(input, weight.detach(), bias, weight_threshold=0.8, activation_threshold=0.8)

    assert torch.autograd.gradcheck(function, (input, bias))


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_second_derivative_is_refused(backend: str, generator: torch.Generator) -> None:
    input, weight, bias = _small(generator)
    packed = functional.compress(weight, 0.5), functional.compress(functional.linear_input_view(input), 0.5)
    output = functional.linear_packed(input, weight, bias, *packed, backend=backend)
    (gradient,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_thresholds_select_elements_of_the_input(isa: str) -> None:
    """By hand: the dropped weight passes no signal, yet receives a gradient from the activation that is kept."""
    input = torch.tensor([[3.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[0.5, 2.0]], requires_grad=True)
    output = functional.linear(input, weight, weight_threshold=1.0, activation_threshold=2.0)
    assert output.tolist() == [[2.0]]
    output.backward()
    assert input.grad.tolist() == [[0.0, 2.0]]
    assert weight.grad.tolist() == [[3.0, 0.0]]


_EMPTY = [((0, 3), (2, 3)), ((2, 0, 3), (5, 3)), ((4, 0), (2, 0)), ((4, 3), (0, 3))]


@pytest.mark.parametrize("sizes", _EMPTY)
def test_empty_sizes_as_in_pytorch(sizes: tuple[tuple[int, ...], ...], isa: str, generator: torch.Generator) -> None:
    input, weight = (torch.randn(size, generator=generator, requires_grad=True) for size in sizes)
    expected = F.linear(input, weight)
    output = functional.linear(input, weight, weight_threshold=0, activation_threshold=0)
    torch.testing.assert_close(output, expected)
    grads, wanted = (torch.autograd.grad(y.sum(), (input, weight)) for y in (output, expected))
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [100_003, 70, 3])
def test_bias_of_one_output(rows: int, generator: torch.Generator, restore_threads: None) -> None:
    input, weight = torch.randn(rows, 3, generator=generator), torch.randn(1, 3, generator=generator)
    bias = torch.zeros(1, requires_grad=True)
    grad_output = torch.randn(rows, 1, generator=generator)
    first = None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        output = functional.linear(input, weight, bias, weight_threshold=0, activation_threshold=0)
        grad = torch.autograd.grad(output, bias, grad_output)[0]
        torch.testing.assert_close(grad.double(), grad_output.double().sum(0), rtol=1e-5, atol=1e-4)
        first = grad if first is None else first
        assert_identical(grad, first, f"{threads} threads")


def test_threads_do_not_matter(isa: str, generator: torch.Generator, restore_threads: None) -> None:
    tensors = [torch.randn(size, generator=generator).requires_grad_() for size in ((203, 130), (75, 130), (75,))]
    first = None
    for threads in (1, 2, 3, 4, 1):
        torch.set_num_threads(threads)
        output = functional.linear(*tensors, weight_threshold=0.9, activation_threshold=0.9)
        results = [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]
        first = first or results
        for got, want in zip(results, first, strict=True):
            assert_identical(got, want, f"{threads} threads")
