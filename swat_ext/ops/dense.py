"""Convolution on packed tensors by PyTorch's own kernels, on tensors unpacked for the moment of the call.

Arguments and results are those of ``swat_ext::conv2d`` and its two gradients. A linear layer, whose rows come as one
row of 1x1 pixels, is multiplied as matrices.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from swat_ext.ops.layout import empty, memory_format

__all__ = ["conv2d", "input_grad", "weight_grad"]

# On the CPU activations are unpacked so many bytes at a time, or one sample where that is more.
_TILE_BYTES = 4 << 20


def _padded(input: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Input and symmetric padding for a convolution whose padding may differ between the two ends of an axis."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return input, [top, left]
    return torch.nn.functional.pad(input, (left, right, top, bottom)), [0, 0]


def _is_linear(
    input_size: Sequence[int], weight_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    one_row = input_size[0] == input_size[2] == weight_size[2] == weight_size[3] == 1
    return one_row and groups == stride[1] == 1 and not any(padding)


def _rows(image: Tensor) -> Tensor:
    """``[1, C, 1, rows]`` as ``[rows, C]``."""
    return image[0, :, 0].t()


def _image(rows: Tensor, channels_last: bool) -> Tensor:
    """``[rows, C]``, contiguous, as ``[1, C, 1, rows]``."""
    image = rows[None, None].permute(0, 3, 1, 2)
    return image.contiguous(memory_format=memory_format(channels_last))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_values: Tensor,
    weight_mask: Tensor,
    input_values: Tensor | None,
    input_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    retake_weight: bool = False,
) -> Tensor:
    """``conv2d`` by ``torch.convolution``, or ``torch.nn.functional.linear``, on the unpacked weight."""
    if _is_linear(input.shape, weight.shape, stride, padding, groups):
        matrix = torch.ops.swat_ext.decompress(weight_values, weight_mask, weight.shape[:2], False)
        return _image(torch.nn.functional.linear(_rows(input), matrix, bias), channels_last)
    dense = torch.ops.swat_ext.decompress(weight_values, weight_mask, weight.shape, channels_last)
    padded, symmetric = _padded(input, padding)
    output = torch.convolution(padded, dense, bias, stride, symmetric, dilation, False, [0, 0], groups)
    return output.contiguous(memory_format=memory_format(channels_last))


def input_grad(
    grad_output: Tensor,
    weight_values: Tensor,
    weight_mask: Tensor,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """``conv2d_input_grad`` by ``convolution_backward`` on the unpacked weight."""
    if _is_linear(input_size, weight_size, stride, padding, groups):
        matrix = torch.ops.swat_ext.decompress(weight_values, weight_mask, weight_size[:2], False)
        return _image(_rows(grad_output) @ matrix, channels_last)
    weight = torch.ops.swat_ext.decompress(weight_values, weight_mask, weight_size, channels_last)
    # Its values do not matter for its own gradient; an expanded scalar gives the shape without the memory.
    input = grad_output.new_empty(()).expand(*input_size)
    padded, symmetric = _padded(input, padding)
    grad = torch.ops.aten.convolution_backward(
        grad_output, padded, weight, None, stride, symmetric, dilation, False, [0, 0], groups, [True, False, False]
    )[0]
    if padded is input and grad.is_contiguous(memory_format=memory_format(channels_last)):
        return grad
    top, _, left, _ = padding if padded is not input else [0] * 4
    grad = grad[:, :, top : top + input_size[2], left : left + input_size[3]]
    # A view of something larger would keep it all alive, and an operator may not return one.
    return empty(grad, input_size, channels_last).copy_(grad)


def weight_grad(
    grad_output: Tensor,
    input_values: Tensor,
    input_mask: Tensor,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
) -> Tensor:
    """``conv2d_weight_grad`` by ``convolution_backward`` on the unpacked input.

    On the CPU a few samples at a time, or of a linear layer a few features: a whole activation is never there. Samples
    are added up in their order, whatever the number of threads.
    """
    if _is_linear(input_size, weight_size, stride, padding, groups):
        return _linear_weight_grad(grad_output, input_values, input_mask, input_size, weight_size, channels_last)
    like_grad = grad_output.is_contiguous(memory_format=torch.channels_last)
    shape = grad_output.new_empty(()).expand(*weight_size)
    total: Tensor | None = None
    for begin, end in _tiles(input_size, grad_output):
        input = _unpacked(input_values, input_mask, input_size, begin, end, like_grad)
        padded, symmetric = _padded(input, padding)
        grad = torch.ops.aten.convolution_backward(
            grad_output[begin:end],
            padded,
            shape,
            None,
            stride,
            symmetric,
            dilation,
            False,
            [0, 0],
            groups,
            [False, True, False],
        )[1]
        total = grad if total is None else total.add_(grad)
    if total is None:
        return empty(grad_output, weight_size, channels_last).zero_()
    return total.contiguous(memory_format=memory_format(channels_last))


def _linear_weight_grad(
    grad_output: Tensor,
    input_values: Tensor,
    input_mask: Tensor,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    # As matrices: rows of the packed input are features.
    features, rows = input_size[1], input_size[3]
    grad_rows = _rows(grad_output)
    grad = grad_output.new_empty(weight_size[0], features)
    for begin, end in _tiles((features, rows), grad_output):
        part = _unpacked(input_values, input_mask, (features, rows), begin, end, False)
        if end - begin == features:
            grad = grad_rows.t() @ part.t()
        else:
            grad[:, begin:end] = grad_rows.t() @ part.t()
    return grad[:, :, None, None].contiguous(memory_format=memory_format(channels_last))


def _tiles(size: Sequence[int], like: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of the first dimension to unpack at once."""
    count = size[0]
    step = max(1, count)
    if like.device.type == "cpu":
        step = max(1, _TILE_BYTES // max(1, math.prod(size[1:]) * like.element_size()))
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def _unpacked(values: Tensor, mask: Tensor, size: Sequence[int], begin: int, end: int, channels_last: bool) -> Tensor:
    """``[begin, end)`` of the first dimension, dropped elements zero."""
    if (begin, end) == (0, size[0]):
        return torch.ops.swat_ext.decompress(values, mask, size, channels_last)
    return torch.ops.swat_ext.decompress_part(values, mask, size, begin, end, channels_last)
