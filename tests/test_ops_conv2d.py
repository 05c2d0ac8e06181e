"""swat_ext::conv2d and its gradients against a float64 reference, on over a thousand random convolutions a set."""

import random

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_identical, in_double
from geometries import LAYOUTS, Geometry, in_layout, random_geometry, random_tensor, random_threshold
from torch import Tensor

from swat_ext import functional, reference
from swat_ext.ops.layout import memory_format

_BATCHES_OF_TESTS = 26
_GEOMETRIES_EACH = 40  # 1,040 in all

ops = torch.ops.swat_ext


def _reference(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor,
    thresholds: tuple[float, float],
) -> dict[str, Tensor]:
    """Output and gradients in float64. Padding is done outside, since PyTorch's numbers are the same at both ends."""
    inputs = in_double(*(tensor for tensor in (input, weight, bias) if tensor is not None))
    top, bottom, left, right = geometry.padding
    stride, _, dilation, groups = geometry.arguments
    output = reference.conv2d(
        F.pad(inputs[0], (left, right, top, bottom)),
        *inputs[1:],
        stride=stride,
        dilation=dilation,
        groups=groups,
        weight_threshold=thresholds[0],
        activation_threshold=thresholds[1],
    )
    gradients = torch.autograd.grad(output, inputs, grad_output.to(torch.float64))
    names = ("input gradient", "weight gradient", "bias gradient")
    return {"output": output.detach(), **dict(zip(names, gradients, strict=False))}


def _operators(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor,
    thresholds: tuple[float, float],
    *,
    channels_last: bool,
    weight_channels_last: bool = False,
) -> dict[str, Tensor]:
    """The same by the operators themselves, without autograd."""
    packed_weight = functional.compress(weight, thresholds[0])
    packed_input = functional.compress(input, thresholds[1])
    results = {
        "output": ops.conv2d(input, *packed_weight[:2], weight.shape, bias, *geometry.arguments, channels_last),
        "input gradient": ops.conv2d_input_grad(
            grad_output, *packed_weight[:2], weight.shape, input.shape, *geometry.arguments, channels_last
        ),
        "weight gradient": ops.conv2d_weight_grad(
            grad_output, *packed_input[:2], input.shape, weight.shape, *geometry.arguments, weight_channels_last
        ),
    }
    formats = dict.fromkeys(("output", "input gradient"), memory_format(channels_last))
    formats["weight gradient"] = memory_format(weight_channels_last)
    for name, expected in formats.items():
        assert results[name].is_contiguous(memory_format=expected), f"{name}: strides {results[name].stride()}"
    return results


def _by_autograd(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor,
    thresholds: tuple[float, float],
    padding: str | tuple[int, int],
) -> dict[str, Tensor]:
    """The same by swat_ext.functional."""
    stride, _, dilation, groups = geometry.arguments
    inputs = [tensor.detach().requires_grad_() for tensor in (input, weight, bias) if tensor is not None]
    output = functional.conv2d(
        *inputs,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        weight_threshold=torch.tensor(thresholds[0], dtype=torch.float64),
        activation_threshold=thresholds[1],
    )
    gradients = torch.autograd.grad(output, inputs, grad_output)
    names = ("input gradient", "weight gradient", "bias gradient")
    return {"output": output.detach(), **dict(zip(names, gradients, strict=False))}


def _functional_padding(geometry: Geometry, rng: random.Random) -> str | tuple[int, int] | None:
    """How :func:`functional.conv2d` would be asked for this padding; None if it cannot be."""
    (kh, kw), (dh, dw) = geometry.kernel, geometry.dilation
    top, bottom, left, right = geometry.padding
    rows, columns = dh * (kh - 1), dw * (kw - 1)
    same = (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)
    if geometry.stride == (1, 1) and geometry.padding == same and (same[0] != same[1] or rng.random() < 0.7):
        return "same"
    if (top, left) != (bottom, right):
        return None
    return "valid" if geometry.padding == (0, 0, 0, 0) and rng.random() < 0.5 else (top, left)


def _check(geometry: Geometry, rng: random.Random, dtype: torch.dtype, *, autograd: bool = False) -> None:
    """One random convolution on this geometry, by the operators and, where asked, by functional.conv2d."""
    layouts = [rng.choice(LAYOUTS) for _ in range(3)]
    positive = geometry.has_lone_sums
    sizes = (geometry.input_size, geometry.weight_size, geometry.output_size)
    input, weight, grad_output = (
        in_layout(random_tensor(size, dtype, rng, positive=positive), layout, rng)
        for size, layout in zip(sizes, layouts, strict=True)
    )
    bias = random_tensor(sizes[1][:1], dtype, rng, positive=positive) if rng.random() < 0.5 else None
    thresholds = (random_threshold(weight, rng), random_threshold(input, rng))
    tensors = (input, weight, bias, grad_output, thresholds)
    versions = [tensor._version for tensor in (input, weight, grad_output)]
    copies = [tensor.clone() for tensor in (input, weight, grad_output)]

    expected = _reference(geometry, *tensors)
    formats = {name: rng.random() < 0.5 for name in ("channels_last", "weight_channels_last")}
    got = _operators(geometry, *tensors, **formats)
    padding = _functional_padding(geometry, rng) if autograd else None
    through_autograd = {} if padding is None else _by_autograd(geometry, *tensors, padding)
    described = f"{geometry}, {dtype}, layouts {layouts}, {formats}, thresholds {thresholds}, bias {bias is not None}"
    for name, result in got.items():
        assert_close(result, expected[name], f"{name} of {described}")
    for name, result in through_autograd.items():
        assert_close(result, expected[name], f"{name} by autograd, padding {padding!r}, of {described}")
    for tensor, version, copy in zip((input, weight, grad_output), versions, copies, strict=True):
        assert tensor._version == version, f"an argument was written to: {described}"
        assert_identical(tensor, copy, f"an argument after the calls of {described}")


