"""A layer's three passes by this library's kernels, which walk over what is kept alone.

A convolution whose weight keeps whole filters is a dense one of fewer channels: see :mod:`swat_ext.ops.filters`.

Each function takes a :class:`Geometry` for a convolution and None for a linear layer. A packed operand is ``values``
and ``mask``; that of a linear layer's input has the size ``[in_features, rows]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swat_ext.ops import dense, filters
from swat_ext.ops.geometry import Geometry

__all__ = ["forward", "input_grad", "weight_grad"]


def forward(
    input: Tensor,
    weight_values: Tensor,
    weight_mask: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry | None,
    channels_last: bool,
) -> Tensor:
    """``conv(input, top(weight)) + bias``."""
    if geometry is None:
        return torch.ops.swat_ext.linear(input, weight_values, weight_mask, weight_size, bias)
    kept = filters.kept_filters(weight_values, weight_mask, weight_size, geometry)
    if kept is not None:
        return filters.forward(input, weight_values, kept, weight_size, bias, geometry, channels_last)
    return torch.ops.swat_ext.conv2d(input, weight_values, weight_mask, weight_size, bias, *geometry, channels_last)


def input_grad(
    grad_output: Tensor,
    weight_values: Tensor,
    weight_mask: Tensor,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    geometry: Geometry | None,
    channels_last: bool,
) -> Tensor:
    """The gradient of the input, through ``top(weight)``."""
    if geometry is None:
        return torch.ops.swat_ext.linear_input_grad(grad_output, weight_values, weight_mask, weight_size)
    kept = filters.kept_filters(weight_values, weight_mask, weight_size, geometry)
    if kept is not None:
        return filters.input_grad(grad_output, weight_values, kept, weight_size, input_size, geometry, channels_last)
    return torch.ops.swat_ext.conv2d_input_grad(
        grad_output, weight_values, weight_mask, weight_size, input_size, *geometry, channels_last
    )


def weight_grad(
    grad_output: Tensor,
    input_values: Tensor,
    input_mask: Tensor,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    geometry: Geometry | None,
    channels_last: bool,
) -> Tensor:
    """The gradient of every weight, from ``top(input)``; on CUDA by PyTorch's kernels, which are faster at it."""
    if grad_output.device.type == "cuda":
        return dense.weight_grad(
            grad_output, input_values, input_mask, input_size, weight_size, geometry, channels_last
        )
    if geometry is None:
        return torch.ops.swat_ext.linear_weight_grad(grad_output, input_values, input_mask, weight_size)
    return torch.ops.swat_ext.conv2d_weight_grad(
        grad_output, input_values, input_mask, input_size, weight_size, *geometry, channels_last
    )
