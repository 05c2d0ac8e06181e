"""Patterns that are held: saved, loaded, resumed, compiled, refused; and a method of one's own."""

import copy
import io
import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same_state, batches, sgd, small_network, sparse_layers, sparse_network, train
from resuming import Run, assert_equal, assert_resumes, run_of
from torch import Tensor, nn

from swat_ext import SWATConfig, SWATConv2d, SWATLinear, SWATScheduler, sparsify_, to_dense
from swat_ext.topology import SET, Method, RigL, Static, methods

PLAN: dict[str, Any] = {"total_steps": 12}


def run(seed: int, method: str | Method, **config: Any) -> Run:
    return run_of(seed, plan=PLAN, method=method, **config)


def patterns_of(model: nn.Module) -> list[Tensor]:
    return [layer.kept_weight().pattern.dense() for layer in sparse_layers(model)]


def assert_all_equal(left: list[Tensor], right: list[Tensor]) -> None:
    for mine, other in zip(left, right, strict=True):
        assert torch.equal(mine, other)


def assert_same_patterns(left: nn.Module, right: nn.Module) -> None:
    assert_all_equal(patterns_of(left), patterns_of(right))


# --- Loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_is_cut_down_to_its_largest_weights(assign: bool) -> None:
    dense, model = small_network(seed=5), sparse_network(method="rigl", skip=())
    model.load_state_dict(dense.state_dict(), assign=assign)
    layers = [module for module in dense if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer, twin, mask in zip(sparse_layers(model), layers, patterns_of(model), strict=True):
        keep = -(-layer.weight.numel() // 5)
        limit = twin.weight.abs().flatten().sort(descending=True).values[keep - 1]
        assert torch.equal(mask, twin.weight.abs() >= limit)
        assert torch.equal(layer.weight, twin.weight * mask)


def test_a_sparse_state_brings_its_pattern() -> None:
    """That of the weights that are not zero; to fill up where some of those are zero by chance, the own one."""
    first, second = sparse_network(method="static"), sparse_network(method=Static(seed=4), seed=9)
    before = patterns_of(second)[0]
    kept = patterns_of(first)[0]
    zero = tuple((kept & ~before).nonzero()[0].tolist())
    with torch.no_grad():
        sparse_layers(first)[0].weight[zero] = 0.0
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    assert_same_state(first, second)
    now = patterns_of(second)
    assert [torch.equal(*pair) for pair in zip(now, patterns_of(first), strict=True)] == [False, True, True, True]
    assert int(now[0].sum()) == int(kept.sum())
    assert torch.equal(now[0] & kept, kept & (sparse_layers(first)[0].weight != 0))
    assert (before | kept)[now[0]].all()


def test_a_state_that_is_no_number_keeps_that() -> None:
    first, second = sparse_network(method="static"), sparse_network(method="static", seed=9)
    layer = sparse_layers(first)[0]
    layer.weight.data[patterns_of(first)[0]] = torch.nan
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(sparse_layers(second)[0].weight.isnan(), patterns_of(first)[0])
    assert_same_patterns(first, second)


# --- Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["mos", "som", "oms", "smom"])
@pytest.mark.parametrize("method", [Static(), SET(update_period=3), RigL(update_period=3)], ids=lambda each: each.name)
def test_resuming_is_exact_in_any_order_of_loading(tmp_path: Path, method: Method, order: str) -> None:
    # Broken off right after an update: what grew is zero, and its pattern is in the scheduler's state alone.
    assert_resumes(lambda seed: run(seed, method), order, 6, tmp_path / "state.pt")


@pytest.mark.parametrize("order", ["mos", "som"])
def test_resuming_blocks_of_erk_under_adam_is_exact(tmp_path: Path, order: str) -> None:
    def make(seed: int) -> Run:
        return run_of(
            seed,
            plan=PLAN,
            optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
            method=RigL(update_period=2, until=1.0),
            granularity="block",
            block_size=(3, 2),
            distribution="erk",
        )

    assert_resumes(make, order, 4, tmp_path / "state.pt")


def test_a_whole_model_may_be_pickled() -> None:
    made = run(0, RigL(update_period=1))
    train(made.m, made.o, batches(2))
    file = io.BytesIO()
    torch.save(made.m, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_same_state(made.m, again)
    assert_same_patterns(made.m, again)
    optimizer = sgd(again)
    SWATScheduler(again, optimizer, **PLAN)
    train(again, optimizer, batches(1))


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        weight = state["layers"]["3"]["weight"]
        weight[name] = change(weight[name])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("mask", lambda mask: mask[1:]), "weight: mask: expected int64 of shape"),
        (changed("mask", lambda mask: mask.float()), "weight: mask: expected int64 of shape .* got 'torch.float32"),
        (changed("mask", lambda mask: None), "weight: mask: expected int64"),
        (changed("mask", lambda mask: torch.full_like(mask, -1)), "weight: mask and count do not go together"),
        (changed("count", lambda count: count - 1), "weight: mask and count do not go together"),
        (changed("count", lambda count: -1), "weight: count: expected an integer from 0 to"),
        (changed("count", float), "weight: count: expected an integer from 0 to"),
        (changed("steps", lambda steps: -1), "weight: steps: expected an integer of at least 0"),
        (lambda state: state["layers"]["3"].update(weight={}), r"weight: .* keys \['count', 'mask', 'steps'\]"),
        (lambda state: state["layers"]["3"].update(topology="set, unstructured, uniform"), "topology: expected 'RigL"),
        (lambda state: state["layers"]["3"].update(budget=[0, 5]), r"budget: expected a fraction in \(0, 1\]"),
        (lambda state: state["layers"]["3"].update(end_budget=[6, 5]), r"end_budget: expected a fraction in \(0, 1\]"),
        (
            lambda state: state["layers"]["3"].update(momentum="large"),
            "momentum: expected a number of at least 0 or None",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    made = run(0, "rigl")
    good = made.s.state_dict()
    bad = copy.deepcopy(good)
    change(bad)
    before = patterns_of(made.m)
    with pytest.raises(ValueError, match=f"^state_dict: layer '3': {message}"):
        made.s.load_state_dict(bad)
    assert all(torch.equal(*pair) for pair in zip(before, patterns_of(made.m), strict=True))


# --- Compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
def test_patterns_move_in_a_compiled_model_without_compiling_anew() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 36, 5))
    sparsify_(eager, SWATConfig(0.6, skip=(), backend="sparse", method=RigL(update_period=1, until=1.0)))
    model = copy.deepcopy(eager)
    first, second = sgd(eager), sgd(model)
    SWATScheduler(eager, first, **PLAN), SWATScheduler(model, second, **PLAN)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    data = batches(11)
    assert_equal(train(eager, first, data), train(model, second, data, forward=fast))
    assert_same_state(eager, model)
    assert_same_patterns(eager, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        assert torch.equal(eager.eval()(data[0][0]), fast.eval()(data[0][0]))


# --- A method of one's own --------------------------------------------------------------------------------------------


def example() -> str:
    """The code in the docstring of the module."""
    lines = (methods.__doc__ or "").split("::\n", 1)[1].splitlines()
    code = [line for line in lines if not line.strip() or line.startswith("    ")]
    return textwrap.dedent("\n".join(code))


def test_the_example_in_the_documentation_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    names: dict[str, Any] = {"model": model}
    exec(compile(example(), "example", "exec"), names)
    assert len(sparse_layers(model)) == 1  # the first convolution stays dense
    (layer,) = sparse_layers(model)
    assert layer.sparsity == 0.9
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    # Sooner than after 100 steps.
    sparsify_(model, SWATConfig(0.9, method=names["GrowLikeNeighbours"](update_period=2, fraction=0.5)))
    (layer,) = sparse_layers(model)
    optimizer = sgd(model)
    SWATScheduler(model, optimizer, total_steps=8)
    before = layer.kept_weight().pattern.dense()
    train(model, optimizer, batches(1))
    assert torch.equal(layer.kept_weight().pattern.dense(), before)
    x, y = batches(1, first=1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    likes = layer.weight.grad.abs().mean(0)
    optimizer.step()
    now = layer.kept_weight().pattern.dense()
    grown = now & ~before
    assert grown.any()
    # Whole columns grow, those whose neighbours' gradients are the largest.
    least = likes.expand_as(grown)[grown].min()
    full = likes > least
    assert now[:, full].all()
    assert int(now.sum()) == int(before.sum()) == 144


class Newest(Method):
    """Drops the largest weights, grows in order."""

    def drop(self, weight: Tensor) -> Tensor:
        return 1 / (1 + weight.abs())

    def growth(self, weight: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        return torch.arange(weight.numel(), 0, -1.0).view(weight.shape)


def test_a_method_decides_what_to_drop_and_what_to_grow() -> None:
    layer = SWATLinear(10, 4, bias=False, sparsity=0.5, method=Newest(update_period=1, fraction=0.25, until=1.0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    SWATScheduler(layer, optimizer, total_steps=1000)
    before, weight = layer.kept_weight().pattern.dense(), layer.weight.detach().clone()
    layer.weight.grad = torch.zeros(4, 10)
    optimizer.step()
    now = layer.kept_weight().pattern.dense()
    # A share of a hair less than 0.25: 4 of 20.
    limit = weight.abs().flatten().sort(descending=True).values[3]
    stay = before & (weight.abs() < limit)
    assert int(stay.sum()) == 16
    expected = stay.flatten().clone()
    expected[(~stay).flatten().nonzero()[:4, 0]] = True
    assert torch.equal(now.flatten(), expected)


def test_what_grows_moves() -> None:
    class Still(Method):
        def drop(self, weight: Tensor) -> Tensor:
            return weight.abs()

    class More(Newest):
        """Grows as its parent does."""

    assert [method().moves for method in (Method, Static, Still)] == [False] * 3
    assert [method().moves for method in (SET, RigL, Newest, More)] == [True] * 4
    model = sparse_network(method=Newest())
    with pytest.raises(ValueError, match=r"^total_steps: method 'newest' needs it"):
        SWATScheduler(model, sgd(model))
    SWATScheduler(model, sgd(model), total_steps=5)


@pytest.mark.parametrize("shape", [(), (1,), (16, 16, 3, 1), (16, 16, 9), (1, 16, 16, 3, 3)])
def test_a_growth_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    class Wrong(Method):
        def growth(self, weight: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
            return torch.ones(shape)

    made = run(0, Wrong(update_period=1))
    before = patterns_of(made.m)
    with pytest.raises(ValueError, match=r"^Wrong\.growth: expected a score for each weight, \(.*\), got shape \("):
        train(made.m, made.o, batches(1))
    assert_all_equal(before, patterns_of(made.m))


def test_a_method_that_moves_must_say_how() -> None:
    class Silent(Method):
        moves = True

    made = run(0, Silent(update_period=1))
    with pytest.raises(NotImplementedError, match=r"^Silent\.growth: expected a score for each weight"):
        train(made.m, made.o, batches(1))


# --- What it cannot do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["set", "rigl", SET(seed=3)])
def test_what_moves_needs_a_scheduler_with_a_length(method: str | Method) -> None:
    model = sparse_network(method=method)
    optimizer = sgd(model)
    with pytest.raises(RuntimeError, match=r"^method .* needs a swat_ext\.SWATScheduler\(model, optimizer\), made bef"):
        train(model, optimizer, batches(1))
    with pytest.raises(ValueError, match=r"^total_steps: method '(set|rigl)' needs it"):
        SWATScheduler(model, optimizer)


def test_static_needs_none() -> None:
    model = sparse_network(method="static")
    optimizer = sgd(model)
    before = patterns_of(model)
    train(model, optimizer, batches(3))
    SWATScheduler(model, optimizer)
    train(model, optimizer, batches(2))
    for layer, mask, now in zip(sparse_layers(model), before, patterns_of(model), strict=True):
        assert torch.equal(mask, now)
        assert not layer.weight[~mask].any()


@pytest.mark.parametrize("warmup", [0, 12])
def test_static_stays_where_the_length_is_known_too(warmup: int) -> None:
    made = run_of(0, plan={"total_steps": 20, "topk_warmup": warmup}, method=Static(update_period=5))
    before = patterns_of(made.m)
    # A warm-up moves its layers too.
    assert {layer.driver for layer in sparse_layers(made.m)} == {made.s if warmup else None}
    train(made.m, made.o, batches(20))
    assert made.s.steps == 20
    assert_all_equal(before, patterns_of(made.m))
    for layer, mask in zip(sparse_layers(made.m), before, strict=True):
        assert torch.equal(layer.weight != 0, mask)


def test_a_ramp_and_another_sparsity_are_refused() -> None:
    for method in ("static", "rigl"):
        model = sparse_network(method=method)
        with pytest.raises(ValueError, match=f"^ramp: expected 0 for method '{method}'"):
            SWATScheduler(model, sgd(model), total_steps=9, ramp=0.5)
        layer = sparse_layers(model)[0]
        with pytest.raises(ValueError, match=f"^sparsity: method '{method}' keeps a fixed number of weights"):
            layer.sparsity = 0.5
        layer.sparsity = 0.8  # what it has
        layer.activation_sparsity = 0.3  # not of the weights
        assert (layer.sparsity, layer.activation_sparsity) == (0.8, 0.3)


def test_a_weight_that_two_layers_share_is_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"^method: 'set' makes weights zero, but '0' and '1' share theirs"):
        sparsify_(model, SWATConfig(0.5, method="set"))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, before)
    shared = nn.Sequential(model[0], nn.ReLU(), model[0])  # one layer that is called twice is no obstacle
    sparsify_(shared, SWATConfig(0.5, method="set"))


@pytest.mark.parametrize("method", ["static", RigL()])
def test_a_weight_that_any_other_module_uses_is_refused_too(method: str | Method) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(self.words(tokens)))

    model = Language()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^method: .* makes weights zero, but 'words' and 'head' share theirs"):
        sparsify_(model, SWATConfig(0.5, method=method))
    assert [type(module) for module in model.children()] == [nn.Embedding, nn.Linear, nn.Linear]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert sparsify_(copy.deepcopy(model), SWATConfig(0.5)).swapped == ("body", "head")  # SWAT makes none zero
    assert sparsify_(model, SWATConfig(0.5, method=method, skip=["head"])).swapped == ("body",)
    assert torch.equal(model.words.weight, before["words.weight"])


class Remembering(torch.optim.Optimizer):
    """Keeps things of many dtypes of each weight, and fills them with ones."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool):
                state.setdefault(str(dtype), torch.empty_like(parameter, dtype=dtype)).fill_(1)
            state["step"] = state.get("step", 0) + 1
            state["norms"] = torch.ones(parameter.shape[0])
            with torch.no_grad():
                parameter.add_(0.01)


@pytest.mark.parametrize("method", [Static(), RigL(update_period=1)], ids=lambda each: each.name)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_optimizer_may_remember_anything(method: Method, memory_format: torch.memory_format) -> None:
    model = sparse_network(method=method).to(memory_format=memory_format)
    optimizer = Remembering(model.parameters())
    SWATScheduler(model, optimizer, **PLAN)
    before = patterns_of(model)
    train(model, optimizer, batches(1))
    moved = 0
    for layer, old, mask in zip(sparse_layers(model), before, patterns_of(model), strict=True):
        state = optimizer.state[layer.weight]
        assert len(state) == 8
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool):
            value = state[str(dtype)]
            assert value.dtype == dtype
            # What grew starts anew.
            assert torch.equal(value != 0, mask & old)
            assert torch.equal(value, value.bool().to(dtype))
        assert state["norms"].all()
        assert state["step"] == 1
        assert not layer.weight[~mask].any()
        moved += int((mask & ~old).sum())
    assert (moved > 0) == method.moves


@pytest.mark.parametrize("make", ["constructor", "from_dense"])
def test_layers_made_on_their_own_have_patterns_of_their_own(make: str) -> None:
    def layers(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        if make == "constructor":
            made = [SWATLinear(20, 30, sparsity=0.5, method="static") for _ in range(3)]
        else:
            made = [SWATLinear.from_dense(nn.Linear(20, 30), sparsity=0.5, method="static") for _ in range(3)]
        return [layer.kept_weight().pattern.dense() for layer in made]

    first, again, other = layers(0), layers(0), layers(1)
    assert_all_equal(first, again)
    for one, two in itertools.combinations([*first, *other], 2):
        # At random they agree in half of 600 elements.
        assert 220 < int((one == two).sum()) < 380


def test_sparsify_and_swat_take_nothing_of_torchs_generator() -> None:
    model = nn.Sequential(nn.Linear(20, 20))
    before = torch.random.get_rng_state()
    sparsify_(model, SWATConfig(0.5, method="static"))
    SWATLinear.from_dense(nn.Linear(20, 20, device="meta"), sparsity=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


class Sharded(nn.Parameter):
    """A parameter of which an optimizer may see but a part, as DTensor."""


def test_weights_in_parts_are_refused() -> None:
    model = sparse_network(method="static")
    model[9].weight = Sharded(model[9].weight.detach().clone())
    with pytest.raises(NotImplementedError, match=r"^weight: method 'static' needs whole weights, got a Sharded"):
        train(model, sgd(model), batches(1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RigL(update_period=0), ValueError, "^update_period: expected at least 1, in optimizer steps, got 0"),
        (lambda: SET(fraction=1.0), ValueError, "^fraction: expected a number in"),
        (lambda: SET(fraction=float("nan")), ValueError, "^fraction: expected a number in"),
        (lambda: Static(until=0), ValueError, "^until: expected a number in"),
        (lambda: Static(until=1.5), ValueError, "^until: expected a number in"),
        (
            lambda: SWATConfig(0.9, method="RigL"),
            ValueError,
            "^method: expected one of 'swat', 'static', 'set', 'rigl'",
        ),
        (lambda: SWATConfig(0.9, method=RigL), ValueError, "^method: expected one of .*Method, got .*RigL"),
        (lambda: SWATConfig(0.9, method=None), ValueError, "^method: expected one of"),
        (lambda: SWATConfig(0.9, method=["rigl"]), ValueError, "^method: expected one of"),
        (lambda: SWATLinear(3, 3, sparsity=0.5, method="dst"), ValueError, "^method: expected one of"),
        (lambda: SWATConv2d(3, 3, 3, sparsity=0.5, method=2), ValueError, "^method: expected one of"),
    ],
)
def test_wrong_settings(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_dense_form_has_no_trace_of_it() -> None:
    made = run(0, "rigl")
    dense = to_dense(made.m)
    assert [type(module) for module in dense] == [type(module) for module in small_network()]
    for layer, twin in zip(sparse_layers(made.m), [dense[i] for i in (3, 5, 7, 9)], strict=True):
        assert vars(twin).keys() <= vars(nn.Conv2d(1, 1, 1)).keys() | vars(nn.Linear(1, 1)).keys()
        assert torch.equal(twin.weight, layer.weight)
    assert "method='rigl'" in repr(made.m)