@pytest.mark.parametrize("seed", range(_BATCHES_OF_TESTS))
def test_random_convolutions(seed: int, isa: str) -> None:
    for number in range(_GEOMETRIES_EACH):
        rng = random.Random(f"{seed} {number}")
        _check(random_geometry(rng), rng, torch.float64 if number % 4 == 0 else torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_random_convolutions_by_autograd(seed: int, isa: str) -> None:
    for number in range(_GEOMETRIES_EACH):
        rng = random.Random(f"autograd {seed} {number}")
        _check(random_geometry(rng), rng, torch.float64 if number % 4 == 0 else torch.float32, autograd=True)


# Layers of real networks, whose sizes pick the fast paths: full vectors, several tiles of channels, batch blocks.
_REAL = {
    "3x3, 64 channels": Geometry(32, 1, 64, 64, 8, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "3x3, wide and small": Geometry(16, 1, 160, 144, 4, 4, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "3x3, stride 2": Geometry(17, 1, 64, 128, 16, 16, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "1x1, stride 2": Geometry(33, 1, 64, 128, 8, 8, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    "1x1, bottleneck": Geometry(4, 1, 256, 64, 14, 14, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "7x7 stem": Geometry(5, 1, 3, 64, 40, 40, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    "depthwise": Geometry(16, 96, 1, 1, 14, 14, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "depthwise, stride 2": Geometry(5, 37, 1, 1, 15, 17, (5, 3), (2, 2), (2, 1, 0, 1), (1, 1)),
    "depthwise, dilated": Geometry(1, 19, 1, 1, 23, 20, (3, 4), (1, 2), (3, 0, 5, 1), (3, 2)),
    "depthwise, tiles of rows": Geometry(2, 24, 1, 1, 70, 33, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "depthwise, tiles of columns": Geometry(1, 9, 1, 1, 4, 1500, (2, 7), (1, 1), (0, 1, 3, 3), (1, 1)),
    "depthwise, far taps": Geometry(1, 16, 1, 1, 70, 66, (2, 2), (2, 1), (1, 0, 0, 3), (66, 63)),
    "multiplier 2": Geometry(7, 21, 1, 2, 11, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "multiplier 3": Geometry(3, 11, 1, 3, 12, 14, (3, 3), (2, 1), (0, 2, 1, 0), (1, 1)),
    "one output of a group": Geometry(4, 9, 3, 1, 10, 13, (3, 2), (1, 1), (1, 0, 1, 1), (1, 1)),
    "ResNeXt": Geometry(8, 32, 4, 4, 14, 14, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "patch embedding": Geometry(3, 1, 3, 64, 48, 32, (16, 16), (16, 16), (0, 0, 0, 0), (1, 1)),
    "stride 20": Geometry(2, 2, 3, 9, 45, 61, (5, 23), (20, 20), (1, 2, 3, 0), (2, 1)),
    "1x1, padded behind": Geometry(7, 2, 2, 27, 18, 12, (1, 1), (1, 1), (0, 2, 0, 4), (1, 1)),
    "dilated": Geometry(2, 1, 64, 32, 20, 20, (3, 3), (1, 1), (4, 4, 4, 4), (4, 4)),
    "linear": Geometry(64, 1, 512, 100, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "one wide row": Geometry(1, 1, 17, 31, 1, 3000, (1, 7), (1, 1), (0, 0, 3, 3), (1, 1)),
    "one image": Geometry(1, 1, 32, 48, 40, 36, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
}


@pytest.mark.parametrize("name", _REAL)
def test_layers_of_real_networks(name: str, isa: str) -> None:
    for number in range(2):
        rng = random.Random(f"{name} {number}")
        _check(_REAL[name], rng, torch.float32)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    batch=st.integers(0, 5),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    space=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(*[st.integers(0, 6)] * 4),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
def test_property_small_convolutions(
    batch: int,
    channels: tuple[int, int, int],
    space: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    seed: int,
) -> None:
    """The same check where a failure shrinks to the smallest convolution that shows it."""
    geometry = Geometry(batch, *channels, *space, kernel, stride, padding, dilation)
    hypothesis.assume(geometry.fits())
    _check(geometry, random.Random(seed), torch.float64)


_FOR_THREADS = {
    **{
        name: _REAL[name]
        for name in (
            "3x3, 64 channels",
            "3x3, wide and small",
            "1x1, stride 2",
            "patch embedding",
            "depthwise",
            "depthwise, stride 2",
            "depthwise, tiles of rows",
            "multiplier 3",
            "linear",
        )
    },
    "one image": Geometry(1, 1, 8, 16, 33, 31, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "odd": Geometry(35, 3, 5, 7, 11, 13, (2, 5), (2, 1), (3, 0, 1, 2), (1, 2)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "sliced"])
def test_bias_of_one_output(layout: str, restore_threads: None) -> None:
    rng = random.Random(layout)
    input, weight = torch.randn(5, 2, 120, 130), torch.randn(1, 2, 1, 1)
    bias = torch.zeros(1, requires_grad=True)
    grad_output = in_layout(torch.randn(5, 1, 120, 130), layout, rng)
    first = None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        output = functional.conv2d(input, weight, bias, weight_threshold=0, activation_threshold=0)
        grad = torch.autograd.grad(output, bias, grad_output)[0]
        torch.testing.assert_close(grad.double(), grad_output.double().sum().view(1), rtol=1e-5, atol=1e-2)
        first = grad if first is None else first
        assert_identical(grad, first, f"{layout}, {threads} threads")


@pytest.mark.parametrize("name", _FOR_THREADS)
def test_threads_do_not_matter(name: str, isa: str, restore_threads: None) -> None:
    geometry, rng = _FOR_THREADS[name], random.Random(name)
    sizes = (geometry.input_size, geometry.weight_size, geometry.weight_size[:1], geometry.output_size)
    tensors = [random_tensor(size, torch.float32, rng) for size in sizes]
    for channels_last in (False, True):
        first = None
        for threads in (1, 2, 3, 4, 1):
            torch.set_num_threads(threads)
            formats = {"channels_last": channels_last, "weight_channels_last": channels_last}
            results = _operators(geometry, *tensors, (0.9, 1.2), **formats)
            first = first or results
            for what, result in results.items():
                assert_identical(result, first[what], f"{what} with {threads} threads, channels_last {channels_last}")
