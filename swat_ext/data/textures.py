"""Textures: which of sixteen photographs does a small grey patch come from?

The photographs ship in scikit-image's wheel, so that this real, not quite easy problem needs no download. A patch is
grey, brought to zero mean and unit variance, turned and mirrored at random, and noisy: neither colour nor brightness
gives the answer away. Patches are cut from the left 70% of each picture for training and from the rest for testing;
none crosses the border.
"""

import copy
import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor

from swat_ext.data.base import VALIDATION_FRACTION, Batch, Data, check_count, keyed_generator
from swat_ext.data.extras import require

__all__ = ["PICTURES", "Textures", "picture_folder"]

# Class name and file in scikit-image's data folder, in the order of the labels.
PICTURES = {
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "coins": "coins.png",
    "moon": "moon.png",
    "camera": "camera.png",
    "astronaut": "astronaut.png",
    "coffee": "coffee.png",
    "chelsea": "chelsea.png",
    "rocket": "rocket.jpg",
    "retina": "retina.jpg",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "cell": "cell.png",
    "page": "page.png",
    "motorcycle": "motorcycle_left.png",
}

TRAIN_FRACTION = 0.7
NOISE = 0.2

# Grey levels added to a patch's deviation before dividing by it, so that a flat patch does not become amplified
# rounding error.
_FLAT = 2.0


def picture_folder() -> Path:
    """The folder of scikit-image's wheel that holds the photographs.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        require("skimage", "scikit-image", "data 'textures'")
        raise ModuleNotFoundError("data 'textures' needs scikit-image installed as a package of files", name="skimage")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _load_pictures() -> list[Tensor]:
    """The pictures of :data:`PICTURES`, grey, uint8 ``[H, W]`` each."""
    numpy = require("numpy", "numpy", "data 'textures'")
    image = require("PIL.Image", "pillow", "data 'textures'")
    folder = picture_folder()
    missing = [file for file in PICTURES.values() if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"data 'textures' needs photographs that this scikit-image does not ship: {', '.join(missing)} "
            f"in {folder}; version 0.26 has them all"
        )
    pictures = []
    for file in PICTURES.values():
        with image.open(folder / file) as picture:
            pictures.append(torch.from_numpy(numpy.array(picture.convert("L"))))
    return pictures


class Textures(Data):
    """See the module's docstring.

    Args:
        train_size: patches in an epoch, drawn anew every epoch; as many of each picture as can be.
        test_size: patches in the test set, which is always the same.
        patch: rows and columns of a patch.
        noise: standard deviation of the Gaussian noise, in units of the patch's own.

    Raises:
        TypeError, ValueError: an argument out of its range.
        ModuleNotFoundError, FileNotFoundError: the photographs are not there.
    """

    def __init__(self, train_size: int = 8192, test_size: int = 2048, *, patch: int = 32, noise: float = NOISE) -> None:
        check_count("train_size", train_size)
        check_count("test_size", test_size)
        check_count("patch", patch)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise: expected a finite number of at least 0, got {noise}")
        pictures = _load_pictures()
        self.name = "textures"
        self.num_classes = len(pictures)
        self.shape = (1, patch, patch)
        self.train_size, self.test_size = train_size, test_size
        self.patch, self.noise = patch, noise
        heights, widths = torch.tensor([picture.shape for picture in pictures]).T
        borders = (TRAIN_FRACTION * widths).long()
        smallest = int(torch.cat([heights, borders, widths - borders]).min())
        if patch > smallest:
            raise ValueError(f"patch: expected from 1 to {smallest}, got {patch}")
        # All pictures in one row of pixels, so that one gather cuts a whole batch from them.
        self._pixels = torch.cat([picture.flatten() for picture in pictures])
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), (heights * widths).cumsum(0)[:-1]])
        # Training patches end at the border, test patches at the end.
        self._heights, self._borders, self._ends = heights, borders, widths
        self._widths = widths
        self._test = self._cut(torch.arange(test_size), False, keyed_generator("textures", "test"))

    def corners(self, labels: Tensor, train: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random top rows and left columns (int64 ``[B]``) of patches that lie wholly in the training or in the test
        part."""
        first = torch.zeros_like(labels) if train else self._borders[labels]
        last = (self._borders if train else self._ends)[labels] - self.patch
        where = torch.rand(2, len(labels), dtype=torch.float64, generator=generator)
        top = (where[0] * (self._heights[labels] - self.patch + 1)).long()
        left = first + (where[1] * (last - first + 1)).long()
        return top, left

    def validation(self) -> "Textures":
        """Test patches from the right fifth of what the training part was, training patches from the rest of it.

        Raises:
            ValueError: a patch is wider than that fifth.
        """
        other = copy.copy(self)
        other._ends, other._borders = self._borders, ((1 - VALIDATION_FRACTION) * self._borders).long()
        narrowest = int((other._ends - other._borders).min())
        if self.patch > narrowest:
            raise ValueError(f"patch: expected from 1 to {narrowest} to validate on textures, got {self.patch}")
        other._test = other._cut(torch.arange(self.test_size), False, keyed_generator("textures", "validation"))
        return other

    def _cut(self, indices: Tensor, train: bool, generator: torch.Generator) -> Batch:
        labels = indices % self.num_classes
        batch, patch = len(labels), self.patch
        top, left = self.corners(labels, train, generator)
        turn = torch.randint(8, (batch, 1, 1), generator=generator)  # the eight symmetries of a square
        along = torch.arange(patch)
        rows, columns = along.view(1, -1, 1).expand(batch, -1, patch), along.view(1, 1, -1).expand(batch, patch, -1)
        rows, columns = torch.where(turn >= 4, columns, rows), torch.where(turn >= 4, rows, columns)
        rows = torch.where(turn % 2 == 1, patch - 1 - rows, rows)
        columns = torch.where(turn // 2 % 2 == 1, patch - 1 - columns, columns)
        corner = self._starts[labels] + top * self._widths[labels] + left
        pixels = self._pixels[corner.view(-1, 1, 1) + rows * self._widths[labels].view(-1, 1, 1) + columns].float()
        deviation, mean = torch.std_mean(pixels, (1, 2), keepdim=True, correction=0)
        noise = torch.randn(pixels.shape, generator=generator)
        return ((pixels - mean) / (deviation + _FLAT)).add_(noise, alpha=self.noise).unsqueeze(1), labels

    def train_batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        return self._cut(indices, True, generator)

    def test_batch(self, indices: Tensor) -> Batch:
        return self._test[0][indices], self._test[1][indices]
