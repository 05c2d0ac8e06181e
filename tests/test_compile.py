"""Under torch.compile a sparse model is one graph and takes the very steps that it takes without."""

from collections.abc import Iterator

import pytest
import torch
from networks import assert_same_state, batches, sgd, sparse_layers, sparse_network, train
from torch import nn

import swat_ext


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("scheduled", [False, True])
def test_training_and_evaluation_are_those_of_eager(scheduled):
    # Not "auto": it cannot measure what it only traces, and may choose differently.
    eager, model = sparse_network(backend="sparse"), sparse_network(backend="sparse")
    first, second = sgd(eager), sgd(model)
    if scheduled:
        swat_ext.SWATScheduler(eager, first)
        swat_ext.SWATScheduler(model, second)
    fast = compiled(model)
    for number in range(8):
        data = batches(1, first=number)
        assert torch.equal(train(eager, first, data)[0], train(model, second, data, forward=fast)[0])
        if number % 3 == 0:
            eager.eval(), model.eval()
            with torch.no_grad():
                assert torch.equal(eager(data[0][0]), fast(data[0][0]))
            eager.train(), model.train()
    assert_same_state(eager, model)
    for mine, other in zip(sparse_layers(model), sparse_layers(eager), strict=True):
        assert mine.steps == other.steps == 8
        assert torch.equal(mine.weight_threshold, other.weight_threshold)
        assert torch.equal(mine.activation_threshold, other.activation_threshold)


def test_another_batch_size_is_no_obstacle():
    # Not "auto": it cannot measure what it only traces, and may choose differently.
    eager, model = sparse_network(backend="sparse"), sparse_network(backend="sparse")
    first, second = sgd(eager), sgd(model)
    fast = compiled(model)
    for number, size in enumerate((4, 6, 3, 5)):
        data = batches(1, first=number, size=size)
        assert torch.equal(train(eager, first, data)[0], train(model, second, data, forward=fast)[0])
    assert_same_state(eager, model)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_every_backend_and_padding_mode_is_one_graph(mode, backend, generator):
    layer = swat_ext.SWATConv2d(3, 4, 3, padding=1, padding_mode=mode, sparsity=0.5, backend=backend)
    x = torch.randn(2, 3, 6, 6, generator=generator)
    eager = layer(x)
    eager.sum().backward()
    wanted, layer.weight.grad = layer.weight.grad, None
    output = compiled(layer)(x)
    output.sum().backward()
    assert torch.equal(output, eager)
    assert torch.equal(layer.weight.grad, wanted)


def test_a_new_sparsity_reaches_the_compiled_layer():
    layer = swat_ext.SWATLinear(100, 10, bias=False, sparsity=0.5)
    fast, x = compiled(layer), torch.eye(100)
    assert int((fast(x) != 0).sum()) == 500
    layer.sparsity = 0.9
    assert int((fast(x) != 0).sum()) == 100
