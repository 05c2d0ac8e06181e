"""How many elements a selection keeps, and a selection made for one call alone."""

from fractions import Fraction

import torch
from torch import Tensor

from swat_ext import ops
from swat_ext.functional import Packed

__all__ = ["kept", "kept_ratio", "select_exactly"]


def kept_ratio(sparsity: float) -> tuple[int, int]:
    """``1 - sparsity`` as numerator and denominator, of the decimal number that ``sparsity`` prints as."""
    return (1 - Fraction(repr(sparsity))).as_integer_ratio()


def kept(numel: int, ratio: tuple[int, int]) -> int:
    """``functional.keep_count`` in integers alone, which symbolic sizes of torch.compile pass through."""
    return -(-numel * ratio[0] // ratio[1])


def select_exactly(tensor: Tensor, ratio: tuple[int, int]) -> Packed:
    """``tensor`` packed with a threshold of its own."""
    if tensor.numel():
        threshold = torch.ops.swat_ext.kth_magnitude(tensor, kept(tensor.numel(), ratio))
    else:
        threshold = tensor.new_zeros(())
    limits = {}
    if tensor.device.type != "cpu":
        keep = kept(tensor.numel(), ratio)
        limits = {"keep": keep, "capacity": ops.capacity(keep, tensor.numel())}
    values, mask = torch.ops.swat_ext.compress(tensor, threshold, **limits)
    return Packed(values, mask, tensor.shape)
