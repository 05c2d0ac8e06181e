"""The benchmarks run, on something small, and write what they say."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swat_ext
from swat_ext import functional

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
    known = {"cpu", "isa", "threads", "torch", "freed_memory", "commit", "date"}
    assert all(known <= layer["conditions"].keys() for layer in result["layers"])
    assert [layer["channels"] for layer in result["layers"]] == [64, 128, 256, 512]
    assert all(timing["median_ms"] > 0 for layer in result["layers"] for timing in layer["timings"].values())
    assert len(result["totals"]) == 1
    assert out.with_suffix(".md").read_text(encoding="utf-8").strip() in done.stdout
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_other_layers_have_a_table_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    layers, calls = importlib.import_module("layers"), importlib.import_module("layer_calls")
    tiny = [
        calls.Layer(3, 8, 14, 7, 2, batch=2),
        calls.Layer(16, 16, 6, 3, 1, groups=16, batch=4),
        calls.Layer(16, 16, 6, 3, 1, groups=4, batch=4),
        calls.Layer(16, 8, 1, 1, 1, batch=8, linear=True),
        calls.Layer(8, 8, 5, 3, 1, batch=1),
    ]
    monkeypatch.setattr(layers, "OTHERS", tiny)
    monkeypatch.setattr(
        layers, "RESNET18", {"3x3": [calls.Layer(8, 8, 4, 3, 1, 4)], "1x1": [calls.Layer(8, 8, 4, 1, 2)]}
    )
    out = tmp_path / "layers.json"
    options = ["--sparsity", "80,90", "--rounds", "1", "--out", str(out)]
    layers.main(["--layers", "resnet18", "--batch", "2", *options])
    layers.main(["--layers", "others", *options])
    layers.main(["--layers", "3x3", "--batch", "2", *options])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["group"], row["name"], row["batch"]) for row in result["layers"]] == [
        ("resnet18", "3x3 8->8 @4", 2),
        ("resnet18", "1x1 8->8 @4 /2", 2),
        ("others", "7x7 3->8 @14 /2", 2),
        ("others", "3x3 16->16 @6 depthwise", 4),
        ("others", "3x3 16->16 @6 4 groups", 4),
        ("others", "Linear 16->8", 8),
        ("others", "3x3 8->8 @5", 1),
    ]
    # Multiply-adds of a pass: 7x7x3 taps of 8 outputs at 7x7 places of two images.
    assert [row["macs"] for row in result["layers"][2:5]] == [2 * 49 * 8 * 147, 4 * 36 * 16 * 9, 4 * 36 * 16 * 36]
    assert all(timing["median_ms"] > 0 for row in result["layers"] for timing in row["timings"].values())
    figures = importlib.import_module("layer_figures")
    summary = figures.summarise(result["layers"][0], 0.9)
    assert [total["sparsity"] for total in result["totals"]] == [0.8, 0.9]
    assert result["totals"][1]["step"] == pytest.approx(4 * summary["step"])  # the 3x3 layer of ResNet-18 alone
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert text.count("forward + backward, 4 in the network") == 1
    first, second = text.split("# Layers of other networks")
    assert "| 3x3 8->8 @4 " in first
    assert "| 3x3 16->16 @6 depthwise |     4 |" in second
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_layers_read_the_files_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    figures = importlib.import_module("layer_figures")
    timing = {"median_ms": 1.0, "best_ms": 1.0, "rounds": 3}
    names = [f"{what} {name}" for what in ("dense NCHW", "0.90") for name in ("forward", "input grad", "weight grad")]
    timings = dict.fromkeys([*names, "dense NCHW step", "0.90 step", "0.90 compress", "0.90 select"], timing)
    row = {"name": "3x3 8->8 @4", "kernel": 3, "count": 2, "macs": 9, "peak_gflops": 1.0, "timings": timings}
    before = {"conditions": {"cpu": "a"}, "batch": 64, "inputs": "relu", "layout": "NCHW", "topk_period": 10}
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({**before, "sparsities": [0.9], "layers": [row]}))
    (known,) = figures.merged(path, [])
    assert (known["group"], known["batch"], known["conditions"]) == ("resnet18", 64, {"cpu": "a"})
    assert "commit: not noted" in figures.report([known])
    assert "1.00x" not in figures.table([known])  # a tenth of the selection is part of the sparse step


def test_conditions_name_the_commit_and_the_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    common = importlib.import_module("common")
    root = tmp_path / "repository"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "code.py").write_text("1\n")
    (root / "bench" / "results" / "a.md").write_text("1\n")
    monkeypatch.setattr(common, "__file__", str(root / "bench" / "common.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)

    def found() -> str | None:
        common.commit.cache_clear()
        return common.commit()

    try:
        assert found() is None
        git("init")
        git("add", ".")
        git("commit", "-m", "first")
        clean = found()
        assert clean is not None
        assert re.fullmatch(r"[0-9a-f]{7,}", clean)
        (root / "bench" / "results" / "a.md").write_text("2\n")
        assert found() == clean
        (root / "code.py").write_text("2\n")
        assert found() == f"{clean}+"
        monkeypatch.setattr(common, "__file__", str(root / "bench" / "results" / "common.py"))
        assert found() is None  # inside another repository
    finally:
        common.commit.cache_clear()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", common.conditions()["date"])


def test_rows_of_several_commits_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    common = importlib.import_module("common")
    new = {"cpu": "a", "load_before": 1.0, "commit": "1234567", "date": "2026-01-31"}
    rows = [{"name": "one", "conditions": new}, {"name": "two", "conditions": {**new, "load_before": 2.0}}]
    assert common.describe(rows, lambda row: row["name"]) == "cpu: a\ncommit: 1234567, date: 2026-01-31"
    rows.append({"name": "three", "conditions": {"cpu": "a"}})
    assert common.describe(rows, lambda row: row["name"]).splitlines() == [
        "cpu: a",
        "commit: 1234567, date: 2026-01-31 (one; two)",
        "commit: not noted (three)",
    ]


def test_wrong_sparsity_is_explained() -> None:
    done = _run("--sparsity", "0.9")
    assert done.returncode == 2
    assert "whole percentages in [0, 100)" in done.stderr
    assert "'0.9'" in done.stderr


def test_train_step(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ["--models", "vgg16", "--width", "0.125", "--batch", "2", "--sparsity", "80,90", "--rounds", "2"]
    options += ["--topk-period", "2", "--threads", "1", "--out", str(out)]
    done = _run(*options, script="train_step.py")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {"cpu", "isa", "torch", "freed_memory", "commit", "date"} <= row["conditions"].keys()
    assert row["conditions"]["threads"] == 1
    assert set(row["timings"]) == {"80%", "90%", "dense NCHW", "dense channels_last"}
    fastest = min(row["timings"][f"dense {layout}"]["median_ms"] for layout in ("NCHW", "channels_last"))
    assert row["ratios"]["90%"] == pytest.approx(fastest / row["timings"]["90%"]["median_ms"])
    least, most = row["ratio_ranges"]["90%"]
    assert 0 < least <= row["ratios"]["90%"] * 1.5
    assert least <= most
    assert all(timing["best_ms"] <= timing["median_ms"] <= timing["most_ms"] for timing in row["timings"].values())
    assert f"x, {least:.2f}-{most:.2f})" in out.with_suffix(".md").read_text(encoding="utf-8")
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
    assert all({"freed_memory", "commit", "date"} <= row["conditions"].keys() for row in rows)
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
    assert {row["conditions"]["freed_memory"] for row in rows.values()} == {"mmap"}
    assert rows["checkpoint"]["held"] < rows["dense"]["held"]
    assert rows["90%"]["held"] < rows["dense"]["held"]
    assert all(0 < row["idle"] < row["peak"] and row["growth"] == row["peak"] - row["idle"] for row in rows.values())
    assert "| ResNet-18 " in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_too_little_memory_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    memory = importlib.import_module("memory")
    assert memory.ran_out_of_memory(-9, "")
    for errors in (
        "RuntimeError: cannot allocate 8589934592 bytes for a result of size [64, 64, 724, 724]",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ):
        assert memory.ran_out_of_memory(1, f"Traceback ...\n{errors}"), errors
    assert not memory.ran_out_of_memory(1, "RuntimeError: the network did not train: its loss is nan")
    # What the library says itself, of a result that no machine has room for: one pixel and a margin of 2 million.
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(RuntimeError) as error:
        functional.conv2d(one, one, padding=1 << 21, weight_threshold=0.0, activation_threshold=0.0)
    assert memory.ran_out_of_memory(1, str(error.value)), error.value


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
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"freed_memory", "commit", "date"} <= result["conditions"].keys()
    assert "commit: " in out.with_suffix(".md").read_text(encoding="utf-8")
    accuracies = result["accuracies"]
    assert list(accuracies["digits"]) == ["dense", "exact", "bf16", "int8"]
    assert all(len(found) == 1 and 0.1 < found[0] <= 1 for found in accuracies["digits"].values())
    assert "int8" in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 5_000
