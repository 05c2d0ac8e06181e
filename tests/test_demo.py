"""The demo at a tiny size: what it measures, its table and its picture."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swat_ext import demo, keep_freed_memory, report
from swat_ext.models import resnet18
from swat_ext.training.comparison import Comparison, Outcome
from swat_ext.training.figure import draw

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_as_before() -> Iterator[None]:
    yield
    keep_freed_memory(False)


TINY = {"width": 0.125, "epochs": 2, "samples": 32, "test_samples": 32, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def result() -> Comparison:
    return demo.compare(**TINY)  # type: ignore[arg-type]


def test_both_runs_are_measured(result: Comparison) -> None:
    model = resnet18(16, in_channels=1, width=0.125)
    dense_flops = report(model, input_size=(16, 1, 32, 32)).dense_flops
    assert dense_flops is not None
    assert result.dense.flops == pytest.approx(4 * dense_flops)
    # The first convolution stays dense; everything else does a tenth of the work.
    assert 0.1 < (result.swat.flops / result.swat.epochs) / (result.dense.flops / 2) < 0.15
    assert result.swat.held_bytes < 0.8 * result.dense.held_bytes
    assert result.dense.epochs == 2
    for run in (result.dense, result.swat):
        assert len(run.losses) == 2 * run.epochs
        assert len(run.test_accuracies) == len(run.seconds) == run.epochs
        assert run.test_accuracy == run.test_accuracies[-1]
        assert 0 < run.seconds[0] <= run.seconds[-1]
        assert run.seconds[-1] >= run.epochs * run.step_ms / 1000  # half of the steps take the median or more


@pytest.mark.parametrize(("ratio", "epochs"), [(2.49, 7), (1.0, 3), (0.2, 1)])
def test_the_sparse_run_has_the_epochs_that_fit_in_the_time(
    ratio: float, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_trial", lambda *arguments: ("channels_last", 1.0, ratio))
    found = demo.compare(**{**TINY, "epochs": 3})  # type: ignore[arg-type]
    assert (found.dense.epochs, found.swat.epochs) == (3, epochs)


@pytest.mark.parametrize(("seconds", "epochs"), [(1e-3, 4), (25.0, 2), (1e3, 1)])
def test_the_dense_run_has_the_epochs_of_two_minutes(
    seconds: float, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_trial", lambda *arguments: ("channels_last", seconds, 1.0))
    found = demo.compare(**{**TINY, "epochs": None})  # type: ignore[arg-type]
    assert (found.dense.epochs, found.swat.epochs) == (epochs, epochs)


def test_the_trial_measures_every_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layouts of the dense network and the sparse one: the faster layout, and how much faster the last is."""
    took = {"dense, contiguous": 3.0, "dense, channels_last": 2.0, "swat, channels_last": 0.5}
    now = [0.0]

    def stepper(model: str, data: object, recipe: object, layout: torch.memory_format) -> object:
        name = f"{model}, {'channels_last' if layout is torch.channels_last else 'contiguous'}"

        def step() -> None:
            now[0] += took[name]

        return step

    monkeypatch.setattr(demo, "_stepper", stepper)
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])
    assert demo._trial("dense", "swat", None, None) == ("channels_last", 2.0, 4.0)  # type: ignore[arg-type]


def test_without_zeros_the_runs_start_the_same() -> None:
    found = demo.compare(**{**TINY, "sparsity": 0.0, "epochs": 1})  # type: ignore[arg-type]
    assert found.swat.losses[0] == pytest.approx(found.dense.losses[0], rel=1e-4)
    assert found.swat.flops / found.swat.epochs == found.dense.flops
    assert found.swat.name == "SWAT 0/0"


def test_activation_sparsity_can_differ() -> None:
    found = demo.compare(**{**TINY, "activation_sparsity": 0.0, "epochs": 1})  # type: ignore[arg-type]
    assert found.swat.name == "SWAT 90/0"
    assert found.swat.flops / found.swat.epochs > 0.4 * found.dense.flops


def test_the_seed_decides() -> None:
    losses = [demo.compare(**{**TINY, "epochs": 1, "seed": seed}).dense.losses for seed in (1, 1, 2)]  # type: ignore[arg-type]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("has", "words"), [(True, "freed memory kept"), (False, "freed memory left to the system")])
def test_both_runs_have_one_allocator(has: bool, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    train = demo._train
    monkeypatch.setattr(demo, "keep_freed_memory", lambda: order.append("keep") or has)
    monkeypatch.setattr(
        demo, "_train", lambda name, *rest, **options: order.append(name) or train(name, *rest, **options)
    )
    found = demo.compare(**{**TINY, "epochs": 1})  # type: ignore[arg-type]
    assert order == ["keep", "dense", "SWAT 90/90"]
    assert f"{words} in both" in found.conditions


def _outcome(name: str, accuracy: float, flops: float, step_ms: float, held: int) -> Outcome:
    return Outcome(name, "contiguous", 2, accuracy, flops, step_ms, held, [2.0, 1.0], [1.0, 2.0], [0.5, accuracy])


def test_the_table_says_which_way_it_went() -> None:
    better = Comparison(_outcome("dense", 0.7, 2e12, 300, 2**20), _outcome("SWAT", 0.72, 5e11, 100, 2**19), "here")
    assert [row[3] for row in better.rows()] == [
        "+2.0 points",
        "+0%",
        "1.0x",
        "4.00x fewer",
        "3.00x faster",
        "50% less",
    ]
    assert better.verdict == "In the time of 2 dense epochs SWAT is 2.0 points better."
    worse = Comparison(better.swat, better.dense, "here")
    assert [row[3] for row in worse.rows()] == [
        "-2.0 points",
        "+0%",
        "1.0x",
        "4.00x more",
        "3.00x slower",
        "100% more",
    ]
    assert worse.verdict == "In the time of 2 dense epochs dense is 2.0 points behind."
    table = str(better)
    for text in ("70.0%", "2.00 T", "300 ms", "1.00 MiB", "512 KiB", "here"):
        assert text in table


def test_the_picture_is_drawn(result: Comparison, tmp_path: Path) -> None:
    draw(result, tmp_path / "a.png")
    with image_module.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**20)}
    assert {(0x8A, 0x93, 0xA0), (0xD1, 0x49, 0x5B), (255, 255, 255)} <= colours


def test_the_picture_shows_the_figures(result: Comparison, tmp_path: Path) -> None:
    draw(result, tmp_path / "a.png")
    draw(replace(result, swat=replace(result.swat, step_ms=7 * result.swat.step_ms)), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--width", "0.125", "--epochs", "1", "--samples", "32", "--test-samples", "32", "--batch-size", "16"]
    assert demo.main([*sizes, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("test accuracy", "training FLOPs", "step time", "held for the backward pass", "demo.png shows it"):
        assert text in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["dense"]["held_bytes"] > found["swat"]["held_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--sparsity", "2"], "sparsity"), (["--threads", "0"], "threads"), (["--samples", "0"], "error: samples: ")],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    assert demo.main([*arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("demo: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert torch.get_num_threads() == threads


def test_a_missing_matplotlib_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # None in sys.modules makes an import fail; the message is then Python's own name for it.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(demo, "compare", lambda **arguments: pytest.fail("it trained"))
    assert demo.main(["--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("demo: error: the demo's picture needs matplotlib, which is not installed: pip install")
    assert error.count("\n") == 1
