"""What every data set is to the training loop: batches that are functions of (seed, epoch, batch) and of nothing else.

So a run that is resumed, or that loads on several threads, sees bit for bit the batches of one that was not.
"""

import hashlib
import operator
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["VALIDATION_FRACTION", "Batch", "Data", "check_count", "keyed_generator", "stratified_split"]

Batch = tuple[Tensor, Tensor]

# Share of the training images that Data.validation() takes.
VALIDATION_FRACTION = 0.2


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise TypeError where argument ``name`` is no integer, ValueError where it is below ``least``."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {count}")


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on ``key`` alone; different keys give unrelated streams."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stratified_split(labels: Tensor, test_fraction: float, key: str) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part, both with every class in proportion.

    Args:
        labels: int64 ``[N]``.
        test_fraction: share of each class that goes to the test part, in (0, 1).
        key: names the split; the same key always gives the same one.

    Returns:
        int64 training and test indices, each ascending.
    """
    train, test = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=keyed_generator("split", key, label))
        held_out = round(test_fraction * len(members))
        test.append(members[order[:held_out]])
        train.append(members[order[held_out:]])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


class Data(ABC):
    """A training and a test set of images of one shape.

    Attributes:
        name: as on the command line.
        num_classes: labels are 0 to ``num_classes - 1``.
        shape: ``(C, H, W)`` of an image.
        train_size, test_size: images in an epoch and in the test set.
    """

    name: str
    num_classes: int
    shape: tuple[int, int, int]
    train_size: int
    test_size: int

    @abstractmethod
    def train_batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        """Training images ``indices`` (int64 ``[B]``), augmented with ``generator``: float32 ``[B, C, H, W]``, int64
        ``[B]``."""

    @abstractmethod
    def test_batch(self, indices: Tensor) -> Batch:
        """Test images ``indices`` (int64 ``[B]``): float32 ``[B, C, H, W]`` and int64 labels ``[B]``."""

    def validation(self) -> "Data":
        """The same data with another test set, cut from the training images, which lose it: settings are chosen on it,
        and the test set stays unseen.

        Raises:
            NotImplementedError: this kind of data cannot.
        """
        raise NotImplementedError(f"data {self.name!r} has no validation part")

    def train_steps(self, batch_size: int) -> int:
        """Batches in an epoch: whole ones alone, unless there is not even one."""
        return max(1, self.train_size // batch_size)

    def train_batches(self, batch_size: int, *, seed: int, epoch: int, workers: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, shuffled and augmented.

        The images that do not fill a last batch wait for another epoch's shuffle.

        Args:
            batch_size: images in a batch.
            seed, epoch: together they choose the order and the augmentation.
            workers: threads that prepare batches ahead; 0 prepares each one when it is asked for. The batches are the
                same.
        """
        check_count("batch_size", batch_size)
        check_count("workers", workers, 0)
        order = torch.randperm(self.train_size, generator=keyed_generator("order", seed, epoch))

        def prepare(batch: int) -> Batch:
            indices = order[batch * batch_size : (batch + 1) * batch_size]
            return self.train_batch(indices, keyed_generator("augment", seed, epoch, batch))

        return _prepare_ahead(prepare, self.train_steps(batch_size), workers)

    def test_batches(self, batch_size: int, *, workers: int = 0) -> Iterator[Batch]:
        """The test set, in order, the last batch perhaps smaller; arguments as in :meth:`train_batches`."""
        check_count("batch_size", batch_size)
        check_count("workers", workers, 0)
        parts = torch.arange(self.test_size).split(batch_size)
        return _prepare_ahead(lambda batch: self.test_batch(parts[batch]), len(parts), workers)


def _prepare_ahead(prepare: Callable[[int], Batch], count: int, workers: int) -> Iterator[Batch]:
    if workers == 0:
        yield from map(prepare, range(count))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="swat-data") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for batch in range(count):
                waiting.append(pool.submit(prepare, batch))
                # One batch more than threads, so that no thread waits for the training step to take a batch.
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
