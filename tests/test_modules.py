"""The sparse layers alone: what they compute, save, refuse, and what their own count of steps decides."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from networks import assert_same_state, batches, sgd, small_network, sparse_layers, sparse_network, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import swat_ext
from swat_ext import SWATConv2d, SWATLinear, functional, reference
from swat_ext.modules.conv import pad_by_index

PADDINGS = [
    ("zeros", 1),
    ("zeros", "same"),
    ("zeros", "valid"),
    ("reflect", (2, 1)),
    ("replicate", 2),
    ("circular", "same"),
]


def exact_threshold(tensor: torch.Tensor, sparsity: float) -> torch.Tensor:
    return reference.kth_magnitude(tensor, functional.keep_count(tensor.numel(), sparsity))


def expected(layer: SWATConv2d, x: torch.Tensor) -> torch.Tensor:
    """The oracle's output for a layer that selects now."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return reference.conv2d(
        x,
        layer.weight,
        layer.bias,
        layer.stride,
        padding,
        layer.dilation,
        layer.groups,
        weight_threshold=exact_threshold(layer.weight.detach(), layer.sparsity),
        activation_threshold=exact_threshold(x.detach(), layer.activation_sparsity),
    )


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return list(torch.autograd.grad((output * weights).sum(), inputs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize(("mode", "padding"), PADDINGS)
@pytest.mark.parametrize("unbatched", [False, True])
def test_convolution_agrees_with_the_reference(mode, padding, backend, unbatched, training, generator):
    layer = SWATConv2d(
        4, 6, (3, 4), padding=padding, padding_mode=mode, groups=2, dtype=torch.float64, sparsity=0.7, backend=backend
    )
    layer.train(training)
    x = torch.randn(3, 4, 7, 8, generator=generator, dtype=torch.float64)
    x = (x[0] if unbatched else x).requires_grad_()
    actual, wanted = layer(x), expected(layer, x)
    torch.testing.assert_close(actual, wanted)
    inputs = (x, layer.weight, layer.bias)
    for mine, other in zip(gradients(actual, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_linear_agrees_with_the_reference(shape, backend, generator):
    layer = SWATLinear(12, 7, dtype=torch.float64, sparsity=0.5, activation_sparsity=0.25, backend=backend)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    threshold = exact_threshold(x.detach(), 0.25) if x.numel() else 0.0
    wanted = reference.linear(
        x,
        layer.weight,
        layer.bias,
        weight_threshold=exact_threshold(layer.weight.detach(), 0.5),
        activation_threshold=threshold,
    )
    actual = layer(x)
    torch.testing.assert_close(actual, wanted)
    inputs = (x, layer.weight, layer.bias)
    for mine, other in zip(gradients(actual, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [[0, 0, 0, 0], [2, 1, 0, 3], [4, 4, 4, 4]])
def test_padding_by_index_is_that_of_pytorch(mode, padding, generator):
    x = torch.randn(2, 3, 5, 6, generator=generator, requires_grad=True)
    mine, theirs = pad_by_index(x, padding, mode), nn.functional.pad(x, padding, mode=mode)
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(gradients(mine, x), gradients(theirs, x))


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_an_input_too_small_to_pad_is_refused(mode):
    layer = SWATConv2d(1, 1, 3, padding=4, padding_mode=mode, sparsity=0.5)
    with pytest.raises(ValueError, match=r"^input: expected a width of at least \d for padding \(4, 4\)"):
        layer(torch.randn(1, 1, 9, 3))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_zero_sparsity_is_the_dense_layer(memory_format, generator):
    dense = nn.Conv2d(3, 4, 3).double()
    sparse = SWATConv2d.from_dense(dense, sparsity=0.0).to(memory_format=memory_format)
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64).to(memory_format=memory_format)
    torch.testing.assert_close(sparse(x), dense(x))


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 3, 12)])
def test_what_a_layer_returns_may_be_changed_in_place(backend, shape, generator):
    """As the classifiers of VGG and AlexNet do."""
    torch.manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    layer = SWATLinear(12, 7, sparsity=0.5, backend=backend)
    outputs = [nn.functional.relu(layer(x), inplace=inplace) for inplace in (True, False)]
    assert not layer(x)._is_view()
    found = [gradients(output, x, layer.weight, layer.bias) for output in outputs]
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)
    image = torch.randn(2, 4, 5, 5, generator=generator)
    conv = SWATConv2d(4, 4, 3, sparsity=0.5, backend=backend)
    nn.functional.relu_(conv(image)).sum().backward()
    assert conv.weight.grad is not None


# --- What is saved ----------------------------------------------------------------------------------------------------


def saved_tensors(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What ``layer`` saves beside its parameters, which are there anyway."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    return [tensor for tensor in saved if tensor.data_ptr() not in parameters]


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_only_packed_tensors_are_saved(backend, generator):
    layer = SWATConv2d(8, 16, 3, padding=1, sparsity=0.9, backend=backend)
    x = torch.randn(4, 8, 10, 10, generator=generator, requires_grad=True)
    saved = saved_tensors(layer, x)
    weight = functional.compress(layer.weight, exact_threshold(layer.weight, 0.9))
    input = functional.compress(x, exact_threshold(x, 0.9))
    wanted = [weight.mask, input.values, input.mask]
    assert len(saved) == len(wanted)
    for mine, other in zip(saved, wanted, strict=True):
        assert torch.equal(mine, other)
    assert sum(tensor.nbytes for tensor in saved) < 0.2 * (x.nbytes + layer.weight.nbytes)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_save_no_dense_input(mode, generator):
    layer = SWATConv2d(8, 16, 3, padding=1, padding_mode=mode, sparsity=0.9)
    x = torch.randn(4, 8, 10, 10, generator=generator, requires_grad=True)
    assert sum(tensor.nbytes for tensor in saved_tensors(layer, x)) < 0.4 * x.nbytes


def test_a_linear_layer_saves_only_packed_tensors(generator):
    layer = SWATLinear(256, 64, sparsity=0.9)
    x = torch.randn(128, 256, generator=generator, requires_grad=True)
    assert sum(tensor.nbytes for tensor in saved_tensors(layer, x)) < 0.2 * (x.nbytes + layer.weight.nbytes)


@pytest.mark.parametrize("make", [lambda: SWATConv2d(4, 4, 3, sparsity=0.9), lambda: SWATLinear(6, 4, sparsity=0.9)])
def test_the_dense_input_is_freed_after_forward(make):
    layer = make()
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    hidden = x * 2
    storage = weakref.ref(hidden)
    output = layer(hidden)
    del hidden
    gc.collect()
    # A multiplication by a number saves nothing, so the layer alone could hold its output.
    assert storage() is None
    output.sum().backward()
    assert x.grad is not None


def test_nothing_is_saved_without_gradients():
    layer = SWATConv2d(3, 4, 3, sparsity=0.5)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        assert saved_tensors(layer, x) == []
    assert not layer(x.requires_grad_(False)).detach().requires_grad


def test_a_frozen_weight_saves_no_activation_and_passes_the_gradient_on(generator):
    layer = SWATConv2d(3, 4, 3, dtype=torch.float64, sparsity=0.5)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert len(saved_tensors(layer, x)) <= 3  # the bits of the weight, and nothing of the size of x
    actual, wanted = layer(x), expected(layer, x)
    for mine, other in zip(gradients(actual, x, layer.bias), gradients(wanted, x, layer.bias), strict=True):
        torch.testing.assert_close(mine, other)
    layer(x).sum().backward()
    assert layer.weight.grad is None


def test_an_input_without_gradient_still_trains_the_weight(generator):
    layer = SWATConv2d(3, 4, 3, dtype=torch.float64, sparsity=0.5)
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(gradients(layer(x), layer.weight), gradients(expected(layer, x), layer.weight))


def test_second_derivatives_are_refused():
    layer = SWATConv2d(2, 2, 3, dtype=torch.float64, sparsity=0.5)
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


# --- Steps and selections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("periods", [(3, 3), (1, 3), (4, 2), (2, 1)])
def test_thresholds_are_selected_every_period_and_kept_in_between(periods):
    layer = SWATLinear(40, 10, sparsity=0.5, weight_topk_period=periods[0], topk_period=periods[1])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    seen = []
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        layer(torch.randn(6, 40, generator=generator)).square().sum().backward()
        seen.append((layer.steps, layer.weight_threshold.item(), layer.activation_threshold.item()))
        optimizer.step()
        optimizer.zero_grad()
    assert [steps for steps, _, _ in seen] == list(range(8))
    for index, period in enumerate(periods, start=1):
        thresholds = [entry[index] for entry in seen]
        groups = [set(thresholds[first : first + period]) for first in range(0, 8, period)]
        assert [len(group) for group in groups] == [1] * len(groups)
        assert len(set(thresholds)) == len(groups)


def test_a_new_period_counts_from_the_last_selection():
    layer = SWATLinear(40, 10, sparsity=0.5, weight_topk_period=100, topk_period=100)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    ages = []
    for step in range(6):
        if step == 2:
            layer.weight_topk_period = 4
        if step == 3:
            layer.topk_period = 3
        layer(torch.randn(6, 40)).sum().backward()
        ages.append(layer.steps_since_selection)
        optimizer.step()
    assert ages == [(0, 0), (1, 1), (2, 2), (3, 0), (0, 1), (1, 2)]


@pytest.mark.parametrize("scheduled", [False, True])
def test_accumulated_backwards_count_as_one_step(scheduled):
    model = sparse_network()
    optimizer = sgd(model)
    scheduler = swat_ext.SWATScheduler(model, optimizer) if scheduled else None
    train(model, optimizer, batches(12), accumulate=4)
    assert [layer.steps for layer in sparse_layers(model)] == [3] * 4
    assert scheduler is None or scheduler.steps == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant):
    plain, checkpointed = sparse_network(), sparse_network()

    def forward(x: torch.Tensor) -> torch.Tensor:
        hidden = checkpointed[:2](x)
        hidden = checkpoint(checkpointed[2:5], hidden, use_reentrant=reentrant)
        return checkpoint(checkpointed[5:], hidden, use_reentrant=reentrant)

    data = batches(10)
    mine = train(plain, sgd(plain), data, accumulate=2)
    other = train(checkpointed, sgd(checkpointed), data, forward=forward, accumulate=2)
    assert torch.equal(torch.stack(mine), torch.stack(other))
    assert_same_state(plain, checkpointed)


