"""Running statistics of BatchNorm estimated anew: against float64, what stays as it was, and in training runs."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same_state, batches, sgd, sparse_layers
from resuming import interrupt_train
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import swat_ext
from swat_ext import SWATConfig, SWATScheduler, keep_freed_memory, sparsify_, to_dense, train, update_batchnorm_
from swat_ext.data import Synthetic
from swat_ext.models import resnet18
from swat_ext.training import CHECKPOINT, LOG, Recipe, Trainer, load_checkpoint, save_checkpoint

_TIMES = ("step_ms", "seconds", "batchnorm_seconds")


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_as_before() -> Iterator[None]:
    yield
    keep_freed_memory(False)


def _network(sparse: bool, *, momentum: float | None = 0.1, batchnorm: str = "exact") -> nn.Sequential:
    """Three BatchNorms, the last of two dimensions, and a dropout; some steps old."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24, momentum=momentum),
        nn.Flatten(),
        nn.Linear(24 * 16, 20),
        nn.BatchNorm1d(20, momentum=momentum),
        nn.Linear(20, 5),
    )
    if sparse:
        sparsify_(model, SWATConfig(0.8, topk_period=3, batchnorm=batchnorm))
    optimizer = sgd(model)
    for x, y in batches(4, size=8):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _inputs(count: int = 5) -> list[Tensor]:
    return [3 * x + 1 for x, _ in batches(count, first=50, size=8)]


