"""Which elements of a tensor are kept, and a tensor of those alone."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed", "Pattern", "pack", "take"]


class Packed(NamedTuple):
    """A tensor with most elements dropped.

    Attributes:
        values: ``[kept]``, the kept elements in logical row-major order; may be longer, the rest is not read.
        mask: int64 ``[ceil(numel / 64) + ceil(numel / 1024)]``: a bit an element, then the kept before each 1024.
        size: shape of the dense tensor.
    """

    values: Tensor
    mask: Tensor
    size: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes held by ``values`` and ``mask``."""
        return self.values.nbytes + self.mask.nbytes

    @property
    def pattern(self) -> "Pattern":
        """Which elements these are."""
        return Pattern(self.mask, self.size, self.values.shape[0])


class Pattern(NamedTuple):
    """Which elements of a tensor are kept.

    Attributes:
        mask: as that of :class:`Packed`.
        size: shape of the tensor.
        kept: elements kept, or more where their number is not known without waiting for a device.
    """

    mask: Tensor
    size: torch.Size
    kept: int

    @classmethod
    def of(cls, kept: Tensor) -> "Pattern":
        """The pattern of a bool tensor: True is kept."""
        values, mask = torch.ops.swat_ext.compress(kept.float(), torch.tensor(0.5, device=kept.device))
        return cls(mask, kept.shape, values.shape[0])

    def dense(self) -> Tensor:
        """Bool, of :attr:`size`."""
        ones = torch.ones(self.kept, device=self.mask.device)
        return torch.ops.swat_ext.decompress(ones, self.mask, self.size, False) != 0


def pack(tensor: Tensor, pattern: Pattern) -> Packed:
    """The elements of ``tensor`` that ``pattern`` keeps, zeros too, packed without gradient."""
    return Packed(take(tensor.detach(), pattern.mask, pattern.kept), pattern.mask, pattern.size)


def take(tensor: Tensor, mask: Tensor, count: int) -> Tensor:
    """The elements of ``tensor`` whose bits are set in ``mask``, in logical order, ``[count]``."""
    if tensor.device.type == "cuda":
        return _take_by_place(tensor, mask, count)
    return torch.ops.swat_ext.take(tensor, mask, count)


def _take_by_place(tensor: Tensor, mask: Tensor, count: int) -> Tensor:
    """:func:`take` where it is no operator; where ``mask`` has fewer bits than ``count``, the rest is zeros."""
    ones = tensor.new_ones([count])
    kept = (torch.ops.swat_ext.decompress(ones, mask, tensor.shape, False) != 0).flatten()
    # What is not kept goes to a place behind all others.
    place = torch.where(kept, kept.cumsum(0) - 1, count)
    return tensor.new_zeros([count + 1]).scatter_(0, place, tensor.flatten())[:count]
