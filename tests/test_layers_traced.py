"""The layers around the convolutions under torch.compile, torch.fx and torch.jit."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from swat_ext import SWATBatchNorm2d, SWATConfig, SWATLayer, sparsify_
from swat_ext.modules.around import become_around, has_around_form
from swat_ext.modules.lean import LeanLayer

pytestmark = pytest.mark.usefixtures("fresh_compiler")


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True)),
    "MaxPool2d": lambda: nn.MaxPool2d(3, 2, 1),
    "AvgPool2d": lambda: nn.AvgPool2d(3, 2, 1),
    "BatchNorm2d": lambda: nn.BatchNorm2d(6),
    "BatchNorm2d of an average": lambda: nn.BatchNorm2d(6, momentum=None),
    "BatchNorm2d without affine": lambda: nn.BatchNorm2d(6, affine=False),
    "all of them": lambda: nn.Sequential(
        nn.Conv2d(6, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.AvgPool2d(2)
    ),
}

SAVED = {"BatchNorm2d": "bf16", "all of them": "int8"}


def _lean(name: str, saved: str = "exact") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name]())
    for module in list(model.modules()):
        if has_around_form(module):
            become_around(module, saved)
    assert any(isinstance(module, LeanLayer) for module in model.modules())
    return model


def _step(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(x)
    leaves = [x, *parameters]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_it_is_one_graph_that_computes_the_same(name: str, backend: str) -> None:
    eager = _lean(name, SAVED.get(name, "exact"))
    model = copy.deepcopy(eager)
    fast = torch.compile(model, fullgraph=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(0)
    # The second batch size makes a graph for all.
    for batch, graphs in [(2, 1), (2, 1), (3, 2), (5, 2), (2, 2)]:
        x = torch.randn(batch, 6, 9, 10, generator=generator).to(memory_format=torch.channels_last)
        found = _step(fast, list(model.parameters()), x)
        for got, expected in zip(found, _step(eager, list(eager.parameters()), x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert got.stride() == expected.stride()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for mine, other in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


# --- torch.fx and torch.jit -------------------------------------------------------------------------------------------


def _without_warnings(call: Callable[..., nn.Module], *arguments: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return call(*arguments)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if "average" not in name])  # a trace keeps its first factor
def test_traced_and_scripted_it_computes_the_same(name: str, training: bool) -> None:
    x = torch.randn(2, 6, 9, 10, generator=torch.Generator().manual_seed(0))
    for make in (
        fx.symbolic_trace,
        lambda model: _without_warnings(torch.jit.script, model),
        lambda model: _without_warnings(torch.jit.trace, model, x.clone().requires_grad_()),
    ):
        eager = _lean(name).train(training)
        made = make(copy.deepcopy(eager))
        made.load_state_dict(eager.state_dict())  # a trace runs once
        for got, expected in zip(
            _step(made, list(made.parameters()), x), _step(eager, list(eager.parameters()), x), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for mine, other in zip(made.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(mine, other)


def test_a_scripted_layer_shares_parameters_and_leaves_the_layer() -> None:
    layer = SWATBatchNorm2d(3, saved="int8")
    scripted = _without_warnings(torch.jit.script, layer)
    assert scripted.weight is layer.weight
    assert type(layer) is SWATBatchNorm2d
    assert layer.saved == "int8"


def test_a_tracer_that_takes_sparse_layers_for_leaves_keeps_the_norms() -> None:
    """As the sparse layers advise."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, SWATLayer) or super().is_leaf_module(module, name)

    torch.manual_seed(0)
    model = LAYERS["all of them"]()
    sparsify_(model, SWATConfig(0.5, skip=()))
    x = torch.randn(2, 6, 9, 10)
    traced = fx.GraphModule(model, Tracer().trace(model))
    assert type(traced.get_submodule("1")) is SWATBatchNorm2d
    torch.testing.assert_close(traced(x), model(x))