def test_evaluating_in_between_does_not_change_training():
    plain, evaluated = sparse_network(), sparse_network()
    first, second = sgd(plain), sgd(evaluated)
    for number in range(8):
        train(plain, first, batches(1, first=number))
        train(evaluated, second, batches(1, first=number))
        evaluated.eval()
        for size in (1, 7):
            with torch.no_grad():
                evaluated(batches(1, first=99, size=size)[0][0])
        evaluated(batches(1, first=98)[0][0])
        evaluated.train()
    assert_same_state(plain, evaluated)


def test_evaluation_selects_exactly_from_the_weight_alone():
    layer = SWATLinear(40, 10, bias=False, dtype=torch.float64, sparsity=0.75, topk_period=1000).eval()
    identity = torch.eye(40, dtype=torch.float64)
    for change in (lambda: None, lambda: layer.weight.mul_(-3), lambda: layer.weight.data.normal_()):
        with torch.no_grad():
            change()  # the last one goes past the version counter
            top = layer(identity).T
        assert int((top != 0).sum()) == 100
        wanted = torch.where(layer.weight.abs() >= exact_threshold(layer.weight, 0.75), layer.weight, 0)
        torch.testing.assert_close(top, wanted)


def test_evaluation_with_gradients_works(generator):
    layer = SWATConv2d(3, 4, 3, dtype=torch.float64, sparsity=0.5).eval()
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    for mine, other in zip(gradients(layer(x), *inputs), gradients(expected(layer, x), *inputs), strict=True):
        torch.testing.assert_close(mine, other)
    assert layer.activation_threshold.item() == 0


