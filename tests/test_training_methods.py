"""swat-train with every distribution, granularity and method: what it builds, and resuming bit for bit."""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import interrupt_train
from torch import Tensor

from swat_ext import keep_freed_memory, train
from swat_ext.data import Synthetic
from swat_ext.topology import METHODS, SET, RigL
from swat_ext.training import CHECKPOINT, LOG, Recipe, load_checkpoint

_TIMES = ("step_ms", "seconds", "batchnorm_seconds")
_ARGUMENTS = [
    *("--data", "synthetic", "--width", "0.125"),
    *("--batch-size", "8", "--epochs", "2", "--no-progress"),
]
_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "erk": ("--distribution erk", {"distribution": "erk"}),
    "momentum": ("--distribution momentum", {"distribution": "momentum"}),
    "kernel": ("--granularity kernel", {"granularity": "kernel"}),
    "filter": ("--granularity filter --sparsity 0.5", {"granularity": "filter"}),
    "block": ("--granularity block --block-size 4 2", {"granularity": "block", "block_size": [4, 2]}),
    "static": ("--method static", {"method": "static"}),
    "set": ("--method set --activation-sparsity 0", {"method": "set"}),
    "rigl": ("--method rigl --distribution erk", {"method": "rigl", "distribution": "erk"}),
    "ramp": ("--ramp 0.75", {"ramp": 0.75}),
    "warm-up": ("--topk-warmup-epochs 1 --topk-period 4", {"topk_warmup_epochs": 1, "topk_period": 4}),
    "period": ("--weight-topk-period 3", {"weight_topk_period": 3}),
    "all": (
        "--distribution momentum --granularity block --ramp 1 --topk-warmup-epochs 1 --weight-topk-period 5",
        {"distribution": "momentum", "granularity": "block", "ramp": 1.0, "weight_topk_period": 5},
    ),
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # A run of 8 steps would see no update.
    monkeypatch.setitem(METHODS, "set", functools.partial(SET, update_period=2))
    monkeypatch.setitem(METHODS, "rigl", functools.partial(RigL, update_period=2))
    # The command line's own have a thousand test images.
    tiny = Synthetic((3, 8, 8), num_classes=3, train_size=32, test_size=12)
    load = train.load_data
    monkeypatch.setattr(
        train, "load_data", lambda name, *rest, **options: tiny if name == "synthetic" else load(name, *rest, **options)
    )
    yield
    keep_freed_memory(False)


def _history(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in _TIMES} for line in lines]


