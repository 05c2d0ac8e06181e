"""swat_ext::bias_grad: accurate, and the same bits for any strides and any number of threads."""

import random

import pytest
import torch
from checks import TOLERANCE, assert_identical
from geometries import LAYOUTS, in_layout
from torch import Tensor

ops = torch.ops.swat_ext

# Size and dimension: convolutions, linear layers, planes of few and many pixels, one channel, more dimensions.
_SIZES = [
    ((64, 64, 16, 16), 1),
    ((9, 40, 7, 7), 1),
    ((3, 17, 1, 1), 1),
    ((5, 1, 120, 130), 1),
    ((2, 3, 300, 200), 1),
    ((300, 70), 1),
    ((100_003, 1), -1),
    ((70, 3), 1),
    ((4, 5, 6, 33), -1),
    ((7, 5, 4), 0),
    ((3, 4, 5, 2, 3), 2),
    ((2, 3, 4, 2, 3, 2), 3),
    ((6,), 0),
    ((0, 4), 1),
    ((4, 0), 1),
    ((2, 5, 0, 3), 1),
]


def _expected(grad_output: Tensor, dim: int) -> Tensor:
    return grad_output.double().movedim(dim, 0).flatten(1).sum(1) if grad_output.dim() > 1 else grad_output.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "dim"), _SIZES)
def test_same_bits_however_it_lies(size: tuple[int, ...], dim: int, dtype: torch.dtype, isa: str) -> None:
    rng = random.Random(str(size))
    grad_output = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    got = ops.bias_grad(grad_output, dim)
    magnitude = _expected(grad_output.abs(), dim)
    assert got.shape == (size[dim],)
    assert ((got.double() - _expected(grad_output, dim)).abs() <= TOLERANCE[dtype] * magnitude).all()
    for layout in LAYOUTS:
        strided = in_layout(grad_output, layout, rng)
        same = ops.bias_grad(strided.contiguous(), dim)
        assert_identical(ops.bias_grad(strided, dim), same, f"{layout}, strides {strided.stride()}")
    everywhere = grad_output.new_tensor(0.1).expand(size)
    assert_identical(ops.bias_grad(everywhere, dim), ops.bias_grad(everywhere.contiguous(), dim), "one number")


@pytest.mark.parametrize(("size", "dim"), _SIZES[:8])
def test_threads_do_not_matter(size: tuple[int, ...], dim: int, isa: str, restore_threads: None) -> None:
    grad_output = torch.randn(size, generator=torch.Generator().manual_seed(0))
    layouts = [grad_output, grad_output.transpose(0, -1).contiguous().transpose(0, -1), grad_output[:1].expand(size)]
    first = None
    for threads in (1, 2, 3, 4, 1):
        torch.set_num_threads(threads)
        results = [ops.bias_grad(tensor, dim) for tensor in layouts]
        first = first or results
        for got, want in zip(results, first, strict=True):
            assert_identical(got, want, f"{threads} threads")


def test_long_sums_stay_accurate(isa: str) -> None:
    """Four million numbers of one sign: float32 one after the other would be wrong in the third digit."""
    grad_output = torch.full((64, 2, 256, 256), 0.1)
    expected = grad_output[:, 0].double().sum()
    for tensor in (grad_output, grad_output.contiguous(memory_format=torch.channels_last)):
        assert ((ops.bias_grad(tensor, 1).double() - expected).abs() <= 1e-6 * expected).all()


def test_nonfinite_gradients_show(isa: str) -> None:
    grad_output = torch.ones(3, 40, 5, 5)
    grad_output[1, 7, 2, 2], grad_output[2, 9, 4, 4], grad_output[0, 39, 0, 0] = torch.nan, torch.inf, -torch.inf
    got = ops.bias_grad(grad_output, 1)
    assert got[7].isnan()
    assert got[9] == torch.inf
    assert got[39] == -torch.inf
    assert got.isfinite().sum() == 37