def _expected(model: nn.Module, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each BatchNorm the mean over the batches of their means and unbiased variances, in float64."""
    twin = copy.deepcopy(model)
    twin = (to_dense(twin) if sparse_layers(twin) else twin).eval().double()
    found: list[list[tuple[Tensor, Tensor]]] = []
    for norm in _norms(twin):
        norm.training = True
        seen: list[tuple[Tensor, Tensor]] = []
        found.append(seen)

        def note(_: nn.Module, args: tuple[Tensor], seen: list[tuple[Tensor, Tensor]] = seen) -> None:
            dims = [dim for dim in range(args[0].dim()) if dim != 1]
            seen.append((args[0].mean(dims), args[0].var(dims, unbiased=True)))

        norm.register_forward_pre_hook(note)
    with torch.no_grad():
        for x in inputs:
            twin(x.double())
    return [tuple(torch.stack(part).mean(0) for part in zip(*seen, strict=True)) for seen in found]  # type: ignore[misc]


# --- what is estimated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["dense", "exact", "bf16", "int8"])
def test_statistics_are_the_mean_over_batches(kind: str, training: bool, grad: bool) -> None:
    model = (_network(False) if kind == "dense" else _network(True, batchnorm=kind)).train(training)
    expected = _expected(model, _inputs())
    with torch.set_grad_enabled(grad):
        assert update_batchnorm_(model, _inputs()) == 5
    for norm, (mean, variance) in zip(_norms(model), expected, strict=True):
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_they_are_those_of_torchs_own_function() -> None:
    ours, theirs = _network(False).eval(), _network(False)
    theirs[3].p = 0.0  # theirs has dropout at work
    update_batchnorm_(ours, _inputs())
    update_bn(_inputs(), theirs)
    for mine, other in zip(_norms(ours), _norms(theirs), strict=True):
        assert torch.equal(mine.running_mean, other.running_mean)
        assert torch.equal(mine.running_var, other.running_var)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_double_network_is_exact(sparse: bool) -> None:
    model = _network(sparse).double()
    inputs = [x.double() for x in _inputs(3)]
    expected = _expected(model, inputs)
    update_batchnorm_(model, inputs)
    for norm, (mean, variance) in zip(_norms(model), expected, strict=True):
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-11, atol=1e-11)


def test_every_form_of_a_batch() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
            return self.norm(x + shift)

    x = torch.arange(12.0).view(4, 3)
    model = Named()
    assert update_batchnorm_(model, iter([x, (x, 1), [x, None, 2], {"x": x, "shift": 4.0}])) == 4
    torch.testing.assert_close(model.norm.running_mean, x.mean(0) + 1)


@pytest.mark.parametrize(("limit", "used"), [(1, 1), (3, 3), (7, 5)])
def test_no_more_batches_are_taken_than_asked_for(limit: int, used: int) -> None:
    model, left = _network(True), iter(_inputs())
    expected = _expected(model, _inputs()[:used])
    assert update_batchnorm_(model, left, limit=limit) == used
    assert len(list(left)) == 5 - used
    torch.testing.assert_close(_norms(model)[1].running_mean.double(), expected[1][0], rtol=1e-5, atol=1e-5)


# --- what stays -------------------------------------------------------------------------------------------------------


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_selections_parameters_and_random_numbers_stay() -> None:
    model = _network(True)
    scheduler = SWATScheduler(model, sgd(model))
    before = copy.deepcopy(scheduler.state_dict())
    shares = [layer.realised_sparsity for layer in sparse_layers(model)]
    parameters = copy.deepcopy(dict(model.named_parameters()))
    random = torch.get_rng_state()
    update_batchnorm_(model, _inputs())
    after = scheduler.state_dict()
    assert after["layers"].keys() == before["layers"].keys()
    for name, layer in after["layers"].items():
        for operand in ("weight", "activation"):
            threshold = layer[operand].pop("threshold")
            assert torch.equal(threshold, before["layers"][name][operand].pop("threshold"))
            assert threshold > 0
    assert after == before
    assert [layer.realised_sparsity for layer in sparse_layers(model)] == shares
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("sparse", [False, True])
def test_modes_and_momenta_stay(sparse: bool) -> None:
    model = _network(sparse).train()
    model[1].eval()
    model[3].eval()
    model[5].momentum = None
    modes = _modes(model)
    update_batchnorm_(model, _inputs())
    assert _modes(model) == modes
    assert [norm.momentum for norm in _norms(model)] == [0.1, None, 0.1]
    model.eval()
    model[3].train()
    modes = _modes(model)
    update_batchnorm_(model, _inputs())
    assert _modes(model) == modes


@pytest.mark.parametrize("sparse", [False, True])
def test_the_count_of_batches(sparse: bool) -> None:
    model = _network(sparse)
    model[5].momentum = None
    update_batchnorm_(model, _inputs())
    # Without a momentum the average goes on, so that the next batch weighs a sixth.
    assert [int(norm.num_batches_tracked) for norm in _norms(model)] == [4, 5, 4]
    x, mean = _inputs(6)[5], _norms(model)[1].running_mean.double()
    seen: list[Tensor] = []
    model[5].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().mean((0, 2, 3))))
    model(x)
    torch.testing.assert_close(model[5].running_mean.double(), (5 * mean + seen[0]) / 6, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batchnorm", ["exact", "int8"])
def test_training_goes_on_as_if_nothing_had_been_estimated(batchnorm: str) -> None:
    alone, updated = _network(True, batchnorm=batchnorm), _network(True, batchnorm=batchnorm)
    update_batchnorm_(updated, _inputs())
    for model in (alone, updated):
        optimizer = sgd(model)
        torch.manual_seed(4)
        for x, y in batches(4, first=10, size=8):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(alone.parameters(), updated.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_what_tracks_no_statistics_is_left() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not to be run")

    def none_to_take() -> Iterator[Tensor]:
        raise AssertionError("not to be taken")
        yield

    frozen = nn.BatchNorm2d(3)
    frozen.track_running_stats = False
    norms = [nn.BatchNorm2d(3, track_running_stats=False), frozen, nn.InstanceNorm2d(3, track_running_stats=True)]
    model = nn.Sequential(Counting(), *norms)
    before = copy.deepcopy(model)
    assert update_batchnorm_(model, none_to_take()) == 0
    assert_same_state(model, before)
    model[0] = nn.BatchNorm2d(3)
    model.train()
    assert update_batchnorm_(model, _inputs()) == 5
    assert_same_state(model[1:], before[1:])
    assert not torch.equal(model[0].running_mean, torch.zeros(3))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_norm_that_is_frozen_in_training_keeps_its_statistics(sparse: bool) -> None:
    """As those of a pretrained body in fine-tuning."""
    model = _network(sparse).train()
    first, second, third = _norms(model)
    first.eval(), third.eval()
    before = copy.deepcopy([first, third])
    twin = copy.deepcopy(model)
    assert update_batchnorm_(model, _inputs()) == 5
    for norm, old in zip((first, third), before, strict=True):
        assert_same_state(norm, old)
        assert not norm.training
    # The one between them sees what the frozen one gives.
    twin = (to_dense(twin) if sparse else twin).eval().double()
    seen: list[Tensor] = []
    _norms(twin)[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for x in _inputs():
            twin(x.double())
    means = torch.stack([x.mean([0, 2, 3]) for x in seen]).mean(0)
    torch.testing.assert_close(second.running_mean.double(), means, rtol=1e-4, atol=1e-5)
    # In a model in evaluation none is: each is then in evaluation mode.
    model.eval()
    update_batchnorm_(model, _inputs(2))
    for norm, old in zip((first, third), before, strict=True):
        assert not torch.equal(norm.running_mean, old.running_mean)


def test_where_every_norm_is_frozen_nothing_is_run() -> None:
    model = _network(False).train()
    for norm in _norms(model):
        norm.eval()
    before = copy.deepcopy(model)
    assert update_batchnorm_(model, iter([None])) == 0
    assert_same_state(model, before)
    assert model.training


def test_a_norm_that_is_not_reached_keeps_its_statistics() -> None:
    class WithAuxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.auxiliary = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + (self.auxiliary(x) if self.training else 0)

    model = WithAuxiliary()
    model(_inputs(1)[0])
    before = copy.deepcopy(model.auxiliary)
    update_batchnorm_(model, _inputs())
    assert_same_state(model.auxiliary, before)


def test_a_dropout_inside_a_norm_drops_nothing() -> None:
    class NormAndDrop(nn.BatchNorm2d):
        def __init__(self, features: int) -> None:
            super().__init__(features)
            self.drop = nn.Dropout(0.9)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(super().forward(x))

    model = nn.Sequential(NormAndDrop(3), nn.BatchNorm2d(3, affine=False))
    update_batchnorm_(model, _inputs())
    torch.testing.assert_close(model[1].running_var, torch.ones(3), rtol=1e-2, atol=0)


def test_hooks_and_train_methods_of_the_user_are_called() -> None:
    merged: list[bool] = []

    class Merging(nn.Linear):
        """As adapters that are merged into the weight in evaluation."""

        def train(self, mode: bool = True) -> Any:
            merged.append(not mode)
            return super().train(mode)

    model = nn.Sequential(Merging(3, 3), nn.BatchNorm1d(3))
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model[1].register_forward_hook(lambda *_: calls.append("after"))
    update_batchnorm_(model, [torch.randn(4, 3)] * 2)
    assert calls == ["before", "after"] * 2
    assert merged == [True, False]


def test_a_compiled_model() -> None:
    model = _network(True)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    update_batchnorm_(model, _inputs())
    update_batchnorm_(compiled, _inputs())
    for mine, other in zip(_norms(model), _norms(compiled), strict=True):
        torch.testing.assert_close(mine.running_var, other.running_var)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def _fail_late() -> Iterator[Tensor]:
    yield from _inputs(2)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (_fail_late, KeyboardInterrupt, ""),
        (list, ValueError, "batches: expected at least one batch, got none"),
        (lambda: [*_inputs(2), "x"], TypeError, "batches: .* got a str"),
        (lambda: [("a", _inputs(1)[0])], TypeError, "batches: .* got a tuple of str"),
        (lambda: [()], TypeError, "batches: .* got a tuple"),
        (lambda: [*_inputs(2), _inputs(1)[0].double()], RuntimeError, "type"),
        (lambda: [*_inputs(2), {"x": 1}], TypeError, "unexpected keyword"),
        (lambda: [*_inputs(2), _inputs(1)[0][:1]], ValueError, "more than 1 value per channel"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_after_an_error_all_is_as_before(wrong: Any, error: type[Exception], message: str, training: bool) -> None:
    model = _network(True).train(training)
    model[5].momentum = None
    model[3].train(not training)
    before, modes = copy.deepcopy(model), _modes(model)
    with pytest.raises(error, match=message):
        update_batchnorm_(model, wrong())
    assert_same_state(model, before)
    assert _modes(model) == modes
    assert [norm.momentum for norm in _norms(model)] == [0.1, None, 0.1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": len}, TypeError, "model: expected a torch.nn.Module, got builtin"),
        ({"batches": torch.ones(2, 3, 8, 8)}, TypeError, "batches: expected an iterable of batches, got Tensor"),
        ({"batches": {"x": 1}}, TypeError, "batches: expected an iterable of batches, got dict"),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches, got int"),
        ({"limit": 0}, ValueError, "limit: expected an integer of at least 1, got 0"),
        ({"limit": 2.0}, TypeError, "limit: expected an integer of at least 1, got 2.0"),
        ({"limit": True}, TypeError, "limit: expected an integer of at least 1, got True"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": _network(False), "batches": _inputs(), **arguments}
    with pytest.raises(error, match=message):
        swat_ext.update_batchnorm_(given.pop("model"), given.pop("batches"), **given)


# --- training runs ----------------------------------------------------------------------------------------------------

TINY = Recipe(epochs=3, batch_size=8, lr=0.05, schedule="cosine", warmup_epochs=1, topk_period=3)


def _trainer(sparse: bool, recipe: Recipe, **arguments: Any) -> Trainer:
    torch.manual_seed(3)
    model = resnet18(3, in_channels=2, width=0.125)
    if sparse:
        sparsify_(model, SWATConfig(0.8, 0.7, topk_period=3))
    data = Synthetic((2, 8, 8), num_classes=3, train_size=40, test_size=12)
    return Trainer(model, data, recipe, seed=5, progress=False, **arguments)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_evaluation_is_by_the_coming_epochs_first_batches(sparse: bool, memory_format: torch.memory_format) -> None:
    trainer = _trainer(sparse, replace(TINY, epochs=1, batchnorm_batches=3), memory_format=memory_format)
    record = trainer.run()[0]
    by_hand = _trainer(sparse, replace(TINY, epochs=1, batchnorm_batches=0), memory_format=memory_format)
    running = by_hand.run()[0]
    assert record["train_loss"] == running["train_loss"]
    assert record["test_loss"] != running["test_loss"]
    assert 0 < record["batchnorm_seconds"] < record["seconds"]
    images = [x.contiguous(memory_format=memory_format) for x, _ in by_hand.data.train_batches(8, seed=5, epoch=1)]
    assert update_batchnorm_(by_hand.model, images, limit=3) == 3
    assert_same_state(by_hand.model, trainer.model)


@pytest.mark.parametrize("sparse", [False, True])
def test_training_does_not_depend_on_it(sparse: bool) -> None:
    runs = [_trainer(sparse, replace(TINY, batchnorm_batches=count)) for count in (0, 2, 20)]
    histories = [run.run() for run in runs]
    for other in histories[1:]:
        assert [record["train_loss"] for record in other] == [record["train_loss"] for record in histories[0]]
    for other in runs[1:]:
        for mine, theirs in zip(runs[0].model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    # Never more than the five batches of an epoch.
    five = _trainer(sparse, replace(TINY, batchnorm_batches=5))
    five.run()
    assert_same_state(five.model, runs[2].model)


_ARGUMENTS = [
    *("--data", "synthetic", "--image-size", "8", "--samples", "48", "--width", "0.125"),
    *("--batch-size", "16", "--epochs", "3", "--no-progress"),
]


def _log(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in _TIMES} for record in records]


@pytest.mark.parametrize("kind", [["--batchnorm", "int8"], ["--dense"], ["--batchnorm-batches", "2", "--workers", "1"]])
def test_a_resumed_run_is_exact(kind: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train.main([*_ARGUMENTS, *kind, "--out", str(straight)]) == 0
    interrupt_train([*_ARGUMENTS, *kind, "--out", str(broken)], 2, monkeypatch)
    assert train.main(["--out", str(broken), "--resume", "--no-progress"]) == 0
    assert _log(broken) == _log(straight)
    assert _log(broken)[0]["config"]["batchnorm_batches"] == (2 if "--batchnorm-batches" in kind else 20)
    left, right = (load_checkpoint(out / CHECKPOINT)["model"] for out in (straight, broken))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_of_an_earlier_version_goes_on_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, early = tmp_path / "straight", tmp_path / "early"
    off = [*_ARGUMENTS, "--batchnorm-batches", "0"]
    assert train.main([*off, "--out", str(straight)]) == 0
    interrupt_train([*off, "--out", str(early)], 2, monkeypatch)
    checkpoint = load_checkpoint(early / CHECKPOINT)
    del checkpoint["settings"]["batchnorm_batches"]
    for record in checkpoint["history"]:
        del record["batchnorm_seconds"]
    save_checkpoint(early / CHECKPOINT, checkpoint)
    resume = ["--out", str(early), "--resume", "--no-progress"]
    assert train.main([*resume, "--batchnorm-batches", "20"]) == 1
    assert "--batchnorm-batches: the run to resume has 0, got 20" in capsys.readouterr().err
    assert train.main(resume) == 0
    assert _log(early) == _log(straight)
