"""swat_ext::batch_norm and its gradient: against float64, every layout, form and instruction set."""

import random

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from checks import assert_close, assert_identical
from geometries import LAYOUTS, in_layout
from torch import Tensor
from torch.nn import functional as F

FORMS = ("exact", "bf16", "int8")
SIZES = [(2, 1, 1, 1), (2, 3, 5, 7), (16, 64, 8, 8), (17, 33, 9, 5), (1, 70, 2, 1), (64, 2, 3, 3), (3, 1, 40, 1)]
SIZES += [(128, 64, 1, 1), (2, 257, 4, 4), (3, 8, 33, 31), (1, 5, 70, 71), (31, 17), (40, 3, 64, 65)]
EPS = 1e-5


def _leaves(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Input, weight, bias and the gradient of the output; deviations and means that differ by channel."""
    per_channel = (-1, *[1] * (len(size) - 2))
    spread, middle = torch.rand(2, size[1], generator=generator, dtype=torch.float64)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    x = x * (spread + 0.1).view(per_channel) + (middle * 4 - 2).view(per_channel)
    weight, bias = torch.randn(2, size[1], generator=generator, dtype=torch.float64)
    grad = torch.randn(size, generator=generator, dtype=torch.float64)
    return tuple(tensor.to(dtype) for tensor in (x, weight, bias, grad))


def _ours(x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor, saved: str = "exact") -> list[Tensor]:
    """Output, mean, invstd, variance, the gradients of input, weight and bias, codes and scale."""
    found = torch.ops.swat_ext.batch_norm(x, weight, bias, EPS, saved, torch.tensor(7))
    output, mean, invstd, variance, codes, scale = found
    kept = (x, None) if saved == "exact" else (codes, scale if saved == "int8" else None)
    grads = torch.ops.swat_ext.batch_norm_backward(grad, *kept, mean, invstd, weight, saved)
    return [output, mean, invstd, variance, *grads, codes, scale]


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The first seven by PyTorch in float64."""
    x = x.detach().double().contiguous().requires_grad_()
    channels = x.shape[1]
    weight = (torch.ones(channels) if weight is None else weight).double().requires_grad_()
    bias = (torch.zeros(channels) if bias is None else bias).double().requires_grad_()
    output = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    output.backward(grad.double())
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean, variance = x.detach().mean(dims), x.detach().var(dims, unbiased=True)
    invstd = (x.detach().var(dims, unbiased=False) + EPS).rsqrt()
    return [output.detach(), mean, invstd, variance, x.grad, weight.grad, bias.grad]


def _normalised(x: Tensor) -> Tensor:
    """``x`` with mean 0 and deviation 1 in each channel, in float64."""
    return F.batch_norm(x.double().contiguous(), None, None, None, None, True, 0.0, EPS)


NAMES = ("output", "mean", "invstd", "variance", "grad_input", "grad_weight", "grad_bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS[:5])
def test_same_as_float64(layout: str, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    rng = random.Random(layout)
    for size in SIZES:
        x, weight, bias, grad = _leaves(size, dtype, generator)
        affine = rng.random() < 0.7
        if not affine:
            weight = bias = None
        x = in_layout(x, layout, rng)
        got = _ours(x, weight, bias, in_layout(grad, rng.choice(LAYOUTS[:5]), rng))
        for ours, reference, name in zip(got[:7], _reference(x, weight, bias, grad), NAMES, strict=True):
            if name == "grad_input" and x.numel() == 2 * size[1]:
                continue  # of two values a channel it is all cancellation
            assert_close(ours.to(dtype), reference, f"{name} of {layout} {size}")
        assert got[0].is_contiguous(memory_format=torch.channels_last) or layout != "channels_last" or x.dim() != 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_above_the_deviation(mean: float, layout: str, isa: str, generator: torch.Generator) -> None:
    x, weight, bias, grad = _leaves((16, 21, 9, 9), torch.float32, generator)
    x = in_layout(x + mean, layout, random.Random(0))
    for ours, reference, name in zip(
        _ours(x, weight, bias, grad)[:7], _reference(x, weight, bias, grad), NAMES, strict=True
    ):
        assert_close(ours.float(), reference, name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_outlier_costs_no_accuracy(layout: str, isa: str, generator: torch.Generator) -> None:
    x, weight, bias, grad = _leaves((16, 21, 32, 32), torch.float32, generator)
    x[0, :, 0, 0] = 1e4  # where the shift is taken
    x[5, 3, 2, 2] = -1e5
    x = in_layout(x, layout, random.Random(0))
    for ours, reference, name in zip(
        _ours(x, weight, bias, grad)[:7], _reference(x, weight, bias, grad), NAMES, strict=True
    ):
        assert_close(ours.float(), reference, name)


@hypothesis.given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS[:5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_property_same_as_float64(batch: int, channels: int, height: int, width: int, layout: str, seed: int) -> None:
    hypothesis.assume(batch * height * width > 3)
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, grad = _leaves((batch, channels, height, width), torch.float64, generator)
    x = in_layout(x, layout, random.Random(seed))
    got = _ours(x, weight, bias, grad)
    for ours, reference, name in zip(got[:7], _reference(x, weight, bias, grad), NAMES, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("saved", ["bf16", "int8"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_codes_are_within_a_step(
    layout: str, saved: str, dtype: torch.dtype, isa: str, generator: torch.Generator
) -> None:
    for size in SIZES:
        x, _, _, _ = _leaves(size, dtype, generator)
        x = in_layout(x, layout, random.Random(0))
        *_, codes, scale = torch.ops.swat_ext.batch_norm(x, None, None, EPS, saved, None)
        assert codes.shape == x.shape
        assert codes.stride() == x.stride()
        per_channel = (-1, *[1] * (x.dim() - 2))
        exact = _normalised(x)
        if saved == "bf16":
            assert codes.dtype == torch.bfloat16
            # Eight bits of significand: half a unit of the last is 2^-9 of the power of two above, 2^-8 of the value.
            assert ((codes.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()
            continue
        assert codes.dtype == torch.int8
        assert codes.abs().max() <= 127
        dims = [dim for dim in range(x.dim()) if dim != 1]
        assert_close(scale, exact.abs().amax(dims) / 127, "scale")
        step = scale.double().view(per_channel)
        assert ((codes.double() * step - exact).abs() <= step * 1.0001).all()


@pytest.mark.parametrize("saved", ["bf16", "int8"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_stay_within_their_bounds(layout: str, saved: str, isa: str, generator: torch.Generator) -> None:
    """The gradient is w/s (g - mean(g) - h mean(g h)), and h is known up to e.

    So grad_weight, the sum of g h, moves by at most the sum of |g| e, and grad_input by |w/s| times what
    h mean(g h) moves: at most e |mean(g (h + e))| + |h| mean(|g| e).
    """
    for size in [(4, 5, 6, 7), (16, 33, 8, 8), (3, 64, 16, 16)]:
        x, weight, bias, grad = _leaves(size, torch.float32, generator)
        x = in_layout(x, layout, random.Random(0))
        exact, rounded = (_ours(x, weight, bias, grad, form) for form in ("exact", saved))
        for number in (0, 1, 2, 3, 6):  # what does not depend on the codes
            assert_identical(rounded[number], exact[number], NAMES[number])
        _, _, invstd, _, grad_input, grad_weight, _ = _reference(x, weight, bias, grad)
        g, h = grad.double(), _normalised(x)
        largest = h.abs().amax((0, 2, 3), keepdim=True)
        error = h.abs() * 2**-8 if saved == "bf16" else (largest / 127).expand_as(h)
        error = error * 1.001 + 1e-6
        count = h.numel() // h.shape[1]
        moved = (g.abs() * error).sum((0, 2, 3))
        slack = 1e-5 * (g * h).abs().sum((0, 2, 3))
        assert ((rounded[5].double() - grad_weight).abs() <= moved + slack).all()
        tilt = (rounded[5].double().abs() / count).view(-1, 1, 1)
        bound = error * tilt + h.abs() * (moved / count).view(-1, 1, 1)
        scaled = (weight.double() * invstd).abs().view(-1, 1, 1)
        slack_input = 1e-5 * grad_input.abs().max()
        assert ((rounded[4].double() - grad_input).abs() <= scaled * bound + slack_input).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_random_rounding_is_unbiased_and_independent(layout: str, isa: str, generator: torch.Generator) -> None:
    x, weight, bias, _ = _leaves((4, 6, 7, 9), torch.float32, generator)
    x = in_layout(x, layout, random.Random(0))
    h, rounds = _normalised(x), 2000
    errors = []
    for seed in range(rounds):
        *_, codes, scale = torch.ops.swat_ext.batch_norm(x, weight, bias, EPS, "int8", torch.tensor(seed))
        errors.append(codes.double() - h / scale.double().view(-1, 1, 1))
    error = torch.stack(errors)
    fraction = (h / scale.double().view(-1, 1, 1)) % 1
    # A code is one up with the probability of the fraction; the mean of all rounds has this deviation.
    deviation = (fraction * (1 - fraction) / rounds).sqrt()
    assert ((error.mean(0)).abs() <= 5 * deviation + 1e-4).all()
    assert error.mean().abs() <= 5 * 0.5 / error.numel() ** 0.5
    # Neighbours, channels and seeds do not follow each other.
    for dim in range(error.dim()):
        near, far = error.narrow(dim, 0, error.shape[dim] - 1), error.narrow(dim, 1, error.shape[dim] - 1)
        correlation = (near * far).mean() / error.square().mean()
        assert correlation.abs() < 5 / near.numel() ** 0.5 + 0.002, f"dimension {dim}: {correlation}"


def test_random_rounding_is_reproducible(isa: str, generator: torch.Generator) -> None:
    x, _, _, _ = _leaves((4, 6, 7, 9), torch.float32, generator)

    def codes(x: Tensor, seed: int | None) -> Tensor:
        seeds = None if seed is None else torch.tensor(seed)
        return torch.ops.swat_ext.batch_norm(x, None, None, EPS, "int8", seeds)[4]

    assert torch.equal(codes(x, 5), codes(x.clone(), 5))
    assert torch.equal(codes(x, None), codes(x, 0))
    assert not torch.equal(codes(x, 5), codes(x, 6))
    # Another layer, with other statistics, rounds by other numbers.
    assert not torch.equal(codes(x * 1.5, 5), codes(x, 5))


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("size", [(16, 64, 40, 40), (40, 3, 64, 65), (300, 600, 2, 2), (1, 40, 90, 91)])
def test_threads_do_not_matter(
    size: tuple[int, ...], saved: str, generator: torch.Generator, restore_threads: None
) -> None:
    leaves = _leaves(size, torch.float32, generator)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, weight, bias, grad = leaves
        x, grad = x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
        expected: list[Tensor] = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            got = _ours(x, weight, bias, grad, saved)
            got[7] = got[7].float()
            expected = expected or got
            for ours, first in zip(got, expected, strict=True):
                assert_identical(ours, first, f"{threads} threads")


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_special_values_stay_in_their_channel(layout: str, saved: str, isa: str, generator: torch.Generator) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x, weight, bias, grad = _leaves((3, 9, 5, 5), torch.float32, generator)
        x[1, 4, 2, 2] = value
        x[:, 7] = 3.25  # constant: no deviation at all
        got = _ours(in_layout(x, layout, random.Random(0)), weight, bias, grad, saved)
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        assert not got[0][:, 4].isfinite().any()
        assert not got[4][:, 4].isfinite().any()
        for tensor in (got[0], got[4]):
            assert tensor[:, others].isfinite().all()
        assert torch.equal(got[0][:, 7], bias[7].expand(3, 5, 5))
        if saved == "int8":  # what NaN is converted to is no accident of the processor
            assert got[8][4].isnan()
            assert got[8][others].isfinite().all()
            assert (got[7][:, 4] == -127).all()
            assert not got[7][:, 7].any()


def test_wrong_arguments_are_named() -> None:
    norm, backward = torch.ops.swat_ext.batch_norm, torch.ops.swat_ext.batch_norm_backward
    x, weight = torch.randn(2, 3, 4, 4), torch.ones(3)
    output, mean, invstd, _, codes, scale = norm(x, weight, weight, EPS, "int8", torch.tensor(1))
    for arguments, message in [
        ((x.long(), None, None, EPS, "exact", None), "input: expected dtype float32, float64, bfloat16 or float16"),
        ((x[0], None, None, EPS, "exact", None), r"input: expected \[N, C, H, W\] or \[N, C\]"),
        ((x[:1, :, :1, :1], None, None, EPS, "exact", None), "input: expected more than 1 value per channel"),
        ((x, weight[:2], None, EPS, "exact", None), r"weight: expected size \[3\], got \[2\]"),
        ((x, None, weight.double(), EPS, "exact", None), "bias: expected scalar type"),
        ((x, None, None, EPS, "int4", None), "saved: expected 'exact', 'bf16' or 'int8', got 'int4'"),
        ((x, None, None, EPS, "int8", torch.ones(2)), "seed: expected one int64 number"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            norm(*arguments)
    for arguments, message in [
        ((output, x, None, mean, invstd, weight, "int8"), "saved: expected scalar type"),
        ((output, codes, None, mean, invstd, weight, "int8"), "scale: expected a tensor for 'int8'"),
        ((output[:1], codes, scale, mean, invstd, weight, "int8"), "grad_output: expected size"),
        ((output, codes, scale, mean.float(), invstd, weight, "int8"), "mean: expected scalar type"),
        ((output, codes, scale, mean, invstd, weight, "none"), "saved_as: expected"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            backward(*arguments)
