"""The two memory formats that tensors are made in: contiguous, and channels_last."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty", "is_channels_last", "memory_format"]


def is_channels_last(tensor: Tensor) -> bool:
    """Whether ``tensor`` lies in memory as ``[N, H, W, C]`` and not also as ``[N, C, H, W]``."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty(like: Tensor, size: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Memory on the device of ``like``, in its dtype or in ``dtype``."""
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last))
