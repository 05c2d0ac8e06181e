"""static, SET and RigL: a fixed number of weights, the others exactly zero, and what is replaced when."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blockwise import GRANULARITIES, blocks_of, sides_of
from networks import batches, sgd, sparse_layers, sparse_network, train
from torch import Tensor, nn

from swat_ext import SWATConfig, SWATLayer, SWATLinear, SWATScheduler, sparsify_
from swat_ext.topology import METHODS, SET, Method, RigL, Static

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": sgd,
    "Nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
}
TOTAL = 16
MOVING = {"update_period": 3, "fraction": 0.45, "until": 0.8}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
    ).double()


def sparse(method: str | Method, seed: int = 0, **config: Any) -> nn.Sequential:
    model = network(seed)
    options = {"sparsity": 0.7, "activation_sparsity": 0.0, "topk_period": 1, "skip": (), "backend": "dense", **config}
    sparsify_(model, SWATConfig(method=method, **options))
    return model


def scheduled(model: nn.Module, optimizer: torch.optim.Optimizer) -> SWATScheduler:
    return SWATScheduler(model, optimizer, total_steps=TOTAL)


def patterns_of(model: nn.Module) -> list[Tensor]:
    return [layer.kept_weight().pattern.dense() for layer in sparse_layers(model)]


def share_of(step: int, method: Method) -> float:
    """RigL's equation 1, where an update is due after ``step`` steps; else 0."""
    if not method.moves or step % method.update_period or step >= method.until * TOTAL:
        return 0.0
    return method.fraction / 2 * (1 + math.cos(step * math.pi / (method.until * TOTAL)))


def assert_moved(
    now: Tensor, before: Tensor, weight: Tensor, gradient: Tensor, share: float, blocks: list[tuple[slice, ...]]
) -> None:
    """RigL: of the kept blocks the ``share`` with the smallest weights went, and came where the gradient is largest."""
    kept = [block for block in blocks if before[block].any()]
    count = int(share * len(kept))
    stay = sorted(kept, key=lambda block: float(weight[block].abs().sum()))[count:]
    assert all(now[block].all() for block in stay)
    free = [block for block in blocks if block not in stay]
    worth = [float(gradient[block].abs().sum()) for block in free]
    grown = [score for score, block in zip(worth, free, strict=True) if now[block].any()]
    # Of equal gradients any may grow.
    assert sorted(grown, reverse=True) == pytest.approx(sorted(worth, reverse=True)[:count])


