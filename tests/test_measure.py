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
from swat_ext.modules import choices, measure
from swat_ext.modules.choices import MOST_MEASUREMENTS
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

    def counted(layer, problem, dtype, device):
        measured.append(problem)
        return dict(times) if times else real(layer, problem, dtype, device)

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
    backend, reason, speedup = layer.chosen_backend
    assert backend in ("sparse", "dense")
    assert reason.startswith("measured: ")
    assert speedup > 0
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
    times = {"sparse": 3.0, "dense": 3.0, "pytorch": 0.75, faster: 1.5}
    _count(monkeypatch, times)
    model = sparse_network()
    train(model, sgd(model), batches(1))
    wanted = (
        f"measured: sparse {times['sparse']:.2f} ms, dense kernels {times['dense']:.2f} ms, "
        "PyTorch's dense layer 0.75 ms: 0.5x as fast as dense"
    )
    for layer in sparse_layers(model):
        assert layer.chosen_backend == (faster, wanted, 0.5)
    text = str(swat_ext.report(model))
    assert wanted in text
    names = ", ".join(f"{name} (0.5x)" for name in ("3", "5", "7", "9"))
    assert f"Slower than PyTorch's dense layers: {names}; name them in SWATConfig.skip" in text


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_nothing_is_measured_when_a_backend_was_asked_for(monkeypatch, backend):
    measured = _count(monkeypatch)
    layer = _layer(backend=backend)
    layer(torch.randn(4, 8, 6, 6))
    assert measured == []
    assert layer.chosen_backend == (backend, "asked for", None)


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
    _count(monkeypatch, {"sparse": 3.0, "dense": 1.0, "pytorch": 1.0})
    layer = _layer()
    layer(torch.randn(4, 8, 6, 6)).sum().backward()
    torch.save(layer.selection_state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)

    monkeypatch.setattr(measure, "_known", {})  # another process, where the other one would win
    measured = _count(monkeypatch, {"sparse": 1.0, "dense": 3.0, "pytorch": 1.0})
    resumed = _layer()
    resumed.load_selection_state(state)
    resumed(torch.randn(4, 8, 6, 6)).sum().backward()
    assert measured == []
    assert resumed.chosen_backend == layer.chosen_backend
    del state["choices"]  # of an earlier version
    _layer().load_selection_state(state)


def test_batches_of_like_size_share_a_measurement():
    assert representative((50, 3, 8, 9), CPU) == representative((64, 3, 8, 10), CPU) == (32, 3, 8, 10)
    assert representative((5, 3, 8, 12), CPU) == (8, 3, 8, 12)
    assert representative((1, 3, 1, 1), CPU) == (1, 3, 1, 1)
    usual = (6, 7, 12, 14, 24, 28, 48, 56, 112, 224, *(2**power for power in range(12)))
    for size in usual:  # exactly as they are
        assert representative((1, 3, size, 2), CPU) == (1, 3, size, 2)
    for size in range(1, 2000):
        assert size <= representative((1, 3, size, 2), CPU)[2] <= max(size, 1.25 * size)
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


