"""Models that are made without values, on the meta device, and get them later."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same_state, batches, sgd, small_network, sparse_layers, sparse_network, train
from resuming import assert_equal, run_of
from torch import Tensor, nn

from swat_ext import SWATConfig, SWATConv2d, SWATLinear, SWATScheduler, sparsify_
from swat_ext.modules import base
from swat_ext.topology import RigL

TOTAL = 12
KINDS: dict[str, dict[str, Any]] = {
    "swat": {},
    "block": {"granularity": "block", "block_size": (4, 2)},
    "static": {"method": "static"},
    "rigl": {"method": RigL(update_period=2, until=1.0)},
    "momentum": {"distribution": "momentum"},
}


def on_meta(**config: Any) -> nn.Module:
    with torch.device("meta"):
        return sparse_network(**config)


def source(keep_vars: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A dense network's state, some steps old."""
    dense = small_network(seed=5)
    train(dense, sgd(dense), batches(2))
    return dense, dense.state_dict(keep_vars=keep_vars)


@pytest.mark.parametrize("keep_vars", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_assigned_train_as_those_that_are_copied(kind: str, keep_vars: bool) -> None:
    config = KINDS[kind]
    model, plain = on_meta(**config), sparse_network(**config)
    assert all(parameter.is_meta for parameter in model.parameters())
    dense, state = source(keep_vars)
    before = copy.deepcopy(dense)
    plain.load_state_dict(state)
    model.load_state_dict(state, assign=True)
    assert_same_state(model, plain)
    assert_same_state(dense, before)
    # Of a pattern even while it trains: what is made zero is the model's own. Else it is shared, as in any model.
    for layer, name in zip(sparse_layers(model), ("0", "3", "5", "7", "9")[-len(sparse_layers(model)) :], strict=True):
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight.requires_grad
        same = layer.weight.data_ptr() == state[f"{name}.weight"].data_ptr()
        assert same == (kind not in ("static", "rigl"))
        assert layer.activation_threshold.device.type == "cpu"
    first, second = sgd(plain), sgd(model)
    SWATScheduler(plain, first, total_steps=TOTAL), SWATScheduler(model, second, total_steps=TOTAL)
    x = batches(1, first=60)[0][0]
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model.eval()(x))
    plain.train(), model.train()
    assert_equal(train(plain, first, batches(5)), train(model, second, batches(5)))
    assert_same_state(model, plain)
    if kind in ("static", "rigl"):
        for name in ("3", "5", "7", "9"):
            assert torch.equal(dense.get_parameter(f"{name}.weight"), before.get_parameter(f"{name}.weight"))


def test_a_partial_state_leaves_the_parameter_that_an_optimizer_has() -> None:
    model = sparse_network(method="static")
    weight, pattern = model[9].weight, model[9].kept_weight().pattern.dense()
    model[9].load_state_dict({"bias": torch.zeros(5)}, strict=False, assign=True)
    assert model[9].weight is weight
    assert torch.equal(model[9].kept_weight().pattern.dense(), pattern)


def test_thresholds_of_a_model_without_values_are_real() -> None:
    for layer in sparse_layers(on_meta()):
        for threshold in (layer.weight_threshold, layer.activation_threshold):
            assert threshold.device.type == "cpu"
            assert float(threshold) == 0.0
    moved = sparse_network()
    train(moved, sgd(moved), batches(1))
    before = [(float(layer.weight_threshold), float(layer.activation_threshold)) for layer in sparse_layers(moved)]
    moved.to("meta")
    now = [(float(layer.weight_threshold), float(layer.activation_threshold)) for layer in sparse_layers(moved)]
    assert now == before
    assert min(map(min, now)) > 0


@pytest.mark.parametrize(
    ("kind", "ramp"), [*[(kind, 0.0) for kind in KINDS], ("swat", 0.75), ("block", 0.75), ("momentum", 0.75)]
)
def test_resuming_by_way_of_meta_is_exact(kind: str, ramp: float, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"total_steps": TOTAL, "ramp": ramp, "topk_warmup": 7}
    straight, first = (run_of(0, plan=plan, **KINDS[kind]) for _ in range(2))
    losses = train(straight.m, straight.o, batches(TOTAL))
    # Under "rigl" right after an update: what grew is zero, and in the scheduler's state alone.
    train(first.m, first.o, batches(6))
    torch.save({name: part.state_dict() for name, part in first._asdict().items()}, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model = on_meta(**KINDS[kind])
    SWATScheduler(model, sgd(model), **plan).load_state_dict(state["s"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # as memory that nobody wrote to may be
    model.load_state_dict(state["m"])
    optimizer = sgd(model)
    optimizer.load_state_dict(state["o"])
    assert_equal(losses[6:], train(model, optimizer, batches(TOTAL - 6, first=6)))
    assert_same_state(straight.m, model)
    for mine, other in zip(sparse_layers(straight.m), sparse_layers(model), strict=True):
        assert (mine.budget, mine.topk_period, mine.steps) == (other.budget, other.topk_period, other.steps)
        assert torch.equal(mine.kept_weight().mask, other.kept_weight().mask)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_may_be_made_under_a_default_device(kind: str) -> None:
    model = on_meta(**KINDS[kind])
    plain = sparse_network(**KINDS[kind])
    assert [layer.kept_weights for layer in sparse_layers(model)] == [
        layer.kept_weights for layer in sparse_layers(plain)
    ]
    if kind in ("static", "rigl"):  # the patterns are the same
        for layer, twin in zip(sparse_layers(model), sparse_layers(plain), strict=True):
            state, other = layer.selection_state()["weight"], twin.selection_state()["weight"]
            assert torch.equal(state["mask"], other["mask"])
    options = {name: value for name, value in KINDS[kind].items() if name != "distribution"}
    with torch.device("meta"):
        layers = [SWATConv2d(4, 8, 3, sparsity=0.5, **options), SWATLinear(8, 8, sparsity=0.5, **options)]
        dense = nn.Sequential(nn.Linear(8, 8))
        sparsify_(dense, SWATConfig(0.5, **KINDS[kind]))
    for layer in (*layers, dense[0]):
        assert layer.weight.is_meta
        assert layer.kept_weights == layer.weight.numel() // 2
        assert layer.selection_state()["weight"].get("mask", torch.zeros(())).device.type == "cpu"


def test_the_kernels_are_chosen_anew_for_the_device_of_what_is_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = on_meta(), small_network()
    seen, choose = [], base.choose_backend
    monkeypatch.setattr(base, "choose_backend", lambda *args: [seen.append(args[-1]), choose(*args)][1])
    model.load_state_dict(dense.state_dict(), assign=True)
    assert seen == ["cpu"] * 4
