"""SWATScheduler: following optimizers, and resuming bit for bit."""

import copy

import pytest
import torch
from networks import assert_same_state, batches, sgd, small_network, sparse_layers, sparse_network, train
from torch import nn

import swat_ext
from swat_ext import SWATScheduler
from swat_ext.topology import SET, RigL


def steps(model: nn.Module) -> list[int]:
    return [layer.steps for layer in sparse_layers(model)]


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)])
def test_a_scheduler_changes_nothing_that_layers_do_on_their_own(make):
    alone, followed = sparse_network(), sparse_network()
    first, second = make(alone), make(followed)
    scheduler = SWATScheduler(followed, second)
    train(alone, first, batches(10), accumulate=2)
    train(followed, second, batches(10), accumulate=2)
    assert_same_state(alone, followed)
    assert steps(alone) == steps(followed) == [5] * 4
    assert scheduler.steps == 5


def test_each_of_several_optimizers_counts_for_its_own_weights():
    model = sparse_network()
    body = torch.optim.SGD(model[:8].parameters(), lr=0.01)
    head = torch.optim.SGD(model[8:].parameters(), lr=0.01)
    scheduler = SWATScheduler(model, [body, head])
    for number, (x, y) in enumerate(batches(4)):
        nn.functional.cross_entropy(model(x), y).backward()
        head.step()
        if number % 2:
            body.step()
        model.zero_grad()
    assert steps(model) == [2, 2, 2, 4]
    assert scheduler.steps == 4


# --- Resuming ---------------------------------------------------------------------------------------------------------


def run_on(order: str, path, break_at: int, **config: object) -> tuple[nn.Module, list[torch.Tensor]]:
    """Train ``break_at`` steps, save, start anew in another process' shoes, load in ``order``, train to 12 steps."""
    model = sparse_network(**config)
    optimizer = sgd(model)
    scheduler = SWATScheduler(model, optimizer)
    train(model, optimizer, batches(break_at))
    parts = {"m": model, "o": optimizer, "s": scheduler}
    torch.save({key: part.state_dict() for key, part in parts.items()}, path)

    model = sparse_network(seed=9, **config)
    optimizer = sgd(model)
    scheduler = SWATScheduler(model, optimizer)
    train(model, optimizer, batches(2, first=70))  # a past of its own, to be forgotten
    optimizer.zero_grad()
    state = torch.load(path, weights_only=True)
    parts = {"m": model, "o": optimizer, "s": scheduler}
    for key in order:
        parts[key].load_state_dict(state[key])
    losses = train(model, optimizer, batches(12 - break_at, first=break_at))
    assert scheduler.steps == 12
    assert steps(model) == [12] * 4
    return model, losses


@pytest.mark.parametrize("order", ["mos", "som", "oms", "smom"])
@pytest.mark.parametrize("break_at", [5, 6])
def test_resuming_is_exact_in_any_order_of_loading(tmp_path, order, break_at):
    straight = sparse_network()
    optimizer = sgd(straight)
    SWATScheduler(straight, optimizer)
    losses = train(straight, optimizer, batches(12))
    resumed, later = run_on(order, tmp_path / "state.pt", break_at)
    assert torch.equal(torch.stack(losses[break_at:]), torch.stack(later))
    assert_same_state(straight, resumed)


def test_resuming_without_the_scheduler_is_not_exact(tmp_path):
    """What the tests above would not notice if thresholds did not matter."""
    straight = sparse_network()
    train(straight, sgd(straight), batches(12))
    model = sparse_network()
    optimizer = sgd(model)
    train(model, optimizer, batches(5))
    other = sparse_network()
    other_optimizer = sgd(other)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    train(other, other_optimizer, batches(7, first=5))
    assert any(
        not torch.equal(mine, theirs) for mine, theirs in zip(straight.parameters(), other.parameters(), strict=True)
    )


def test_settings_of_each_layer_are_restored():
    model, other = sparse_network(), sparse_network(sparsity=0.5, topk_period=9)
    for layer, sparsity in zip(sparse_layers(model), (0.1, 0.2, 0.3, 0.4), strict=True):
        layer.sparsity = sparsity
    sparse_layers(model)[1].activation_sparsity = 0.7
    sparse_layers(model)[2].weight_topk_period = 6
    sparse_layers(model)[3].topk_period = 2
    state = SWATScheduler(model, sgd(model)).state_dict()
    SWATScheduler(other, sgd(other)).load_state_dict(state)
    assert [layer.sparsity for layer in sparse_layers(other)] == [0.1, 0.2, 0.3, 0.4]
    assert [layer.activation_sparsity for layer in sparse_layers(other)] == [0.1, 0.7, 0.3, 0.4]
    assert [layer.budget for layer in sparse_layers(other)] == [(9, 10), (4, 5), (7, 10), (3, 5)]
    assert [layer.topk_period for layer in sparse_layers(other)] == [3, 3, 3, 2]
    assert [layer.weight_topk_period for layer in sparse_layers(other)] == [4, 4, 6, 4]
    sparse_layers(other)[0].sparsity = 0.6
    assert [layer.activation_sparsity for layer in sparse_layers(other)] == [0.6, 0.7, 0.3, 0.4]  # it follows again


