"""SWATMaxPool2d and its operators: nn.MaxPool2d bit for bit, at one byte an output."""

import copy
import random
from typing import Any

import pytest
import torch
from checks import assert_identical
from geometries import LAYOUTS, in_layout
from held import saved_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swat_ext import SWATMaxPool2d


def _random_settings(rng: random.Random) -> dict[str, Any]:
    kernel = rng.choice([(2, 2), (3, 3), (1, 1), (rng.randint(1, 5), rng.randint(1, 5)), (16, 16)])
    return {
        "kernel_size": kernel,
        "stride": rng.choice([None, (rng.randint(1, 3), rng.randint(1, 3))]),
        "padding": tuple(rng.randint(0, size // 2) for size in kernel),
        "dilation": rng.choice([1, (rng.randint(1, 3), rng.randint(1, 3))]),
        "ceil_mode": rng.random() < 0.5,
    }


def _random_input(rng: random.Random, dtype: torch.dtype) -> Tensor:
    """Many ties, and some of the values that compare oddly."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    size = (rng.randint(1, 3), rng.choice([1, 3, 4, 8, 17, 33, 64]), rng.randint(1, 19), rng.randint(1, 19))
    x = torch.randn(size, generator=generator).mul(2).round().div(2).to(dtype)
    if rng.random() < 0.5:
        odd = torch.rand(size, generator=generator) < 0.05
        x[odd] = rng.choice([torch.nan, -torch.inf, torch.inf, -0.0])
    if rng.random() < 0.1:
        x.fill_(-torch.inf)
    return x


def _run(pool: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    output = pool(leaf.clone(memory_format=torch.preserve_format))
    output.backward(grad)
    assert leaf.grad is not None
    return output.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_max_pool(dtype: torch.dtype, isa: str) -> None:
    rng = random.Random(0)
    done = 0
    while done < 150:
        settings, x, layout = _random_settings(rng), _random_input(rng, dtype), rng.choice(LAYOUTS[:5])
        dense, ours = nn.MaxPool2d(**settings), SWATMaxPool2d(**settings)
        try:
            size = dense(x).shape
        except RuntimeError:
            with pytest.raises(RuntimeError):
                ours(x)
            continue
        done += 1
        x = in_layout(x, layout, rng)
        grad = torch.randn(size, generator=torch.Generator().manual_seed(done)).to(dtype)
        grad = in_layout(grad, rng.choice(LAYOUTS[:5]), rng)
        what = f"{layout} {tuple(x.shape)} {settings}"
        # Contiguous, so that both sum in the order of the windows.
        results = _run(ours, x, grad), _run(dense, x.contiguous(), grad)
        for got, expected, name in zip(*results, ("output", "gradient"), strict=True):
            assert_identical(got, expected, f"{name} of {what}")


def test_positions_by_hand(isa: str) -> None:
    x = torch.tensor([[1.0, 2.0, 2.0], [torch.nan, 0.0, 2.0], [3.0, torch.nan, 1.0]]).view(1, 1, 3, 3)
    x = x.expand(1, 40, 3, 3)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        output, positions = torch.ops.swat_ext.max_pool2d(
            x.contiguous(memory_format=memory_format), [2, 2], [1, 1], [0, 0], [1, 1], False
        )
        assert positions.dtype == torch.uint8
        assert positions[0, 39].tolist() == [[2, 0], [3, 2]]
        assert output[0, 39, 0, 1] == 2


def test_bytes_held() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    assert saved_bytes(lambda: SWATMaxPool2d(3, 2, 1)(x * 1)) == 4 * 8 * 8 * 8
    assert saved_bytes(lambda: nn.MaxPool2d(3, 2, 1)(x * 1)) > 4 * x.numel()


def test_what_has_no_kernel_is_pytorchs() -> None:
    x = torch.randn(2, 3, 20, 20)
    for pool, dense, input in [
        (SWATMaxPool2d(17), nn.MaxPool2d(17), x),
        (SWATMaxPool2d(2), nn.MaxPool2d(2), x[0]),
        (SWATMaxPool2d(2), nn.MaxPool2d(2), x.bfloat16()),
        (SWATMaxPool2d(2), nn.MaxPool2d(2), x[:0]),
    ]:
        assert torch.equal(pool(input), dense(input))
    output, indices = SWATMaxPool2d(2, return_indices=True)(x)
    expected = nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(output, expected[0])
    assert torch.equal(indices, expected[1])
    for pool, input in [(SWATMaxPool2d(5), x[..., :3, :3]), (SWATMaxPool2d(2, padding=2), x)]:
        with pytest.raises(RuntimeError):
            pool(input)


def test_threads_do_not_matter(generator: torch.Generator, restore_threads: None) -> None:
    x = torch.randn(5, 33, 31, 29, generator=generator).mul(2).round()
    grad = torch.randn(5, 33, 16, 15, generator=generator)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        expected = _run(nn.MaxPool2d(3, 2, 1), x, grad)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = _run(SWATMaxPool2d(3, 2, 1), x.contiguous(memory_format=memory_format), grad)
            for ours, reference in zip(got, expected, strict=True):
                assert_identical(ours, reference, f"{threads} threads")


def test_copies_and_checkpoints() -> None:
    layer = copy.deepcopy(SWATMaxPool2d(3, 2, 1))
    x = torch.randn(2, 3, 9, 8)
    grad = torch.ones_like(layer(x))
    found = _run(lambda leaf: checkpoint(layer, leaf, use_reentrant=False), x, grad)  # type: ignore[arg-type]
    for got, reference in zip(found, _run(nn.MaxPool2d(3, 2, 1), x, grad), strict=True):
        assert_identical(got, reference, "checkpointed")


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    grad = torch.autograd.grad((SWATMaxPool2d(2)(x) ** 3).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_made_up_positions_write_nowhere_else(isa: str) -> None:
    grad = torch.ones(1, 40, 2, 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        positions = torch.full((1, 40, 2, 2), 255, dtype=torch.uint8).contiguous(memory_format=memory_format)
        found = torch.ops.swat_ext.max_pool2d_backward(
            grad, positions, [1, 40, 4, 4], [2, 2], [2, 2], [0, 0], [1, 1], False
        )
        assert not found.any()


def test_wrong_arguments_are_named() -> None:
    pool, backward = torch.ops.swat_ext.max_pool2d, torch.ops.swat_ext.max_pool2d_backward
    x = torch.randn(2, 3, 8, 8)
    usual: tuple[Any, ...] = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    for input, changes, message in [
        (x.long(), {}, "input: expected dtype"),
        (x[0], {}, "input: expected 4 dimensions"),
        (x, {0: [17, 17]}, "kernel_size: expected an area of at most 256"),
        (x, {0: [0, 2]}, "kernel_size: expected two integers of at least 1"),
        (x, {1: [0, 1]}, "stride: expected two integers of at least 1"),
        (x, {2: [2, 0]}, "padding: expected at most half of kernel_size"),
        (x, {3: [0, 1]}, "dilation: expected two integers of at least 1"),
        (x, {0: [9, 9]}, "input: expected at least one whole window"),
    ]:
        arguments = [changes.get(i, value) for i, value in enumerate(usual)]
        with pytest.raises(RuntimeError, match=message):
            pool(input, *arguments)
    output, positions = pool(x, *usual)
    with pytest.raises(RuntimeError, match="positions: expected dtype uint8"):
        backward(output, positions.int(), x.shape, *usual)
    with pytest.raises(RuntimeError, match="positions: expected size"):
        backward(output, positions[:1], x.shape, *usual)
    with pytest.raises(RuntimeError, match="grad_output: expected size"):
        backward(output[:, :1], positions, x.shape, *usual)
