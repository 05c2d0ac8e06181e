"""SWAT-M: one budget shared by the layers' mean momenta after each optimizer step."""

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import assert_same_state, batches, sgd, sparse_layers, sparse_network, train
from resuming import assert_equal, assert_resumes, run_of
from torch import Tensor, nn

from swat_ext import SWATConfig, SWATLayer, SWATScheduler, sparsify_
from swat_ext.topology.distribution import by_momentum

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": sgd,
    "Nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8, nesterov=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True, fused=True),
}


def shared(means: list[float], numels: list[int], keep: Fraction) -> tuple[list[int], bool]:
    """The spec's rule in exact fractions, and whether each layer's share is between 0 and all."""
    total = sum(map(Fraction, means))
    real = [Fraction(mean) / total * keep for mean in means]
    dense: list[int] = []
    while True:
        full = [
            layer
            for layer, numel in enumerate(numels)
            if layer not in dense and real[layer] > Fraction(99, 100) * numel
        ]
        if not full:
            break
        dense += full
        others = [layer for layer in range(len(numels)) if layer not in dense]
        for layer in others:
            real[layer] += sum(real[each] - numels[each] for each in full) / len(others)
        for layer in full:
            real[layer] = Fraction(numels[layer])
    proper = len(dense) < len(numels) and min(real) > 0
    return [math.ceil(share) for share in real], proper


def counts_of(model: nn.Module) -> list[int]:
    return [layer.budget.count(layer.weight.numel()) for layer in sparse_layers(model)]


def numels_of(model: nn.Module) -> list[int]:
    return [layer.weight.numel() for layer in sparse_layers(model)]


def mean_momentum(weight: Tensor, before: Tensor, count: int, state: dict[str, Tensor]) -> float:
    """Over the weights that the threshold of the last forward, on ``before``, keeps of ``weight`` after the step."""
    threshold = before.abs().flatten().sort(descending=True).values[count - 1]
    kept = weight.abs() >= threshold
    # Else the layer would have selected for the moment, and this would be no oracle.
    assert 0.8 * count <= int(kept.sum()) <= 1.25 * count
    if "momentum_buffer" in state:
        momentum = state["momentum_buffer"]
    else:
        momentum = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    return float(momentum[kept].double().abs().mean())


