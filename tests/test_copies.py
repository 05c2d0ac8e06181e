"""Copies of a model that moves: averages of its weights, deepcopy and pickle, and models whose layers are replaced."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_same_state, batches, sgd, small_network, sparse_layers, sparse_network, train
from resuming import Run, assert_equal, run_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from swat_ext import SWATConfig, SWATScheduler, sparsify_
from swat_ext.topology import RigL

TOTAL = 12
RIGL = {"method": RigL(update_period=2, until=1.0)}
RAMP = {"ramp": 1.0, "topk_warmup": 6, "topk_period": 4}
MOVING: dict[str, dict[str, Any]] = {
    "rigl": RIGL,
    "ramp": RAMP,
    "momentum": {"distribution": "momentum"},
    "ramp of momentum": {"distribution": "momentum", **RAMP},
    "ramp of kernels": {"granularity": "kernel", **RAMP},
}


def run(seed: int = 0, *, ramp: float = 0.0, topk_warmup: int = 0, **config: Any) -> Run:
    return run_of(seed, plan={"total_steps": TOTAL, "ramp": ramp, "topk_warmup": topk_warmup}, **config)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(batches(1, first=60)[0][0])


def budgets(model: nn.Module) -> list[Any]:
    return [(layer.budget, layer.activation_budget, layer.topk_period) for layer in sparse_layers(model)]


def patterns(model: nn.Module) -> list[Tensor]:
    return [layer.kept_weight().pattern.dense() for layer in sparse_layers(model)]


def newest(average: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    return new.clone()


# --- Averages of weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_a_copy_of_weights_whose_pattern_moves_computes_what_the_model_does(backend: str) -> None:
    made = run(**RIGL, backend=backend)
    copied = AveragedModel(made.m, avg_fn=newest)
    copied.update_parameters(made.m)
    for step in range(6):
        train(made.m, made.o, batches(1, first=step))
        copied.update_parameters(made.m)
        assert torch.equal(output(copied), output(made.m))
        made.m.train()
    # That of the copy is still the first one.
    assert not any(torch.equal(*pair) for pair in zip(patterns(copied), patterns(made.m), strict=True))


def averaged(made: Run, steps: int) -> tuple[AveragedModel, nn.Module]:
    """Torch's average over ``steps``, and a dense network with the same weights, averaged here."""
    average, seen = AveragedModel(made.m), []
    for step in range(steps):
        train(made.m, made.o, batches(1, first=step))
        average.update_parameters(made.m)
        seen.append({name: value.detach().to(torch.float64, copy=True) for name, value in made.m.named_parameters()})
    dense = small_network(torch.float64)
    # BatchNorm's statistics are those of the model.
    dense.load_state_dict(made.m.state_dict())
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(torch.stack([values[name] for values in seen]).mean(0))
    return average, dense.eval()


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_an_average_over_patterns_uses_all_its_weights(backend: str) -> None:
    made = run(**RIGL, backend=backend)
    average, dense = averaged(made, 7)
    x = batches(1, first=60)[0][0]
    torch.testing.assert_close(output(average).double(), dense(x.double()), rtol=1e-4, atol=1e-6)
    for layer, twin in zip(sparse_layers(average), [dense[i] for i in (3, 5, 7, 9)], strict=True):
        assert int((twin.weight != 0).sum()) > layer.kept_weights
        assert torch.equal(layer.to_dense().weight != 0, twin.weight != 0)
    # Of the same steps, and so do its patterns, in training.
    made.s.copy_to(average.module)
    torch.testing.assert_close(output(average).double(), dense(x.double()), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(patterns(average), patterns(made.m), strict=True))


@pytest.mark.parametrize("name", MOVING)
def test_a_copy_that_is_told_is_the_model(name: str) -> None:
    made = run(**MOVING[name])
    copied = AveragedModel(made.m, avg_fn=newest)
    train(made.m, made.o, batches(5))
    copied.update_parameters(made.m)
    assert torch.equal(output(copied), output(made.m)) == (name == "rigl")
    made.s.copy_to(copied.module)
    assert torch.equal(output(copied), output(made.m))
    assert budgets(copied.module) == budgets(made.m)
    # Thresholds, or patterns, and counts too: as a model in training it goes on from the same.
    made.m.train(), copied.train()
    x = batches(1, first=5)[0][0]
    assert torch.equal(copied.module(x), made.m(x))
    for mine, other in zip(sparse_layers(made.m), sparse_layers(copied), strict=True):
        assert (mine.steps, mine.steps_since_selection) == (other.steps, other.steps_since_selection)
        assert torch.equal(mine.activation_threshold, other.activation_threshold)
        assert mine.activation_threshold is not other.activation_threshold
    # Nothing is shared: the model goes on and the copy stays.
    before, budget = output(copied), budgets(copied.module)
    made.m.train()
    train(made.m, made.o, batches(4, first=5))
    assert torch.equal(output(copied), before)
    assert budgets(copied.module) == budget


