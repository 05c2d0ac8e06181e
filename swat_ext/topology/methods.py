"""Methods that keep a fixed number of weights in each layer, the others exactly zero, and now and then move some.

For comparison with SWAT on the same kernels, and for those who prefer them. A method says how many kept weights to
replace and which to grow; the layers do the rest. Another one is a subclass::

    from dataclasses import dataclass

    from swat_ext import SWATConfig, sparsify_
    from swat_ext.topology import Method


    @dataclass(frozen=True)
    class GrowLikeNeighbours(Method):
        def growth(self, weight, gradient, generator):
            return gradient.abs().mean(0, keepdim=True).expand_as(weight)


    sparsify_(model, SWATConfig(0.9, method=GrowLikeNeighbours()))
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["METHODS", "SET", "Method", "RigL", "Static", "method_of"]


@dataclass(frozen=True)
class Method:
    """How kept weights are replaced while training; a base class.

    Attributes:
        update_period: optimizer steps from one update of the patterns to the next.
        fraction: share of a layer's kept weights that the first update replaces, in [0, 1). It falls by a half cosine.
        until: share of training after which nothing is replaced any more, in (0, 1].
        seed: of the random patterns. They depend on it, on the layer's number and on the step alone, so that all ranks
            of a group draw the same.

    Raises:
        TypeError, ValueError: an attribute of another type, or out of its range.
    """

    update_period: int = 100
    fraction: float = 0.3
    until: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("update_period", int), ("fraction", (int, float)), ("until", (int, float)), ("seed", int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                what = "an integer" if kinds is int else "a number"
                raise TypeError(f"{name}: expected {what}, got {value!r}")
        if self.update_period < 1:
            raise ValueError(f"update_period: expected at least 1, in optimizer steps, got {self.update_period}")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction: expected a number in [0, 1), got {self.fraction}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until: expected a number in (0, 1], got {self.until}")

    @property
    def moves(self) -> bool:
        """Whether anything is ever replaced; to know how far training is takes a SWATScheduler with total_steps."""
        return type(self).growth is not Method.growth

    @property
    def name(self) -> str:
        """What reports and checkpoints call it."""
        return type(self).__name__.lower()

    def replaced(self, progress: float) -> float:
        """Share of the kept weights to replace when the share ``progress`` of training is done (RigL, equation 1)."""
        return self.fraction / 2 * (1 + math.cos(math.pi * progress / self.until)) if progress < self.until else 0.0

    def drop(self, weight: Tensor) -> Tensor:
        """How much each weight is worth keeping, at least 0; of the kept ones, those worth the least go."""
        return weight.abs()

    def growth(self, weight: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        """How much each weight is worth growing, at least 0; those worth the most come. Of a block, the sum counts.

        Args:
            weight: as the optimizer step left it.
            gradient: of that step, of every weight, the dropped ones too.
            generator: on the CPU, for random choices.
        """
        raise NotImplementedError(f"{type(self).__name__}.growth: expected a score for each weight")


class Static(Method):
    """Patterns that are random at the start and stay."""


class SET(Method):
    """Kept weights of the smallest magnitude give way to random ones (Mocanu et al., Nature Communications 2018)."""

    def growth(self, weight: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(weight.shape, generator=generator, device="cpu").to(weight.device)


class RigL(Method):
    """Kept weights of the smallest magnitude give way to those of the largest gradient (Evci et al., ICML 2020)."""

    def growth(self, weight: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        return gradient.abs()


METHODS: dict[str, type[Method] | None] = {"swat": None, "static": Static, "set": SET, "rigl": RigL}


def method_of(value: str | Method) -> Method | None:
    """The method that a name of :data:`METHODS` stands for, with its published settings; None is SWAT."""
    if isinstance(value, Method):
        return value
    made = METHODS[value]
    return None if made is None else made()
