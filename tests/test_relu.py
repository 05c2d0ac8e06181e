"""SWATReLU and its operators: nn.ReLU bit for bit, at one bit an element."""

import copy
import random

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from checks import assert_identical
from geometries import LAYOUTS, in_layout
from held import saved_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swat_ext import SWATConfig, sparsify_
from swat_ext.models import resnet18
from swat_ext.modules import SWATReLU

SIZES = [(0, 3), (1,), (63,), (64,), (65,), (4097,), (3, 5, 4, 7), (2, 64, 8, 8), (1, 3, 1, 1), (5, 1, 3, 3), (2, 3, 4)]
SPECIAL = [float("nan"), -float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-38, -1e-38, 1e-45, -1e-45]


def _input(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    special = torch.tensor(SPECIAL, dtype=dtype)[: x.numel()]
    x.view(-1)[-len(special) :] = special if x.numel() else 0
    return x


def _results(relu: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    output = relu(leaf.clone(memory_format=torch.preserve_format))
    output.backward(grad)
    assert leaf.grad is not None
    return output.detach(), leaf.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_relu(layout: str, dtype: torch.dtype, inplace: bool, isa: str, generator: torch.Generator) -> None:
    rng = random.Random(layout)
    for size in SIZES:
        x = in_layout(_input(size, dtype, generator), layout, rng)
        grad = in_layout(_input(size, dtype, generator), rng.choice(LAYOUTS[:4]), rng)
        results = [_results(relu, x, grad) for relu in (nn.ReLU(inplace), SWATReLU(inplace))]
        for expected, got, what in zip(*results, ("output", "gradient"), strict=True):
            assert_identical(got, expected, f"{what} of {layout} {size}")


@hypothesis.given(values=st.lists(st.floats(width=32), max_size=200), repeats=st.integers(1, 4))
def test_property_same_as_relu(values: list[float], repeats: int) -> None:
    x = torch.tensor(values * repeats, dtype=torch.float32)
    results = [_results(relu, x, torch.full_like(x, -3.5)) for relu in (nn.ReLU(), SWATReLU())]
    for expected, got in zip(*results, strict=True):
        assert_identical(got, expected, "hypothesis")


@pytest.mark.parametrize("sliced", [False, True])
def test_in_place_writes_to_its_input(sliced: bool) -> None:
    base = torch.randn(4, 6, 5, 8, requires_grad=True)
    inner = base * 1
    x = inner[:, :, :, ::2] if sliced else inner
    output = SWATReLU(inplace=True)(x)
    assert output.data_ptr() == x.data_ptr()
    assert (output >= 0).all()
    output.sum().backward()
    expected = (base > 0).float()
    if sliced:
        expected[..., 1::2] = 0
    assert torch.equal(base.grad, expected)


def test_one_bit_an_element_in_the_order_of_memory(isa: str) -> None:
    x = torch.full((1, 2, 8, 8), -1.0).to(memory_format=torch.channels_last)
    x[0, 1, 0, 0], x[0, 0, 0, 1], x[0, 1, 7, 7] = 1.0, torch.nan, 2.0
    mask = torch.ops.swat_ext.relu(x)[1]
    assert mask.tolist() == [0b110, -(2**63)]


def test_bytes_held() -> None:
    for x in (torch.randn(4, 8, 16, 16), torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last)):
        x.requires_grad_()
        assert saved_bytes(lambda x=x: nn.ReLU()(x)) == 4 * x.numel()
        for inplace in (False, True):
            assert saved_bytes(lambda x=x, inplace=inplace: SWATReLU(inplace)(x * 1)) == x.numel() // 8


def test_threads_do_not_matter(isa: str, generator: torch.Generator, restore_threads: None) -> None:
    x, grad = torch.randn(2, 9, 61, 67, 31, generator=generator)
    expected = _results(nn.ReLU(), x, grad)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for got, reference in zip(_results(SWATReLU(), x, grad), expected, strict=True):
            assert_identical(got, reference, f"{threads} threads")


def test_second_derivative() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: SWATReLU()(v) ** 3, (x,))


def test_without_gradients_and_in_other_dtypes_it_is_plain() -> None:
    x = torch.randn(3, 3)
    assert torch.equal(SWATReLU()(x), x.clamp(min=0))
    with torch.no_grad():
        assert torch.equal(SWATReLU()(x.requires_grad_()), x.clamp(min=0))
    for dtype in (torch.bfloat16, torch.float16):
        half = x.detach().to(dtype).requires_grad_()
        SWATReLU()(half).sum().backward()
        assert torch.equal(half.grad, (half > 0).to(dtype))
    with torch.device("meta"):
        assert SWATReLU()(torch.empty(2, 3, requires_grad=True)).shape == (2, 3)


def test_checkpointing_and_copies() -> None:
    x = torch.randn(6, 7, requires_grad=True)
    relu = copy.deepcopy(SWATReLU())
    checkpoint(relu, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


def test_in_place_refuses_elements_that_share_memory() -> None:
    relu, x = SWATReLU(inplace=True), torch.randn(1, 3, requires_grad=True) * 1
    with pytest.raises(
        RuntimeError, match=r"input: expected elements that share no memory, .* expanded in dimension 0"
    ):
        relu(x.expand(4, 3))
    assert (relu(x.expand(1, 3)) >= 0).all()


def test_wrong_arguments_are_named() -> None:
    relu, relu_backward = torch.ops.swat_ext.relu, torch.ops.swat_ext.relu_backward
    x = torch.randn(10, 10)
    mask = relu(x)[1]
    with pytest.raises(RuntimeError, match="input: expected dtype float32, float64, bfloat16 or float16"):
        relu(x.long())
    with pytest.raises(RuntimeError, match="mask: expected 2 words for 100 elements, got 1"):
        relu_backward(x, mask[:1].clone())
    with pytest.raises(RuntimeError, match="mask: expected one contiguous dimension of int64"):
        relu_backward(x, mask.float())
    with pytest.raises(RuntimeError, match="grad_output: expected a tensor without gaps"):
        relu_backward(torch.randn(10, 20)[:, ::2], mask)


def test_a_sparse_network_holds_less_only_with_lean_relus() -> None:
    torch.manual_seed(0)
    dense = resnet18(10, width=0.25).to(memory_format=torch.channels_last)
    lean = copy.deepcopy(dense)
    sparsify_(lean, SWATConfig(0.9))
    swat = copy.deepcopy(lean)
    for module in swat.modules():
        if type(module) is SWATReLU:
            module.__class__ = nn.ReLU
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)

    def held(model: nn.Module) -> int:
        return saved_bytes(lambda: model(images).sum(), exclude=[*model.parameters(), *model.buffers()])

    assert held(lean) < 0.75 * held(dense) < held(swat)
    torch.testing.assert_close(lean(images), swat(images), rtol=0, atol=0)
