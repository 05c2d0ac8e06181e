"""What ``torch.autocast`` means for a sparse layer: results in its dtype, as PyTorch's own layers have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Cast", "autocast_call", "autocast_input", "autocast_of"]

PackedTensor = Any  # functional.Packed, which that module defines over this one


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


def autocast_call(
    function: Callable[..., Tensor],
    cast: Cast,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_weight: PackedTensor,
    packed_input: PackedTensor | None,
    *arguments: object,
    **keywords: object,
) -> Tensor:
    """``function`` with everything cast, and autocast off so that it does not cast once more."""

    def packed(tensor: PackedTensor) -> PackedTensor:
        return tensor._replace(values=tensor.values.to(cast.compute))

    with torch.autocast(input.device.type, enabled=False):
        output = function(
            input.to(cast.compute),
            weight.to(cast.compute),
            None if bias is None else bias.to(cast.compute),
            packed(packed_weight),
            None if packed_input is None else packed(packed_input),
            *arguments,
            **keywords,
        )
        return output.to(cast.result)
