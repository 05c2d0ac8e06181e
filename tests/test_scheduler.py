"""SWATScheduler: following optimizers, and resuming bit for bit."""

import copy

import pytest
import torch
from networks import assert_same_state, batches, sgd, small_network, sparse_layers, sparse_network, train
from torch import nn

import swat_ext
from swat_ext import SWATScheduler


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
    state = SWATScheduler(model, sgd(model)).state_dict()
    SWATScheduler(other, sgd(other)).load_state_dict(state)
    assert [layer.sparsity for layer in sparse_layers(other)] == [0.1, 0.2, 0.3, 0.4]
    assert [layer.activation_sparsity for layer in sparse_layers(other)] == [0.1, 0.7, 0.3, 0.4]
    assert [layer.topk_period for layer in sparse_layers(other)] == [3] * 4


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
        layer["sparsity"] = 0.1
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
        (lambda state: {**state, "format": 99}, ValueError, "expected format 2, got 99"),
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
        (changed("3", "sparsity", 1.0), ValueError, r"layer '3': sparsity: expected a number in \[0, 1\)"),
        (changed("3", "topk_period", 0), ValueError, "layer '3': topk_period: expected"),
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
    with pytest.raises(error, match=f"^state_dict: .*{message}"):
        scheduler.load_state_dict(change(scheduler.state_dict()))


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
