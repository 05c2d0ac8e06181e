"""Texture patches: where they are cut, what they look like, and what is said where the photographs are missing."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from swat_ext.data import Textures, keyed_generator
from swat_ext.data.textures import PICTURES, TRAIN_FRACTION, _load_pictures


def _symmetries(patch: torch.Tensor) -> list[torch.Tensor]:
    return [turned for p in (patch, patch.T) for k in range(4) for turned in [torch.rot90(p, k)]]


@pytest.fixture(scope="module")
def quiet_textures() -> Textures:
    return Textures(256, 256, noise=0.0)


def test_all_sixteen_photographs_are_there(quiet_textures: Textures) -> None:
    assert quiet_textures.num_classes == len(PICTURES) == 16
    _, labels = quiet_textures.train_batch(torch.arange(64), keyed_generator(0))
    assert labels.bincount().tolist() == [4] * 16


@pytest.mark.parametrize("train", [True, False])
def test_no_patch_crosses_the_border(quiet_textures: Textures, train: bool) -> None:
    pictures = _load_pictures()
    labels = torch.arange(16).repeat(2000)
    top, left = quiet_textures.corners(labels, train, keyed_generator("corners"))
    for label, picture in enumerate(pictures):
        height, width = picture.shape
        border = int(TRAIN_FRACTION * width)
        rows, columns = top[labels == label], left[labels == label]
        low, high = (0, border) if train else (border, width)
        assert int(rows.min()) >= 0
        assert int(rows.max()) + 32 <= height
        assert int(columns.min()) >= low
        assert int(columns.max()) + 32 <= high
        # All of the part is used.
        assert int(columns.min()) - low < 0.02 * width
        assert high - int(columns.max()) - 32 < 0.02 * width


@pytest.mark.parametrize("train", [True, False])
def test_a_patch_is_a_turned_normalised_cut(quiet_textures: Textures, train: bool) -> None:
    pictures = _load_pictures()
    indices = torch.arange(160)
    images, labels = quiet_textures._cut(indices, train, keyed_generator("cut"))
    top, left = quiet_textures.corners(labels, train, keyed_generator("cut"))
    used = set()
    for image, label, row, column in zip(images, labels.tolist(), top.tolist(), left.tolist(), strict=True):
        cut = pictures[label][row : row + 32, column : column + 32].double()
        cut = (cut - cut.mean()) / (cut.std(correction=0) + 2)
        matches = [
            k for k, turned in enumerate(_symmetries(cut)) if torch.allclose(image[0].double(), turned, atol=1e-4)
        ]
        assert matches
        if len(matches) == 1:
            used.add(matches[0])
    assert used == set(range(8))


def test_noise_has_the_deviation_asked_for(quiet_textures: Textures) -> None:
    noisy = Textures(256, 256, noise=0.7)
    difference = noisy.test_batch(torch.arange(256))[0] - quiet_textures.test_batch(torch.arange(256))[0]
    assert abs(float(difference.std()) - 0.7) < 0.01


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"train_size": 0}, "train_size: expected at least 1, got 0"),
        ({"test_size": -1}, "test_size: expected at least 1, got -1"),
        ({"noise": -1.0}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"patch": 0}, "patch: expected at least 1, got 0"),
        ({"patch": 500}, "patch: expected from 1 to"),
    ],
)
def test_wrong_texture_arguments_are_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Textures(**arguments)


def test_a_missing_scikit_image_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        if name == "skimage":
            raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
        return import_module(name)

    import_module = importlib.import_module
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-image.*swat_ext\[train\]"):
        Textures()


def test_a_missing_photograph_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("swat_ext.data.textures.picture_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"brick\.png, grass\.png"):
        Textures()


def test_validation_patches_lie_between_training_patches_and_the_border(quiet_textures: Textures) -> None:
    part = quiet_textures.validation()
    labels = torch.arange(16).repeat(1000)
    for label, picture in enumerate(_load_pictures()):
        border = int(TRAIN_FRACTION * picture.shape[1])
        inner = int(0.8 * border)
        for train, low, high in ((True, 0, inner), (False, inner, border)):
            _, left = part.corners(labels, train, keyed_generator("corners"))
            columns = left[labels == label]
            assert int(columns.min()) >= low
            assert int(columns.max()) + part.patch <= high
            assert int(columns.max()) - int(columns.min()) > 0.9 * (high - low - part.patch) - 1
    with pytest.raises(ValueError, match="patch: expected from 1 to 54 to validate on textures, got 60"):
        Textures(16, 16, patch=60).validation()
