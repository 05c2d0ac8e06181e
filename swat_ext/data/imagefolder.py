"""Folders of images, one folder a class, as ImageNet is usually unpacked."""

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swat_ext.data.base import VALIDATION_FRACTION, Batch, Data, check_count, stratified_split
from swat_ext.data.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFolder"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

# Mean and standard deviation of ImageNet's pixels, scaled to [0, 1].
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

# A training crop covers this share of the image's area and has this range of width / height (Szegedy et al. 2015).
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10

# A test image's shorter side is this many times the crop that is taken from its centre (256 pixels for 224).
_TEST_MARGIN = 256 / 224


class ImageFolder(Data):
    """``data_dir/train/<class>/*`` and ``data_dir/val/<class>/*`` (or ``test``), decoded when asked for.

    A training image is a random crop, resized and mirrored half of the time; a test image is resized by its shorter
    side and cropped at the centre. Images become RGB and are normalised by ImageNet's mean and deviation.

    Args:
        data_dir: the folder that holds ``train`` and ``val``.
        image_size: rows and columns of an image.

    Raises:
        ModuleNotFoundError: pillow is not installed.
        FileNotFoundError: a folder is missing, or a class's folder holds no image.
        TypeError, ValueError: ``image_size`` is no integer of at least 1; a class only in ``val``; while training, a
            file that cannot be decoded.
    """

    def __init__(self, data_dir: str | Path, image_size: int = 224) -> None:
        self._image = require("PIL.Image", "pillow", "data 'imagefolder'")
        self._numpy = require("numpy", "numpy", "data 'imagefolder'")
        check_count("image_size", image_size)
        root = Path(data_dir)
        train_folder = root / "train"
        test_folder = next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")
        for folder in (train_folder, test_folder):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"data_dir: expected the folders train and val (or test) in {root}, found no {folder.name}"
                )
        self.classes = sorted(path.name for path in train_folder.iterdir() if path.is_dir())
        self._train = self._files(train_folder)
        self._test = self._files(test_folder)
        self.name = "imagefolder"
        self.num_classes = len(self.classes)
        self.shape = (3, image_size, image_size)
        self.train_size, self.test_size = len(self._train), len(self._test)
        self._mean = torch.tensor(_MEAN).view(3, 1, 1)
        self._std = torch.tensor(_STD).view(3, 1, 1)

    def _files(self, folder: Path) -> list[tuple[Path, int]]:
        present = sorted(path.name for path in folder.iterdir() if path.is_dir())
        unknown = [name for name in present if name not in self.classes]
        if unknown:
            raise ValueError(f"data_dir: {folder} has classes that the training folder lacks: {', '.join(unknown[:5])}")
        files = [
            (path, label)
            for label, name in enumerate(self.classes)
            if name in present
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in EXTENSIONS and path.is_file()
        ]
        filled = {label for _, label in files}
        empty = [name for label, name in enumerate(self.classes) if name in present and label not in filled]
        if empty or not files:
            found = f"no image in {', '.join(empty[:5])}" if empty else "no folder"
            raise FileNotFoundError(f"data_dir: expected a folder of images for each class in {folder}, found {found}")
        return files

    def _open(self, path: Path) -> "Image":
        try:
            with self._image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # Pillow raises whatever its decoders meet
            raise ValueError(f"data_dir: {path} cannot be read as an image: {error}") from error

    def _tensor(self, image: "Image") -> Tensor:
        pixels = torch.from_numpy(self._numpy.array(image)).permute(2, 0, 1)
        return (pixels.float() / 255 - self._mean) / self._std

    def _train_image(self, path: Path, random: Tensor) -> Tensor:
        """One augmented image; ``random`` is float64 ``[2 * _TRIES + 3]`` in [0, 1)."""
        image = self._open(path)
        side = self.shape[1]
        box = _random_box(image.width, image.height, random[1:])
        image = image.resize((side, side), self._image.Resampling.BILINEAR, box=box)
        if random[0] < 0.5:
            image = image.transpose(self._image.Transpose.FLIP_LEFT_RIGHT)
        return self._tensor(image)

    def _test_image(self, path: Path) -> Tensor:
        image = self._open(path)
        side = self.shape[1]
        scale = round(side * _TEST_MARGIN) / min(image.size)
        # The centre crop is cut from the image itself, and resized once.
        width, height = side / scale, side / scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
        return self._tensor(image.resize((side, side), self._image.Resampling.BILINEAR, box=box))

    def train_batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        files = [self._train[i] for i in indices.tolist()]
        random = torch.rand(len(files), 2 * _TRIES + 3, dtype=torch.float64, generator=generator)
        images = [self._train_image(path, row) for (path, _), row in zip(files, random, strict=True)]
        return torch.stack(images), torch.tensor([label for _, label in files])

    def test_batch(self, indices: Tensor) -> Batch:
        files = [self._test[i] for i in indices.tolist()]
        return torch.stack([self._test_image(path) for path, _ in files]), torch.tensor([label for _, label in files])

    def validation(self) -> "ImageFolder":
        """A fixed fifth of each class of the training images is the test set."""
        labels = torch.tensor([label for _, label in self._train])
        train, test = stratified_split(labels, VALIDATION_FRACTION, f"{self.name} validation")
        if not len(test):
            raise ValueError(f"data {self.name!r}: expected at least 3 training images of a class to validate on")
        other = copy.copy(self)
        other._train, other._test = ([self._train[i] for i in part.tolist()] for part in (train, test))
        other.train_size, other.test_size = len(train), len(test)
        return other


def _random_box(width: int, height: int, random: Tensor) -> tuple[int, int, int, int]:
    """A crop ``(left, top, right, bottom)`` by the rule of Szegedy et al. 2015; ``random`` is ``[2 * _TRIES + 2]`` in
    [0, 1)."""
    *tries, down, across = random.tolist()
    for share, shape in zip(tries[::2], tries[1::2], strict=True):
        area = width * height * (_AREA[0] + share * (_AREA[1] - _AREA[0]))
        aspect = math.exp(math.log(_ASPECT[0]) + shape * (math.log(_ASPECT[1]) - math.log(_ASPECT[0])))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= columns <= width and 1 <= rows <= height:
            left, top = int(across * (width - columns + 1)), int(down * (height - rows + 1))
            return left, top, left + columns, top + rows
    # A very long image: the largest crop at its centre whose shape is allowed.
    columns, rows = min(width, max(1, round(height * _ASPECT[1]))), min(height, max(1, round(width / _ASPECT[0])))
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows
