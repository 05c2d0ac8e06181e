"""Recipes, the training loop, its files, and resuming bit for bit."""

import copy
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import interrupt_train
from torch import Tensor, nn

from swat_ext import SWATConfig, SWATLayer, SWATScheduler, keep_freed_memory, sparsify_, train
from swat_ext.data import Synthetic
from swat_ext.models import resnet18
from swat_ext.training import (
    CHECKPOINT,
    LOG,
    RECIPES,
    Diverged,
    Recipe,
    Trainer,
    build_optimizer,
    evaluate,
    load_checkpoint,
    recipe_for,
    save_checkpoint,
    write_log,
)

# What differs between two equal runs.
_TIMES = ("step_ms", "seconds", "batchnorm_seconds")
TINY = Recipe(epochs=4, batch_size=8, lr=0.05, schedule="cosine", warmup_epochs=1, topk_period=3)


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_as_before() -> Iterator[None]:
    yield
    keep_freed_memory(False)


class Interrupted(Exception):
    pass


def _model(sparse: bool) -> nn.Module:
    torch.manual_seed(3)
    model = resnet18(3, in_channels=2, width=0.125)
    if sparse:
        sparsify_(model, SWATConfig(0.8, 0.7, topk_period=3))
    return model


def _data() -> Synthetic:
    return Synthetic((2, 8, 8), num_classes=3, train_size=40, test_size=12)


def _trainer(sparse: bool, **arguments: Any) -> Trainer:
    return Trainer(_model(sparse), _data(), arguments.pop("recipe", TINY), seed=5, progress=False, **arguments)


def _untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in _TIMES} for record in history]


def _assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys()
        for key in left:
            if key not in _TIMES:
                _assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            _assert_same(a, b)
    else:
        assert left == right


# --- recipes -------------------------------------------------------------------------------------------------------


def _rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    return [recipe.lr_at(step, steps_per_epoch) for step in range(recipe.epochs * steps_per_epoch)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar", {0: 0.1, 49: 0.1, 50: 0.01, 99: 0.01, 100: 0.001, 149: 0.001}),
        ("wrn", {0: 0.1, 59: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008, 199: 0.0008}),
        ("imagenet", {5: 0.1, 29: 0.1, 30: 0.01, 60: 0.001, 89: 0.0001}),
    ],
)
def test_learning_rates_are_the_published_ones(name: str, expected: dict[int, float]) -> None:
    rates = _rates(RECIPES[name], 7)
    assert {epoch: pytest.approx(rate) for epoch, rate in expected.items()} == {e: rates[7 * e] for e in expected}
    for epoch, rate in expected.items():
        assert rates[7 * epoch + 6] == pytest.approx(rate)


def test_published_recipes() -> None:
    cifar, wrn, imagenet = RECIPES["cifar"], RECIPES["wrn"], RECIPES["imagenet"]
    assert (cifar.epochs, cifar.batch_size, cifar.momentum, cifar.weight_decay) == (150, 128, 0.9, 5e-4)
    assert (cifar.nesterov, cifar.topk_period) == (False, 10)
    assert (wrn.epochs, wrn.nesterov) == (200, True)
    assert (imagenet.batch_size, imagenet.nesterov, imagenet.label_smoothing) == (256, True, 0.1)
    assert (imagenet.warmup_epochs, imagenet.topk_period) == (5, 5)
    assert [recipe_for(data) for data in ("cifar10", "imagefolder", "digits")] == ["cifar", "imagenet", "small"]


def test_warmup_rises_step_by_step() -> None:
    rates = _rates(RECIPES["imagenet"], 10)
    assert rates[0] == pytest.approx(0.1 / 50)
    steps = [b - a for a, b in itertools.pairwise(rates[:50])]
    assert steps == pytest.approx([0.1 / 50] * 49)
    assert rates[49] == pytest.approx(0.1)


def test_another_length_keeps_the_shape() -> None:
    short = RECIPES["cifar"].with_epochs(15)
    assert short.milestones == (5, 10)
    assert _rates(short, 20)[::20] == pytest.approx(_rates(RECIPES["cifar"], 20)[::200])
    assert RECIPES["imagenet"].with_epochs(9).warmup_epochs == pytest.approx(0.5)


