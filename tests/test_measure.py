"""backend="auto": each layer is timed once, keeps the faster kernels, and says so."""

import copy

import pytest
import torch
from networks import batches, sgd, small_network, sparse_layers, sparse_network, train
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import swat_ext
from swat_ext import SWATConfig, SWATConv2d, SWATLinear
from swat_ext.modules import measure
from swat_ext.modules.measure import representative

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Each test starts with nothing measured."""
    monkeypatch.setattr(measure, "_known", {})


def _count(monkeypatch, times=None):
    """Count measurements; with ``times``, say that they took so long."""
    measured = []
    real = measure._measure

    def counted(problem, dtype, device):
        measured.append(problem)
        return dict(times) if times else real(problem, dtype, device)

    monkeypatch.setattr(measure, "_measure", counted)
    return measured


def _layer(**settings):
    torch.manual_seed(0)
    return SWATConv2d(8, 16, 3, padding=1, sparsity=0.9, **settings)


@pytest.mark.parametrize("layer", [_layer(), SWATLinear(8, 16, sparsity=0.9)], ids=["conv", "linear"])
def test_a_layer_measures_once_for_each_shape(monkeypatch, layer):
    measured = _count(monkeypatch)
    size = (4, 8, 6, 6) if isinstance(layer, nn.Conv2d) else (4, 8)
    for _ in range(3):
        layer(torch.randn(size)).sum().backward()
    assert len(measured) == 1
    assert measured[0].backward
    backend, reason = layer.chosen_backend
    assert backend in ("sparse", "dense")
    assert reason.startswith("measured: ")
    with torch.no_grad():
        layer(torch.randn(size))
        assert len(measured) == 1  # a checkpoint's first forward
        layer.eval()(torch.randn(size))
    assert len(measured) == 2
    assert not measured[1].backward
    twin = copy.deepcopy(layer).train()
    twin(torch.randn(size)).sum().backward()
    assert len(measured) == 2


@pytest.mark.parametrize("faster", ["sparse", "dense"])
def test_the_faster_is_chosen_and_reported(monkeypatch, faster):
    times = {"sparse": 3.0, "dense": 3.0, faster: 1.5}
    _count(monkeypatch, times)
    model = sparse_network()
    train(model, sgd(model), batches(1))
    for layer in sparse_layers(model):
        assert layer.chosen_backend == (
            faster,
            f"measured: 2.0x faster, sparse {times['sparse']:.2f} ms, dense {times['dense']:.2f} ms",
        )
    assert f"measured: 2.0x faster, sparse {times['sparse']:.2f} ms" in str(swat_ext.report(model))


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_nothing_is_measured_when_a_backend_was_asked_for(monkeypatch, backend):
    measured = _count(monkeypatch)
    layer = _layer(backend=backend)
    layer(torch.randn(4, 8, 6, 6))
    assert measured == []
    assert layer.chosen_backend == (backend, "asked for")


def test_measuring_leaves_no_trace(monkeypatch):
    measured = _count(monkeypatch)
    torch.manual_seed(5)
    layer = _layer()
    state = torch.get_rng_state()
    x = torch.randn(4, 8, 6, 6)
    expected = torch.randn(3)
    torch.set_rng_state(state)
    torch.randn(4, 8, 6, 6)
    layer(x).sum().backward()
    assert len(measured) == 1
    assert torch.equal(torch.randn(3), expected)


def test_a_checkpoint_carries_the_choices(monkeypatch, tmp_path):
    _count(monkeypatch, {"sparse": 3.0, "dense": 1.0})
    layer = _layer()
    layer(torch.randn(4, 8, 6, 6)).sum().backward()
    torch.save(layer.selection_state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)

    monkeypatch.setattr(measure, "_known", {})  # another process, where the other one would win
    measured = _count(monkeypatch, {"sparse": 1.0, "dense": 3.0})
    resumed = _layer()
    resumed.load_selection_state(state)
    resumed(torch.randn(4, 8, 6, 6)).sum().backward()
    assert measured == []
    assert resumed.chosen_backend == layer.chosen_backend
    del state["choices"]  # of an earlier version
    _layer().load_selection_state(state)


def test_batches_of_like_size_share_a_measurement():
    assert representative((50, 3, 8, 9), CPU) == representative((64, 3, 8, 9), CPU) == (32, 3, 8, 9)
    assert representative((5, 3, 8, 9), CPU) == (8, 3, 8, 9)
    assert representative((1, 3, 8, 9), CPU) == (1, 3, 8, 9)
    assert representative((1, 3, 1, 100), CPU) == (1, 3, 1, 128)
    assert representative((50, 3, 8, 9), torch.device("cuda")) == (50, 3, 8, 9)


def test_what_has_no_values_is_not_measured(monkeypatch):
    measured = _count(monkeypatch)
    shapes = ShapeEnv(allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes):
        _layer()(torch.randn(4, 8, 6, 6))
    small_meta = small_network().to("meta")
    swat_ext.sparsify_(small_meta, SWATConfig(sparsity=0.9))
    small_meta(torch.empty(4, 3, 8, 8, device="meta"))
    _layer()(torch.randn(0, 8, 6, 6))
    torch.compile(_layer(), backend="eager", fullgraph=True)(torch.randn(4, 8, 6, 6))
    assert measured == []