def test_dropped_weights_get_a_gradient():
    layer = SWATLinear(20, 10, sparsity=0.9, activation_sparsity=0.0)
    layer(torch.randn(30, 20)).square().sum().backward()
    assert int((layer.weight.grad != 0).sum()) > 150


def test_a_new_sparsity_takes_effect_at_once():
    layer = SWATLinear(100, 10, bias=False, sparsity=0.5)
    x = torch.eye(100)
    assert int((layer(x) != 0).sum()) == 500
    layer.sparsity = 0.9
    assert int((layer(x) != 0).sum()) == 100
    assert layer.activation_sparsity == 0.9
    layer.activation_sparsity = 0.25
    assert (layer.sparsity, layer.activation_sparsity) == (0.9, 0.25)
    for name, value in (
        ("sparsity", 1.0),
        ("activation_sparsity", -1),
        ("topk_period", 0),
        ("weight_topk_period", 0),
        ("backend", "fast"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            setattr(layer, name, value)


def test_nan_is_not_dropped():
    layer = SWATLinear(100, 10, sparsity=0.99)
    x = torch.full((2, 100), 1e-3)
    x[0, 0] = math.nan
    layer(x).sum().backward()
    assert layer.weight.grad[:, 0].isnan().all()
    with torch.no_grad():
        layer.weight[3, 4] = math.nan
    assert layer(torch.ones(1, 100))[0, 3].isnan()


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_an_empty_batch_passes(backend):
    layer = SWATConv2d(3, 4, 3, sparsity=0.5, backend=backend)
    output = layer(torch.randn(0, 3, 6, 6))
    assert output.shape == (0, 4, 4, 4)
    output.sum().backward()
    assert not layer.weight.grad.any()
    assert layer.eval()(torch.randn(0, 3, 6, 6)).shape == (0, 4, 4, 4)


# --- Copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_trains_on_the_same(duplicate):
    model = sparse_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, batches(4))
    twin = duplicate(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    assert [layer.steps for layer in sparse_layers(twin)] == [4] * 4
    train(model, optimizer, batches(7, first=4))
    train(twin, twin_optimizer, batches(7, first=4))
    assert_same_state(model, twin)
    assert [layer.steps for layer in sparse_layers(twin)] == [11] * 4


def test_a_copy_does_not_share_its_clock():
    model = sparse_network()
    twin = copy.deepcopy(model)
    train(twin, sgd(twin), batches(5))
    assert [layer.steps for layer in sparse_layers(model)] == [0] * 4


def test_an_averaged_model_evaluates_the_average():
    model = sparse_network()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    ).eval()
    optimizer = sgd(model)
    untouched = sparse_network()
    train(untouched, sgd(untouched), batches(6))
    x = batches(1, first=50)[0][0]
    for number in range(6):
        train(model, optimizer, batches(1, first=number))
        averaged.update_parameters(model)
        with torch.no_grad():
            average = averaged(x)
        fresh = sparse_network()
        fresh.load_state_dict(averaged.module.state_dict())
        with torch.no_grad():
            assert torch.equal(average, fresh.eval()(x))
    assert_same_state(model, untouched)


def test_changing_dtype_and_device_keeps_the_count():
    model = sparse_network()
    optimizer = sgd(model)
    train(model, optimizer, batches(4))
    model.double()
    assert [layer.steps for layer in sparse_layers(model)] == [4] * 4
    assert all(layer.weight_threshold.dtype == torch.float64 for layer in sparse_layers(model))
    assert model(batches(1, dtype=torch.float64)[0][0]).dtype == torch.float64
    assert [layer.steps for layer in sparse_layers(model)] == [4] * 4


def test_loading_weights_is_not_a_step():
    model, other = sparse_network(), sparse_network(seed=1)
    train(model, sgd(model), batches(2))
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert [layer.steps for layer in sparse_layers(model)] == [2] * 4
    x, _ = batches(1)[0]
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_a_weight_replaced_in_evaluation_is_refused():
    """Folding a BatchNorm into a layer scales its weight, and other elements would be the largest."""
    conv, norm = SWATConv2d(3, 4, 3, sparsity=0.5).eval(), nn.BatchNorm2d(4).eval()
    with pytest.raises(RuntimeError, match=r"^weight: .* fuse swat_ext\.to_dense\(model\)"):
        nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    linear, norm = SWATLinear(3, 4, sparsity=0.5).eval(), nn.BatchNorm1d(4).eval()
    with pytest.raises(RuntimeError, match=r"^weight: .*"):
        nn.utils.fusion.fuse_linear_bn_eval(linear, norm)
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv.to_dense(), nn.BatchNorm2d(4).eval())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fused(x), nn.BatchNorm2d(4).eval()(conv(x)))


