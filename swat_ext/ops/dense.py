"""A layer's three passes by PyTorch's kernels, on operands unpacked for the moment of the call.

Arguments and results are those of :mod:`swat_ext.ops.sparse`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec

import torch
from torch import Tensor

from swat_ext.ops.geometry import Geometry
from swat_ext.ops.layout import empty, memory_format

__all__ = ["convolution", "convolution_input_grad", "forward", "in_its_own_dtype", "input_grad", "weight_grad"]

# Activations are unpacked so many bytes at a time, or one sample where that is more: what caches hold.
_TILE_BYTES = 4 << 20
_CUDA_TILE_BYTES = 32 << 20

_P = ParamSpec("_P")


def in_its_own_dtype(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Operands are cast already where autocast is on: PyTorch's functions must not cast them once more."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        operand = args[0]
        assert isinstance(operand, Tensor)
        with torch.autocast(operand.device.type, enabled=False):
            return function(*args, **kwargs)

    return call


@in_its_own_dtype
def forward(
    input: Tensor,
    weight_values: Tensor,
    weight_mask: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry | None,
    channels_last: bool,
) -> Tensor:
    """By ``torch.convolution`` or ``torch.nn.functional.linear``."""
    weight = torch.ops.swat_ext.decompress(weight_values, weight_mask, weight_size, channels_last)
    if geometry is None and input.dim() == 2:
        return torch.nn.functional.linear(input, weight, bias)
    if geometry is None:
        # linear() would return a view here, which nobody could change in place behind a function of ours.
        output = torch.matmul(input, weight.t())
        return output if bias is None else output.add_(bias)
    return convolution(input, weight, bias, geometry, channels_last)


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, channels_last: bool) -> Tensor:
    """PyTorch's convolution with a dense ``weight``."""
    padded, symmetric = _padded(input, geometry)
    stride, _, dilation, groups = geometry
    output = torch.convolution(padded, weight, bias, stride, symmetric, dilation, False, [0, 0], groups)
    return output.contiguous(memory_format=memory_format(channels_last))


@in_its_own_dtype
def input_grad(
    grad_output: Tensor,
    weight_values: Tensor,
    weight_mask: Tensor,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    geometry: Geometry | None,
    channels_last: bool,
) -> Tensor:
    """By ``convolution_backward``, or a product of matrices."""
    weight = torch.ops.swat_ext.decompress(weight_values, weight_mask, weight_size, channels_last)
    if geometry is None:
        return grad_output @ weight
    return convolution_input_grad(grad_output, weight, input_size, geometry, channels_last)


def convolution_input_grad(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], geometry: Geometry, channels_last: bool
) -> Tensor:
    """The gradient of the input of :func:`convolution`."""
    # Its values do not matter for its own gradient; an expanded scalar gives the shape without the memory.
    input = grad_output.new_empty(()).expand(list(input_size))
    padded, symmetric = _padded(input, geometry)
    grad = _backward(grad_output, padded, weight, symmetric, geometry, [True, False, False])[0]
    if padded is input and grad.is_contiguous(memory_format=memory_format(channels_last)):
        return grad
    top, _, left, _ = geometry.padding if padded is not input else (0, 0, 0, 0)
    # A view of something larger would keep it all alive.
    inside = grad[:, :, top : top + input_size[2], left : left + input_size[3]]
    return empty(grad, input_size, channels_last).copy_(inside)


@in_its_own_dtype
def weight_grad(
    grad_output: Tensor,
    input_values: Tensor,
    input_mask: Tensor,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    geometry: Geometry | None,
    channels_last: bool,
) -> Tensor:
    """By ``convolution_backward``, or a product of matrices.

    A few samples at a time, or of a linear layer a few features: a whole activation is never there. Samples are added
    up in their order, whatever the number of threads; on CUDA a part's own sum is cuDNN's, which repeats bit for bit
    where ``torch.backends.cudnn.deterministic`` is set.
    """
    if geometry is None:
        return _linear_weight_grad(grad_output, input_values, input_mask, input_size, weight_size)
    # PyTorch 2.13 writes past the end of what it allocates here for 2 to 7 channels in channels_last, with AVX2.
    fatal = weight_size[1] < 8 and tuple(weight_size[2:]) == (1, 1) and geometry.stride != (1, 1)
    like_grad = grad_output.is_contiguous(memory_format=torch.channels_last) and not fatal
    shape = grad_output.new_empty(()).expand(list(weight_size))
    total: Tensor | None = None
    for begin, end in _tiles(input_size, grad_output):
        input = _unpacked(input_values, input_mask, input_size, begin, end, like_grad)
        padded, symmetric = _padded(input, geometry)
        grad = _backward(grad_output[begin:end], padded, shape, symmetric, geometry, [False, True, False])[1]
        total = grad if total is None else total.add_(grad)
    if total is None:
        return empty(grad_output, weight_size, channels_last).zero_()
    return total.contiguous(memory_format=memory_format(channels_last))


def _linear_weight_grad(
    grad_output: Tensor, values: Tensor, mask: Tensor, input_size: Sequence[int], weight_size: Sequence[int]
) -> Tensor:
    features, rows = weight_size[1], math.prod(input_size[:-1])
    transposed = grad_output.reshape(rows, weight_size[0]).t()
    parts = [
        transposed @ _unpacked(values, mask, (features, rows), begin, end, False).t()
        for begin, end in _tiles((features, rows), grad_output)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, padding: list[int], geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor, ...]:
    stride, _, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )


def _padded(input: Tensor, geometry: Geometry) -> tuple[Tensor, list[int]]:
    """Input and symmetric padding for a convolution whose padding may differ between the two ends of an axis."""
    top, bottom, left, right = geometry.padding
    if top == bottom and left == right:
        return input, [top, left]
    return torch.nn.functional.pad(input, (left, right, top, bottom)), [0, 0]


def _tiles(size: Sequence[int], like: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of the first dimension to unpack at once."""
    count = size[0]
    step = max(1, count)
    if not torch.compiler.is_compiling():
        bytes_ = _CUDA_TILE_BYTES if like.device.type == "cuda" else _TILE_BYTES
        step = max(1, bytes_ // max(1, math.prod(size[1:]) * like.element_size()))
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def _unpacked(values: Tensor, mask: Tensor, size: Sequence[int], begin: int, end: int, channels_last: bool) -> Tensor:
    """``[begin, end)`` of the first dimension, dropped elements zero."""
    if (begin, end) == (0, size[0]):
        return torch.ops.swat_ext.decompress(values, mask, size, channels_last)
    return torch.ops.swat_ext.decompress_part(values, mask, size, begin, end, channels_last)
