"""profile_memory where only a part of the model runs, other hooks are at work, or several profiles see one another."""

import pytest
import torch
from held import saved_bytes
from networks import sparse_network
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from swat_ext import MemoryProfile, SWATConfig, profile_memory, sparsify_
from swat_ext.inspect.record import OUTSIDE

SIZE = (4, 3, 8, 8)


def _input(*size: int) -> Tensor:
    return torch.randn(size or SIZE, generator=torch.Generator().manual_seed(0))


def _whole() -> MemoryProfile:
    model = sparse_network()
    with profile_memory(model) as profile:
        model(_input()).sum().backward()
    return profile


def test_the_count_that_tests_compare_with_is_right() -> None:
    x = torch.randn(10, requires_grad=True)
    weight = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: x.exp()) == 40
    assert saved_bytes(lambda: x * weight) == 80
    assert saved_bytes(lambda: x * weight, exclude=[weight]) == 40
    assert saved_bytes(lambda: x.exp() * x.exp()) == 80
    assert saved_bytes(lambda: (x * x) * x) == 80
    # A view keeps all of its storage alive.
    assert saved_bytes(lambda: torch.sin(x[:2])) == 40


@pytest.mark.parametrize("after", [False, True])
def test_a_part_that_runs_on_its_own_has_its_bytes_and_no_dense_ones(after: bool) -> None:
    model = sparse_network()
    x = _input(64, 16, 8, 8)
    with profile_memory(model) as profile:
        if after:
            model(_input()).sum().backward()
        model[3](x).sum().backward()
    rows = {layer.name: layer for layer in profile.layers}
    assert list(rows) == ["3"]
    assert rows["3"].held_bytes == profile.held_bytes > 0
    assert rows["3"].dense_bytes is profile.dense_bytes is None
    assert profile.dense_note == "not known, as a part of the model was called on its own"
    assert "dense: not known" in str(profile)


def test_a_part_of_a_dense_model_is_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    with profile_memory(model) as profile:
        model[1](_input(2, 8).requires_grad_()).sum().backward()
    assert profile.held_bytes == profile.dense_bytes == 2 * 8 * 4


def test_what_is_saved_before_the_first_call_picks_no_call() -> None:
    model = sparse_network()
    scale = torch.full(SIZE, 2.0, requires_grad=True)
    with profile_memory(model) as profile:
        first = model(scale.sin())  # sin saves before the model is called
        model(_input(1, 3, 8, 8)).sum().backward()
        first.sum().backward()
    # Held at the most: both calls once, and what sin saved.
    batch = _whole().dense_bytes or 0
    assert profile.dense_bytes == pytest.approx(batch * 5 / 4 + scale.nbytes, rel=0.005)
    with profile_memory(model) as outside:
        scale.exp().sum().backward()
        with torch.no_grad():
            model(_input())
    assert {layer.name for layer in outside.layers} == {OUTSIDE}
    assert outside.dense_bytes == outside.held_bytes == scale.nbytes


@pytest.mark.parametrize("where", ["around", "in a container"])
def test_hooks_inside_are_noted(where: str) -> None:
    class OnCPU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with save_on_cpu():
                return torch.exp(x)

    if where == "around":
        model = sparse_network()
        with profile_memory(model) as profile, save_on_cpu():
            model(_input()).sum().backward()
    else:
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), OnCPU())
        with profile_memory(model) as profile:
            model(_input(2, 8)).sum().backward()
        assert [layer.name for layer in profile.layers] == ["1"]
    assert "saved_tensors_hooks" in profile.held_note
    assert f"held: {profile.held_note}." in str(profile)
    assert profile.to_dict()["held_note"] == profile.held_note
    assert profile.dense_bytes is None


def test_hooks_that_take_nothing_are_not_noted() -> None:
    model = sparse_network()
    assert _whole().held_note == ""
    # Around the block, where torch asks the inner ones, and where nothing is saved.
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor), profile_memory(model) as profile:
        model(_input()).sum().backward()
    assert profile.held_note == ""
    assert profile.held_bytes == _whole().held_bytes
    with profile_memory(model) as profile:
        with save_on_cpu(), torch.no_grad():
            model(_input())
        checkpoint(model, _input().requires_grad_(), use_reentrant=False).sum().backward()
    assert profile.held_note == ""


def test_the_dense_network_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    sparsify_(model, SWATConfig(0.9))
    copied: list[str] = []
    deepcopy = nn.Parameter.__deepcopy__

    def watch(parameter: nn.Parameter, memo: dict[int, object]) -> object:
        copied.append(parameter.device.type)
        return deepcopy(parameter, memo)

    with profile_memory(model) as profile:
        model(_input(2, 64).requires_grad_()).sum().backward()
        monkeypatch.setattr(nn.Parameter, "__deepcopy__", watch)
    assert profile.dense_bytes == 2 * 64 * 4  # the ReLU's output
    assert copied == []


def test_a_model_without_values_has_a_profile_too() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        profile = profile_memory(model, torch.empty(2, 8))
    assert profile.held_bytes == 2 * 8 * 4


def test_what_backward_saves_counts_while_it_is_held() -> None:
    """A gradient that is itself differentiated, and a reentrant checkpoint, which runs its part again."""
    x = _input(4, 8).requires_grad_()
    model = nn.Sequential(nn.Tanh())
    with profile_memory(model) as profile:
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grad.pow(2).sum().backward()
    # tanh, and for its second derivative: the gradient that it was given, then what pow was given.
    assert profile.held_bytes > x.nbytes
    assert {layer.name for layer in profile.layers} == {"0", OUTSIDE}

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Tanh(), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x * 2, use_reentrant=True)

    profile = profile_memory(Block(), x.detach().requires_grad_())
    rows = {layer.name: layer.held_bytes for layer in profile.layers}
    assert rows["inner.0"] == rows["inner.1"] == x.nbytes
