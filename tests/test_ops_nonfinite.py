"""Where NaN and infinity spread: only kept elements multiply; the pixels around an image are zeros like any other."""

import itertools
import random

import pytest
import torch
from checks import assert_identical
from geometries import LAYOUTS, Geometry, in_layout, random_tensor
from torch import Tensor

ops = torch.ops.swat_ext


def _oracle(
    geometry: Geometry, x: Tensor, w: Tensor, x_kept: Tensor, w_kept: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient in float64, product by product.

    A kept weight multiplies a pixel of every window, a zero of the padding too. In the gradients a kept element meets
    the taps that lie a whole number of strides away, and there the gradient of that output pixel, or a zero where
    there is no such pixel.
    """
    height, width = geometry.input_size[2:]
    kh, kw = geometry.kernel
    out_height, out_width = geometry.output_size[2:]
    (sh, sw), (top, _, left, _), (dh, dw), groups = geometry.arguments
    x, x_kept, dy = (tensor.unflatten(1, (groups, -1)) for tensor in (x, x_kept, dy))
    w, w_kept = (tensor.unflatten(0, (groups, -1)) for tensor in (w, w_kept))
    y, dx, grad = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(w)

    def at(image: Tensor, row: int, column: int) -> Tensor:
        inside = 0 <= row < image.shape[3] and 0 <= column < image.shape[4]
        return image[..., row, column] if inside else torch.zeros_like(image[..., 0, 0])

    for r, c in itertools.product(range(kh), range(kw)):
        keep, taps = w_kept[..., r, c], w[..., r, c]  # [groups, outputs, inputs]
        for i, j in itertools.product(range(out_height), range(out_width)):
            pixels = at(x, i * sh + r * dh - top, j * sw + c * dw - left)
            y[..., i, j] += torch.where(keep, taps * pixels[:, :, None], 0).sum(3)
        for h, v in itertools.product(range(height), range(width)):
            i, j = h + top - r * dh, v + left - c * dw
            if i % sh or j % sw:
                continue
            gradient = at(dy, i // sh, j // sw)[..., None]
            kept, pixels = x_kept[..., h, v][:, :, None], x[..., h, v][:, :, None]
            dx[..., h, v] += torch.where(keep, taps * gradient, 0).sum(2)
            grad[..., r, c] += torch.where(kept, pixels * gradient, 0).sum(0)
    return y.flatten(1, 2), dx.flatten(1, 2), grad.flatten(0, 1)


def _spoil(tensor: Tensor, rng: random.Random, share: float) -> None:
    flat = tensor.view(-1)
    for _ in range(max(1, round(share * flat.numel()))):
        flat[rng.randrange(flat.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])


def _classes(tensor: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 infinite."""
    return tensor.isnan().to(torch.int32) + 2 * tensor.isinf().to(torch.int32)


_KINDS = {
    "3x3": Geometry(2, 1, 5, 7, 5, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "3x3, stride 2": Geometry(2, 1, 5, 7, 6, 7, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "1x1": Geometry(3, 1, 9, 17, 4, 3, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "1x1, stride 2": Geometry(2, 1, 9, 17, 5, 4, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    "1x1, padded": Geometry(2, 1, 3, 4, 4, 3, (1, 1), (1, 1), (0, 2, 1, 0), (1, 1)),
    "uneven": Geometry(1, 2, 3, 4, 6, 5, (2, 4), (2, 1), (1, 0, 2, 3), (1, 2)),
    "dilated": Geometry(2, 1, 4, 3, 7, 6, (3, 2), (1, 3), (2, 2, 0, 1), (2, 3)),
    "never read": Geometry(2, 1, 4, 3, 8, 8, (2, 2), (3, 3), (0, 0, 0, 0), (1, 1)),
    "grouped": Geometry(2, 3, 2, 3, 5, 5, (3, 3), (1, 2), (1, 1, 1, 1), (1, 1)),
    "depthwise": Geometry(2, 18, 1, 1, 5, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "depthwise, stride 2": Geometry(2, 18, 1, 1, 6, 6, (3, 3), (2, 2), (0, 1, 1, 0), (1, 1)),
    "depthwise, dilated": Geometry(1, 17, 1, 2, 7, 6, (2, 2), (1, 1), (1, 0, 0, 1), (3, 2)),
}


@pytest.mark.parametrize("name", _KINDS)
def test_only_kept_elements_multiply(name: str, isa: str) -> None:
    geometry = _KINDS[name]
    for number in range(8):
        rng = random.Random(f"{name} {number}")
        sizes = (geometry.input_size, geometry.weight_size, geometry.output_size)
        dtype = rng.choice([torch.float32, torch.float64])
        x, w, dy = (random_tensor(size, dtype, rng) for size in sizes)
        # One operand at a time, then all: what multiplies what shows best alone. In few places: sums must stay apart.
        for tensor, spoiled in ((x, number % 4 in (0, 3)), (w, number % 4 in (1, 3)), (dy, number % 4 in (2, 3))):
            if spoiled:
                _spoil(tensor, rng, 0.01)
        packed, kept = [], []
        for tensor in (w, x):
            threshold = torch.tensor(rng.choice([0.0, 0.8, 1.5]), dtype=dtype)
            packed.append(ops.compress(tensor, threshold))
            kept.append(~(tensor.abs() < threshold) & (tensor != 0))
        expected = _oracle(geometry, x.double(), w.double(), kept[1], kept[0], dy.double())
        laid, laid_dy = (in_layout(tensor, rng.choice(LAYOUTS[:5]), rng) for tensor in (x, dy))
        arguments, last = geometry.arguments, rng.random() < 0.5
        got = (
            ops.conv2d(laid, *packed[0], w.shape, None, *arguments, last),
            ops.conv2d_input_grad(laid_dy, *packed[0], w.shape, x.shape, *arguments, last),
            ops.conv2d_weight_grad(laid_dy, *packed[1], x.shape, w.shape, *arguments, last),
        )
        for what, result, want in zip(("output", "input gradient", "weight gradient"), got, expected, strict=True):
            described = f"{what} of {geometry}, {dtype}, number {number}"
            assert_identical(_classes(result), _classes(want), described)
            finite = want.isfinite()
            torch.testing.assert_close(result.double()[finite], want[finite], rtol=1e-4, atol=1e-4, msg=described)


@pytest.mark.parametrize("operand", ["input", "weight", "gradient"])
def test_linear_layers_too(operand: str, isa: str, generator: torch.Generator) -> None:
    x, w, dy = (torch.randn(size, generator=generator) for size in ((37, 19), (21, 19), (37, 21)))
    {"input": x, "weight": w, "gradient": dy}[operand][5, 7] = torch.inf
    limit = torch.tensor(0.9)
    packed_weight, packed_input = ops.compress(w, limit), ops.compress(x.t(), limit)
    kept_weight, kept_input = w.abs() >= limit, x.abs() >= limit
    products = {
        "output": (x[:, None] * w, kept_weight[None], 2, ops.linear(x, *packed_weight, w.shape, None)),
        "input gradient": (
            dy[:, :, None] * w,
            kept_weight[None],
            1,
            ops.linear_input_grad(dy, *packed_weight, w.shape),
        ),
        "weight gradient": (
            dy[:, :, None] * x[:, None],
            kept_input[:, None],
            0,
            ops.linear_weight_grad(dy, *packed_input, w.shape),
        ),
    }
    for what, (product, kept, dim, got) in products.items():
        want = torch.where(kept, product, 0).sum(dim)
        assert_identical(_classes(got), _classes(want), what)
