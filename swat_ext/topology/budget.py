"""How many elements a layer keeps."""

from decimal import Decimal
from typing import NamedTuple

__all__ = ["Budget"]


class Budget(NamedTuple):
    """The share of elements to keep, ``1 - sparsity``, as a fraction of integers.

    Integers alone, so that symbolic sizes of torch.compile pass through :meth:`count`.
    """

    numerator: int
    denominator: int

    @classmethod
    def of(cls, sparsity: float) -> "Budget":
        """The budget of ``sparsity``, taken as the decimal number that it prints as: 0.9 of 1000 keeps 100, not 101."""
        return cls(*(1 - Decimal(repr(float(sparsity)))).as_integer_ratio())

    def count(self, numel: int) -> int:
        """Elements to keep of ``numel``: ``ceil((1 - sparsity) * numel)`` (spec: "Selection")."""
        return -(-numel * self.numerator // self.denominator)
