"""How many elements a layer keeps."""

from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

__all__ = ["Budget"]

# What the kernels count with.
_LARGEST = 2**62


class Budget(NamedTuple):
    """The share of elements to keep, ``1 - sparsity``, as a fraction of integers in (0, 1].

    Integers alone, so that symbolic sizes of torch.compile pass through :meth:`count`.
    """

    numerator: int
    denominator: int

    @classmethod
    def of(cls, sparsity: float) -> "Budget":
        """The budget of ``sparsity``, taken as the decimal number that it prints as: 0.9 of 1000 keeps 100, not 101."""
        share = Fraction(1 - Decimal(repr(float(sparsity)))).limit_denominator(_LARGEST)
        return cls(*share.as_integer_ratio())

    @classmethod
    def kept(cls, count: int, numel: int) -> "Budget":
        """The budget that keeps exactly ``count`` of ``numel`` elements; at least 1."""
        return cls(*Fraction(min(max(count, 1), numel), numel).as_integer_ratio()) if numel else cls(1, 1)

    @property
    def sparsity(self) -> float:
        """The share of elements to drop, in [0, 1)."""
        return float(1 - Fraction(self.numerator, self.denominator))

    def count(self, numel: int) -> int:
        """Elements to keep of ``numel``: ``ceil((1 - sparsity) * numel)`` (spec: "Selection")."""
        return -(-numel * self.numerator // self.denominator)
