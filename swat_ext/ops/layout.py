"""The two memory formats that tensors are made in: contiguous, and channels_last."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty", "is_channels_last", "memory_format", "suggests_channels_last"]


def suggests_channels_last(tensor: Tensor) -> bool:
    """torch's rule of the memory format that results take from ``tensor``.

    channels_last where its strides are in that order, with gaps or without. A tensor that is contiguous too, of one
    channel say, may be either.
    """
    if tensor.dim() != 4 or tensor.stride(1) == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = stride * size
    return True


def is_channels_last(tensor: Tensor) -> bool:
    """Whether it suggests channels_last and is not contiguous."""
    return not tensor.is_contiguous() and suggests_channels_last(tensor)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty(like: Tensor, size: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Memory on the device of ``like``, in its dtype or in ``dtype``."""
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last))
