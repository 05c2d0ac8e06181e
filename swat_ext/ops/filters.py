"""Convolutions whose weight keeps whole filters: dense convolutions of the output channels that are left.

Inside such a filter nothing is skipped, so PyTorch's kernels are the ones to compute it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from swat_ext.ops import dense
from swat_ext.ops.geometry import Geometry
from swat_ext.ops.layout import empty, memory_format

__all__ = ["forward", "input_grad", "kept_filters"]

# PyTorch's convolution is up to 1.4 times as fast if its output channels are a multiple of this.
_MULTIPLE = 8


def kept_filters(values: Tensor, mask: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor | None:
    """The output channels whose filters are kept, if each is kept or dropped as a whole: int64, ascending.

    Args:
        values, mask, size: of the packed weight ``[O, C, kh, kw]``.
        geometry: of the convolution.

    Returns:
        None where single weights are dropped, or one is not finite; for groups, where the filters left would not be
        equally many; for padding of more than half a kernel; and where to know would wait for a device or, in a
        compiled graph, is not possible.
    """
    if geometry.groups > 1 or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    kept, length = values.shape[0], size[1] * size[2] * size[3]
    if not kept or kept % length:
        return None  # the usual case
    spans = [geometry.dilation[axis] * (size[2 + axis] - 1) + 1 for axis in range(2)]
    if any(2 * padding > spans[side // 2] for side, padding in enumerate(geometry.padding)):
        return None  # PyTorch's kernels have crashed on padding that wide
    if values.dtype not in (torch.float32, torch.float64):
        return None  # of these PyTorch's kernels are slow but on few processors
    filters = torch.ops.swat_ext.whole_filters(mask, size)
    # PyTorch's kernels do not multiply an infinite weight by the zeros around an image.
    return filters if len(filters) * length == kept and math.isfinite(values.sum().item()) else None


@dense.in_its_own_dtype
def forward(
    input: Tensor,
    weight_values: Tensor,
    filters: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None,
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """``conv(input, top(weight)) + bias``; of a dropped filter the bias alone is left."""
    if len(filters) == weight_size[0]:
        weight = _weight(weight_values, filters, weight_size, channels_last)
        return dense.convolution(input, weight, bias, geometry, channels_last)
    padding = -len(filters) % _MULTIPLE
    weight = _weight(weight_values, filters, weight_size, channels_last, padding)
    part = dense.convolution(input, weight, None, geometry, channels_last)
    output = empty(part, [part.shape[0], weight_size[0], *part.shape[2:]], channels_last)
    kept = _by_channel(part, channels_last)[:, : len(filters)]
    _by_channel(output.zero_(), channels_last).index_copy_(1, filters, kept)
    return output if bias is None else output.add_(bias[:, None, None])


@dense.in_its_own_dtype
def input_grad(
    grad_output: Tensor,
    weight_values: Tensor,
    filters: Tensor,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    geometry: Geometry,
    channels_last: bool,
) -> Tensor:
    """The gradient of the input, through the kept filters alone."""
    if len(filters) < weight_size[0]:
        like = grad_output.contiguous(memory_format=memory_format(channels_last))
        grad_output = empty(like, [like.shape[0], len(filters), *like.shape[2:]], channels_last)
        torch.index_select(_by_channel(like, channels_last), 1, filters, out=_by_channel(grad_output, channels_last))
    weight = _weight(weight_values, filters, weight_size, channels_last)
    return dense.convolution_input_grad(grad_output, weight, input_size, geometry, channels_last)


def _weight(values: Tensor, filters: Tensor, size: Sequence[int], channels_last: bool, padding: int = 0) -> Tensor:
    """The kept filters, whose packed values are all of their elements, and ``padding`` filters of zeros after them."""
    weight = empty(values, [len(filters) + padding, *size[1:]], channels_last)
    weight[: len(filters)] = values.view(len(filters), *size[1:])
    weight[len(filters) :] = 0
    return weight


def _by_channel(image: Tensor, channels_last: bool) -> Tensor:
    """A view of ``[N, C, H, W]`` in which channels are the second axis, and all else is as few axes as can be."""
    batch, channels, height, width = image.shape
    if channels_last:
        return image.permute(0, 2, 3, 1).view(batch * height * width, channels)
    return image.view(batch, channels, height * width)
