"""Evaluation selects a threshold once, and again when the weight has changed."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from swat_ext import SWATConfig, SWATConv2d, SWATLayer, SWATLinear, sparsify_, to_dense
from swat_ext.topology import selection


def _layer(**settings: object) -> SWATConv2d:
    torch.manual_seed(0)
    return SWATConv2d(8, 16, 3, padding=1, sparsity=0.8, **settings).eval()  # type: ignore[arg-type]


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by the shape at each selection of a weight's threshold for evaluation."""
    counted: list[object] = []
    real = selection.select_exactly

    def select(tensor: torch.Tensor, keep: int) -> object:
        counted.extend([tensor.shape] * (tensor.shape[0] == 16))
        return real(tensor, keep)

    monkeypatch.setattr(selection, "select_exactly", select)
    return counted


def _input() -> torch.Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_unchanged_weight_is_selected_once(selected: list[object], mode: Callable[[], object]) -> None:
    layer = _layer(backend="sparse")
    with mode():  # type: ignore[attr-defined]
        outputs = [layer(_input()) for _ in range(3)]
    assert len(selected) == 1
    assert torch.equal(outputs[0], outputs[2])
    x = _input().requires_grad_()
    layer(x).sum().backward()  # of a selection that inference mode may have made
    assert x.grad is not None
    layer.weight.requires_grad_(False)
    layer(_input())
    assert len(selected) == 1


def _step(layer: SWATLayer) -> None:
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=1.0).step()


def _load(layer: SWATLayer, *, assign: bool) -> None:
    layer.load_state_dict({name: -2 * value for name, value in layer.state_dict().items()}, assign=assign)


def _swap(layer: SWATLayer) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def _new(layer: SWATLayer) -> None:
    layer.train().weight = nn.Parameter(torch.randn_like(layer.weight))
    layer.eval()


def _sparser(layer: SWATLayer) -> None:
    layer.sparsity = 0.95


_CHANGES = {
    "step": _step,
    "in place": lambda layer: layer.weight.detach().mul_(-3),
    "one element": lambda layer: layer.weight.detach()[3, 4, 1].fill_(7),
    "data in place": lambda layer: layer.weight.data.normal_(),
    "data": _swap,
    "parameter": _new,
    "load": lambda layer: _load(layer, assign=False),
    "assign": lambda layer: _load(layer, assign=True),
    "sparsity": _sparser,
    "dtype": lambda layer: layer.double().float().weight.detach().add_(1),
    "memory format": lambda layer: layer.to(memory_format=torch.channels_last).weight.detach().neg_(),
}


@pytest.mark.parametrize("change", _CHANGES)
@torch.no_grad()
def test_a_changed_weight_is_selected_anew(change: str) -> None:
    layer = _layer(backend="sparse")
    before = layer(_input())
    with torch.enable_grad():
        _CHANGES[change](layer)
    after = layer(_input())
    fresh = _layer(backend="sparse")
    fresh.load_state_dict(layer.state_dict())
    fresh.sparsity = layer.sparsity
    fresh.to(memory_format=torch.channels_last if change == "memory format" else torch.contiguous_format)
    assert torch.equal(after, fresh(_input()))
    assert not torch.equal(after, before)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["unstructured", "kernel"])
def test_a_layer_that_was_elsewhere_selects_anew(selected: list[object], granularity: str) -> None:
    """Its threshold would be on the device where it was; here where its dtype was another."""
    layer = _layer(backend="sparse", granularity=granularity)
    output = layer(_input())
    for number, move in enumerate(
        (lambda: layer.double().float(), lambda: layer.cpu(), lambda: layer.load_state_dict(layer.state_dict())), 2
    ):
        move()
        assert torch.equal(layer(_input()), output)
        assert torch.equal(layer(_input()), output)
        assert len(selected) == number
    layer.double()
    x = _input().double()
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-12, atol=1e-12)


def test_a_layer_is_evaluated_on_one_device_and_then_on_another(device: torch.device) -> None:
    layer = _layer()
    before = layer(_input())
    for where in (device, torch.device("cpu"), device):
        layer.to(where)
        torch.testing.assert_close(layer(_input().to(where)).cpu(), before, rtol=1e-4, atol=1e-4)


def test_few_elements_changed_behind_the_version_are_seen() -> None:
    layer = _layer(backend="sparse")
    for _ in range(20):
        layer(_input())
        layer.weight.data.view(-1)[torch.randint(layer.weight.numel(), (2,))] *= -3
        fresh = _layer(backend="sparse")
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(_input()), fresh(_input()))


@torch.no_grad()
def test_equal_weights_and_nan_are_selected_alike_each_time() -> None:
    layer = _layer(backend="sparse")
    for values in (0.5, 0.0, float("nan")):
        layer.weight[:3] = values
        fresh = _layer(backend="sparse")
        fresh.load_state_dict(layer.state_dict())
        wanted = fresh(_input())
        for _ in range(2):
            torch.testing.assert_close(layer(_input()), wanted, rtol=0, atol=0, equal_nan=True)


def test_what_is_kept_changes_no_copy_and_no_state() -> None:
    layer = _layer()
    layer(_input())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(_input()), layer(_input()))
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert isinstance(to_dense(nn.Sequential(layer.eval()))[0], nn.Conv2d)
    layer.double()
    assert torch.equal(layer(_input().double()), copy.deepcopy(layer)(_input().double()))


@pytest.mark.parametrize("size", [(1, 1), (63, 1), (129, 7)])
def test_layers_of_every_size(size: tuple[int, int]) -> None:
    layer = SWATLinear(*size, sparsity=0.5).eval()
    x = torch.randn(3, size[0])
    assert torch.equal(layer(x), layer(x))
    with torch.inference_mode():
        made_inside = SWATLinear(*size, sparsity=0.5).eval()
        assert torch.equal(made_inside(x), made_inside(x))


def test_an_inference_input_passes_with_gradients_enabled() -> None:
    with torch.inference_mode():
        x = _input()
    layer = _layer()
    wanted = layer(_input())
    output = layer(x)
    assert torch.equal(output, wanted)
    output.sum().backward()
    assert layer.weight.grad is not None
    layer.train()(x).sum().backward()


def test_tracers_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    sparsify_(model, SWATConfig(0.5))
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*to_dense"):
        torch.jit.trace(model, x)
    with pytest.raises(RuntimeError, match=r"symbolic_trace.*to_dense"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script.*to_dense"):
        torch.jit.script(model)
    wanted = model(x)
    dense = to_dense(model)
    torch.testing.assert_close(torch.jit.script(dense)(x), wanted)
    torch.testing.assert_close(torch.jit.trace(dense, x)(x), wanted)
    torch.testing.assert_close(torch.fx.symbolic_trace(dense)(x), wanted)


def test_a_sparsity_of_numpy_is_a_number() -> None:
    numpy = pytest.importorskip("numpy")
    layer = SWATConv2d(3, 8, 3, sparsity=numpy.float64(0.5), activation_sparsity=numpy.float64(0.25))
    assert type(layer.activation_sparsity) is float
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