def test_cosine_ends_near_zero() -> None:
    rates = _rates(Recipe(epochs=10, batch_size=1, lr=0.3, schedule="cosine", warmup_epochs=2), 10)
    assert max(rates) == pytest.approx(0.3)
    assert rates[60] == pytest.approx(0.15)
    assert 0 < rates[-1] < 0.001


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("topk_period", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("weight_decay", float("inf")),
        ("momentum", 1.0),
        ("label_smoothing", -0.1),
        ("decay", 0.0),
        ("schedule", "linear"),
        ("milestones", (3, 2)),
        ("milestones", (0,)),
        ("warmup_epochs", -1),
        ("batchnorm_batches", -1),
    ],
)
def test_wrong_recipes_name_the_setting(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        replace(TINY, **{field: value})


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov"):
        replace(TINY, nesterov=True, momentum=0.0)


def test_normalisation_is_not_decayed() -> None:
    model = _model(True)
    frozen = model.get_parameter("layer1.0.conv1.weight").requires_grad_(False)
    optimizer = build_optimizer(model, RECIPES["cifar"])
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if parameter is frozen:
            assert id(parameter) not in decays
        else:
            assert decays[id(parameter)] == (0.0 if "bn" in name or "downsample.1" in name else 5e-4)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, {"a": torch.ones(3)})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"a": lambda: None})
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04"])
def test_a_broken_checkpoint_is_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / CHECKPOINT
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": 1, "a": Attack()}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / CHECKPOINT)
    assert not (tmp_path / "ran").exists()


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of this version"):
        load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pt")


def test_the_log_is_json_even_of_a_nan(tmp_path: Path) -> None:
    write_log(tmp_path / LOG, [{"config": {"milestones": (1.5, float("inf"))}}, {"epoch": 1, "loss": float("nan")}])
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert lines == [{"config": {"milestones": [1.5, None]}}, {"epoch": 1, "loss": None}]


# --- the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("sparse", [False, True])
def test_training_is_the_usual_loop(sparse: bool, memory_format: torch.memory_format) -> None:
    losses: list[float] = []
    recipe = replace(TINY, epochs=3, label_smoothing=0.1, batchnorm_batches=0)
    trainer = _trainer(
        sparse, recipe=recipe, memory_format=memory_format, on_step=lambda loss, seconds: losses.append(loss)
    )
    history = trainer.run()
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert [record["steps"] for record in history] == [5, 10, 15]

    model, data, expected = _model(sparse).to(memory_format=memory_format), _data(), []
    optimizer = build_optimizer(model, recipe)
    if sparse:
        SWATScheduler(model, optimizer)
    for epoch in range(3):
        for images, labels in data.train_batches(8, seed=5, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(len(expected), 5)
            optimizer.zero_grad()
            outputs = model(images.contiguous(memory_format=memory_format))
            loss = nn.functional.cross_entropy(outputs, labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))
    assert losses == expected
    _assert_same(trainer.model.state_dict(), model.state_dict())


def test_history_agrees_with_what_evaluate_finds() -> None:
    trainer = _trainer(True)
    record = trainer.run()[-1]
    assert trainer.model.training
    found = evaluate(trainer.model, trainer.data, 5)
    assert found == (pytest.approx(record["test_loss"], rel=1e-5), record["test_accuracy"])
    outputs, labels = [], []
    trainer.model.eval()
    with torch.no_grad():
        for image, label in zip(*trainer.data.test_batch(torch.arange(12)), strict=True):
            outputs.append(trainer.model(image[None]))
            labels.append(label)
    logits, target = torch.cat(outputs), torch.stack(labels)
    assert float(nn.functional.cross_entropy(logits, target)) == pytest.approx(found[0], rel=1e-4)
    assert float((logits.argmax(1) == target).float().mean()) == pytest.approx(found[1])


def test_each_step_is_reported() -> None:
    steps: list[tuple[float, float]] = []
    trainer = _trainer(False, on_step=lambda *step: steps.append(step))
    history = trainer.run()
    assert len(steps) == 20
    for epoch, record in enumerate(history):
        losses, seconds = zip(*steps[5 * epoch : 5 * epoch + 5], strict=True)
        assert record["train_loss"] == pytest.approx(sum(losses) / 5)
        assert record["step_ms"] == round(1000 * statistics.median(seconds), 3)


def test_topk_period_and_its_warmup() -> None:
    periods: list[set[int]] = []
    trainer = _trainer(True, recipe=replace(TINY, topk_warmup_epochs=1, topk_period=4, epochs=2))
    layers = [module for module in trainer.model.modules() if isinstance(module, SWATLayer)]
    assert layers

    def note(*_: object) -> None:
        if trainer.model.training:
            periods.append({layer.topk_period for layer in layers})

    layers[0].register_forward_pre_hook(note)
    trainer.run()
    assert periods == [{1}] * 5 + [{4}] * 5
    assert {layer.steps for layer in layers} == {10}


