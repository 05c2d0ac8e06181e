"""A tensor with most elements dropped."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed"]


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