@pytest.mark.parametrize("name", ["ramp", "momentum", "ramp of momentum"])
def test_an_average_keeps_its_largest_weights_as_many_as_the_model(name: str) -> None:
    made = run(**MOVING[name])
    average, dense = averaged(made, 5)
    made.s.copy_to(average.module)
    counts = []
    with torch.no_grad():
        for layer, twin in zip(
            sparse_layers(made.m), [dense[i] for i in (0, 3, 5, 7, 9)][-len(sparse_layers(made.m)) :], strict=True
        ):
            counts.append(layer.budget.count(twin.weight.numel()))
            limit = twin.weight.abs().flatten().sort(descending=True).values[counts[-1] - 1]
            twin.weight *= twin.weight.abs() >= limit
            assert int((twin.weight != 0).sum()) == counts[-1]
    x = batches(1, first=60)[0][0]
    torch.testing.assert_close(output(average).double(), dense(x.double()), rtol=1e-4, atol=1e-6)
    assert [int((layer.to_dense().weight != 0).sum()) for layer in sparse_layers(average)] == counts


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (dict, TypeError, r"^model: expected a torch\.nn\.Module, got dict"),
        (lambda: None, TypeError, r"^model: expected a torch\.nn\.Module, got NoneType"),
        (small_network, ValueError, "missing: none; not in the model: '3', '5', '7', '9'"),
        (lambda: nn.Sequential(sparse_network(**RIGL)), ValueError, "missing: '0.3', .*; not in the model: '3'"),
        (lambda: sparse_network(skip=["0", "9"], **RIGL), ValueError, "not in the model: '9'"),
        (lambda: sparse_network(), ValueError, r"layer '3': topology: expected 'swat, .*, got 'RigL\("),
        (lambda: sparse_network(method="rigl"), ValueError, r"topology: expected 'RigL\(update_period=100, .*, got"),
        (lambda: sparse_network(granularity="kernel", **RIGL), ValueError, "topology: expected .*, kernel, uniform'"),
        (lambda: sparse_network(dtype=torch.float64, **RIGL), ValueError, r"expected a 0-dim torch\.float64"),
    ],
)
def test_another_kind_of_model_is_refused_and_stays(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    made = run(**RIGL)
    train(made.m, made.o, batches(3))
    other = make()
    layers = sparse_layers(other) if isinstance(other, nn.Module) else []
    before = copy.deepcopy([layer.selection_state() for layer in layers])
    with pytest.raises(error, match=message):
        made.s.copy_to(other)
    for layer, state in zip(layers, before, strict=True):
        assert_same_selection(layer.selection_state(), state)


def test_a_last_layer_of_another_shape_leaves_the_first_ones_alone() -> None:
    made = run(**RIGL)
    train(made.m, made.o, batches(3))
    other = sparse_network(**RIGL)
    other[9].weight = nn.Parameter(torch.zeros(5, 383))
    before = copy.deepcopy([layer.selection_state() for layer in sparse_layers(other)])
    with pytest.raises(ValueError, match=r"^state_dict: layer '9': expected a weight of shape \(5, 383\), got "):
        made.s.copy_to(other)
    for layer, state in zip(sparse_layers(other), before, strict=True):
        assert_same_selection(layer.selection_state(), state)


def assert_same_selection(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            assert_same_selection(value, right[name])
        elif isinstance(value, Tensor):
            assert torch.equal(value, right[name])
        else:
            assert value == right[name], name


# --- deepcopy and pickle ----------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", MOVING)
def test_a_copy_with_a_scheduler_of_its_own_goes_on_where_it_was_taken(
    name: str, how: Callable[[nn.Module], nn.Module]
) -> None:
    config = dict(MOVING[name])
    plan = {"total_steps": TOTAL, "ramp": config.get("ramp", 0.0), "topk_warmup": config.get("topk_warmup", 0)}
    made = run(**config)
    train(made.m, made.o, batches(3))
    model = how(made.m)
    assert [layer.driver for layer in sparse_layers(model)] == [None] * len(sparse_layers(model))
    optimizer = sgd(model)
    optimizer.load_state_dict(copy.deepcopy(made.o.state_dict()))
    SWATScheduler(model, optimizer, **plan)
    data = batches(TOTAL - 3, first=3)
    assert_equal(train(made.m, made.o, data), train(model, optimizer, data))
    assert_same_state(made.m, model)
    assert budgets(made.m) == budgets(model)
    if "momentum" not in name:
        assert {layer.sparsity for layer in sparse_layers(model)} == {0.8}
    assert {layer.topk_period for layer in sparse_layers(model)} == {config.get("topk_period", 3)}


def test_a_copy_without_a_scheduler_keeps_what_it_has() -> None:
    made = run(**RAMP)
    train(made.m, made.o, batches(3))
    model = copy.deepcopy(made.m)
    before = budgets(model)
    train(model, sgd(model), batches(2))
    assert budgets(model) == before
    assert {layer.topk_period for layer in sparse_layers(model)} == {1}


# --- Layers that are put elsewhere ------------------------------------------------------------------------------------


def test_a_layer_that_is_wrapped_later_goes_on_with_what_it_was_to_do() -> None:
    plain, wrapped = run(**RAMP), run(**RAMP)
    for step in range(TOTAL):
        if step == 2:
            wrapped.m[3] = nn.Sequential(wrapped.m[3])
        data = batches(1, first=step)
        assert_equal(train(plain.m, plain.o, data), train(wrapped.m, wrapped.o, data))
        assert budgets(plain.m) == budgets(wrapped.m)
    assert wrapped.m[3][0].sparsity == 0.8
    assert wrapped.m[3][0].topk_period == 4
    assert wrapped.s.state_dict()["layers"].keys() == {"3.0", "5", "7", "9"}
    wrapped.s.load_state_dict(wrapped.s.state_dict())
    for mine, other in zip(
        plain.s.state_dict()["layers"].values(), wrapped.s.state_dict()["layers"].values(), strict=True
    ):
        assert_same_selection(mine, other)


def test_two_layers_that_change_places_keep_what_is_theirs() -> None:
    """By name each would take over the other's end."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    sparsify_(model, SWATConfig(0.5, topk_period=4))
    first, second = model[0], model[2]
    first.sparsity, second.topk_period = 0.75, 7
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    SWATScheduler(model, optimizer, total_steps=4, ramp=1.0, topk_warmup=3)
    model[0], model[2] = second, first
    for _ in range(4):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    assert (first.sparsity, first.topk_period) == (0.75, 4)
    assert (second.sparsity, second.topk_period) == (0.5, 7)