@pytest.mark.parametrize("sparsity", [0.8, 0.3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_shares_the_budget_by_momentum(name: str, sparsity: float) -> None:
    model = sparse_network(distribution="momentum", sparsity=sparsity, weight_topk_period=1)
    layers, numels = sparse_layers(model), numels_of(model)
    assert len(layers) == 5  # the first convolution takes part
    optimizer = OPTIMIZERS[name](model)
    SWATScheduler(model, optimizer)
    share = 1 - Fraction(str(sparsity))
    keep, expected = share * sum(numels), [math.ceil(share * numel) for numel in numels]
    dense_seen = False
    for step in range(6):
        assert counts_of(model) == expected, f"step {step}"
        before = [layer.weight.detach().clone() for layer in layers]
        train(model, optimizer, batches(1, first=step))
        for layer, count, numel in zip(layers, expected, numels, strict=True):
            assert layer.realised_sparsity[0] == pytest.approx(1 - count / numel)
        states = [optimizer.state[layer.weight] for layer in layers]
        means = [
            mean_momentum(layer.weight.detach(), *rest)
            for layer, *rest in zip(layers, before, expected, states, strict=True)
        ]
        expected, proper = shared(means, numels, keep)
        assert proper
        assert keep <= sum(expected) < keep + 5
        dense_seen |= any(count == numel for count, numel in zip(expected, numels, strict=True))
    assert len(set(map(float, means))) == 5
    assert dense_seen or sparsity > 0.5
    # Both follow: the activations as the weights, and what evaluation keeps.
    for layer, count in zip(layers, counts_of(model), strict=True):
        assert layer.activation_budget == layer.budget
        assert int((layer.to_dense().weight != 0).sum()) == count


@given(
    layers=st.lists(
        st.tuples(st.floats(0, 1e3, allow_subnormal=False), st.integers(1, 100_000)), min_size=1, max_size=20
    ),
    sparsity=st.floats(0, 0.99),
)
def test_any_momenta(layers: list[tuple[float, int]], sparsity: float) -> None:
    means, numels = [mean for mean, _ in layers], [numel for _, numel in layers]
    assume(sum(means) > 1e-100)
    keep = Fraction(1 - sparsity) * sum(numels)
    counts = by_momentum(means, numels, float(keep))  # type: ignore[arg-type]
    assert all(1 <= count <= numel for count, numel in zip(counts, numels, strict=True))
    expected, proper = shared(means, numels, keep)
    if proper:
        assert keep - 1e-3 <= sum(counts) < keep + len(numels) + 1e-3
        assert all(abs(count - wanted) <= 1 for count, wanted in zip(counts, expected, strict=True))


def test_activations_keep_a_sparsity_of_their_own() -> None:
    run = run_of(0, distribution="momentum", activation_sparsity=0.6)
    train(run.m, run.o, batches(3))
    assert {layer.activation_sparsity for layer in sparse_layers(run.m)} == {0.6}
    assert len({layer.sparsity for layer in sparse_layers(run.m)}) > 1


def test_two_optimizers_share_one_budget() -> None:
    model = sparse_network(distribution="momentum")
    body, head = sgd(model[:8]), torch.optim.Adam(model[8:].parameters(), lr=1e-3)
    SWATScheduler(model, [body, head])
    uniform, numels = counts_of(model), numels_of(model)
    keep = Fraction(1, 5) * sum(numels)
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    body.step()
    # The head's momentum is not known yet: the others share what they have.
    assert counts_of(model)[4] == uniform[4]
    part = Fraction(1, 5) * sum(numels[:4])
    assert part <= sum(counts_of(model)[:4]) < part + 4
    assert counts_of(model)[:4] != uniform[:4]
    head.step()
    assert keep <= sum(counts_of(model)) < keep + 5
    assert counts_of(model)[4] != uniform[4]


def test_a_frozen_layer_and_one_without_gradient_keep_their_share() -> None:
    model = sparse_network(distribution="momentum")
    layers, uniform, numels = sparse_layers(model), counts_of(model), numels_of(model)
    layers[1].weight.requires_grad_(False)
    optimizer = sgd(model)
    SWATScheduler(model, optimizer)
    for step in range(4):
        x, y = batches(1, first=step)[0]
        nn.functional.cross_entropy(model(x), y).backward()
        if step < 2:
            layers[2].weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
        counts = counts_of(model)
        moving = [0, 3, 4] if step < 2 else [0, 2, 3, 4]
        assert [counts[i] for i in range(5) if i not in moving] == [uniform[i] for i in range(5) if i not in moving]
        keep = Fraction(1, 5) * sum(numels[i] for i in moving)
        assert keep <= sum(counts[i] for i in moving) < keep + len(moving)
        assert [counts[i] for i in moving] != [uniform[i] for i in moving]


def test_momenta_that_are_no_numbers_move_nothing() -> None:
    run = run_of(0, distribution="momentum")
    train(run.m, run.o, batches(2))
    before = counts_of(run.m)
    for bad in (torch.nan, torch.inf):
        x, y = batches(1)[0]
        nn.functional.cross_entropy(run.m(x), y).backward()
        sparse_layers(run.m)[2].weight.grad.fill_(bad)
        copied = copy.deepcopy([run.m.state_dict(), run.o.state_dict()])
        run.o.step()
        assert counts_of(run.m) == before
        run.m.load_state_dict(copied[0])
        run.o.load_state_dict(copied[1])
        run.o.zero_grad()
    train(run.m, run.o, batches(1, first=2))
    assert counts_of(run.m) != before


def test_a_weight_that_two_layers_share_counts_once() -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 7))
    model[2].weight = model[0].weight
    sparsify_(model, SWATConfig(0.7, distribution="momentum"))
    optimizer = sgd(model)
    SWATScheduler(model, optimizer)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 30, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        first, second, third = counts_of(model)
        assert first == second
        keep = Fraction(3, 10) * (900 + 210)
        assert keep <= first + third < keep + 2
    assert third != 63