# --- Conversion of one layer, and its description ---------------------------------------------------------------------


def test_from_dense_shares_the_parameters_and_keeps_the_rest():
    dense = nn.Conv2d(3, 4, 3, padding=1, bias=False).eval()
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    sparse = SWATConv2d.from_dense(
        dense, sparsity=0.5, activation_sparsity=0.25, topk_period=4, weight_topk_period=2, backend="dense"
    )
    assert type(dense) is nn.Conv2d
    assert "_weights" not in vars(dense)
    assert sparse.weight is dense.weight
    assert sparse.bias is None
    assert not sparse.training
    assert (sparse.sparsity, sparse.activation_sparsity, sparse.backend) == (0.5, 0.25, "dense")
    assert (sparse.topk_period, sparse.weight_topk_period) == (4, 2)
    sparse(torch.randn(1, 3, 4, 4))
    assert calls == [1]
    sparse.register_forward_hook(lambda *_: calls.append(2))
    dense(torch.randn(1, 3, 4, 4))
    assert calls == [1, 1]


def test_to_dense_of_a_layer_is_its_own_and_computes_the_evaluation():
    layer = SWATConv2d(3, 4, 3, sparsity=0.5)
    dense = layer.to_dense()
    assert type(dense) is nn.Conv2d
    assert vars(dense).keys() == vars(nn.Conv2d(3, 4, 3)).keys()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(dense(x), layer.eval()(x))
    assert int((dense.weight == 0).sum()) == 54
    assert dense.bias is not layer.bias
    assert not (layer.weight == 0).any()


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv1d(3, 4, 3), SWATConv2d(3, 4, 3, sparsity=0.5)])
def test_from_dense_refuses_other_classes(layer):
    with pytest.raises(TypeError, match=rf"^layer: expected exactly nn\.Conv2d, got {type(layer).__name__}$"):
        SWATConv2d.from_dense(layer, sparsity=0.5)


def test_state_dict_is_that_of_the_dense_layer():
    layer = SWATConv2d(3, 4, 3, sparsity=0.5)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not dict(layer.named_buffers())  # nothing that a wrapper would broadcast or average


def test_repr_says_the_sparsities():
    assert repr(SWATLinear(3, 4, sparsity=0.5)).endswith("out_features=4, bias=True, sparsity=0.5)")
    text = repr(SWATConv2d(3, 4, 3, sparsity=0.9, activation_sparsity=0.75))
    assert text.endswith("sparsity=0.9, activation_sparsity=0.75)")