def test_a_diverging_run_stops_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step \d+ of epoch 1: try a lower learning rate"):
        _trainer(False, recipe=replace(TINY, lr=1e30, warmup_epochs=0), out=tmp_path).run()
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("sparse", [False, True])
def test_resuming_is_bit_for_bit(sparse: bool, tmp_path: Path) -> None:
    straight = _trainer(sparse, out=tmp_path / "straight", settings={"a": 1})
    straight.run()

    seen = 0

    def stop(loss: float, seconds: float) -> None:
        nonlocal seen
        seen += 1
        if seen == 13:  # in the middle of the third epoch
            raise Interrupted

    with pytest.raises(Interrupted):
        _trainer(sparse, out=tmp_path / "broken", settings={"a": 1}, on_step=stop).run()
    torch.manual_seed(12345)
    resumed = _trainer(sparse, out=tmp_path / "broken", settings={"a": 1})
    resumed.load_state_dict(load_checkpoint(tmp_path / "broken" / CHECKPOINT))
    assert len(resumed.history) == 2
    resumed.run()

    assert _untimed(resumed.history) == _untimed(straight.history)
    files = [tmp_path / name for name in ("straight", "broken")]
    _assert_same(*(load_checkpoint(file / CHECKPOINT) for file in files))
    logs = [[json.loads(line) for line in (file / LOG).read_text().splitlines()] for file in files]
    assert len(logs[0]) == 5
    assert _untimed(logs[0]) == _untimed(logs[1])
    assert _untimed(logs[0])[1:] == _untimed(straight.history)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_another_length_is_the_end_of_a_run_of_that_length(sparse: bool, schedule: str) -> None:
    short = replace(TINY, epochs=2, schedule=schedule, milestones=(1.5, 3.0))  # type: ignore[arg-type]
    first = _trainer(sparse, recipe=short)
    first.run()
    rates: list[float] = []
    longer = _trainer(sparse, recipe=replace(short, epochs=4))
    longer.load_state_dict(copy.deepcopy(first.state_dict()))
    longer.on_step = lambda *_: rates.append(longer.optimizer.param_groups[0]["lr"])
    longer.run()
    assert rates == [longer.recipe.lr_at(step, 5) for step in range(10, 20)]
    assert [record["epoch"] for record in longer.history] == [1, 2, 3, 4]
    straight = _trainer(sparse, recipe=replace(short, epochs=4))
    straight.run()
    # Milestones are epochs, so that the length of the run does not matter before its end; a cosine has another past.
    same = _untimed(longer.history) == _untimed(straight.history)
    assert same == (schedule == "step")


def test_a_dense_state_is_not_a_sparse_one() -> None:
    with pytest.raises(ValueError, match="expected that of a sparse run, got that of a dense one"):
        _trainer(True).load_state_dict(_trainer(False).state_dict())


# --- the command line ----------------------------------------------------------------------------------------------