def test_a_state_dict_does_not_change_when_training_goes_on():
    model = sparse_network(topk_period=1)
    optimizer = sgd(model)
    scheduler = SWATScheduler(model, optimizer)
    train(model, optimizer, batches(2))
    state = scheduler.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, batches(2))
    for name, layer in state["layers"].items():
        assert layer == before["layers"][name]


def test_a_failed_load_changes_nothing():
    model = sparse_network()
    optimizer = sgd(model)
    scheduler = SWATScheduler(model, optimizer)
    train(model, optimizer, batches(3))
    good = scheduler.state_dict()
    bad = copy.deepcopy(good)
    for layer in bad["layers"].values():
        layer["budget"], layer["end_budget"] = [9, 10], [9, 10]
        layer["topk_period"], layer["end_period"], layer["momentum"] = 7, 8, 0.5
        layer["weight"]["steps"] = layer["activation"]["steps"] = 9
    bad["layers"]["9"]["shape"] = [1, 2]
    with pytest.raises(ValueError, match=r"layer '9': expected a weight of shape \(5, 384\), got \[1, 2\]"):
        scheduler.load_state_dict(bad)
    assert scheduler.state_dict() == good


def changed(layer, *path):
    """A change of one entry of a layer's state: keys, then the new value."""

    def change(state):
        state = copy.deepcopy(state)
        entry = state["layers"][layer]
        *keys, last, value = path
        for key in keys:
            entry = entry[key]
        entry[last] = value
        return state

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: [1, 2], TypeError, "expected a mapping, got list"),
        (lambda state: {"lr": 0.1}, ValueError, r"keys \['format', 'layers'\] are missing"),
        (lambda state: {**state, "format": 99}, ValueError, "expected format 3, got 99"),
        (lambda state: {**state, "format": 2}, ValueError, "expected format 3, got 2"),
        (lambda state: {**state, "layers": [1]}, ValueError, "expected a mapping, got list"),
        (lambda state: {**state, "layers": {}}, ValueError, "missing: '3', '5', '7', '9'; not in the model: none"),
        (
            lambda state: {**state, "layers": {f"module.{name}": layer for name, layer in state["layers"].items()}},
            ValueError,
            "not in the model: 'module.3', 'module.5'",
        ),
        (
            lambda state: {**state, "layers": {**state["layers"], "3": {"shape": [1]}}},
            ValueError,
            "layer '3': .* keys .*'weight'.* are missing",
        ),
        (changed("3", "shape", 7), ValueError, "layer '3': expected a weight of shape .*, got 7"),
        (changed("3", "shape", [16, 16, 3, 3.5]), ValueError, "layer '3': expected a weight of shape"),
        *[
            (changed("3", *keys, value), ValueError, rf"layer '3': {': '.join(keys)}: expected a fraction in \(0, 1\]")
            for keys in (("budget",), ("activation_budget",), ("end_budget",))
            for value in ([0, 1], [-1, -2], [3, 2], [1, 0], [1, 2, 3], [1], 0.5, [0.5, 1], [True, 1], "12")
        ],
        (changed("3", "budget", None), ValueError, "layer '3': budget: expected a fraction"),
        (changed("3", "end_budget", None), ValueError, "layer '3': end_budget: expected a fraction"),
        *[
            (changed("3", *keys, value), ValueError, rf"layer '3': .*{keys[-1]}: expected an integer of at least 1")
            for keys in (("topk_period",), ("weight_topk_period",), ("end_period",))
            for value in (0, -1, 1.5, True, None)
        ],
        *[
            (changed("3", "topology", value), ValueError, "topology: expected 'swat, unstructured, uniform', got")
            for value in ("rigl, unstructured, uniform", "swat, kernel, uniform", "swat, unstructured, erk", None)
        ],
        *[
            (changed("3", "momentum", value), ValueError, "momentum: expected a number of at least 0 or None, got")
            for value in ("1", [1.0], -0.5, torch.tensor(1.0))
        ],
        (changed("3", "backend", "fast"), ValueError, "layer '3': backend: expected"),
        (changed("3", "weight", None), ValueError, "layer '3': weight: expected a mapping, got NoneType"),
        (changed("3", "weight", "steps", -5), ValueError, "weight: steps: expected an integer of at least 0, got -5"),
        (changed("3", "weight", "steps", 1.5), ValueError, "weight: steps: expected an integer of at least 0, got 1.5"),
        (changed("3", "weight", "steps", True), ValueError, "weight: steps: expected an integer .* got True"),
        (changed("3", "activation", "selected", 7), ValueError, "activation: selected: expected .* got 7"),
        (changed("3", "activation", "threshold", 0.5), ValueError, "activation: threshold: expected a 0-dim .* 0.5"),
        (changed("3", "weight", "threshold", torch.ones(2)), ValueError, "weight: threshold: expected a 0-dim"),
        (changed("3", "weight", "threshold", torch.tensor(-1.0)), ValueError, "threshold: expected at least 0"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, error, message):
    model = sparse_network()
    scheduler = SWATScheduler(model, sgd(model))
    with pytest.raises(error, match=rf"^state_dict(\['layers'\])?: .*{message}"):
        scheduler.load_state_dict(change(scheduler.state_dict()))


