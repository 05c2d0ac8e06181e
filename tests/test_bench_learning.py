"""bench/learning.py: runs are kept and not run again, and its tables say what the lines of the runs say."""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_bench import BENCH, CONDITIONS, _Here

Load = Callable[[str], ModuleType]
_TIMED: dict[str, Any] = {"width": 0.5, "config": None, "recipe": {"batch_size": 32, "topk_period": 10}}
_SETTINGS = {**_TIMED, "recipe": {**_TIMED["recipe"], "lr": 0.05, "weight_decay": 5e-4, "schedule": "cosine"}}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script of bench/ by name; steps are timed in this process, and threads are set back."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(importlib.import_module("learning_times"), "Worker", _Here)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def _quick(out: Path, *more: str) -> list[str]:
    return ["--quick", "--threads", "1", "--allocator", "default", "--width", "0.5", "--out", str(out), *more]


def test_quick_runs_and_then_has_nothing_left_to_run(
    bench: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learning, runs = bench("learning"), bench("learning_runs")
    out = tmp_path / "learning.json"
    result = learning.main(_quick(out, "--seeds", "1"))
    lines = runs.read_lines(tmp_path / "learning" / "resnet18-digits.jsonl")
    assert [(line["variant"], line["budget"]) for line in lines[:3]] == [
        (variant, "epochs") for variant in ("dense", "narrow90", "u90")
    ]
    assert {line["variant"] for line in lines if line["budget"] == "clock"} == {"dense", "narrow90", "u90"}
    for line in lines:
        assert line["conditions"].keys() >= CONDITIONS
        assert len(line["history"]) == line["epochs"]
        assert line["steps"] == 44 * line["epochs"]
        last = line["history"][-1]
        assert line["accuracy"] == last["test_accuracy"]
        assert line["flops"] == pytest.approx(last["flops"])
        assert last["step_seconds"] == pytest.approx(line["step_seconds"], abs=0.01)
        assert last["other_seconds"] > 0
    # The dense network by the clock is the run by epochs, which is not run twice.
    dense = [line for line in lines if line["variant"] == "dense"]
    assert {**dense[0], "budget": "clock"} == dense[1]
    times = json.loads((tmp_path / "learning" / "times.json").read_text())["resnet18-digits"]
    assert [row["variant"] for row in times] == ["dense", "narrow90", "u90"]
    assert all(row["ratio"] == pytest.approx(row["dense_ms"] / row["ms"]) for row in times)
    assert {(row["variant"], row["budget"]) for row in result["rows"]} == {
        (line["variant"], line["budget"]) for line in lines
    }
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("| resnet18-digits |") == len(lines)
    for name in ("seconds", "flops"):
        assert (tmp_path / f"learning-{name}.png").stat().st_size > 10_000

    def no_training(*_: Any, **__: Any) -> None:
        raise AssertionError("a run that is known was run again")

    monkeypatch.setattr(runs, "train", no_training)
    learning.main(_quick(out, "--seeds", "1"))
    with pytest.raises(AssertionError, match="run again"):
        learning.main(_quick(out, "--seeds", "1", "--lr", "0.01"))
    capsys.readouterr()
    learning.main(_quick(out, "--report"))
    assert "SWAT-U 90%" in capsys.readouterr().out


def test_a_run_that_is_stopped_is_run_again_and_a_torn_line_is_left_out(
    bench: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learning, runs = bench("learning"), bench("learning_runs")
    out, real = tmp_path / "learning.json", runs.train

    def stopped(run: Any, *arguments: Any, **named: Any) -> Any:
        if run.variant == "u90":
            raise KeyboardInterrupt
        return real(run, *arguments, **named)

    options = _quick(out, "--seeds", "1", "--budgets", "epochs", "--variants", "dense,u90")
    monkeypatch.setattr(runs, "train", stopped)
    learning.main(options)
    assert "stopped; the same command goes on" in capsys.readouterr().err
    file = tmp_path / "learning" / "resnet18-digits.jsonl"
    kept = file.read_text(encoding="utf-8")
    assert kept.count("\n") == 1
    file.write_text(kept + kept[: len(kept) // 2], encoding="utf-8")
    monkeypatch.setattr(runs, "train", real)
    learning.main(options)
    assert "line 2 is cut off and left out" in capsys.readouterr().err
    lines = runs.read_lines(file)
    assert [line["variant"] for line in lines] == ["dense", "u90"]
    assert lines[0] == json.loads(kept)
    # The same seed gives the same run again.
    file.write_text(kept, encoding="utf-8")
    learning.main(options)
    again = runs.read_lines(file)[1]
    assert (again["accuracy"], again["flops"]) == (lines[1]["accuracy"], lines[1]["flops"])


def test_validation_is_kept_apart(bench: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds", "1,", "--budgets", "epochs", "--variants", "u90"]
    more = ["--validate", "--set", "topk_period=2", "--lr", "0.02"]
    bench("learning").main(_quick(tmp_path / "learning.json", *options, *more))
    assert [path.name for path in (tmp_path / "learning").iterdir()] == ["validation.jsonl"]
    (line,) = bench("learning_runs").read_lines(tmp_path / "learning" / "validation.jsonl")
    assert line["changes"] == {"topk_period": 2, "lr": 0.02}
    assert line["settings"]["config"]["topk_period"] == line["settings"]["recipe"]["topk_period"] == 2
    assert line["steps"] == 2 * (1151 // 32)
    assert "topk_period 2, lr 0.02" in capsys.readouterr().out
    assert bench("learning_report").load(tmp_path / "learning") == []


def test_a_run_that_diverges_counts_as_guessing(bench: Load) -> None:
    runs = bench("learning_runs")
    setup = runs.Setup(steps=40, width=0.0625, changes={"lr": 1e30, "warmup_epochs": 0})
    line = runs.train(runs.plan("resnet18", "digits", "dense", "epochs", setup), 0)
    assert line["accuracy"] == 0.1
    assert line["history"] == []
    assert "the loss is" in line["diverged"]


@pytest.mark.parametrize("percent", [80, 90, 95])
def test_narrow_networks_have_the_flops_of_sparse_ones(bench: Load, percent: int) -> None:
    pytest.importorskip("skimage")
    runs = bench("learning_runs")
    images = runs.data_of("textures", 32)
    flops = {}
    for variant in (f"narrow{percent}", f"u{percent}", "dense"):
        run = runs.plan("resnet18", "textures", variant, "epochs", runs.Setup())
        flops[variant] = runs.step_flops(runs.build(run, images, 0), images, 32)
    assert flops[f"narrow{percent}"] == pytest.approx(flops[f"u{percent}"], rel=0.03)
    assert flops[f"u{percent}"] == pytest.approx((1 - percent / 100) * flops["dense"], rel=0.06)


def test_a_thousand_steps_of_whole_epochs(bench: Load) -> None:
    pytest.importorskip("skimage")
    runs, times = bench("learning_runs"), bench("learning_times")
    run = runs.plan("resnet18", "textures", "dense", "epochs", runs.Setup())
    assert (run.recipe.epochs, runs.data_of("textures", 32).train_steps(32)) == (5, 200)
    assert [times.clock_epochs(5, {"ratio": ratio}) for ratio in (1.0, 0.1, 1.19, 1.2, 2.39)] == [5, 1, 5, 6, 11]


def test_every_network_can_be_planned(bench: Load) -> None:
    runs = bench("learning_runs")
    for network in runs.WIDTHS:
        for variant in ("dense", "u90"):
            run = runs.plan(network, "digits", variant, "epochs", runs.Setup(steps=40))
            assert sum(weight.numel() for weight in runs.build(run, runs.data_of("digits", 32), 0).parameters()) > 1e5


# --- The report -----------------------------------------------------------------------------------------------------


def _line(variant: str, budget: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    history = [
        {"steps": 200 * i, "flops": 1e12 * i, "test_accuracy": accuracy * i / 2, "other_seconds": 1.0} for i in (1, 2)
    ]
    return {
        "network": "resnet18",
        "data": "textures",
        "variant": variant,
        "budget": budget,
        "seed": seed,
        "accuracy": accuracy,
        "epochs": 2,
        "steps": 400,
        "flops": 2e12,
        "step_seconds": 9.0,
        "load_after": 1.0,
        "changes": {},
        "settings": _SETTINGS,
        "conditions": {"commit": "abc", "date": "2026-01-31", "load_before": 0.5, "threads": 2},
        "history": history,
        **more,
    }


def _time(variant: str, ms: float) -> dict[str, Any]:
    return {"variant": variant, "ms": ms, "dense_ms": 100.0, "ratio": 100 / ms, "settings": _TIMED}


def _folder(root: Path, lines: Sequence[dict[str, Any]]) -> Path:
    folder = root / "learning"
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "resnet18-textures.jsonl").write_text(text, encoding="utf-8")
    times = {"resnet18-textures": [_time("dense", 100.0), _time("u90", 40.0)]}
    (folder / "times.json").write_text(json.dumps(times), encoding="utf-8")
    return folder


def test_means_spreads_and_differences_are_those_of_the_lines(bench: Load, tmp_path: Path) -> None:
    other = {**_SETTINGS, "width": 0.25}
    lines = [
        *(_line("dense", "epochs", seed, accuracy) for seed, accuracy in enumerate((0.70, 0.72, 0.74))),
        _line("u90", "epochs", 9, 0.2, settings=other),  # of other settings: not in the mean
        _line("u90", "epochs", 0, 0.1),  # replaced by the next
        _line("u90", "epochs", 0, 0.69, flops=2e11),
        _line("u90", "epochs", 1, 0.74, flops=2e11),
        *(_line("u90", "clock", seed, accuracy) for seed, accuracy in enumerate((0.705, 0.725, 0.745))),
        *(_line("kernel50", "epochs", seed, 0.71) for seed in range(3)),
    ]
    (results,) = bench("learning_report").load(_folder(tmp_path, lines))
    row = results.row(results.cell("u90", "epochs"))
    assert row["n"] == 2
    assert row["seeds"] == pytest.approx({0: 69.0, 1: 74.0})
    assert (row["mean"], row["least"], row["most"]) == pytest.approx((71.5, 69.0, 74.0))
    assert (row["to_dense"], row["to_dense_least"], row["to_dense_most"]) == pytest.approx((0.5, -1.0, 2.0))
    assert row["flops_share"] == pytest.approx(0.1)
    assert (row["step_ms"], row["seconds"], row["speed"]) == pytest.approx((40.0, 16.0, 2.5))
    assert results.row(results.cell("kernel50", "epochs"))["seconds"] is None
    result, text = bench("learning_report").summarise([results])
    judged = {row["what"]: row for row in result["targets"]}
    assert judged["90/90 against dense, equal wall clock"]["found"] == pytest.approx(0.5)
    assert judged["90/90 against dense, equal wall clock"]["reached"] is True
    assert judged["90/90 against dense, equal epochs"]["n"] == 2
    assert judged["90/90 against dense, equal epochs"]["reached"] is None
    assert judged["kernel at 50% against dense, equal epochs"]["found"] == pytest.approx(-1.0)
    assert judged["kernel at 50% against dense, equal epochs"]["reached"] is False
    assert judged["95/95 against dense, equal wall clock"]["n"] == 0
    # Every line is in the appendix, whatever became of it.
    assert text.count("| resnet18-textures |") == len(lines)
    assert text.count("replaced") == 2
    assert "not reached" in text


def test_either_of_two_will_do_where_both_are_held_against_their_equals(bench: Load, tmp_path: Path) -> None:
    accuracies = {"u90": 0.70, "rigl90": 0.71, "erk90": 0.73, "rigl90erk": 0.72}
    lines = [_line(variant, "epochs", seed, value) for variant, value in accuracies.items() for seed in range(3)]
    report = bench("learning_report")
    result, _ = report.summarise(report.load(_folder(tmp_path, lines)))
    row = next(row for row in result["targets"] if "RigL" in row["what"])
    assert (row["variant"], row["against"], row["reached"]) == ("erk90", "rigl90erk", True)
    assert row["found"] == pytest.approx(1.0)


def test_variants_have_names_in_words(bench: Load) -> None:
    title = bench("learning_report").title
    assert title("dense") == "dense"
    assert title("narrow90") == "dense, narrower, as U 90%"
    assert title("kernel50") == "kernel 50%"
    assert title("rigl90erk") == "RigL 90%, ERK"
    assert title("static90d") == "static 90%, activations dense"
    titles = [title(variant) for variant in bench("learning_runs").VARIANTS]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "-1"], "expected a number of seeds such as 3, or seeds such as 0,2"),
        (["--seeds", "0"], "expected a number of seeds such as 3, or seeds such as 0,2"),
        (["--variants", "u85"], "u85"),
        (["--set", "lr"], "expected name=value, got 'lr'"),
        (["--set", "depth=3"], "variant 'dense': this version's SWATConfig and Recipe have no depth"),
        (["--set", "epochs=3"], "--set epochs: budgets are set by --steps and --batch"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--lr", "-1"], "variant 'dense': lr: expected"),
        (["--variants", "u90", "--set", "sparsity=2"], "variant 'u90': sparsity: expected a number in [0, 1)"),
    ],
)
def test_wrong_options_are_explained(
    bench: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench("learning").main(_quick(tmp_path / "learning.json", *options))
    assert message in capsys.readouterr().err


def test_a_variant_that_this_version_cannot_do_is_named(bench: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = bench("learning_runs")
    monkeypatch.setitem(runs.VARIANTS, "future", {"sparsity": 0.9, "colour": "red"})
    with pytest.raises(ValueError, match="variant 'future': this version's SWATConfig and Recipe have no colour"):
        runs.plan("resnet18", "digits", "future", "epochs", runs.Setup())