_ARGUMENTS = [
    *("--data", "synthetic", "--image-size", "8", "--samples", "48", "--width", "0.125"),
    *("--batch-size", "16", "--epochs", "3", "--no-progress"),
]


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def test_command_line_trains_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train.main([*_ARGUMENTS, "--sparsity", "0.8", "--activation-sparsity", "0.7", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "20 of 21 layers with weights train sparse" in printed
    assert "after 3 epochs" in printed
    config, *epochs = _log(out)
    expected = {"data": "synthetic", "sparsity": 0.8, "activation_sparsity": 0.7, "epochs": 3, "recipe": "small"}
    assert expected.items() <= config["config"].items()
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINT, LOG]
    # The sparse run's weights are a plain network's.
    resnet18(10, width=0.125).load_state_dict(load_checkpoint(out / CHECKPOINT)["model"])


@pytest.mark.parametrize("kind", [[], ["--dense"]])
def test_freed_memory_is_kept_before_anything_is_made(
    kind: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: order.append("keep"))
    monkeypatch.setattr(train, "load_data", lambda *_, **__: order.append("data") or _data())
    assert train.main([*_ARGUMENTS, *kind, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert order == ["keep", "data"]


def test_command_line_resumes_with_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train.main([*_ARGUMENTS, "--out", str(straight)]) == 0
    # --resume where there is nothing yet starts a run.
    interrupt_train([*_ARGUMENTS, "--out", str(broken), "--resume"], 2, monkeypatch)
    assert len(_log(broken)) == 3
    assert train.main(["--out", str(broken), "--resume", "--no-progress"]) == 0
    assert _untimed(_log(broken)) == _untimed(_log(straight))
    _assert_same(load_checkpoint(straight / CHECKPOINT)["model"], load_checkpoint(broken / CHECKPOINT)["model"])
    # A finished run has nothing left to do.
    assert train.main(["--out", str(broken), "--resume"]) == 0
    _assert_same(load_checkpoint(straight / CHECKPOINT)["model"], load_checkpoint(broken / CHECKPOINT)["model"])


def test_a_resumed_run_may_have_another_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [*_ARGUMENTS, "--schedule", "step", "--milestones", "1", "3", "--warmup-epochs", "0.5"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert train.main([*recipe, "--epochs", "4", "--out", str(straight)]) == 0
    assert train.main([*recipe, "--epochs", "2", "--out", str(out)]) == 0
    resume = ["--out", str(out), "--resume", "--no-progress"]
    assert train.main([*resume, "--epochs", "4"]) == 0
    assert "epochs from 2 to 4 after epoch 2" in capsys.readouterr().out
    config, *history = _untimed(_log(out))
    assert config["config"]["epochs"] == 4
    assert config["config"]["lengths"] == [{"after_epoch": 2, "from": 2, "to": 4}]
    assert history == _untimed(_log(straight))[1:]
    _assert_same(load_checkpoint(straight / CHECKPOINT)["model"], load_checkpoint(out / CHECKPOINT)["model"])
    assert train.main([*resume, "--epochs", "3"]) == 1
    assert "epochs: expected at least the 4 that the run to resume has done, got 3" in capsys.readouterr().err


def test_another_length_holds_before_an_epoch_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Trainer, epoch: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    resume = ["--out", str(tmp_path), "--resume", "--no-progress"]
    assert train.main([*_ARGUMENTS, "--epochs", "1", "--out", str(tmp_path)]) == 0
    for epochs in ("5", "2"):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_train_epoch", interrupt)
            assert train.main([*resume, "--epochs", epochs]) == 130
    assert train.main(resume) == 0
    config, *history = _log(tmp_path)
    assert [record["epoch"] for record in history] == [1, 2]
    assert [(change["from"], change["to"]) for change in config["config"]["lengths"]] == [(1, 5), (5, 2)]


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = [*_ARGUMENTS, "--epochs", "12", "--dense", "--threads", "1"]
    command = [sys.executable, "-m", "swat_ext.train", *arguments, "--out", str(out)]
    root = str(Path(train.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (out / CHECKPOINT).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = len(load_checkpoint(out / CHECKPOINT)["history"])
    assert 1 <= done < 12, "the run was to be killed in the middle"
    threads = torch.get_num_threads()
    try:
        assert train.main(["--out", str(out), "--resume", "--no-progress"]) == 0
        assert train.main([*arguments, "--out", str(tmp_path / "straight")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert _untimed(_log(out)) == _untimed(_log(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar10"], "data_dir: data 'cifar10' needs the folder"),
        (["--data", "cifar10", "--data-dir", "absent"], "lacks data_batch_1"),
        (["--sparsity", "1"], "sparsity: expected a number in [0, 1)"),
        (["--dense", "--sparsity", "0.9"], "--sparsity: has no meaning with --dense"),
        (["--lr", "-1"], "lr: expected"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--width", "-1"], "width: expected a positive number"),
        (["--skip", "nothing.*"], "nothing.*"),
        (["--threads", "0"], "threads: expected at least 1"),
        (["--lr", "1e30", "--warmup-epochs", "0"], "the loss is"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [*_ARGUMENTS, "--out", str(tmp_path / "x")]
    if "--data" in arguments:
        base = ["--out", str(tmp_path / "x")]
    assert train.main([*base, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("swat-train: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x" / CHECKPOINT).exists()


def test_a_run_is_not_overwritten_nor_resumed_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert train.main([*_ARGUMENTS, "--dense", "--epochs", "1", "--out", out]) == 0
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    capsys.readouterr()
    assert train.main([*_ARGUMENTS, "--dense", "--out", out]) == 1
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert train.main(["--out", out, "--resume", "--lr", "0.7"]) == 1
    assert "--lr: the run to resume has 0.05, got 0.7" in capsys.readouterr().err
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_validation_leaves_the_test_set_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "digits", "--width", "0.125", "--dense", "--epochs", "1", "--no-progress"]
    out = tmp_path / "run"
    pytest.importorskip("sklearn")
    assert train.main([*arguments, "--validate", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1151 training and 287 validation images" in printed
    assert "\nvalidation accuracy" in printed
    assert _log(out)[0]["config"]["validate"] is True
    settings = {"data": "digits", "model": "vgg16", "dense": True, "seed": 0, "validate": True}
    assert train._default_out(settings) == Path("runs/digits-validation-vgg16-dense-seed0")


def test_an_older_checkpoint_has_the_defaults_of_later_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main([*_ARGUMENTS, "--epochs", "1", "--out", str(out)]) == 0
    state = load_checkpoint(out / CHECKPOINT)
    del state["settings"]["batchnorm"]
    save_checkpoint(out / CHECKPOINT, state)
    capsys.readouterr()
    assert train.main(["--out", str(out), "--resume", "--batchnorm", "int8"]) == 1
    assert "--batchnorm: the run to resume has exact, got int8" in capsys.readouterr().err
    assert train.main(["--out", str(out), "--resume", "--batchnorm", "exact"]) == 0
    assert _log(out)[0]["config"]["batchnorm"] == "exact"


def test_help_and_unknown_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    assert "--resume" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        train.main(["--data", "imagenet"])
