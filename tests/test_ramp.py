"""Sparsity that rises over training, and activations that are selected at every step at first."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same_state, batches, sgd, sparse_layers, sparse_network, train
from resuming import Run, assert_equal, assert_resumes, run_of
from torch import nn

from swat_ext import SWATLinear, SWATScheduler
from swat_ext.ops import filters

TOTAL = 12


def kept_at(numel: int, sparsity: str, step: int, ramp: float) -> Fraction:
    """Of ``numel`` weights, not rounded: the sparsity times ``1 - (1 - t)^3``."""
    progress = min(Fraction(step) / (Fraction(str(ramp)) * TOTAL), 1)
    final = math.ceil((1 - Fraction(sparsity)) * numel)
    return numel - (numel - final) * (1 - (1 - progress) ** 3)


def counts_of(model: nn.Module) -> list[int]:
    return [layer.budget.count(layer.weight.numel()) for layer in sparse_layers(model)]


def run(seed: int = 0, *, ramp: float = 0.5, topk_warmup: int = 0, **config: Any) -> Run:
    plan = {"total_steps": TOTAL, "ramp": ramp, "topk_warmup": topk_warmup}
    return run_of(seed, plan=plan, **config)


@pytest.mark.parametrize("ramp", [0.5, 0.7, 1.0, 0.01])
@pytest.mark.parametrize("sparsity", [0.8, 0.99])
def test_sparsity_rises_by_its_formula(ramp: float, sparsity: float) -> None:
    model, _, _ = made = run(ramp=ramp, sparsity=sparsity, weight_topk_period=1)
    for step in range(TOTAL + 1):
        if step:
            train(model, made.o, batches(1, first=step))
        for layer, count in zip(sparse_layers(model), counts_of(model), strict=True):
            numel = layer.weight.numel()
            exact = kept_at(numel, str(sparsity), step, ramp)
            assert exact <= count < exact + 1 + 1e-6, f"step {step}"
            assert layer.activation_budget == layer.budget
            # What training multiplied by, and what evaluation does.
            if step:
                before = kept_at(numel, str(sparsity), step - 1, ramp)
                assert before / numel <= 1 - Fraction(layer.realised_sparsity[0]) + Fraction(1, 10**9)
                assert 1 - layer.realised_sparsity[0] < before / numel + Fraction(1, numel) + Fraction(1, 10**9)
            assert int((layer.to_dense().weight != 0).sum()) == count
        if step == 0:
            assert counts_of(model) == [layer.weight.numel() for layer in sparse_layers(model)]
    assert [layer.sparsity for layer in sparse_layers(model)] == [sparsity] * 4  # exactly, at the end


def test_erk_rises_too_and_activations_keep_a_sparsity_of_their_own() -> None:
    plain = sparse_network(distribution="erk")
    ends = counts_of(plain)
    made = run(distribution="erk", activation_sparsity=0.6)
    assert counts_of(made.m) == [layer.weight.numel() for layer in sparse_layers(made.m)]
    train(made.m, made.o, batches(3))
    for layer, count, end in zip(sparse_layers(made.m), counts_of(made.m), ends, strict=True):
        numel = layer.weight.numel()
        exact = numel - (numel - end) * Fraction(7, 8)
        assert exact <= count < exact + 1
        assert layer.activation_sparsity == 0.6
    train(made.m, made.o, batches(3, first=3))
    assert counts_of(made.m) == ends


def test_the_budget_of_momentum_rises() -> None:
    made = run(distribution="momentum", ramp=1.0)
    numels = [layer.weight.numel() for layer in sparse_layers(made.m)]
    for step in range(1, TOTAL + 1):
        train(made.m, made.o, batches(1, first=step))
        keep = sum(kept_at(numel, "0.8", step, 1.0) for numel in numels)
        # Each layer's part is rounded up, and each one's share again.
        assert keep - 1e-6 <= sum(counts_of(made.m)) < keep + 2 * len(numels)
        shares = {round(count / numel, 3) for count, numel in zip(counts_of(made.m), numels, strict=True)}
        assert len(shares) > 1 or step == 1
    assert Fraction(sum(numels), 5) <= sum(counts_of(made.m)) < Fraction(sum(numels), 5) + len(numels)


def test_each_layer_rises_by_its_own_optimizer() -> None:
    model = sparse_network()
    body, head = sgd(model[:8]), sgd(model[8:])
    SWATScheduler(model, [body, head], total_steps=TOTAL, ramp=1.0)
    for number, (x, y) in enumerate(batches(6)):
        nn.functional.cross_entropy(model(x), y).backward()
        head.step()
        if number % 2:
            body.step()
        model.zero_grad()
    for layer, count, steps in zip(sparse_layers(model), counts_of(model), (3, 3, 3, 6), strict=True):
        exact = kept_at(layer.weight.numel(), "0.8", steps, 1.0)
        assert exact <= count < exact + 1 + 1e-6


def test_without_a_ramp_budgets_are_the_users_own() -> None:
    made = run_of(0)
    layer = sparse_layers(made.m)[0]
    layer.sparsity = 0.5
    train(made.m, made.o, batches(2))
    assert layer.sparsity == 0.5


# --- topk_warmup ------------------------------------------------------------------------------------------------------


def test_a_warmup_selects_at_every_step() -> None:
    model = sparse_network(topk_period=4)
    optimizer = sgd(model)
    SWATScheduler(model, optimizer, topk_warmup=3)
    ages, periods = [], []
    for step in range(9):
        periods.append({layer.topk_period for layer in sparse_layers(model)})
        train(model, optimizer, batches(1, first=step))
        ages.append({layer.steps_since_selection[1] for layer in sparse_layers(model)})
    assert periods == [{1}] * 3 + [{4}] * 6
    # Selected at the forwards after 0, 1, 2 and 6 steps; looked at after the step.
    assert ages == [{1}] * 3 + [{2}, {3}, {4}, {1}, {2}, {3}]


def test_a_warmup_changes_what_is_learnt() -> None:
    losses = []
    for warmup in (0, 6):
        made = run_of(0, plan={"topk_warmup": warmup}, topk_period=6)
        losses.append(train(made.m, made.o, batches(6)))
    every = run_of(0, topk_period=1)
    assert_equal(losses[1], train(every.m, every.o, batches(6)))
    assert not torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


def test_a_second_scheduler_takes_over_where_the_first_was_to_end() -> None:
    """As where a cell of a notebook is run again, or an optimizer is replaced."""
    once, twice = run(ramp=1.0, topk_warmup=6, topk_period=4), run(ramp=1.0, topk_warmup=6, topk_period=4)
    for step in range(TOTAL):
        if step in (0, 3):
            SWATScheduler(nn.Sequential(twice.m), twice.o, total_steps=TOTAL, ramp=1.0, topk_warmup=6)
        data = batches(1, first=step)
        assert_equal(train(once.m, once.o, data), train(twice.m, twice.o, data))
        assert counts_of(once.m) == counts_of(twice.m)
    assert [layer.sparsity for layer in sparse_layers(twice.m)] == [0.8] * 4
    assert [layer.topk_period for layer in sparse_layers(twice.m)] == [4] * 4
    # Nothing moves any more, and what the user sets then counts.
    sparse_layers(twice.m)[0].sparsity = 0.5
    SWATScheduler(twice.m, twice.o)
    train(twice.m, twice.o, batches(1))
    assert sparse_layers(twice.m)[0].sparsity == 0.5


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_second_scheduler_without_a_plan_ends_an_unfinished_one(step: int) -> None:
    made = run(ramp=1.0, topk_warmup=6, topk_period=4)
    train(made.m, made.o, batches(step))
    assert all(layer.sparsity < 0.8 and layer.topk_period == 1 for layer in sparse_layers(made.m))
    SWATScheduler(made.m, made.o)
    ends = [math.ceil(Fraction(layer.weight.numel(), 5)) for layer in sparse_layers(made.m)]
    for more in range(3):
        assert counts_of(made.m) == ends
        assert {(layer.sparsity, layer.activation_sparsity) for layer in sparse_layers(made.m)} == {(0.8, 0.8)}
        assert {layer.topk_period for layer in sparse_layers(made.m)} == {4}
        train(made.m, made.o, batches(1, first=step + more))


def test_a_state_of_the_middle_without_a_plan_is_at_its_end() -> None:
    first, second = run(ramp=1.0, topk_warmup=6, topk_period=4), run_of(3, topk_period=2)
    train(first.m, first.o, batches(3))
    second.s.load_state_dict(first.s.state_dict())
    for _ in range(2):
        assert {(layer.sparsity, layer.activation_sparsity) for layer in sparse_layers(second.m)} == {(0.8, 0.8)}
        assert {layer.topk_period for layer in sparse_layers(second.m)} == {4}
        train(second.m, second.o, batches(1))


def test_a_frozen_layer_is_at_its_end_from_the_start() -> None:
    model = sparse_network(topk_period=4)
    frozen, *others = sparse_layers(model)
    frozen.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model[:3].parameters(), *model[4:].parameters()], lr=0.01)
    scheduler = SWATScheduler(model, optimizer, total_steps=TOTAL, ramp=1.0, topk_warmup=TOTAL)
    for step in range(TOTAL + 1):
        assert (frozen.sparsity, frozen.activation_sparsity, frozen.topk_period) == (0.8, 0.8, 4)
        assert int((frozen.to_dense().weight != 0).sum()) == math.ceil(Fraction(frozen.weight.numel(), 5))
        assert [layer.topk_period for layer in others] == [4 if step == TOTAL else 1] * 3
        for layer in others:
            exact = kept_at(layer.weight.numel(), "0.8", step, 1.0)
            assert exact <= layer.kept_weights < exact + 1 + 1e-6
        if step == 3:
            scheduler.load_state_dict(scheduler.state_dict())
        train(model, optimizer, batches(1, first=step))
    assert (frozen.driver, frozen.steps) == (None, 0)


@pytest.mark.parametrize("step", [0, 3, 6, 9])
def test_a_sparsity_that_the_user_sets_is_the_new_end(step: int) -> None:
    made = run(ramp=0.5, weight_topk_period=1)
    layer, *others = sparse_layers(made.m)
    train(made.m, made.o, batches(step))
    layer.sparsity = 0.5
    # For now; the ramp, where it is not over, goes on to there.
    assert layer.sparsity == layer.activation_sparsity == 0.5
    for later in range(step + 1, TOTAL + 1):
        train(made.m, made.o, batches(1, first=later))
        for each, end in zip((layer, *others), ("0.5", "0.8", "0.8", "0.8"), strict=True):
            exact = kept_at(each.weight.numel(), end, later, 0.5)
            assert exact <= each.kept_weights < exact + 1 + 1e-6, f"step {later}"
            assert each.activation_budget == each.budget
    assert [each.sparsity for each in sparse_layers(made.m)] == [0.5, 0.8, 0.8, 0.8]
    assert [each.end_budget.sparsity for each in sparse_layers(made.m)] == [0.5, 0.8, 0.8, 0.8]


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_period_that_the_user_sets_is_the_new_end(step: int) -> None:
    made = run(ramp=0.0, topk_warmup=3, topk_period=9)
    layer, *others = sparse_layers(made.m)
    train(made.m, made.o, batches(step))
    layer.topk_period = 4
    assert (layer.topk_period, layer.end_period) == (4, 4)
    for later in range(step + 1, 8):
        train(made.m, made.o, batches(1, first=later))
        assert layer.topk_period == (1 if later < 3 else 4)
        assert [each.topk_period for each in others] == [1 if later < 3 else 9] * 3


def test_what_the_user_sets_is_saved(tmp_path: Path) -> None:
    def made(seed: int) -> Run:
        each = run(seed, ramp=0.75, topk_warmup=7, topk_period=9)
        if seed == 0:
            sparse_layers(each.m)[0].sparsity, sparse_layers(each.m)[1].topk_period = 0.5, 4
        return each

    assert_resumes(made, "mos", 5, tmp_path / "state.pt")


def test_a_layer_that_is_put_in_later_is_in_the_state() -> None:
    made = run()
    made.m.append(SWATLinear(5, 5, sparsity=0.5))
    made.o.add_param_group({"params": list(made.m[10].parameters())})
    train(made.m, made.o, batches(7))
    state = made.s.state_dict()
    put_in = state["layers"]["10"]
    assert (put_in["budget"], put_in["end_budget"]) == ([1, 2], [1, 2])
    assert (put_in["topk_period"], put_in["end_period"]) == (10, 10)
    made.s.load_state_dict(state)
    train(made.m, made.o, batches(1))
    assert made.m[10].sparsity == 0.5


# --- Resumed, compiled ------------------------------------------------------------------------------------------------

PLANS = {
    "ramp": {"ramp": 0.75},
    "warm-up": {"topk_warmup": 7, "topk_period": 5},
    "both, momentum": {"ramp": 0.75, "topk_warmup": 7, "distribution": "momentum", "weight_topk_period": 2},
    "both, kernels": {"ramp": 0.75, "topk_warmup": 7, "granularity": "kernel"},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("order", ["mos", "som", "smom"])
def test_resuming_in_the_middle_is_exact(tmp_path: Path, plan: str, order: str) -> None:
    assert_resumes(lambda seed: run(seed, **{"ramp": 0.0, **PLANS[plan]}), order, 5, tmp_path / "state.pt")


@pytest.mark.parametrize("break_at", [1, 7, 9, 11])
def test_resuming_at_the_ends_is_exact(tmp_path: Path, break_at: int) -> None:
    plan: dict[str, Any] = {"ramp": 0.75, "topk_warmup": 7, "topk_period": 5}
    assert_resumes(lambda seed: run(seed, **plan), "mos", break_at, tmp_path / "state.pt")


def test_a_state_of_the_middle_ends_where_it_was_to_end() -> None:
    first = run(sparsity=0.9, topk_warmup=6, topk_period=5)
    train(first.m, first.o, batches(2))
    second = run(seed=3, sparsity=0.5, topk_warmup=6, topk_period=2)
    second.s.load_state_dict(first.s.state_dict())
    assert counts_of(second.m) == counts_of(first.m)
    train(second.m, second.o, batches(6))
    assert [layer.sparsity for layer in sparse_layers(second.m)] == [0.9] * 4
    assert [layer.topk_period for layer in sparse_layers(second.m)] == [5] * 4


@pytest.mark.usefixtures("fresh_compiler")
def test_a_budget_that_rises_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    # While nothing is dropped, eager mode has PyTorch's kernels and a graph this library's: here both have the latter.
    monkeypatch.setattr(filters, "kept_filters", lambda *arguments: None)
    plan = {"ramp": 1.0, "topk_warmup": 4, "topk_period": 3, "backend": "sparse"}
    eager, model = run(**plan), run(**plan)
    fast = torch.compile(model.m, fullgraph=True, backend="aot_eager")
    for step in range(TOTAL):
        data = batches(1, first=step)
        assert_equal(train(eager.m, eager.o, data), train(model.m, model.o, data, forward=fast))
        assert counts_of(eager.m) == counts_of(model.m)
    assert_same_state(eager.m, model.m)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"ramp": 0.5}, ValueError, "^total_steps: ramp needs it, the optimizer steps of the whole training"),
        ({"ramp": -0.1, "total_steps": 9}, ValueError, "^ramp: expected a number in"),
        ({"ramp": 1.1, "total_steps": 9}, ValueError, "^ramp: expected a number in"),
        ({"ramp": float("nan"), "total_steps": 9}, ValueError, "^ramp: expected a number in"),
        ({"ramp": "all", "total_steps": 9}, TypeError, "^ramp: expected a number in"),
        ({"ramp": True, "total_steps": 9}, TypeError, "^ramp: expected a number in"),
        ({"total_steps": 0}, ValueError, "^total_steps: expected an integer of at least 1"),
        ({"total_steps": 9.0}, TypeError, "^total_steps: expected an integer of at least 1"),
        ({"topk_warmup": -1}, ValueError, "^topk_warmup: expected an integer of at least 0"),
        ({"topk_warmup": 1.0}, TypeError, "^topk_warmup: expected an integer of at least 0"),
        ({"topk_warmup": None}, TypeError, "^topk_warmup: expected an integer of at least 0"),
        ({"topk_warmup": True}, TypeError, "^topk_warmup: expected an integer of at least 0"),
        ({"topk_warmup": False}, TypeError, "^topk_warmup: expected an integer of at least 0"),
        ({"topk_warmup": 0.0}, TypeError, "^topk_warmup: expected an integer of at least 0"),
    ],
)
def test_wrong_plans_change_nothing(plan: dict[str, Any], error: type[Exception], message: str) -> None:
    model = sparse_network()
    with pytest.raises(error, match=message):
        SWATScheduler(model, sgd(model), **plan)
    assert {(layer.sparsity, layer.topk_period) for layer in sparse_layers(model)} == {(0.8, 3)}
    assert {layer.driver for layer in sparse_layers(model)} == {None}
