"""The CUDA operators of the layers around the convolutions: on a GPU, and thread by thread on the CPU."""

import random

import pytest
import torch
from checks import assert_identical
from conftest import Kernels
from geometries import LAYOUTS, in_layout
from torch import Tensor
from torch.nn import functional as F

from swat_ext.ops.layout import is_channels_last

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-38, -1e-38]


def _same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.stride() == expected.stride(), what
    assert_identical(got.cpu(), expected.cpu(), what)


# --- ReLU -------------------------------------------------------------------------------------------------------------


def _bits(mask: Tensor, numel: int) -> Tensor:
    return (mask.cpu()[:, None] >> torch.arange(64) & 1).view(-1)[:numel].bool()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu(kernels: Kernels, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    rng = random.Random(layout)
    for size in [(0, 3), (1,), (63,), (65,), (4097,), (3, 5, 4, 7), (2, 64, 8, 8), (1, 3, 1, 1), (2, 70, 9, 9)]:
        x = torch.randn(size, generator=generator).to(dtype)
        x.view(-1)[: min(7, x.numel())] = torch.tensor(_SPECIAL[: x.numel()], dtype=dtype)
        x = in_layout(x.to(kernels.device), layout, rng)
        grad = in_layout(torch.randn(size, generator=generator).to(kernels.device, dtype), rng.choice(LAYOUTS), rng)
        dense = torch.relu(x)  # as PyTorch's lies
        order = torch.as_strided(dense, (x.numel(),), (1,))
        expected = torch.empty_like(dense).copy_(torch.where(x < 0, 0, x))
        output, mask = kernels.ops.relu(x)
        _same_bits(output, expected, f"output of {layout} {size}")
        passes = ~(order.reshape(-1) <= 0)
        assert torch.equal(_bits(mask, x.numel()), passes.cpu())
        assert not _bits(mask, mask.numel() * 64)[x.numel() :].any()
        grad = torch.empty_like(dense).copy_(grad)
        got = kernels.ops.relu_backward(grad, mask)
        expected_grad = torch.empty_like(dense).copy_(torch.where(x <= 0, 0, grad))
        _same_bits(got, expected_grad, f"gradient of {layout} {size}")
        if layout != "expanded":
            assert torch.equal(kernels.ops.relu_(x), mask)
            assert_identical(x.cpu(), expected.cpu(), f"in place, {layout} {size}")


# --- Max pooling ------------------------------------------------------------------------------------------------------


def _windows(rng: random.Random) -> list[object]:
    kernel = rng.choice([(2, 2), (3, 3), (1, 1), (rng.randint(1, 5), rng.randint(1, 5)), (16, 16)])
    stride = rng.choice([kernel, (2, 2), (rng.randint(1, 3), rng.randint(1, 3))])
    padding = tuple(rng.randint(0, size // 2) for size in kernel)
    dilation = rng.choice([(1, 1), (rng.randint(1, 3), rng.randint(1, 3))])
    return [kernel, stride, padding, dilation, rng.random() < 0.5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool(kernels: Kernels, dtype: torch.dtype) -> None:
    """Results and gradients are those of PyTorch in float64, bit for bit once rounded; ties, NaN, infinities."""
    rng = random.Random(0)
    done = 0
    while done < 60:
        geometry, layout = _windows(rng), rng.choice(LAYOUTS[:5])
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        size = (rng.randint(1, 3), rng.choice([1, 3, 8, 33]), rng.randint(1, 19), rng.randint(1, 19))
        x = torch.randn(size, generator=generator).mul(2).round().div(2).to(dtype)
        if rng.random() < 0.5:
            x[torch.rand(size, generator=generator) < 0.05] = rng.choice(_SPECIAL)
        if rng.random() < 0.1:
            x.fill_(-torch.inf)
        leaf = x.double().requires_grad_()
        try:
            expected = F.max_pool2d(leaf, *geometry)
        except RuntimeError:
            continue
        # Quarters: their sums are exact in every dtype, whatever the order.
        grad = torch.randint(-8, 9, expected.shape, generator=generator).div(4).to(dtype)
        expected.backward(grad.double())
        strided = in_layout(x.to(kernels.device), layout, rng)
        output, positions = kernels.ops.max_pool2d(strided, *geometry)
        assert torch.equal(output.cpu().nan_to_num(7), expected.to(dtype).nan_to_num(7)), f"{geometry}, {layout} {size}"
        given = in_layout(grad.to(kernels.device), rng.choice(LAYOUTS[:5]), rng)
        got = kernels.ops.max_pool2d_backward(given, positions, x.shape, *geometry)
        assert torch.equal(got.cpu(), leaf.grad.to(dtype)), f"gradient of {geometry}, {layout} {size}"
        for result in (output, got):
            memory_format = torch.channels_last if is_channels_last(strided) else torch.contiguous_format
            assert result.is_contiguous(memory_format=memory_format)
        done += 1


def test_max_pool_is_that_of_the_cpu(kernels: Kernels, generator: torch.Generator) -> None:
    """Positions too, also for windows of padding alone."""
    for geometry in [((3, 3), (2, 2), (1, 1), (1, 1), False), ((4, 2), (1, 3), (2, 1), (7, 9), True)]:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 5, 23, 11, generator=generator).contiguous(memory_format=memory_format)
            for got, expected in zip(
                kernels.ops.max_pool2d(x.to(kernels.device), *geometry),
                torch.ops.swat_ext.max_pool2d(x, *geometry),
                strict=True,
            ):
                assert torch.equal(got.cpu(), expected)


def test_made_up_positions_write_nowhere_else(kernels: Kernels, generator: torch.Generator) -> None:
    geometry = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    positions = torch.randint(0, 256, (2, 3, 5, 5), generator=generator, dtype=torch.uint8).to(kernels.device)
    grad = torch.ones(2, 3, 5, 5, device=kernels.device)
    result = kernels.ops.max_pool2d_backward(grad, positions, (2, 3, 9, 9), *geometry)
    assert result.sum() <= (positions < 9).sum()


# --- Batch normalisation ----------------------------------------------------------------------------------------------

_EPS = 1e-5
_SIZES = [(2, 3, 5, 7), (16, 64, 4, 4), (17, 33, 9, 5), (1, 70, 2, 1), (64, 2, 3, 3), (3, 1, 40, 2), (128, 9, 1, 1)]
_SIZES += [(2, 257, 2, 2), (3, 2, 61, 71), (31, 17), (9, 2, 33, 32)]
_NAMES = ("output", "mean", "invstd", "variance", "grad_input", "grad_weight", "grad_bias")
# Norm of the difference / norm of the float64 result; half types: the rounding of the result.
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def _leaves(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Input, weight, bias and the gradient of the output; deviations and means that differ by channel."""
    per_channel = (-1, *[1] * (len(size) - 2))
    spread, middle = torch.rand(2, size[1], generator=generator, dtype=torch.float64)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    x = x * (spread + 0.1).view(per_channel) + (middle * 4 - 2).view(per_channel)
    weight, bias = torch.randn(2, size[1], generator=generator, dtype=torch.float64)
    grad = torch.randn(size, generator=generator, dtype=torch.float64) + 0.3
    return tuple(tensor.to(dtype) for tensor in (x, weight, bias, grad))


def _normalise(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad: Tensor,
    saved: str = "exact",
    *,
    seed: int = 7,
) -> list[Tensor]:
    """Output, mean, invstd, variance, gradients of input, weight and bias; then codes and scale."""
    x, grad = x.to(kernels.device), grad.to(kernels.device)
    weight, bias = (None if each is None else each.to(kernels.device) for each in (weight, bias))
    steps = torch.tensor(seed, device=kernels.device)
    output, *statistics, codes, scale = kernels.ops.batch_norm(x, weight, bias, _EPS, saved, steps)
    kept = (x, None) if saved == "exact" else (codes, scale if saved == "int8" else None)
    grads = kernels.ops.batch_norm_backward(grad, *kept, *statistics[:2], weight, saved)
    return [each.cpu() for each in (output, *statistics, *grads, codes, scale)]


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The first seven by PyTorch in float64."""
    x = x.detach().double().contiguous().requires_grad_()
    channels = x.shape[1]
    weight = (torch.ones(channels) if weight is None else weight).double().requires_grad_()
    bias = (torch.zeros(channels) if bias is None else bias).double().requires_grad_()
    output = F.batch_norm(x, None, None, weight, bias, True, 0.0, _EPS)
    # Contiguous: of (140, 1, 70, 140) as strides of (1, 70, 2, 1), torch 2.13 makes a wrong gradient on the CPU.
    output.backward(grad.double().contiguous())
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean, variance = x.detach().mean(dims), x.detach().var(dims, unbiased=True)
    invstd = (x.detach().var(dims, unbiased=False) + _EPS).rsqrt()
    return [output.detach(), mean, invstd, variance, x.grad, weight.grad, bias.grad]


def _assert_near(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape, what
    error = (got.double() - expected).norm().item()
    assert error <= tolerance * expected.norm().item(), f"{what}: {error / expected.norm().item():.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_batch_norm(kernels: Kernels, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    rng = random.Random(layout)
    for size in _SIZES:
        x, weight, bias, grad = _leaves(size, dtype, generator)
        style = rng.choice(["none", "same", "wide"])
        if style == "none":
            weight = bias = None
        elif style == "wide":
            weight, bias = (each.to(torch.promote_types(dtype, torch.float32)) for each in (weight, bias))
        x, grad = in_layout(x, layout, rng), in_layout(grad, rng.choice(LAYOUTS[:5]), rng)
        got = _normalise(kernels, x, weight, bias, grad)
        for ours, reference, name in zip(got[:7], _reference(x, weight, bias, grad), _NAMES, strict=True):
            if name == "grad_input" and x.numel() == 2 * size[1]:
                continue  # of two values a channel it is all cancellation
            exact = name in ("mean", "invstd", "variance")
            _assert_near(ours, reference, 1e-11 if exact else _TOLERANCE[dtype], f"{name} of {layout} {size}")
        assert got[0].is_contiguous(memory_format=torch.channels_last) or layout != "channels_last" or x.dim() != 4
        assert got[5].dtype == (dtype if weight is None else weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_codes_of_batch_norm(kernels: Kernels, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Each code is one of the two next to the normalised value; gradients are those of what it stands for."""
    for size in [(3, 5, 21, 19), (8, 70, 4, 3)]:
        x, weight, bias, grad = _leaves(size, dtype, generator)
        x = in_layout(x, layout, random.Random(0))
        exact = _normalise(kernels, x, weight, bias, grad)
        invstd = _reference(x, weight, bias, grad)[2].view(-1, 1, 1)
        h = (x.double() - x.double().mean((0, 2, 3), keepdim=True)) * invstd
        for saved in ("bf16", "int8"):
            got = _normalise(kernels, x, weight, bias, grad, saved)
            for ours, reference, name in zip(got[:4], exact[:4], _NAMES, strict=False):
                assert torch.equal(ours, reference), name
            codes, scale = got[7].double(), got[8].double().view(-1, 1, 1)
            assert got[7].stride() == x.stride()
            if saved == "bf16":
                _assert_near(codes, h, 2**-8, "codes")
                value = codes
            else:
                units = h / scale
                assert (codes - units).abs().max() < 1 + 1e-4
                assert codes.abs().max() == 127
                assert (codes - units).mean().abs() < 0.05
                value = codes * scale
            g, w = grad.double(), weight.double()
            mean = lambda each: each.mean((0, 2, 3), keepdim=True)  # noqa: E731
            expected = w.view(-1, 1, 1) * invstd * (g - mean(g) - value * mean(g * value))
            _assert_near(got[4], expected, _TOLERANCE[dtype], f"grad_input from {saved}")
            _assert_near(got[5], (g * value).sum((0, 2, 3)), _TOLERANCE[dtype], f"grad_weight from {saved}")
            again, other = (_normalise(kernels, x, weight, bias, grad, saved, seed=seed) for seed in (7, 8))
            for first, second in zip(got, again, strict=True):
                assert torch.equal(first, second)
            assert torch.equal(other[7], got[7]) == (saved == "bf16")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_means_and_outliers_cost_batch_norm_no_accuracy(
    kernels: Kernels, layout: str, generator: torch.Generator
) -> None:
    for number in range(3):
        x, weight, bias, grad = _leaves((8, 21, 9, 9), torch.float32, generator)
        if number < 2:
            x += (1e3, -1e4)[number]
        else:
            x[0, :, 0, 0] = 1e4  # where the shift is taken
            x[5, 3, 2, 2] = -1e5
        x = in_layout(x, layout, random.Random(0))
        got = _normalise(kernels, x, weight, bias, grad)
        for ours, reference, name in zip(got[:7], _reference(x, weight, bias, grad), _NAMES, strict=True):
            _assert_near(ours, reference, 2e-5, f"{name} of {number}")


@pytest.mark.parametrize("saved", ["exact", "bf16", "int8"])
def test_nan_stays_in_its_channel_of_batch_norm(kernels: Kernels, saved: str, generator: torch.Generator) -> None:
    x, weight, bias, grad = _leaves((3, 4, 5, 6), torch.float32, generator)
    x[1, 2, 3, 4] = torch.nan
    x[:, 1] = 2.5  # a channel without a spread
    got = _normalise(kernels, x, weight, bias, grad, saved)
    for result in (got[0], got[4]):
        assert result[:, 2].isnan().all()
        assert result[:, [0, 1, 3]].isfinite().all()
    assert got[5][2].isnan()
    assert got[5][[0, 1, 3]].isfinite().all()
    if saved == "int8":
        assert got[8][2].isnan()
        assert (got[7][:, 2] == -127).all()
        assert not got[7][:, 1].any()


def test_wrong_arguments_are_named(kernels: Kernels) -> None:
    x = torch.randn(2, 3, 4, 4, device=kernels.device)
    wrong = x.new_empty(3, dtype=torch.float16)
    for call, message in (
        (lambda: kernels.ops.relu(x.int()), "input: expected dtype"),
        (lambda: kernels.ops.relu_backward(x, x.new_empty(1, dtype=torch.int64)), "mask: expected 2 words"),
        (lambda: kernels.ops.max_pool2d(x, (9, 9), (1, 1), (0, 0), (1, 1), False), "at least one whole window"),
        (lambda: kernels.ops.batch_norm(x, wrong, None, 1e-5, "exact", None), "weight: expected scalar type"),
        (lambda: kernels.ops.batch_norm(x, None, None, 1e-5, "int4", None), "saved: expected 'exact'"),
        (lambda: kernels.ops.batch_norm(x[:1, :, :1, :1], None, None, 1e-5, "exact", None), "more than 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
