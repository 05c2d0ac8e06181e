"""Synthetic images of any size, for timing and for tests: each class is a fixed random picture, seen through noise."""

import copy

import torch
from torch import Tensor

from swat_ext.data.base import Batch, Data, check_count, keyed_generator

__all__ = ["Synthetic"]


class Synthetic(Data):
    """Images ``picture[label] + noise``, made when they are asked for; nothing but the pictures is kept in memory.

    Args:
        shape: ``(C, H, W)`` of an image.
        num_classes: number of pictures.
        train_size: images in an epoch, with fresh noise every epoch.
        test_size: images in the test set.

    Raises:
        TypeError, ValueError: an argument that is no integer, or below 1.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int = 10,
        train_size: int = 8192,
        test_size: int = 1024,
    ) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape: expected three sizes of at least 1, got {shape}")
        for name, value in (("num_classes", num_classes), ("train_size", train_size), ("test_size", test_size)):
            check_count(name, value)
        self.name = "synthetic"
        self.num_classes = num_classes
        self.shape = shape
        self.train_size, self.test_size = train_size, test_size
        self._noise = "test"
        self._pictures = torch.randn(num_classes, *shape, generator=keyed_generator("synthetic", "pictures"))

    def _see(self, indices: Tensor, noise: Tensor) -> Batch:
        labels = indices % self.num_classes
        return noise.add_(self._pictures[labels], alpha=0.5), labels

    def train_batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        return self._see(indices, torch.randn(len(indices), *self.shape, generator=generator))

    def test_batch(self, indices: Tensor) -> Batch:
        # A generator an image, so that the test set does not depend on the size of the batches.
        noise = [
            torch.randn(self.shape, generator=keyed_generator("synthetic", self._noise, i)) for i in indices.tolist()
        ]
        return self._see(indices, torch.stack(noise))

    def validation(self) -> "Synthetic":
        """Other noise in the test set."""
        other = copy.copy(self)
        other._noise = "validation"
        return other