def test_a_measurement_is_of_whole_steps_and_of_the_dense_layer():
    """All three run for every problem, packing included, and nothing of them reaches the caller's hooks or modes."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        for layer, size in ((_layer(), (4, 8, 6, 6)), (SWATLinear(8, 16, sparsity=0.9), (4, 8))):
            saved.clear()
            layer(torch.randn(size, requires_grad=True))
            first = len(saved)
            assert layer.chosen_backend.speedup > 0
            saved.clear()
            layer(torch.randn(size, requires_grad=True))
            assert len(saved) == first > 0
    same = _layer(padding_mode="circular")
    asymmetric = SWATConv2d(8, 8, (2, 3), padding="same", sparsity=0.5, dtype=torch.float64)
    frozen = _layer()
    frozen.weight.requires_grad_(False)
    for layer in (same, asymmetric, frozen):
        layer(torch.randn(4, 8, 6, 6, dtype=layer.weight.dtype))
        assert layer.chosen_backend.speedup > 0
    with torch.inference_mode():
        _layer()(torch.randn(4, 8, 6, 6))


def test_packing_is_part_of_the_time(monkeypatch):
    packed = []
    real = measure.ops.select
    monkeypatch.setattr(measure.ops, "select", lambda *args: packed.append(args[0].shape) or real(*args))
    layer = _layer()
    geometry = ((1, 1), 1, (1, 1), 1)
    problem = measure.problem_of(torch.randn(2, 8, 6, 6), layer.weight, geometry, (1, 10), (1, 10), backward=True)
    steps = measure._steps(layer, problem, torch.float32, CPU)
    for name, count in (("sparse", 2), ("dense", 2), ("pytorch", 0)):
        packed.clear()
        with torch.enable_grad():
            steps[name]()
        assert len(packed) == count


def test_many_sizes_are_measured_a_few_times(monkeypatch):
    measured = _count(monkeypatch, {"sparse": 3.0, "dense": 1.0, "pytorch": 1.0})
    layer = _layer()
    for size in range(8, 60):
        layer(torch.randn(1, 8, size, 7)).sum().backward()
    assert len(measured) == MOST_MEASUREMENTS
    assert len(layer.selection_state()["choices"]) == MOST_MEASUREMENTS
    with torch.no_grad():
        layer.eval()(torch.randn(1, 8, 9, 7))  # another kind of step is measured for itself
    assert len(measured) == MOST_MEASUREMENTS + 1


def test_beyond_those_the_nearest_decides(monkeypatch):
    monkeypatch.setattr(choices, "MOST_MEASUREMENTS", 2)

    def by_size(layer, problem, dtype, device):
        large = problem.input_size[2] > 16
        return {"sparse": 1.0 + large, "dense": 2.0 - large, "pytorch": 1.0}

    monkeypatch.setattr(measure, "_measure", by_size)
    layer = _layer()
    for size, backend in ((4, "sparse"), (40, "dense"), (6, "sparse"), (30, "dense"), (100, "dense")):
        layer(torch.randn(1, 8, size, 8))
        assert layer.chosen_backend.backend == backend


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("cannot allocate 8 bytes for a result of size [2]"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_without_memory_to_measure_in_the_rule_stands(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(measure, "_measure", fail)
    layer = _layer()
    for _ in range(2):
        layer(torch.randn(4, 8, 6, 6)).sum().backward()
    assert layer.chosen_backend.reason == "skips 90% of the work (no memory to measure in)"
    monkeypatch.setattr(measure, "_measure", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        layer(torch.randn(4, 8, 6, 6))


def test_what_the_sparse_kernels_refuse_runs_on_the_others(monkeypatch):
    real = measure.ops.CONVOLUTIONS["sparse"]

    def refuse(*arguments):
        raise RuntimeError("stride: the weight gradient takes strides whose product is at most 255")

    monkeypatch.setitem(measure.ops.CONVOLUTIONS, "sparse", refuse)
    layer = _layer()
    layer(torch.randn(4, 8, 6, 6)).sum().backward()
    assert layer.chosen_backend.backend == "dense"
    assert "sparse kernels do not take it" in layer.chosen_backend.reason
    monkeypatch.setitem(measure.ops.CONVOLUTIONS, "sparse", real)
    wide = SWATConv2d(2, 16, 3, stride=20, sparsity=0.9)
    wide(torch.randn(1, 2, 45, 45)).sum().backward()
    assert wide.weight.grad is not None


@pytest.mark.parametrize("duplicate", ["pickle", "deepcopy"])
def test_a_copied_layer_can_be_checkpointed_in_a_new_process(monkeypatch, tmp_path, duplicate):
    layer = _layer()
    layer(torch.randn(4, 8, 6, 6)).sum().backward()
    if duplicate == "pickle":
        torch.save(layer, tmp_path / "layer.pt")
        copied = torch.load(tmp_path / "layer.pt", weights_only=False)
    else:
        copied = copy.deepcopy(layer)
    monkeypatch.setattr(measure, "_known", {})
    state = copied.selection_state()
    assert state["choices"] == layer.selection_state()["choices"]
    resumed = _layer()
    resumed.load_selection_state(state)
    assert resumed.selection_state()["choices"] == state["choices"]
    assert resumed.chosen_backend == layer.chosen_backend


def test_choices_without_a_speedup_are_of_an_earlier_version():
    layer = _layer()
    layer(torch.randn(4, 8, 6, 6)).sum().backward()
    state = layer.selection_state()
    state["choices"] = [
        (*choice[:2], "measured: 2.0x faster, sparse 1.00 ms, dense 2.00 ms") for choice in state["choices"]
    ]
    resumed = _layer()
    resumed.load_selection_state(state)
    assert resumed.chosen_backend.speedup is None
    resumed(torch.randn(4, 8, 6, 6))
    assert resumed.chosen_backend.reason.startswith("measured: 2.0x faster")