@pytest.mark.parametrize("method", ["swat", "static"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "rigl"), ("granularity", "kernel"), ("granularity", "unstructured"), ("block_size", (4, 4))],
)
def test_what_a_layer_is_made_of_is_read_only(method, name, value):
    layers = [SWATLinear(8, 8, sparsity=0.5, method=method), SWATConv2d(8, 8, 3, sparsity=0.5, method=method)]
    for layer in layers:
        before = getattr(layer, name)
        with pytest.raises(AttributeError, match=f"'{name}' of '{type(layer).__name__}' object has no setter"):
            setattr(layer, name, value)
        assert getattr(layer, name) == before
    assert (layers[0].method, layers[0].granularity, layers[0].block_size) == (method, "unstructured", (8, 1))


def test_meta_layers_give_shapes_and_work_once_they_have_values():
    with torch.device("meta"):
        layer = SWATConv2d(3, 4, 3, sparsity=0.5)
    assert layer(torch.empty(2, 3, 6, 6, device="meta")).shape == (2, 4, 4, 4)
    layer.to_empty(device="cpu")
    source = SWATConv2d(3, 4, 3, sparsity=0.5)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), source(x))


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (SWATConv2d(3, 4, 3, sparsity=0.5), torch.randn(2, 5, 6, 6), ValueError, r"\[N, 3, H, W\] or \[3, H, W\], got"),
        (SWATConv2d(3, 4, 3, sparsity=0.5), torch.randn(6, 6), ValueError, r"got shape \(6, 6\)"),
        (SWATConv2d(3, 4, 3, sparsity=0.5), torch.randn(2, 3, 2, 6), ValueError, "height of at least 3"),
        (SWATLinear(3, 4, sparsity=0.5), torch.randn(2, 5), ValueError, r"\[\.\.\., 3\], got shape \(2, 5\)"),
        (SWATLinear(3, 4, sparsity=0.5), torch.randn(2, 3).double(), TypeError, "dtype torch.float32, that of weight"),
        (SWATLinear(3, 4, sparsity=0.5), [1.0, 2.0, 3.0], TypeError, "expected a Tensor, got list"),
        (SWATLinear(3, 4, sparsity=0.5), torch.randn(2, 3, device="meta"), ValueError, "expected device cpu"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(layer, x, error, message):
    with pytest.raises(
        error, match=f"^input: expected.*{message}" if not message.startswith("expected") else f"^input: {message}"
    ):
        layer(x)


def test_a_refused_input_leaves_the_thresholds_alone():
    layer = SWATConv2d(3, 4, 3, sparsity=0.5)
    with pytest.raises(ValueError, match=r"^input"):
        layer(torch.randn(2, 5, 6, 6))
    assert layer.steps == 0
    assert layer.weight_threshold.item() == 0


def test_other_dtypes_are_refused_by_name():
    layer = SWATLinear(3, 4, sparsity=0.5).to(torch.complex64)
    with pytest.raises(
        TypeError, match=r"^weight: expected dtype float32, float64, bfloat16 or float16, got torch.compl"
    ):
        layer(torch.randn(2, 3, dtype=torch.complex64))


@pytest.mark.parametrize("name", ["sparsity", "activation_sparsity"])
def test_constructors_check_their_settings(name):
    for make in (lambda **settings: SWATConv2d(3, 4, 3, **settings), lambda **settings: SWATLinear(3, 4, **settings)):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            make(**{"sparsity": 0.5, name: 1.5})


# --- Choice of kernels ------------------------------------------------------------------------------------------------


def test_backends_train_alike():
    final = []
    for backend in ("sparse", "dense"):
        model = sparse_network(backend=backend, dtype=torch.float64)
        train(model, sgd(model), batches(6, dtype=torch.float64))
        assert {layer.chosen_backend.backend for layer in sparse_layers(model)} == {backend}
        final.append(model)
    for mine, other in zip(final[0].parameters(), final[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_dense_network_is_not_what_the_sparse_one_computes():
    x, _ = batches(1)[0]
    assert not torch.allclose(small_network()(x), sparse_network()(x))
