"""The benchmarks run, on something small, and write what they say."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import swat_ext

BENCH = Path(__file__).parents[1] / "bench"


def _run(*arguments: str, script: str = "layers.py") -> subprocess.CompletedProcess[str]:
    """A script of bench/, on the swat_ext that is tested here."""
    paths = [str(Path(swat_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(BENCH / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_layers(tmp_path: Path) -> None:
    out = tmp_path / "new" / "layers.json"
    done = _run("--batch", "1", "--rounds", "1", "--sparsity", "90", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"cpu", "isa", "threads", "torch"} <= result["conditions"].keys()
    assert [layer["channels"] for layer in result["layers"]] == [64, 128, 256, 512]
    assert all(timing["median_ms"] > 0 for layer in result["layers"] for timing in layer["timings"].values())
    assert len(result["totals"]) == 1
    assert out.with_suffix(".md").read_text(encoding="utf-8").strip() in done.stdout
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_wrong_sparsity_is_explained() -> None:
    done = _run("--sparsity", "0.9")
    assert done.returncode == 2
    assert "whole percentages in [0, 100)" in done.stderr
    assert "'0.9'" in done.stderr


def test_train_step(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ["--models", "vgg16", "--width", "0.125", "--batch", "2", "--sparsity", "80,90", "--rounds", "1"]
    options += ["--topk-period", "2", "--threads", "1", "--out", str(out)]
    done = _run(*options, script="train_step.py")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {"cpu", "isa", "torch"} <= row["conditions"].keys()
    assert row["conditions"]["threads"] == 1
    assert set(row["timings"]) == {"80%", "90%", "dense NCHW", "dense channels_last"}
    fastest = min(row["timings"][f"dense {layout}"]["median_ms"] for layout in ("NCHW", "channels_last"))
    assert row["ratios"]["90%"] == pytest.approx(fastest / row["timings"]["90%"]["median_ms"])
    for name, part in row["breakdown"].items():
        for category in ("convolution forward", "input gradient", "weight gradient", "BatchNorm", "optimizer"):
            assert part[category] > 0, (name, category)
        assert (part["select and compress"] > 0) == (name != "dense")
    assert "| VGG-16 " in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_scaling_keeps_the_axes_measured_before(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    options = ["--quick", "--rounds", "1", "--size", "4", "--width", "16", "--batch", "2", "--out", str(out)]
    for axes in ("sparsity,threads", "width"):
        done = _run("--axes", axes, *options, script="scaling.py")
        assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["axis"] for row in rows} == {"sparsity", "threads", "width"}
    assert [row["sparsity"] for row in rows if row["axis"] == "sparsity"] == [0.5, 0.9, 0.99]
    assert [row["width"] for row in rows if row["axis"] == "width"] == [32, 64]
    assert all(row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"]) for row in rows)
    assert "## Width" in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_memory(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    options = ["--models", "resnet18", "--width", "0.125", "--batch", "8", "--sparsity", "90", "--steps", "1"]
    done = _run(*options, "--limit", "0", "--allocators", "mmap", "--out", str(out), script="memory.py")
    assert done.returncode == 0, done.stderr
    rows = {row["run"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == {"dense", "checkpoint", "90%"}
    assert {row["allocator"] for row in rows.values()} == {"mmap"}
    assert rows["checkpoint"]["held"] < rows["dense"]["held"]
    assert rows["90%"]["held"] < rows["dense"]["held"]
    assert all(0 < row["idle"] < row["peak"] and row["growth"] == row["peak"] - row["idle"] for row in rows.values())
    assert "| ResNet-18 " in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(("fixed", "slope"), [(100, 1), (100, 30), (7, 0.5), (990, 11), (1001, 1), (0, 2000)])
@pytest.mark.parametrize("start", [1, 16, 300])
def test_the_largest_batch_is_found(monkeypatch: pytest.MonkeyPatch, fixed: int, slope: float, start: int) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    memory = importlib.import_module("memory")
    tried: list[int] = []

    def peak_of(batch: int) -> int | None:
        tried.append(batch)
        peak = int(fixed + slope * batch)
        return None if peak > 5000 else peak  # beyond that the machine has no more

    best = max(0, int((1000 - fixed) // slope))
    found = memory.largest(peak_of, 1000, start)
    assert best * 0.98 - 1 <= found <= best
    assert len(tried) == len(set(tried)) <= 10


@pytest.mark.parametrize(
    ("script", "option", "value", "message"),
    [
        ("train_step.py", "--models", "resnet19", "resnet19"),
        ("scaling.py", "--axes", "depth", "expected some of sparsity,batch,threads,width"),
        ("memory.py", "--batch", "0", "expected integers of at least 1"),
    ],
)
def test_wrong_options_are_explained(script: str, option: str, value: str, message: str) -> None:
    done = _run(option, value, script=script)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("script", ["layers.py", "train_step.py"])
def test_a_folder_is_no_file_to_write(tmp_path: Path, script: str) -> None:
    done = _run("--out", str(tmp_path), script=script)
    assert done.returncode == 2
    assert "--out: expected the path of a .json file" in done.stderr


def test_accuracy(tmp_path: Path) -> None:
    out = tmp_path / "accuracy.json"
    done = _run(
        *("--data", "digits", "--seeds", "1", "--epochs", "1", "--width", "0.125", "--out", str(out)),
        script="accuracy.py",
    )
    assert done.returncode == 0, done.stderr
    accuracies = json.loads(out.read_text(encoding="utf-8"))["accuracies"]
    assert list(accuracies["digits"]) == ["dense", "exact", "bf16", "int8"]
    assert all(len(found) == 1 and 0.1 < found[0] <= 1 for found in accuracies["digits"].values())
    assert "int8" in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 5_000