@pytest.mark.parametrize("method", ["swat", "static"])
def test_no_entry_may_be_missing(method):
    model = sparse_network(method=method)
    scheduler = SWATScheduler(model, sgd(model))
    entries = list(scheduler.state_dict()["layers"]["5"])
    assert len(entries) == 12
    for missing in entries:
        state = scheduler.state_dict()
        del state["layers"]["5"][missing]
        with pytest.raises(ValueError, match=rf"^state_dict: layer '5': .* keys \['{missing}'\] are missing"):
            scheduler.load_state_dict(state)


def first_bit(mask, kept):
    """A copy of a pattern's mask whose lowest bit that is ``kept`` is turned over."""
    copied = mask.clone()
    for bit in range(64):
        if bool(int(mask[0]) >> bit & 1) == kept:
            copied[0] ^= 1 << bit
            return copied
    raise AssertionError("no such bit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: None, "expected a mapping, got NoneType"),
        (lambda held: {"mask": held["mask"], "steps": 0}, r"keys \['count'\] are missing"),
        (lambda held: {"mask": held["mask"], "count": 461}, r"keys \['steps'\] are missing"),
        (lambda held: {"threshold": torch.zeros(()), "steps": 0, "selected": -1}, r"keys \['count', 'mask'\] are"),
        (lambda held: held | {"mask": None}, r"mask: expected int64 of shape \(39,\), got None"),
        (lambda held: held | {"mask": held["mask"][:-1]}, r"mask: expected int64 .* got 'torch.int64 of shape \(38,\)"),
        (lambda held: held | {"mask": held["mask"][None]}, r"mask: expected int64 .* of shape \(1, 39\)"),
        (lambda held: held | {"mask": held["mask"].int()}, r"mask: expected int64 .* got 'torch.int32"),
        (lambda held: held | {"mask": held["mask"].tolist()}, r"mask: expected int64 of shape \(39,\), got \["),
        (lambda held: held | {"count": 460}, "mask and count do not go together"),
        (lambda held: held | {"count": -1}, "count: expected an integer from 0 to 2304, got -1"),
        (lambda held: held | {"count": 2305}, "count: expected an integer from 0 to 2304, got 2305"),
        (lambda held: held | {"count": 461.0}, "count: expected an integer from 0 to 2304, got 461.0"),
        (lambda held: held | {"count": None}, "count: expected an integer from 0 to 2304, got None"),
        (lambda held: held | {"mask": first_bit(held["mask"], False)}, "mask and count do not go together"),
        (lambda held: held | {"mask": first_bit(held["mask"], True)}, "mask and count do not go together"),
        (lambda held: held | {"mask": held["mask"] * 0 - 1}, "mask and count do not go together"),
        (lambda held: held | {"mask": held["mask"] * 0}, "mask and count do not go together"),
        (lambda held: held | {"steps": -1}, "steps: expected an integer of at least 0, got -1"),
        (lambda held: held | {"steps": 1.0}, "steps: expected an integer of at least 0, got 1.0"),
        (lambda held: held | {"steps": True}, "steps: expected an integer of at least 0, got True"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(change, message):
    model = sparse_network(method="static")
    scheduler = SWATScheduler(model, sgd(model))
    state = scheduler.state_dict()
    before = copy.deepcopy(state)
    assert state["layers"]["3"]["weight"]["count"] == 461
    state["layers"]["3"]["weight"] = change(state["layers"]["3"]["weight"])
    with pytest.raises(ValueError, match=f"^state_dict: layer '3': weight: .*{message}"):
        scheduler.load_state_dict(state)
    after = scheduler.state_dict()
    for name, layer in before["layers"].items():
        assert torch.equal(layer["weight"]["mask"], after["layers"][name]["weight"]["mask"])
        assert layer["weight"]["count"] == after["layers"][name]["weight"]["count"]


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ({}, {"method": "set"}, r"'swat, unstructured, uniform', got 'SET\(.*\), unstructured, uniform'"),
        ({"method": "set"}, {"method": "static"}, r"'SET\(.*, got 'Static\("),
        ({"method": "rigl"}, {"method": RigL(seed=1)}, r"'RigL\(.*seed=0\), .*, got 'RigL\(.*seed=1\), "),
        ({"method": SET(fraction=0.2)}, {"method": "set"}, r"'SET\(.*fraction=0\.2, .*, got 'SET\(.*fraction=0\.3, "),
        ({"method": SET(until=0.5)}, {"method": "set"}, r"'SET\(.*until=0\.5, .*, got 'SET\(.*until=0\.75, "),
        ({"method": "set"}, {"method": SET(update_period=7)}, r"period=100, .*, got 'SET\(update_period=7, "),
        ({"granularity": "kernel"}, {}, "'swat, kernel, uniform', got 'swat, unstructured, uniform'"),
        ({"granularity": "block"}, {"granularity": "block", "block_size": (4, 2)}, "block 8x1, .*, got .*block 4x2, "),
        ({"distribution": "momentum"}, {"distribution": "erk"}, "unstructured, momentum', got .*unstructured, erk'"),
    ],
)
def test_a_state_of_another_topology_is_refused(mine, theirs, expected):
    def scheduler(skip=("0",), **config):
        model = sparse_network(skip=skip, **config)
        return SWATScheduler(model, sgd(model), total_steps=10)

    state = scheduler(**theirs).state_dict()
    with pytest.raises(ValueError, match=f"^state_dict: layer '3': topology: expected .*{expected}"):
        scheduler(**mine).load_state_dict(state)
    scheduler(**theirs).load_state_dict(state)


