"""What ``torch.autocast`` means for a sparse layer: results in its dtype, as PyTorch's own layers have."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Cast", "autocast_input", "autocast_of"]


class Cast(NamedTuple):
    """Under autocast: the dtype that is computed in, and that of the result."""

    compute: torch.dtype
    result: torch.dtype


def autocast_of(input: object) -> Cast | None:
    """What ``torch.autocast`` asks of a layer with this input; None where it is off or leaves it alone (float64).

    The CPU kernels have no half types: there the layer computes in float32 and rounds its result alone.
    """
    if not isinstance(input, Tensor) or input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    kind = input.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    result = torch.get_autocast_dtype(kind)
    return Cast(torch.float32 if kind == "cpu" else result, result)


def autocast_input(input: Tensor) -> Tensor:
    """``input`` in the dtype that is selected, packed and computed in: not always its own under autocast."""
    cast = autocast_of(input)
    return input if cast is None else input.to(cast.compute)