def _assert_same(left: Any, right: Any) -> None:
    """Nested dicts and lists, tensors in them to the bit."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - set(_TIMES):
            _assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for mine, other in zip(left, right, strict=True):
            _assert_same(mine, other)
    else:
        assert left == right


@pytest.mark.parametrize("name", _FLAGS)
def test_each_flag_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, settings = _FLAGS[name]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train.main([*_ARGUMENTS, *flags.split(), "--out", str(straight)]) == 0
    config = _history(straight)[0]["config"]
    assert settings.items() <= config.items()
    interrupt_train([*_ARGUMENTS, *flags.split(), "--out", str(broken)], 1, monkeypatch)
    torch.manual_seed(5)
    assert train.main(["--out", str(broken), "--resume", "--no-progress"]) == 0
    assert _history(straight) == _history(broken)
    states = [load_checkpoint(out / CHECKPOINT) for out in (straight, broken)]
    _assert_same(*states)

    layers = states[0]["swat"]["layers"]
    method, granularity = settings.get("method", "swat"), settings.get("granularity", "unstructured")
    for layer, state in layers.items():
        called = METHODS[method]() if METHODS[method] else "swat"
        assert state["topology"].startswith(f"{called}, {granularity}")
        weight = states[0]["model"][f"{layer}.weight"]
        if method != "swat":
            kept = math.ceil(round(weight.numel() * state["budget"][0] / state["budget"][1], 6))
            assert 0 < int((weight != 0).sum()) <= kept
    budgets = {tuple(state["budget"]) for state in layers.values()}
    assert (len(budgets) > 1) == (settings.get("distribution", "uniform") != "uniform")


def test_digits_train_with_rigl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    arguments = [
        "--data",
        "digits",
        "--batch-size",
        "128",
        "--width",
        "0.125",
        "--epochs",
        "2",
        "--no-progress",
        "--method",
        "rigl",
    ]
    assert train.main([*arguments, "--sparsity", "0.8", "--ramp", "0", "--out", str(tmp_path)]) == 0
    _config, first, second = _history(tmp_path)
    assert second["train_loss"] < first["train_loss"]
    assert "kept" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert train.main([*_ARGUMENTS, "--method", "static", "--epochs", "1", *out]) == 0
    for flag, value, had in (
        ("method", ["set"], "static"),
        ("distribution", ["erk"], "uniform"),
        ("granularity", ["kernel"], "unstructured"),
        ("block-size", ["4", "1"], "[8, 1]"),
        ("ramp", ["0.5"], "0.0"),
        ("weight-topk-period", ["2"], "1"),
    ):
        capsys.readouterr()
        assert train.main([*out, "--resume", f"--{flag}", *value]) == 1
        assert f"--{flag}: the run to resume has {had}, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ramp 2", "ramp: expected a number in [0, 1], got 2"),
        ("--ramp 0.5 --method rigl", "ramp: expected 0 for method 'rigl'"),
        ("--distribution momentum --method set", "distribution: expected 'uniform' or 'erk' for method 'set'"),
        ("--distribution momentum --momentum 0", "optimizer: expected SGD with momentum or one of Adam's kin"),
        ("--granularity block --block-size 0 1", "block_size: expected (output channels, input channels)"),
        ("--block-size 4 2", "--block-size: has a meaning with --granularity block alone"),
        ("--granularity kernel --block-size 8 1", "--block-size: has a meaning with --granularity block alone"),
        ("--method rigl --block-size 8 1", "--block-size: has a meaning with --granularity block alone"),
        ("--weight-topk-period 0", "weight_topk_period: expected an integer of at least 1"),
        ("--topk-warmup-epochs -1", "topk_warmup_epochs: expected a finite number of at least 0"),
        ("--dense --method static", "--method: has no meaning with --dense"),
        ("--dense --distribution erk", "--distribution: has no meaning with --dense"),
        ("--dense --granularity kernel", "--granularity: has no meaning with --dense"),
        ("--dense --block-size 4 4", "--block-size: has no meaning with --dense"),
        ("--dense --ramp 0.5", "--ramp: has no meaning with --dense"),
        ("--dense --weight-topk-period 2", "--weight-topk-period: has no meaning with --dense"),
    ],
)
def test_errors_are_one_line(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*_ARGUMENTS, *flags.split(), "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("swat-train: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", ["--method dst", "--granularity channel", "--distribution er", "--block-size 8"])
def test_unknown_choices(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(flags.split())
    assert f"argument {flags.split()[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "swat90"),
        ("--sparsity 0.975", "swat97.5"),
        ("--distribution erk", "swat90-erk"),
        ("--distribution momentum --granularity kernel --sparsity 0.5", "swat50-momentum-kernel"),
        ("--granularity block --block-size 4 2", "swat90-block"),
        ("--method rigl --sparsity 0.8", "rigl80"),
        ("--method set --distribution erk", "set90-erk"),
        ("--method static --granularity filter", "static90-filter"),
        ("--dense", "dense"),
    ],
)
def test_the_folder_is_named_after_the_method(flags: str, name: str) -> None:
    asked = vars(train._parser().parse_args([*_ARGUMENTS, *flags.split()]))
    assert train._default_out(train._new_settings(asked)) == Path(f"runs/synthetic-resnet18-{name}-seed0")


def test_runs_of_two_methods_stand_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for flags in ("--method static", "--method static --distribution erk"):
        arguments = [*_ARGUMENTS, *flags.split(), "--epochs", "1"]
        assert train.main(arguments) == 0
        assert train.main([*arguments, "--resume", "--epochs", "2"]) == 0
        names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["synthetic-resnet18-static90-erk-seed0", "synthetic-resnet18-static90-seed0"]
    assert all(len(_history(tmp_path / "runs" / name)) == 3 for name in names)
    capsys.readouterr()
    assert train.main([*_ARGUMENTS, "--method", "static"]) == 1
    assert "--out: runs/synthetic-resnet18-static90-seed0 holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize("ramp", [-0.1, 1.5, float("nan")])
def test_wrong_recipes(ramp: float) -> None:
    with pytest.raises(ValueError, match=r"^ramp: expected a number in"):
        Recipe(epochs=1, batch_size=1, lr=0.1, ramp=ramp)