def test_a_state_of_another_dtype_is_refused():
    model = sparse_network()
    state = SWATScheduler(model, sgd(model)).state_dict()
    double = sparse_network(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"threshold: expected a 0-dim torch\.float64"):
        SWATScheduler(double, sgd(double)).load_state_dict(state)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_model_must_be_sparse():
    dense = small_network()
    with pytest.raises(ValueError, match=r"^model: expected at least one .* call sparsify_ first"):
        SWATScheduler(dense, sgd(dense))
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got dict"):
        SWATScheduler({}, sgd(dense))


def test_an_optimizer_must_be_one_and_of_this_model():
    model = sparse_network()
    for wrong in ("sgd", 3, None, [sgd(model), None]):
        with pytest.raises(TypeError, match=r"^optimizer: expected"):
            SWATScheduler(model, wrong)
    with pytest.raises(ValueError, match=r"^optimizer: expected at least one"):
        SWATScheduler(model, [])
    with pytest.raises(ValueError, match="none has any of the weights"):
        SWATScheduler(model, sgd(sparse_network()))
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="each optimizer once"):
        SWATScheduler(model, [optimizer, optimizer])


def test_an_optimizer_of_other_weights_may_stand_beside() -> None:
    model = sparse_network()
    body, norm = sgd(model[3:]), sgd(model[:3])
    scheduler = SWATScheduler(model, [norm, body])
    train(model, body, batches(2))
    assert scheduler.steps == 2


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, as accelerate's wrapper does, and never calls the constructor of its class."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


def test_a_wrapped_optimizer_is_one() -> None:
    model = sparse_network()
    wrapped = Wrapper(sgd(model))
    scheduler = SWATScheduler(model, wrapped)
    train(model, wrapped, batches(3))
    assert scheduler.steps == 3
    assert steps(model) == [3] * 4


def test_several_schedulers_of_one_model_agree() -> None:
    model = sparse_network()
    optimizer = sgd(model)
    first, second = SWATScheduler(model, optimizer), SWATScheduler(nn.Sequential(model), optimizer)
    train(model, optimizer, batches(2))
    assert first.steps == second.steps == 2


def test_a_layer_put_in_later_is_followed_too():
    model = sparse_network()
    optimizer = sgd(model)
    SWATScheduler(model, optimizer)
    model[9] = swat_ext.SWATLinear(24 * 16, 5, sparsity=0.5)
    optimizer.add_param_group({"params": list(model[9].parameters())})
    train(model, optimizer, batches(3))
    assert steps(model) == [3] * 4
