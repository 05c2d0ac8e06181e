"""The benches run, in process on small networks, and write what they say."""

import importlib
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest
import torch

from swat_ext import functional
from swat_ext.data import Synthetic, load_data

BENCH = Path(__file__).parents[1] / "bench"
CONDITIONS = {"cpu", "isa", "threads", "torch", "freed_memory", "commit", "date"}

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script of bench/ by name; the threads that it sets are set back."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


class _Here:
    """Stands in for a worker, in this process: starting one takes longer than all that it does."""

    def __init__(self, make: Callable[..., object], *arguments: Any) -> None:
        self._target = make(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._target, method)(*arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_layers(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers, calls, figures = load("layers"), load("layer_calls"), load("layer_figures")
    tiny = [
        calls.Layer(3, 8, 14, 7, 2, batch=2),
        calls.Layer(16, 16, 6, 3, 1, groups=16, batch=4),
        calls.Layer(16, 16, 6, 3, 1, groups=4, batch=4),
        calls.Layer(16, 8, 1, 1, 1, batch=8, linear=True),
        calls.Layer(8, 8, 5, 3, 1, batch=1),
    ]
    monkeypatch.setattr(layers, "OTHERS", tiny)
    monkeypatch.setattr(layers, "_MATMUL", 64)
    monkeypatch.setattr(
        layers, "RESNET18", {"3x3": [calls.Layer(8, 8, 4, 3, 1, 4)], "1x1": [calls.Layer(8, 8, 4, 1, 2)]}
    )
    out = tmp_path / "new" / "layers.json"
    options = ["--sparsity", "80,90", "--rounds", "1", "--allocator", "default", "--out", str(out)]
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
    assert all(row["conditions"].keys() >= CONDITIONS for row in result["layers"])
    timings = [timing for row in result["layers"] for timing in row["timings"].values()]
    assert all(0 < timing["best_ms"] <= timing["median_ms"] for timing in timings)
    summary = figures.summarise(result["layers"][0], 0.9)
    assert [total["sparsity"] for total in result["totals"]] == [0.8, 0.9]
    assert result["totals"][1]["step"] == pytest.approx(4 * summary["step"])  # the 3x3 layer of ResNet-18 alone
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert text.count("forward + backward, 4 in the network") == 1
    first, second = text.split("# Layers of other networks")
    assert "| 3x3 8->8 @4 " in first
    assert "| 3x3 16->16 @6 depthwise |     4 |" in second
    assert "times as fast" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_structure(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, calls = load("structure"), load("layer_calls")
    monkeypatch.setattr(structure, "RESNET18", {"3x3": [calls.Layer(16, 16, 4, 3, 1, count) for count in (4, 3)]})
    out = tmp_path / "structure.json"
    options = ["--sparsities", "50,90", "--rounds", "1", "--batch", "2", "--allocator", "default", "--out", str(out)]
    monkeypatch.setattr(structure, "Worker", _Here)
    structure.main([*options, "--width", "0.125"])
    steps = json.loads(out.read_text(encoding="utf-8"))["steps"]
    assert [(row["granularity"], row["sparsity"]) for row in steps[:3]] == [
        ("unstructured", 0.5),
        ("kernel", 0.5),
        ("filter", 0.5),
    ]
    rows = _rows(out)
    assert len(rows) == 2 * 2 * 4
    assert all(row["conditions"].keys() >= CONDITIONS for row in rows)
    assert all(row["forward_ms"] > 0 and row["input_grad_ms"] > 0 for row in rows)
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    expected = sum(
        row["count"] * (row["forward_ms"] + row["input_grad_ms"])
        for row in rows
        if (row["sparsity"], row["granularity"]) == (0.9, "kernel")
    )
    assert f"| {expected:.0f} ms, " in text


def test_half(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = load("half")
    monkeypatch.setattr(half, "Worker", _Here)
    out = tmp_path / "half.json"
    half.main(["--quick", "--threads", "1", "--allocator", "default", "--out", str(out)])
    rows = {(row["form"], row["sparsity"], row["batchnorm"]): row for row in _rows(out)}
    assert len(rows) == 9
    held = {key: row["held_bytes"] for key, row in rows.items()}
    assert held["bfloat16", 0.0, "exact"] == pytest.approx(held["float32", 0.0, "exact"] / 2, rel=0.02)
    assert held["bfloat16", 0.9, "exact"] < 0.6 * held["float32", 0.9, "exact"]
    assert held["bfloat16", 0.9, "int8"] < held["bfloat16", 0.9, "exact"]
    assert out.with_suffix(".md").read_text(encoding="utf-8").count(" MiB") == 9


def test_selection_is_part_of_a_layers_step(load: Load) -> None:
    timing = {"median_ms": 1.0, "best_ms": 1.0, "rounds": 3}
    names = [f"{what} {name}" for what in ("dense NCHW", "0.90") for name in ("forward", "input grad", "weight grad")]
    timings = dict.fromkeys([*names, "dense NCHW step", "0.90 step", "0.90 compress", "0.90 select"], timing)
    row = {"macs": 9, "peak_gflops": 1.0, "timings": timings, "topk_period": 10}
    summary = load("layer_figures").summarise(row, 0.9)
    assert summary["step"] == pytest.approx(1.1)
    assert summary["ratio"] == pytest.approx(1 / 1.1)


def test_conditions_name_the_commit_and_the_day(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common = load("common")
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


def test_rows_of_several_commits_are_told_apart(load: Load) -> None:
    common = load("common")
    new = {"cpu": "a", "load_before": 1.0, "commit": "1234567", "date": "2026-01-31"}
    rows = [{"name": "one", "conditions": new}, {"name": "two", "conditions": {**new, "load_before": 2.0}}]
    assert common.describe(rows, lambda row: row["name"]) == "cpu: a\ncommit: 1234567, date: 2026-01-31"
    rows.append({"name": "three", "conditions": {"cpu": "a"}})
    assert common.describe(rows, lambda row: row["name"]).splitlines() == [
        "cpu: a",
        "commit: 1234567, date: 2026-01-31 (one; two)",
        "commit: not noted (three)",
    ]


def test_train_step(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = load("train_step")
    monkeypatch.setattr(train_step, "Worker", _Here)
    monkeypatch.setattr(train_step, "_PROFILED", 1)
    out = tmp_path / "step.json"
    options = ["--models", "vgg16", "--width", "0.125", "--batch", "2", "--sparsity", "90", "--rounds", "2"]
    options += ["--topk-period", "2", "--threads", "1", "--allocator", "default", "--out", str(out)]
    train_step.main(options)
    (row,) = _rows(out)
    assert row["conditions"].keys() >= CONDITIONS
    assert row["conditions"]["threads"] == 1
    assert row["allocator"] == row["conditions"]["freed_memory"] == "default"
    assert set(row["timings"]) == {"90%", "dense NCHW", "dense channels_last"}
    fastest = min(row["timings"][f"dense {layout}"]["median_ms"] for layout in ("NCHW", "channels_last"))
    assert row["ratios"]["90%"] == pytest.approx(fastest / row["timings"]["90%"]["median_ms"])
    least, most = row["ratio_ranges"]["90%"]
    assert 0 < least <= most
    assert all(timing["best_ms"] <= timing["median_ms"] <= timing["most_ms"] for timing in row["timings"].values())
    assert f"x, {least:.2f}-{most:.2f})" in out.with_suffix(".md").read_text(encoding="utf-8")
    for name, part in row["breakdown"].items():
        for category in ("convolution forward", "input gradient", "weight gradient", "BatchNorm", "optimizer"):
            assert part[category] > 0, (name, category)
        assert (part["select and compress"] > 0) == (name != "dense")
    assert "| VGG-16 " in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_workers(load: Load) -> None:
    with load("workers").Worker(dict, {"a": 1}) as worker:
        assert worker.call("get", "a") == 1
        with pytest.raises(RuntimeError, match=r"(?s)in the process of a bench:.*KeyError: 'b'"):
            worker.call("pop", "b")


def test_scaling_keeps_the_axes_measured_before(load: Load, tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    options = ["--quick", "--rounds", "1", "--size", "4", "--width", "16", "--batch", "2", "--out", str(out)]
    for axes in ("sparsity,threads", "width"):
        load("scaling").main(["--axes", axes, "--allocator", "default", *options])
    rows = _rows(out)
    assert {row["axis"] for row in rows} == {"sparsity", "threads", "width"}
    assert [row["sparsity"] for row in rows if row["axis"] == "sparsity"] == [0.5, 0.9, 0.99]
    assert [row["width"] for row in rows if row["axis"] == "width"] == [32, 64]
    assert all(row["conditions"].keys() >= CONDITIONS - {"threads"} for row in rows)
    assert all(row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"]) for row in rows)
    assert "## Width" in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_memory(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = load("memory")
    monkeypatch.setattr(memory, "_spawn", memory.run_case)
    out = tmp_path / "memory.json"
    options = ["--models", "resnet18", "--width", "0.125", "--batch", "4", "--sparsity", "90", "--steps", "1"]
    memory.main([*options, "--limit", "0", "--out", str(out)])
    rows = {row["run"]: row for row in _rows(out)}
    assert set(rows) == {"dense", "checkpoint", "90%"}
    assert {row["allocator"] for row in rows.values()} == {"default"}
    assert all(row["conditions"].keys() >= CONDITIONS for row in rows.values())
    assert rows["checkpoint"]["held"] < rows["dense"]["held"]
    assert rows["90%"]["held"] < rows["dense"]["held"]
    assert all(0 < row["idle"] <= row["peak"] and row["growth"] == row["peak"] - row["idle"] for row in rows.values())
    assert "| ResNet-18 " in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_case_has_a_process_of_its_own(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = load("memory")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    case = memory.Case(
        model="resnet18",
        batch=2,
        width=0.0625,
        run="dense",
        layout="NCHW",
        sparsity=0.0,
        batchnorm="exact",
        steps=1,
        threads=1,
        device="cpu",
        allocator="kept",
    )
    assert memory._spawn(case)["idle"] > 0


def test_allocator(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = load("allocator")
    monkeypatch.setattr(allocator, "Worker", _Here)
    monkeypatch.setattr(load("common"), "use_allocator", lambda name: None)  # it would hold for the tests that follow
    out = tmp_path / "allocator.json"
    allocator.main(["--quick", "--width", "0.125", "--threads", "1", "--out", str(out)])
    rows = _rows(out)
    runs = ("dense NCHW", "dense channels_last", "90%")
    assert [(row["run"], row["allocator"]) for row in rows] == [
        (run, name) for run in runs for name in ("default", "kept")
    ]
    assert all(row["step_ms"] > 0 and "faults" in row and row["peak"] > 0 for row in rows)
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("| ResNet-18 ") == len(rows)


def test_too_little_memory_is_told_from_other_errors(load: Load) -> None:
    memory = load("memory")
    assert memory.ran_out_of_memory(-9, "")
    for errors in (
        "RuntimeError: cannot allocate memory for a result of size [64, 64, 724, 724]",
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
def test_the_largest_batch_is_found(load: Load, fixed: int, slope: float, start: int) -> None:
    memory = load("memory")
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
        ("layers", "--sparsity", "0.9", "whole percentages in [0, 100) such as 80,90,95, got '0.9'"),
        ("train_step", "--models", "resnet19", "resnet19"),
        ("train_step", "--allocator", "mmap", "mmap"),
        ("scaling", "--axes", "depth", "expected some of sparsity,batch,threads,width"),
        ("memory", "--batch", "0", "expected integers of at least 1"),
        ("layers", "--out", ".", "--out: expected the path of a .json file"),
        ("accuracy", "--seeds", "0", "--seeds, --epochs: expected at least 1"),
        ("batchnorm", "--planned", "399", "expected at least 1 and the last of --steps, got 2 and 399"),
    ],
)
def test_wrong_options_are_explained(
    load: Load, capsys: pytest.CaptureFixture[str], script: str, option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        load(script).main(["--allocator", "default", option, value])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_accuracy(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = load("accuracy")
    monkeypatch.setattr(accuracy, "load_data", lambda name, samples: load_data("synthetic", samples=32))
    out = tmp_path / "accuracy.json"
    options = ["--data", "digits", "--seeds", "2", "--epochs", "1", "--width", "0.0625", "--batch", "16"]
    accuracy.main([*options, "--threads", "1", "--allocator", "default", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["conditions"].keys() >= CONDITIONS
    assert result["settings"]["seeds"] == 2
    assert list(result["accuracies"]) == ["digits"]
    assert list(result["accuracies"]["digits"]) == ["dense", "exact", "bf16", "int8"]
    for found in result["accuracies"]["digits"].values():
        assert len(found) == 2
        assert all(math.isfinite(value) and 0 <= value <= 1 for value in found)
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "2 seeds, batch 16" in text
    assert "commit: " in text
    assert text.count("| digits ") == 4
    assert out.with_suffix(".png").stat().st_size > 5_000


def test_batchnorm(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batchnorm = load("batchnorm")
    monkeypatch.setattr(batchnorm, "Textures", lambda *sizes: Synthetic((1, 16, 16), 4, *sizes))
    out = tmp_path / "batchnorm.json"
    options = ["--quick", "--threads", "1", "--allocator", "default", "--out", str(out)]
    batchnorm.main([*options, "--forms", "swat"])
    batchnorm.main([*options, "--forms", "dense"])
    rows = _rows(out)
    assert [(row["form"], row["seed"], row["step"]) for row in rows] == [
        *(("swat", 0, 2), ("swat", 0, 4)),
        *(("dense", 0, 2), ("dense", 0, 4)),
    ]
    for row in rows:
        assert row["conditions"].keys() >= CONDITIONS
        assert list(row["accuracies"])[:3] == ["running, 0.1", "running, 0.3", "test batch"]
        assert all(0 <= accuracy <= 1 for accuracy in row["accuracies"].values())
        assert list(row["seconds"]) == ["5", "20", "50"]
        assert all(seconds > 0 for seconds in (row["epoch_seconds"], *row["seconds"].values()))
        # An epoch has three batches, whatever is asked for.
        assert row["accuracies"]["5 batches"] == row["accuracies"]["50 batches"]
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| swat " in text
    assert "Time of an estimate, % of an epoch" in text


def test_averages_are_those_of_batchnorms_own_momentum(load: Load) -> None:
    batchnorm = load("batchnorm")
    models = {momentum: torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=momentum)) for momentum in (1.0, 0.1, 0.3)}
    averages = batchnorm.Averages(models[1.0])
    for step in range(4):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step)) * (step + 1)
        for model in models.values():
            model(x)
        averages.note()
    for momentum in (0.1, 0.3):
        averages.use(momentum)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(models[1.0][0], name), getattr(models[momentum][0], name))
    model = models[1.0].eval()
    with averages.none():
        torch.testing.assert_close(model(x).mean((0, 2, 3)), torch.zeros(3))
    assert model[0].running_mean is not None