class Plain:
    """A dense network with masks that a test moves: the oracle."""

    def __init__(self, sparse_model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.model = network()
        self.layers = [layer for layer in self.model if isinstance(layer, nn.Conv2d | nn.Linear)]
        self.masks = [(layer.weight != 0).detach() for layer in sparse_layers(sparse_model)]
        self.optimizer = make(self.model)
        with torch.no_grad():
            for layer, mask in zip(self.layers, self.masks, strict=True):
                layer.weight *= mask

    def step(self, x: Tensor, y: Tensor, gradients: list[Tensor]) -> None:
        """Its own gradients must be ``gradients`` but for rounding; it goes on with those, masked, to the bit."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        for parameter, given in zip(self.model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, given, rtol=1e-9, atol=1e-12)
            parameter.grad.copy_(given)
        for layer, mask in zip(self.layers, self.masks, strict=True):
            layer.weight.grad *= mask
        self.optimizer.step()

    def hold(self, masks: list[Tensor]) -> None:
        """From now on; what is new starts at 0, in the optimizer's state too."""
        self.masks = masks
        with torch.no_grad():
            for layer, mask in zip(self.layers, masks, strict=True):
                layer.weight *= mask
                for value in self.optimizer.state[layer.weight].values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value *= mask


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", [Static(), SET(**MOVING), RigL(**MOVING)], ids=lambda method: method.name)
def test_training_is_that_of_a_masked_dense_network(method: Method, optimizer: str, backend: str) -> None:
    model = sparse(method, backend=backend)
    plain = Plain(model, OPTIMIZERS[optimizer])
    made = OPTIMIZERS[optimizer](model)
    scheduled(model, made)
    counts = [int(mask.sum()) for mask in plain.masks]
    assert counts == [math.ceil(round(0.3 * mask.numel(), 9)) for mask in plain.masks]
    changes = 0
    for step, (x, y) in enumerate(batches(TOTAL, dtype=torch.float64), start=1):
        made.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        made.step()
        plain.step(x, y, gradients)
        share = share_of(step, method)
        for layer, twin, mask, now in zip(
            sparse_layers(model), plain.layers, plain.masks, patterns_of(model), strict=True
        ):
            if isinstance(method, Static) or not share:
                assert torch.equal(now, mask), f"pattern after step {step}"
            elif isinstance(method, RigL):
                each = blocks_of(tuple(mask.shape), (1,) * mask.dim())
                assert_moved(now, mask, twin.weight.detach(), layer.weight.grad, share, each)
        plain.hold(patterns_of(model))
        changes += share > 0
        for layer, twin, mask in zip(sparse_layers(model), plain.layers, plain.masks, strict=True):
            assert torch.equal(layer.weight, twin.weight), f"weight after step {step}"
            assert not layer.weight[~mask].any()
            for name, value in made.state[layer.weight].items():
                assert torch.equal(value, plain.optimizer.state[twin.weight][name]), f"{name} after step {step}"
                assert value.dim() == 0 or not value[~mask].any(), f"{name} after step {step}"
        assert [int(mask.sum()) for mask in plain.masks] == counts
        assert layer.realised_sparsity[0] == 1 - counts[-1] / mask.numel()
    assert changes == (0 if isinstance(method, Static) else 4)


@pytest.mark.parametrize("kind", [SET, RigL])
def test_how_many_are_replaced_and_when(kind: type[Method]) -> None:
    method = kind(**MOVING)
    model = sparse(method)
    optimizer = sgd(model)
    scheduled(model, optimizer)
    for step in range(1, TOTAL + 1):
        before, optimizer_state = patterns_of(model), optimizer.state
        train(model, optimizer, batches(1, first=step, dtype=torch.float64))
        for layer, old, now in zip(sparse_layers(model), before, patterns_of(model), strict=True):
            most = int(share_of(step, method) * int(old.sum()))
            grown, dropped = now & ~old, old & ~now
            # Of what is dropped some may come back.
            assert int(grown.sum()) == int(dropped.sum()) <= most
            assert bool(grown.any()) == (most > 0)
            assert not layer.weight[grown].any()
            assert not optimizer_state[layer.weight]["momentum_buffer"][grown].any()


def test_published_settings_and_their_formula() -> None:
    for name in ("static", "set", "rigl"):
        method = METHODS[name]()
        assert method.name == name
        assert (method.update_period, method.fraction, method.until) == (100, 0.3, 0.75)
    assert METHODS["swat"] is None
    for progress, share in ((0.0, 0.3), (0.1, 0.15 * (1 + math.cos(math.pi / 7.5))), (0.375, 0.15)):
        assert RigL().replaced(progress) == pytest.approx(share)
    assert [RigL().replaced(progress) for progress in (0.75, 0.9, 1.0)] == [0.0] * 3


def lone_layer(method: Method, number: float = 0.5) -> tuple[SWATLayer, torch.optim.SGD]:
    torch.manual_seed(0)
    layer = SWATLinear(10, 6, bias=False, sparsity=number, method=method)
    optimizer = torch.optim.SGD([layer.weight], lr=0.0)
    SWATScheduler(layer, optimizer, total_steps=100)
    return layer, optimizer


def test_rigl_grows_where_the_gradient_is_largest() -> None:
    layer, optimizer = lone_layer(RigL(update_period=1, fraction=0.2))
    before = layer.kept_weight().pattern.dense()
    layer.weight.grad = torch.randn(6, 10) * 1e-3
    wanted = [tuple(at) for at in (~before).nonzero()[:5].tolist()]
    for number, at in enumerate(wanted):
        layer.weight.grad[at] = (-1) ** number * (5.0 + number)
    optimizer.step()
    # 30 kept; a share of 0.2 / 2 * (1 + cos(pi / 75)), a bit less than 6.
    now = layer.kept_weight().pattern.dense()
    assert [tuple(at) for at in (now & ~before).nonzero().tolist()] == sorted(wanted)


def test_rigl_drops_the_smallest_and_never_what_is_no_number() -> None:
    layer, optimizer = lone_layer(RigL(update_period=1, fraction=0.2))
    kept = layer.kept_weight().pattern.dense().nonzero()
    with torch.no_grad():
        for number, at in enumerate(kept.tolist()):
            layer.weight[tuple(at)] = (-1) ** number * (1 + number)
        layer.weight[tuple(kept[0])], layer.weight[tuple(kept[1])] = torch.nan, -torch.inf
    layer.weight.grad = torch.where(layer.kept_weight().pattern.dense(), 0.0, torch.rand(6, 10))
    optimizer.step()
    now = layer.kept_weight().pattern.dense()
    stays = [bool(now[tuple(at)]) for at in kept]
    assert stays == [True] * 2 + [False] * 5 + [True] * 23
    assert layer.weight[tuple(kept[0])].isnan()


def test_random_choices_depend_on_seed_layer_and_step() -> None:
    def run(seed: int, weights: int = 0) -> list[list[Tensor]]:
        model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(2)))
        torch.manual_seed(weights)
        for layer in model:
            nn.init.normal_(layer.weight)
        torch.manual_seed(weights + 100)  # nor on torch's own generator
        sparsify_(model, SWATConfig(0.5, method=SET(seed=seed, update_period=1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scheduler = SWATScheduler(model, optimizer, total_steps=10)
        found = [patterns_of(model)]
        for _ in range(3):
            for layer in model:
                layer.weight.grad = torch.zeros(20, 20)
            with torch.no_grad():
                for layer in model:
                    layer.weight.fill_(1.0)  # ties, so that who is dropped depends on nothing else
            optimizer.step()
            found.append(patterns_of(model))
        assert scheduler.steps == 3
        return found

    first, again, other = run(1), run(1, weights=5), run(2)
    for left, right in zip(first, again, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(left, right, strict=True))
    for left, right in zip(first, other, strict=True):
        assert not any(torch.equal(mine, theirs) for mine, theirs in zip(left, right, strict=True))
    for one, two in first:
        assert not torch.equal(one, two)
    grown = [now[0] & ~before[0] for before, now in itertools.pairwise(first)]
    assert not torch.equal(grown[0], grown[1])
    assert not torch.equal(grown[1], grown[2])


def after_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Make a step; the weights as it left them, before this library's own hook on all optimizers had a look."""
    found: list[Tensor] = []
    handle = optimizer.register_step_post_hook(
        lambda *_: found.extend(layer.weight.detach().clone() for layer in sparse_layers(model))
    )
    optimizer.step()
    handle.remove()
    return found


@pytest.mark.parametrize("granularity", ["kernel", "filter", "block 3x2", "block 5x3"])
@pytest.mark.parametrize("method", [Static(), SET(**MOVING), RigL(**MOVING)], ids=lambda method: method.name)
def test_whole_blocks_are_held_and_replaced(method: Method, granularity: str) -> None:
    options = GRANULARITIES[granularity]
    model = sparse(method, **options)
    optimizer = sgd(model)
    scheduled(model, optimizer)
    sizes = [tuple(layer.weight.shape) for layer in sparse_layers(model)]
    blocks = [blocks_of(size, sides_of(size, *options.values())) for size in sizes]
    for step, (x, y) in enumerate(batches(TOTAL, dtype=torch.float64), start=1):
        before = patterns_of(model)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        weights = after_step(model, optimizer)
        share = share_of(step, method)
        gradients = [layer.weight.grad for layer in sparse_layers(model)]
        for of, weight, grad, old, now in zip(blocks, weights, gradients, before, patterns_of(model), strict=True):
            assert {int(now[block].sum()) for block in of} <= {0, *(now[block].numel() for block in of)}
            assert sum(bool(now[block].any()) for block in of) == math.ceil(round(0.3 * len(of), 9))
            if isinstance(method, RigL) and share:
                assert_moved(now, old, weight, grad, share, of)
            elif not share:
                assert torch.equal(now, old)


def test_erk_gives_each_layer_its_number() -> None:
    model = sparse("rigl", distribution="erk", sparsity=0.5)
    counts = [int(mask.sum()) for mask in patterns_of(model)]
    numels = [layer.weight.numel() for layer in sparse_layers(model)]
    assert sum(numels) / 2 <= sum(counts) < sum(numels) / 2 + 3
    assert len({round(count / numel, 2) for count, numel in zip(counts, numels, strict=True)}) == 3
    optimizer = sgd(model)
    SWATScheduler(model, optimizer, total_steps=8)
    train(model, optimizer, batches(4, dtype=torch.float64))
    assert [int((layer.weight != 0).sum()) for layer in sparse_layers(model)] == counts


def test_the_gradient_stays_dense() -> None:
    model = sparse("static")
    x, y = batches(1, dtype=torch.float64)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    for layer, mask in zip(sparse_layers(model), patterns_of(model), strict=True):
        assert layer.weight.grad[~mask].any()


@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_training_uses_the_pattern_evaluation_and_the_dense_form_what_is_not_zero(method: str) -> None:
    model = sparse(method)
    x = batches(1, dtype=torch.float64)[0][0]
    masks = patterns_of(model)
    plain = network()
    with torch.no_grad():
        for layer in sparse_layers(model):
            layer.weight.normal_()  # outside the pattern too, as a careless user may do
        for layer, twin, mask in zip(sparse_layers(model), [plain[0], plain[2], plain[5]], masks, strict=True):
            twin.weight.copy_(layer.weight * mask)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    # A step makes zero what is outside; evaluation and the dense form take what is not.
    optimizer = sgd(model)
    scheduled(model, optimizer)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for layer, twin, mask in zip(sparse_layers(model), [plain[0], plain[2], plain[5]], masks, strict=True):
            twin.weight.copy_(layer.weight)
            twin.bias.copy_(layer.bias)
            assert torch.equal(layer.weight != 0, mask)
            assert torch.equal(layer.to_dense().weight, layer.weight)
            assert layer.weight_threshold.isnan()
        for training in (True, False):
            torch.testing.assert_close(model.train(training)(x), plain(x), rtol=1e-12, atol=1e-12)
        # What is put there afterwards, as an average of weights has it, counts.
        for layer, twin in zip(sparse_layers(model), [plain[0], plain[2], plain[5]], strict=True):
            twin.weight.copy_(layer.weight.normal_())
            assert torch.equal(layer.to_dense().weight, layer.weight)
        torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-12, atol=1e-12)


def test_a_frozen_layer_and_one_without_gradient_keep_their_pattern() -> None:
    model = sparse(RigL(update_period=1))
    layers = sparse_layers(model)
    layers[0].weight.requires_grad_(False)
    optimizer = sgd(model)
    scheduled(model, optimizer)
    before = patterns_of(model)
    for x, y in batches(3, dtype=torch.float64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        layers[1].weight.grad = None
        optimizer.step()
    assert [torch.equal(*pair) for pair in zip(before, patterns_of(model), strict=True)] == [True, True, False]


def test_copies_hold_their_own() -> None:
    model = sparse(RigL(update_period=1))
    optimizer = sgd(model)
    scheduled(model, optimizer)
    twin, averaged = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    before = patterns_of(twin)
    train(model, optimizer, batches(2, dtype=torch.float64))
    averaged.update_parameters(model)
    for mine, other, old in zip(patterns_of(model), patterns_of(twin), before, strict=True):
        assert torch.equal(other, old)
        assert not torch.equal(mine, other)
    own = sgd(twin)
    with pytest.raises(RuntimeError, match=r"^method RigL\(.* needs a swat_ext.SWATScheduler"):
        train(twin, own, batches(1, dtype=torch.float64))
    scheduled(twin, own)
    train(twin, own, batches(1, dtype=torch.float64))


def test_a_layer_of_a_network_in_float32_with_every_kind_of_layer_trains() -> None:
    model = sparse_network(method=RigL(update_period=2), topk_period=2)
    optimizer = sgd(model)
    SWATScheduler(model, optimizer, total_steps=12)
    losses = train(model, optimizer, batches(1) * 10)
    assert losses[-1] < losses[0]


def test_activations_that_are_to_stay_dense_do() -> None:
    torch.manual_seed(0)
    layer = SWATLinear(40, 6, bias=False, sparsity=0.5, activation_sparsity=0.0, topk_period=10, method="static")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for _ in range(3):
        x, grad = torch.randn(64, 40), torch.randn(64, 6)
        layer.weight.grad = None
        layer(x).backward(grad)
        optimizer.step()
        torch.testing.assert_close(layer.weight.grad, grad.T @ x, rtol=1e-5, atol=1e-6)