# --- What it cannot do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), "SGD with (nothing|.'momentum_buffer'.) kept"),
        (lambda parameters: torch.optim.RMSprop(parameters, lr=0.1), r"RMSprop with \['square_avg', 'step'\] kept"),
        (lambda parameters: torch.optim.LBFGS(parameters, lr=0.1), "LBFGS with"),
    ],
)
def test_an_optimizer_without_momentum_is_refused(make: Callable[..., torch.optim.Optimizer], kept: str) -> None:
    model = sparse_network(distribution="momentum")
    optimizer = make(model.parameters())
    SWATScheduler(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batches(1)[0][0]).square().mean()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=f"^optimizer: expected SGD with momentum or one of Adam's kin .* {kept}"):
        optimizer.step(closure)


def test_without_a_scheduler_the_first_step_says_so() -> None:
    model = sparse_network(distribution="momentum")
    optimizer = sgd(model)
    model(batches(1)[0][0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"^distribution 'momentum' needs a swat_ext.SWATScheduler"):
        optimizer.step()
    # Evaluation needs none, and neither does a copy that is only looked at.
    copy.deepcopy(model).eval()(batches(1)[0][0])


class Sharded(nn.Parameter):
    """A parameter of which an optimizer may see but a part, as DTensor."""


def test_weights_in_parts_are_refused() -> None:
    model = sparse_network(distribution="momentum")
    layer: SWATLayer = model[9]
    layer.weight = Sharded(layer.weight.detach().clone())
    optimizer = sgd(model)
    SWATScheduler(model, optimizer)
    model(batches(1)[0][0]).sum().backward()
    with pytest.raises(NotImplementedError, match=r"^weight: distribution 'momentum' needs whole weights, got a Shard"):
        optimizer.step()


# --- Compiled, resumed ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
def test_budgets_move_in_a_compiled_model_without_compiling_anew() -> None:
    eager, model = (run_of(0, distribution="momentum", backend="sparse") for _ in range(2))
    fast = torch.compile(model.m, fullgraph=True, backend="aot_eager")
    seen = set()
    for step in range(10):
        data = batches(1, first=step)
        assert_equal(train(model.m, model.o, data, forward=fast), train(eager.m, eager.o, data))
        seen.add(tuple(counts_of(model.m)))
        assert counts_of(model.m) == counts_of(eager.m)
    assert len(seen) > 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same_state(eager.m, model.m)
    for step in range(12):  # evaluation too, whatever the budgets are by then
        model.m.train(), eager.m.train()
        data = batches(1, first=step)
        train(model.m, model.o, data, forward=fast), train(eager.m, eager.o, data)
        model.m.eval(), eager.m.eval()
        with torch.no_grad():
            assert torch.equal(fast(data[0][0]), eager.m(data[0][0]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("order", ["mos", "som", "oms", "smom"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_resuming_is_exact_in_any_order_of_loading(tmp_path: Path, name: str, order: str) -> None:
    assert_resumes(
        lambda seed: run_of(seed, optimizer=OPTIMIZERS[name], distribution="momentum", weight_topk_period=3),
        order,
        5,
        tmp_path / "state.pt",
    )


def test_resuming_is_exact_where_a_layer_has_no_momentum_at_the_end(tmp_path: Path) -> None:
    """The last step brought it no gradient: what is known of it is in the state."""

    def straight(steps: int, path: Path | None = None, load: bool = False) -> list[int]:
        run = run_of(3 if load else 0, distribution="momentum")
        if load:
            state = torch.load(path, weights_only=True)
            for name in "som":
                getattr(run, name).load_state_dict(state[name])
        for step in range(3 if load else 0, steps):
            x, y = batches(1, first=step)[0]
            nn.functional.cross_entropy(run.m(x), y).backward()
            if step in (2, 3):
                sparse_layers(run.m)[2].weight.grad = None
            run.o.step()
            run.o.zero_grad()
        if path is not None and not load:
            torch.save({name: part.state_dict() for name, part in run._asdict().items()}, path)
        return counts_of(run.m)

    straight(3, tmp_path / "state.pt")
    assert straight(5, tmp_path / "state.pt", load=True) == straight(5)
