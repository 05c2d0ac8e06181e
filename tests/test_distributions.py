"""How one budget is shared over the layers by their sizes: uniform and ERK."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import batches, sgd, sparse_layers, sparse_network, train
from torch import nn

from swat_ext import SWATConfig, SWATScheduler, sparsify_
from swat_ext.models import build_model
from swat_ext.topology.distribution import erk


def share(sparsity: float) -> Fraction:
    """``1 - sparsity`` as the decimal number that it prints as."""
    return 1 - Fraction(Decimal(repr(sparsity)))


def by_bisection(sizes: list[tuple[int, ...]], sparsity: float) -> list[float]:
    """Real numbers of weights to keep: ``eps`` times the sum of the sides, at most all, that add up to the budget."""
    numels, sides = [math.prod(size) for size in sizes], [sum(size) for size in sizes]
    budget = float(share(sparsity) * sum(numels))

    def kept(eps: float) -> list[float]:
        return [min(float(numel), eps * side) for numel, side in zip(numels, sides, strict=True)]

    low, high = 0.0, float(max(numels))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle)) < budget else (low, middle)
    return kept(high)


def assert_is_erk(counts: list[int], sizes: list[tuple[int, ...]], sparsity: float) -> None:
    budget = share(sparsity) * sum(math.prod(size) for size in sizes)
    assert budget <= sum(counts) < budget + len(sizes)
    for count, real, size in zip(counts, by_bisection(sizes, sparsity), sizes, strict=True):
        assert real - 1e-6 * (1 + real) <= count < real + 1 + 1e-6 * (1 + real), (count, real, size)
        assert 1 <= count <= math.prod(size)


def counts_of(model: nn.Module) -> list[int]:
    """Weights that each sparse layer's evaluation multiplies by."""
    return [int((layer.to_dense().weight != 0).sum()) for layer in sparse_layers(model)]


def sizes_of(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(layer.weight.shape) for layer in sparse_layers(model)]


_CONV = st.tuples(st.integers(1, 600), st.integers(1, 600), st.integers(1, 7), st.integers(1, 7))
_DEPTHWISE = st.tuples(st.integers(1, 600), st.just(1), st.integers(1, 7), st.integers(1, 7))
_LINEAR = st.tuples(st.integers(1, 2000), st.integers(1, 2000))
_SPARSITIES = st.one_of(
    st.sampled_from([0.0, 0.01, 0.5, 0.8, 0.9, 0.95, 0.99]), st.floats(0, 0.99, allow_subnormal=False)
)


@given(sizes=st.lists(st.one_of(_CONV, _DEPTHWISE, _LINEAR), min_size=1, max_size=30), sparsity=_SPARSITIES)
def test_any_layers_at_any_sparsity(sizes: list[tuple[int, ...]], sparsity: float) -> None:
    assert_is_erk(erk(sizes, sparsity), sizes, sparsity)


def test_resnet50_as_published() -> None:
    """Evci et al., appendix: at 80% the 1x1 convolutions of the first stage are nearly dense, the last far from it."""
    with torch.device("meta"):
        model = build_model("resnet50", 1000, in_channels=3, stem="imagenet")
    sizes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(sizes) == 54
    for sparsity in (0.5, 0.8, 0.9, 0.95, 0.99):
        assert_is_erk(erk(sizes, sparsity), sizes, sparsity)
    # Those of 64 to 64 channels pass 1 and are dense; 512 to 512 channels 3x3 keep few.
    kept = dict(zip(sizes, erk(sizes, 0.8), strict=True))
    assert kept[64, 64, 1, 1] == 64 * 64
    assert kept[512, 512, 3, 3] / (512 * 512 * 9) < 0.1


def test_some_become_dense_only_after_others() -> None:
    """Once the smallest is dense, the eps of the rest rises, and pushes the next one over 1."""
    sizes = [(1, 2000), (4, 4), (300, 300)]
    sparsity = 0.946
    numels, sides = [math.prod(size) for size in sizes], [sum(size) for size in sizes]
    eps = float(share(sparsity)) * sum(numels) / sum(sides)
    at_once = [eps * side > numel for side, numel in zip(sides, numels, strict=True)]
    counts = erk(sizes, sparsity)
    dense = [count == numel for count, numel in zip(counts, numels, strict=True)]
    assert (at_once, dense) == ([True, False, False], [True, True, False])
    assert_is_erk(counts, sizes, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98])
def test_layers_keep_what_erk_gives_them_in_training_and_evaluation(sparsity: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),  # the first convolution takes part
        nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16),
        nn.Conv2d(16, 32, 1),
        nn.Flatten(),
        nn.Linear(32 * 36, 10),
    )
    sparsify_(model, SWATConfig(sparsity, distribution="erk"))
    assert len(sparse_layers(model)) == 4
    assert_is_erk(counts_of(model), sizes_of(model), sparsity)
    model(torch.randn(2, 3, 8, 8))
    for layer, count in zip(sparse_layers(model), counts_of(model), strict=True):
        assert layer.realised_sparsity[0] == pytest.approx(1 - count / layer.weight.numel())
        assert layer.sparsity == pytest.approx(1 - count / layer.weight.numel())
        # The input's follows: of N elements ceil(N * count / weights).
        for numel in (1, 1000, 12345):
            assert layer.activation_budget.count(numel) == math.ceil(Fraction(count, layer.weight.numel()) * numel)


def test_activations_keep_a_sparsity_of_their_own() -> None:
    model = sparse_network(distribution="erk", activation_sparsity=0.7)
    assert {layer.activation_sparsity for layer in sparse_layers(model)} == {0.7}
    assert len({layer.sparsity for layer in sparse_layers(model)}) > 1


def test_layers_that_are_skipped_do_not_count() -> None:
    model = sparse_network(distribution="erk", skip=["0", "9"])
    assert len(sparse_layers(model)) == 3
    assert_is_erk(counts_of(model), sizes_of(model), 0.8)


def test_a_shared_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 90)
            self.second.weight = self.first.weight

    model = Tied()
    sparsify_(model, SWATConfig(0.7, distribution="erk"))
    first, second, third = counts_of(model)
    assert first == second
    assert_is_erk([first, third], [(40, 40), (90, 40)], 0.7)


def test_uniform_gives_each_layer_the_same_and_leaves_the_first_convolution_dense() -> None:
    model = sparse_network(sparsity=0.87)
    assert type(model[0]) is nn.Conv2d
    assert counts_of(model) == [math.ceil(share(0.87) * math.prod(size)) for size in sizes_of(model)]


def test_erk_stays_while_training_and_needs_no_scheduler() -> None:
    model = sparse_network(distribution="erk")
    before = [layer.budget for layer in sparse_layers(model)]
    train(model, sgd(model), batches(3))
    assert [layer.budget for layer in sparse_layers(model)] == before
    assert_is_erk(counts_of(model), sizes_of(model), 0.8)


def test_a_state_of_another_distribution_is_refused() -> None:
    model, other = sparse_network(distribution="erk"), sparse_network(skip=())
    state = SWATScheduler(model, sgd(model)).state_dict()
    with pytest.raises(ValueError, match=r"topology: expected 'swat, unstructured, uniform', got 'swat, .*, erk'"):
        SWATScheduler(other, sgd(other)).load_state_dict(state)


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^distribution: expected one of 'uniform', 'erk', 'momentum', got 'ERK'"):
        SWATConfig(0.9, distribution="ERK")
    with pytest.raises(ValueError, match=r"^distribution: expected 'uniform' or 'erk' for method 'rigl'"):
        SWATConfig(0.9, distribution="momentum", method="rigl")
