"""Kernels, filters and blocks: which weights a layer keeps, and that it computes with those."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blockwise import GRANULARITIES, kept_of, sides_of, top
from checks import assert_close, assert_identical, in_double
from conftest import Kernels
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_same_state, batches, sgd, sparse_network, train
from resuming import assert_equal, assert_resumes, run_of
from torch import Tensor, nn

from swat_ext import SWATConfig, SWATConv2d, SWATLayer, SWATLinear, SWATScheduler, functional, sparsify_, to_dense
from swat_ext.ops import filters
from swat_ext.ops.packed import _take_by_place
from swat_ext.topology.blocks import block_norms, spread

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"in_channels": 6, "out_channels": 13, "kernel_size": 3, "padding": 1},
    "3x2, stride 2": {"in_channels": 5, "out_channels": 7, "kernel_size": (3, 2), "stride": 2, "bias": False},
    "1x1": {"in_channels": 11, "out_channels": 20, "kernel_size": 1},
    "3 groups": {"in_channels": 12, "out_channels": 18, "kernel_size": 3, "padding": 2, "dilation": 2, "groups": 3},
    "depthwise": {"in_channels": 9, "out_channels": 9, "kernel_size": 5, "groups": 9, "padding": 2},
    "one filter": {"in_channels": 4, "out_channels": 1, "kernel_size": (1, 5)},
}


def assert_computes(layer: SWATConv2d | SWATLinear, x: Tensor, kept: Tensor) -> None:
    """Output and all gradients in training, and the output in evaluation, with the weights that are ``kept``."""
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, SWATConv2d) else ()
    function = F.conv2d if isinstance(layer, SWATConv2d) else F.linear
    biases = [] if layer.bias is None else [layer.bias]
    weight, input, *bias = in_double(layer.weight.cpu(), x.cpu(), *(each.cpu() for each in biases))
    output = function(input, weight * kept, *(bias or [None]), *settings)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(output, [input, *bias], grad)
    # The gradient of every weight, from the largest inputs.
    dense = function(top(input.detach(), layer.activation_sparsity), weight, *(bias or [None]), *settings)
    wanted = (*wanted, torch.autograd.grad(dense, weight, grad)[0])

    x = x.detach().requires_grad_()
    got = layer.train()(x)
    assert_close(got.cpu(), output.detach(), "output")
    found = torch.autograd.grad(got, [x, *biases, layer.weight], grad.to(got))
    for name, mine, reference in zip(["input", *["bias"] * len(bias), "weight"], found, wanted, strict=True):
        assert_close(mine.cpu(), reference, f"gradient of the {name}")
    with torch.no_grad():
        assert_close(layer.eval()(x).cpu(), output.detach(), "output in evaluation")
    assert torch.equal(layer.to_dense().weight.cpu(), layer.weight.detach().cpu() * kept)
    layer.train()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convolution_keeps_the_largest_blocks(
    shape: str, granularity: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(len(shape))
    arguments = {**CONVOLUTIONS[shape], **GRANULARITIES[granularity]}
    for sparsity, layout, backend in (
        (0.0, torch.contiguous_format, "sparse"),
        (0.6, torch.channels_last, "sparse"),
        (0.6, torch.contiguous_format, "dense"),
        (0.93, torch.contiguous_format, "sparse"),
    ):
        layer = SWATConv2d(**arguments, sparsity=sparsity, activation_sparsity=0.4, backend=backend, dtype=dtype)
        layer.to(device=device, memory_format=layout)
        kept = kept_of(layer.weight, sparsity, *GRANULARITIES[granularity].values())
        x = torch.randn(3, layer.in_channels, 9, 8, dtype=dtype).to(device=device, memory_format=layout)
        assert_computes(layer, x, kept)
        if device.type == "cpu":
            assert layer.realised_sparsity == pytest.approx((1 - float(kept.double().mean()), 0.4), abs=1e-3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("size", [(13, 21), (1, 30), (16, 2), (40, 1)])
def test_a_linear_layer_has_blocks_but_no_kernels(
    size: tuple[int, int], granularity: str, device: torch.device
) -> None:
    torch.manual_seed(sum(size))
    for sparsity in (0.0, 0.7, 0.95):
        layer = SWATLinear(size[1], size[0], sparsity=sparsity, activation_sparsity=0.3, **GRANULARITIES[granularity])
        kept = kept_of(layer.weight, sparsity, *GRANULARITIES[granularity].values())
        assert_computes(layer.to(device), torch.randn(5, 4, size[1]).to(device), kept)


@given(
    size=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
    ),
    granularity=st.sampled_from(["kernel", "filter", "block"]),
    block_size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.9, 0.99]),
    values=st.sampled_from(["normal", "ties", "zeros", "nan", "inf"]),
)
def test_any_weight(
    size: tuple[int, ...], granularity: str, block_size: tuple[int, int], sparsity: float, values: str
) -> None:
    """Ties are kept together, what is not finite always; a block of zeros is one like others."""
    generator = torch.Generator().manual_seed(sum(size))
    weight = torch.randn(size, generator=generator, dtype=torch.float64)
    if values == "ties":
        weight = weight.round().clamp(-1, 1)
    elif values == "zeros":
        weight = weight * (torch.rand(size[0], generator=generator) < 0.3).view(-1, *[1] * (len(size) - 1))
    elif values != "normal":
        weight[torch.rand(size, generator=generator) < 0.03] = torch.nan if values == "nan" else -torch.inf
    kept = kept_of(weight, sparsity, granularity, block_size)
    pattern = functional.pattern(weight, sparsity, granularity, block_size)
    assert torch.equal(pattern.dense(), kept)
    assert (pattern.kept, pattern.size) == (int(kept.sum()), weight.shape)
    expected = torch.where(kept, weight, 0)
    torch.testing.assert_close(functional.decompress(functional.pack(weight, pattern)), expected, equal_nan=True)
    options = {"sparsity": sparsity, "granularity": granularity, "block_size": block_size}
    layer: SWATLayer = SWATLinear(size[1], size[0], **options)
    if len(size) == 4:
        layer = SWATConv2d(size[1], size[0], (size[2], size[3]), **options)
    layer.to(torch.float64).weight = nn.Parameter(weight)
    torch.testing.assert_close(layer.to_dense().weight.detach(), expected, equal_nan=True)
    for training in (True, False):
        with torch.no_grad():  # what its forward multiplies by
            packed = layer.train(training)._select_weight()
        torch.testing.assert_close(functional.decompress(packed), expected, equal_nan=True)


@pytest.mark.parametrize(("blocks", "sparsity", "kept"), [(20, 0.9, 2), (20, 0.91, 2), (21, 0.9, 3), (7, 0.99, 1)])
def test_the_budget_is_rounded_up(blocks: int, sparsity: float, kept: int) -> None:
    layer = SWATConv2d(1, blocks, 3, bias=False, sparsity=sparsity, granularity="filter")
    x = torch.randn(2, 1, 3, 3)
    assert int((layer(x)[0] != 0).sum()) == kept
    assert int((layer.eval()(x)[0] != 0).sum()) == kept


def test_a_threshold_of_norms_is_reused() -> None:
    """Between selections the kernels whose norm reaches the old threshold are kept, as many as those are."""
    torch.manual_seed(0)
    layer = SWATConv2d(16, 32, 3, bias=False, sparsity=0.5, granularity="kernel", weight_topk_period=3)
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    x, threshold, counts = torch.randn(2, 16, 5, 5), torch.tensor(0.0), set()
    for step in range(6):
        norms = layer.weight.detach().double().abs().sum((2, 3))
        if step % 3 == 0:
            threshold = norms.flatten().sort(descending=True).values[255]
        # The layer's threshold is in float32.
        kept = norms >= threshold - 1e-6
        counts.add(int(kept.sum()))
        assert 0.8 * 256 < int(kept.sum()) < 1.25 * 256
        assert layer(x).allclose(F.conv2d(x, layer.weight * kept[:, :, None, None]), atol=1e-5)
        assert layer.realised_sparsity[0] == 1 - int(kept.sum()) / 512
        layer.weight.grad = torch.randn_like(layer.weight) * 2e-3
        optimizer.step()
    assert len(counts) > 2
    before = layer.realised_sparsity
    layer.eval()(x)
    assert layer.realised_sparsity == before  # of the last training forward


def test_a_new_budget_is_of_blocks() -> None:
    layer = SWATConv2d(4, 10, 3, sparsity=0.5, granularity="filter")
    for sparsity in (0.5, 0.8, 0.1):
        layer.sparsity = sparsity
        assert_computes(layer, torch.randn(2, 4, 6, 6), kept_of(layer.weight, sparsity, "filter"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"granularity": "channel"}, ValueError, "^granularity: expected one of"),
        ({"granularity": "block", "block_size": (8, 0)}, ValueError, "^block_size: expected"),
        ({"granularity": "block", "block_size": "81"}, TypeError, "^block_size: expected"),
        ({"granularity": "block", "block_size": (True, 1)}, TypeError, "^block_size: expected"),
        ({"granularity": "block", "block_size": (8,)}, TypeError, "^block_size: expected"),
    ],
)
def test_wrong_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (
        lambda: SWATConfig(0.5, **options),
        lambda: SWATLinear(3, 3, sparsity=0.5, **options),
        lambda: SWATConv2d.from_dense(nn.Conv2d(3, 3, 3), sparsity=0.5, **options),
    ):
        with pytest.raises(error, match=message):
            make()


# --- Elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["mos", "som"])
@pytest.mark.parametrize("granularity", ["kernel", "filter", "block 3x2"])
def test_resuming_is_exact(tmp_path: Path, granularity: str, order: str) -> None:
    options: dict[str, Any] = {"weight_topk_period": 4, "sparsity": 0.6, **GRANULARITIES[granularity]}
    assert_resumes(lambda seed: run_of(seed, **options), order, 5, tmp_path / "state.pt")


def test_a_state_of_other_blocks_is_refused() -> None:
    model, other = (sparse_network(granularity="block", block_size=size) for size in ((8, 1), (4, 1)))
    state = SWATScheduler(model, sgd(model)).state_dict()
    with pytest.raises(
        ValueError, match=r"topology: expected 'swat, block 4x1, uniform', got 'swat, block 8x1, uniform'"
    ):
        SWATScheduler(other, sgd(other)).load_state_dict(state)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("granularity", ["kernel", "filter", "block 5x3"])
def test_compiled_steps_are_those_of_eager(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole filters have PyTorch's kernels in eager mode and this library's in a graph: here both have the latter.
    monkeypatch.setattr(filters, "kept_filters", lambda *arguments: None)
    torch.manual_seed(0)
    # Without a bias: the many equal outputs of a dropped filter would be ties, of which a graph keeps as have room.
    eager = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 36, 5))
    config = SWATConfig(
        0.6, skip=(), topk_period=2, weight_topk_period=2, backend="sparse", **GRANULARITIES[granularity]
    )
    sparsify_(eager, config)
    model = copy.deepcopy(eager)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    data = batches(5)
    assert_equal(train(eager, sgd(eager), data), train(model, sgd(model), data, forward=fast))
    assert_same_state(eager, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        assert torch.equal(eager.eval()(data[0][0]), fast.eval()(data[0][0]))


@pytest.mark.usefixtures("restore_threads")
def test_threads_change_nothing() -> None:
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        layer = SWATConv2d(33, 70, 3, padding=1, sparsity=0.7, granularity="block", block_size=(4, 2), backend="sparse")
        output = layer(torch.randn(4, 33, 17, 15))
        output.square().sum().backward()
        results.append([output.detach(), layer.weight.grad, layer.to_dense().weight.detach()])
    for name, mine, other in zip(("output", "gradient", "kept"), *results, strict=True):
        assert_identical(mine, other, name)


def test_shared_weights_stay_shared_in_dense_form() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].weight = model[0].weight
    sparsify_(model, SWATConfig(0.5, granularity="block", block_size=(3, 2)))
    dense = to_dense(model)
    assert dense[0].weight is dense[1].weight
    assert torch.equal(dense[0].weight, model[0].weight * kept_of(model[0].weight, 0.5, "block", (3, 2)))


@pytest.mark.parametrize("granularity", ["kernel", "filter", "block 8x1", "block 3x2"])
def test_cuda_operators_make_the_same_of_blocks(
    kernels: Kernels, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As topology/weights.py composes them, with a room as on a GPU: select norms, spread what is kept, compress."""
    generator = torch.Generator().manual_seed(0)
    options = GRANULARITIES[granularity]
    weight = torch.randn(13, 6, 3, 3, generator=generator)
    sides = sides_of((13, 6, 3, 3), *options.values())
    block = tuple(min(pair) for pair in zip(sides, weight.shape, strict=True))
    kept = kept_of(weight, 0.6, *options.values())
    x = torch.randn(2, 6, 5, 5, generator=generator)
    on_device = weight.to(kernels.device)
    norms = block_norms(on_device, block)
    threshold = torch.zeros((), device=kernels.device)
    state = torch.tensor([0, -1, 1, 2, 5])
    values, mask = kernels.ops.select(norms, threshold, state, norms.numel())
    assert values.shape == (norms.numel(),)
    grid = kernels.ops.decompress(values, mask, norms.shape, False) != 0
    room = min(values.shape[0] * math.prod(block), weight.numel())
    masked = on_device * spread(grid.float(), weight.shape, block)
    packed = kernels.ops.compress(masked, torch.zeros((), device=kernels.device), room=room)
    dense = kernels.ops.decompress(*packed, weight.shape, False)
    assert torch.equal(dense.cpu(), weight * kept)
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    output = kernels.ops.conv2d(x.to(kernels.device), *packed, weight.shape, None, *geometry, False)
    assert_close(output.cpu(), F.conv2d(x.double(), (weight * kept).double()), "output")
    # A pattern, and the elements taken by it.
    pattern = functional.pattern(weight, 0.6, **options)
    mask = pattern.mask.to(kernels.device)
    monkeypatch.setattr(torch.ops, "swat_ext", kernels.ops)
    for tensor in (on_device, on_device.contiguous(memory_format=torch.channels_last)):
        taken = _take_by_place(tensor, mask, pattern.kept)
        assert_identical(taken.cpu(), weight[kept], "taken")
        again = kernels.ops.decompress(taken, mask, weight.shape, True)
        assert torch.equal(again.cpu(), weight * kept)
    longer = _take_by_place(on_device, mask, pattern.kept + 5)
    assert torch.equal(longer.cpu(), torch.cat((weight[kept], torch.zeros(5))))
