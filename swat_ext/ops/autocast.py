"""What ``torch.autocast`` means for a sparse layer: operands and results in its dtype, as in PyTorch's own layers."""

import torch
from torch import Tensor

__all__ = ["autocast_input", "autocast_of"]


def autocast_of(input: object) -> torch.dtype | None:
    """The dtype of a layer with this input under ``torch.autocast``; None where it is off or leaves it (float64)."""
    if not isinstance(input, Tensor) or input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    kind = input.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_input(input: Tensor) -> Tensor:
    """``input`` in the dtype that is selected, packed and multiplied in: not always its own under autocast."""
    dtype = autocast_of(input)
    return input if dtype is None else input.to(dtype)
