"""SWATBatchNorm2d as a layer, and what sparsify_ and to_dense do with the layers around the sparse ones."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from held import saved_bytes
from networks import batches, sgd, small_network, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swat_ext import (
    SWATAvgPool2d,
    SWATBatchNorm2d,
    SWATConfig,
    SWATConv2d,
    SWATMaxPool2d,
    SWATReLU,
    sparsify_,
    to_dense,
)

FORMS = ("exact", "bf16", "int8")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


def _pair(channels: int = 5, saved: str = "exact", **settings: Any) -> tuple[nn.BatchNorm2d, SWATBatchNorm2d]:
    torch.manual_seed(1)
    dense = nn.BatchNorm2d(channels, **settings)
    if dense.affine:
        nn.init.normal_(dense.weight)
        nn.init.normal_(dense.bias)
    ours = SWATBatchNorm2d(channels, saved=saved, **settings)
    ours.load_state_dict(dense.state_dict())
    return dense, ours


def _assert_same_buffers(ours: nn.Module, dense: nn.Module) -> None:
    mine, other = dict(ours.named_buffers()), dict(dense.named_buffers())
    assert mine.keys() == other.keys()
    for name, buffer in mine.items():
        assert buffer.dtype == other[name].dtype
        torch.testing.assert_close(buffer, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_training_run_is_that_of_batch_norm(settings: dict[str, Any], dtype: torch.dtype) -> None:
    dense, ours = (layer.to(dtype) for layer in _pair(**settings))
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(3, 5, 4, 6, generator=generator, dtype=dtype) * 2 + step
        if step % 2:
            x = x.to(memory_format=torch.channels_last)
        for layer in (dense, ours):
            layer.train(step != 3)
            layer.zero_grad()
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(leaf) for layer, leaf in zip((dense, ours), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        assert outputs[1].stride() == outputs[0].stride()
        for output in outputs:
            (output**3).sum().backward()
        leaves = zip((inputs[1], *ours.parameters()), (inputs[0], *dense.parameters()), strict=True)
        for mine, other in leaves:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
        _assert_same_buffers(ours, dense)


@pytest.mark.parametrize("saved", FORMS)
def test_outputs_and_statistics_do_not_depend_on_what_is_saved(saved: str) -> None:
    _, exact = _pair()
    _, ours = _pair(saved=saved)
    x = torch.randn(3, 5, 4, 6)
    assert torch.equal(ours(x.clone().requires_grad_()), exact(x))
    for mine, other in zip(ours.buffers(), exact.buffers(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("saved", "each"), [("exact", 4), ("bf16", 2), ("int8", 1)])
def test_bytes_held(saved: str, each: int, memory_format: torch.memory_format) -> None:
    _, layer = _pair(8, saved)
    x = torch.randn(4, 8, 16, 16).contiguous(memory_format=memory_format).requires_grad_()
    per_channel = 8 * (2 * 8 + 4 * (saved == "int8"))  # mean, invstd, scale
    assert saved_bytes(lambda: layer(x), exclude=layer.parameters()) == each * x.numel() + per_channel
    layer.requires_grad_(False)
    assert saved_bytes(lambda: layer(x.detach()), exclude=layer.parameters()) == 0


def _raised(call: Callable[[], object]) -> tuple[type[Exception], str] | None:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return type(error), str(error)
    return None


def test_what_is_wrong_is_wrong_as_in_pytorch() -> None:
    for size in [(0, 5, 3, 3), (1, 5, 1, 1), (2, 4, 3, 3), (2, 5, 3), (2, 5), (2, 5, 0, 3)]:
        dense, ours = _pair()
        x = torch.randn(size)
        assert _raised(lambda: ours(x)) == _raised(lambda: dense(x)), size  # noqa: B023
        _assert_same_buffers(ours, dense)


def test_saved_is_checked() -> None:
    layer = SWATBatchNorm2d(3, saved="bf16")
    with pytest.raises(ValueError, match=r"^saved: expected one of 'exact', 'bf16', 'int8', got 'int4'"):
        layer.saved = "int4"
    with pytest.raises(ValueError, match=r"^saved: expected"):
        SWATBatchNorm2d(3, saved="fp8")
    assert layer.saved == "bf16"
    assert repr(layer).endswith("saved='bf16')")


def test_other_dtypes_are_pytorchs() -> None:
    dense, ours = _pair(saved="int8")
    x = torch.randn(3, 5, 4, 4, dtype=torch.bfloat16)
    assert torch.equal(ours(x), dense(x))
    with torch.device("meta"):
        assert SWATBatchNorm2d(5)(torch.empty(3, 5, 4, 4)).shape == (3, 5, 4, 4)


@pytest.mark.parametrize("saved", FORMS)
def test_copies_and_pickles(saved: str) -> None:
    _, layer = _pair(saved=saved)
    x = torch.randn(3, 5, 4, 6)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert other.saved == saved
        assert list(other.state_dict()) == list(nn.BatchNorm2d(5).state_dict())
        results = []
        for each in (copy.deepcopy(layer), other):
            leaf = x.clone().requires_grad_()
            (each(leaf) ** 2).sum().backward()
            results.append(leaf.grad)
        assert torch.equal(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    _, layer = _pair(saved="bf16")
    x = torch.randn(3, 5, 4, 6)
    results = []
    for call in (layer, lambda leaf: checkpoint(layer, leaf, use_reentrant=use_reentrant)):
        leaf = x.clone().requires_grad_()
        (call(leaf) ** 3).sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_without_gradients_statistics_run_on() -> None:
    dense, ours = _pair(saved="int8")
    with torch.no_grad():
        x = torch.randn(3, 5, 4, 6)
        torch.testing.assert_close(ours(x), dense(x))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), dense(x))
    _assert_same_buffers(ours, dense)


def test_second_derivatives_are_refused() -> None:
    _, layer = _pair()
    x = torch.randn(3, 5, 4, 6, requires_grad=True)
    grad = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradcheck() -> None:
    layer = _pair()[1].double()
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: layer(v), (x, *layer.parameters()))


# --- sparsify_ and to_dense -------------------------------------------------------------------------------------------


class OwnNorm(nn.BatchNorm2d):
    pass


def _odd_model() -> nn.ModuleDict:
    patched = nn.ReLU()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "own": OwnNorm(4),
            "sync": nn.SyncBatchNorm(4),
            "one": nn.BatchNorm1d(4),
            "relu": nn.ReLU(True),
            "six": nn.ReLU6(),
            "pool": nn.MaxPool2d(2),
            "average": nn.AvgPool2d(2),
            "patched": patched,
        }
    )


@pytest.mark.parametrize("saved", FORMS)
def test_sparsify_takes_exactly_the_plain_ones(saved: str) -> None:
    model = _odd_model()
    buffers, parameters = [id(b) for b in model.buffers()], [id(p) for p in model.parameters()]
    result = sparsify_(model, SWATConfig(0.5, skip=(), batchnorm=saved))
    assert result.around == ("norm", "relu", "pool", "average")
    assert "4 around them" in str(result)
    classes = [SWATBatchNorm2d, SWATReLU, SWATMaxPool2d, SWATAvgPool2d]
    assert [type(model[name]) for name in ("norm", "relu", "pool", "average")] == classes
    assert type(model["conv"]) is SWATConv2d
    assert [type(model[name]) for name in ("own", "sync", "one")] == [OwnNorm, nn.SyncBatchNorm, nn.BatchNorm1d]
    assert [type(model[name]) for name in ("six", "patched")] == [nn.ReLU6, nn.ReLU]
    assert model["norm"].saved == saved
    assert model["relu"].inplace
    assert [id(b) for b in model.buffers() if b.dim() == 1 or b.dtype == torch.int64] == buffers
    assert [id(p) for p in model.parameters()] == parameters

    dense = to_dense(model)
    assert [type(module) for module in dense.values()] == [type(module) for module in _odd_model().values()]
    for mine, plain in zip(dense.values(), _odd_model().values(), strict=True):
        assert vars(mine).keys() == vars(plain).keys()
    assert type(model["norm"]) is SWATBatchNorm2d


def test_patterns_may_leave_them() -> None:
    model = _odd_model()
    result = sparsify_(model, SWATConfig(0.5, skip=["norm"]))
    assert (result.swapped, result.around, result.skipped) == (("conv",), ("relu", "pool", "average"), ())
    assert type(model["norm"]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="skip: pattern 'six' matches no layer"):
        sparsify_(_odd_model(), SWATConfig(0.5, skip=["six"]))


def test_a_shared_relu_is_named_once() -> None:
    relu = nn.ReLU()
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": relu, "c": relu})
    assert sparsify_(model, SWATConfig(0.5)).around == ("b",)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.ReLU(), "c": nn.ReLU()})
    assert sparsify_(model, SWATConfig(0.5, skip=["c"])).around == ("b",)


@pytest.mark.parametrize("saved", FORMS)
def test_a_network_trains_as_with_pytorchs_layers(saved: str) -> None:
    torch.manual_seed(0)
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    sparsify_(ours, SWATConfig(0.8, batchnorm=saved))
    sparsify_(theirs, SWATConfig(0.8, skip=["0", "1", "2", "4", "6"]))
    assert type(theirs[1]) is nn.BatchNorm2d
    assert ours[1].saved == saved
    losses: list[Tensor] = []
    for model in (ours, theirs):
        losses.append(torch.stack(train(model, sgd(model), batches(12, dtype=torch.float64))))
    tolerance = {"exact": 1e-9, "bf16": 1e-2, "int8": 3e-2}[saved]
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layer", [SWATReLU(), SWATReLU(inplace=True), SWATMaxPool2d(2), SWATAvgPool2d(2)])
def test_transforms_of_torch_func_take_the_layers_for_pytorchs(layer):
    dense = layer.dense_class(**{"inplace": True} if getattr(layer, "inplace", False) else {}, **_pool_size(layer))
    x = torch.randn(3, 2, 4, 4)
    for module in (layer, dense):
        module.grads = torch.func.grad(lambda t, module=module: module(t * 2).square().sum())(x)
    assert torch.equal(layer.grads, dense.grads)
    assert torch.equal(torch.vmap(layer)(x[None].clone()), torch.vmap(dense)(x[None].clone()))


def _pool_size(layer: nn.Module) -> dict[str, int]:
    return {"kernel_size": 2} if hasattr(layer, "kernel_size") else {}


def test_a_sparse_layer_says_that_transforms_do_not_go_through_it():
    layer = SWATConv2d(2, 3, 3, sparsity=0.5)
    with pytest.raises(NotImplementedError, match="SWATConv2d: the transforms of"):
        torch.func.grad(lambda t: layer(t).sum())(torch.randn(1, 2, 5, 5))


@pytest.mark.parametrize("settings", [{"eps": 0.0}, {"eps": -1.0}, {}])
def test_batch_norm_refuses_what_pytorch_refuses(settings):
    dense, mine = _pair(**settings)
    if not settings:
        dense.running_mean = mine.running_mean = None
    outcomes = []
    for module in (dense, mine):
        try:
            outcomes.append(torch.isnan(module(torch.randn(2, 5, 3, 3))).any().item())
        except Exception as error:  # which releases refuse what differs
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
