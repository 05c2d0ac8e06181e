"""Under torch.compile a sparse model is one graph and takes the very steps that it takes without."""

import copy

import pytest
import torch
from networks import assert_same_state, batches, sgd, sparse_layers, sparse_network, train
from torch import nn

import swat_ext
from swat_ext.models.resnet import resnet18

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


def graphs() -> int:
    """Graphs compiled since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_steps_compile_nothing_anew(backend):
    torch._dynamo.utils.counters.clear()
    eager, model = sparse_network(), sparse_network()
    first, second = sgd(eager), sgd(model)
    fast = compiled(model, backend)
    for number in range(8):
        data = batches(1, first=number)
        mine, other = train(model, second, data, forward=fast)[0], train(eager, first, data)[0]
        torch.testing.assert_close(mine, other)
    assert graphs() == 1
    # Selected at the forwards after 0 and 4 steps, activations after 0, 3 and 6.
    for mine, other in zip(sparse_layers(model), sparse_layers(eager), strict=True):
        assert mine.steps == other.steps == 8
        assert mine.steps_since_selection == other.steps_since_selection == (4, 2)
    for number, size in enumerate((6, 3, 5, 7), start=8):
        data = batches(1, first=number, size=size)
        mine, other = train(model, second, data, forward=fast)[0], train(eager, first, data)[0]
        torch.testing.assert_close(mine, other)
    assert graphs() == 2  # the second for any batch size


@pytest.mark.slow
def test_resnet18_is_one_graph_under_inductor():
    torch.manual_seed(0)
    eager = resnet18(10, width=0.125).to(memory_format=torch.channels_last)
    swat_ext.sparsify_(eager, swat_ext.SWATConfig(sparsity=0.9, topk_period=3, weight_topk_period=2, batchnorm="int8"))
    model = copy.deepcopy(eager)
    first, second = sgd(eager), sgd(model)
    torch._dynamo.utils.counters.clear()
    fast = compiled(model, "inductor")
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        data = [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4))]
        data = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
        mine, other = train(model, second, data, forward=fast)[0], train(eager, first, data)[0]
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert graphs() == 1


@pytest.mark.parametrize("scheduled", [False, True])
def test_training_and_evaluation_are_those_of_eager(scheduled):
    eager, model = sparse_network(), sparse_network()
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
    eager, model = sparse_network(), sparse_network()
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


def test_whoever_reads_what_a_relu_changed_in_place_sees_it_changed():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = swat_ext.SWATReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = x * 2
            return self.relu(hidden) + hidden

    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    for model in (Reads(), compiled(Reads())):
        output = model(x)
        assert output.tolist() == [0.0, 8.0]
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert grad.tolist() == [0.0, 4.0]
