"""Layers that read one tensor share one packed copy of it, and train as if each had its own."""

import copy
import gc
import io
import weakref

import numpy
import pytest
import torch
from networks import assert_same_state, batches, sgd, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swat_ext
from swat_ext import SWATConfig, SWATConv2d
from swat_ext.modules import base
from swat_ext.ops.library import mask_words
from swat_ext.topology import sharing


class Block(nn.Module):
    """Two convolutions that read the same tensor, as a residual block's first and its shortcut do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.relu = nn.ReLU()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)
        self.recompute = False

    def forward(self, input: Tensor) -> Tensor:
        x = self.relu(self.stem(input))
        x = checkpoint(self.both, x, use_reentrant=False) if self.recompute else self.both(x)
        return self.head(x.mean((2, 3)))

    def both(self, x: Tensor) -> Tensor:
        return self.first(x) + self.shortcut(x)


def _network(**settings: object) -> Block:
    torch.manual_seed(0)
    model = Block()
    swat_ext.sparsify_(
        model, SWATConfig(sparsity=0.8, backend="sparse", **{"topk_period": 3, "weight_topk_period": 3, **settings})
    )
    return model


def _packed_storages(model: nn.Module, x: Tensor) -> int:
    """Distinct masks saved for backward by the two convolutions."""
    masks = set()

    def look(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int64 and tensor.numel() == mask_words(x.shape[0] * 16 * 64):
            masks.add(tensor.data_ptr())
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), look(t))[1], lambda t: t):
        model(x)
    return len(masks)


def _alone(monkeypatch) -> None:
    monkeypatch.setattr(base, "shared", lambda tensor, key, pack: pack())


def test_one_copy_is_held_for_two_layers(monkeypatch):
    model, (x, _) = _network(), batches(1)[0]
    # The ReLU's mask has another length.
    assert [_packed_storages(model, x) for _ in range(3)] == [1, 1, 1]
    model.eval()
    assert _packed_storages(model, x) == 1
    _alone(monkeypatch)
    assert _packed_storages(model, x) == 2
    assert _packed_storages(model.train(), x) == 2


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_sharing_changes_no_bit(monkeypatch, scheduled, recompute):
    models = []
    for shared in (True, False):
        if not shared:
            _alone(monkeypatch)
        model = _network()
        model.recompute = recompute
        optimizer = sgd(model)
        if scheduled:
            swat_ext.SWATScheduler(model, optimizer)
        losses = train(model, optimizer, batches(10))
        models.append((model, losses))
    (mine, first), (other, second) = models
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_same_state(mine, other)
    assert torch.equal(mine.first.activation_threshold, other.first.activation_threshold)


def test_an_overflowing_threshold_is_shared_too(monkeypatch):
    states = []
    for shared in (True, False):
        if not shared:
            _alone(monkeypatch)
        model = _network(topk_period=50, weight_topk_period=50)
        optimizer = sgd(model)
        data = batches(6)
        # Twice the size: the old threshold lets far too much pass.
        data = [(x * (1 + number % 2), y) for number, (x, y) in enumerate(data)]
        train(model, optimizer, data)
        states.append(model)
    assert_same_state(*states)


def _touch_input(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    with torch.no_grad():
        args[0].mul_(1)


@pytest.mark.parametrize("change", ["sparsity", "in place", "copy"])
def test_what_differs_is_not_shared(change):
    model, (x, _) = _network(), batches(1)[0]
    if change == "sparsity":
        model.shortcut.activation_sparsity = 0.5
    elif change == "in place":
        model.first.register_forward_hook(_touch_input)
    else:
        model.first.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    assert _packed_storages(model, x) == 2


def test_a_copy_shares_anew_and_trains_alike():
    model, data = _network(), batches(9)
    optimizer = sgd(model)
    train(model, optimizer, data[:4])
    twin = copy.deepcopy(model)
    assert isinstance(twin.first, SWATConv2d)
    twin_optimizer = sgd(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, data[4:])
    train(twin, twin_optimizer, data[4:])
    assert_same_state(model, twin)
    assert _packed_storages(twin, data[0][0]) == 1


def test_a_buffer_filled_again_is_packed_again():
    values = numpy.random.default_rng(0)
    buffer = numpy.zeros((2, 3, 8, 8), numpy.float32)
    x = torch.from_numpy(buffer)
    layer = SWATConv2d(3, 4, 3, sparsity=0.0, activation_sparsity=0.0, backend="sparse")
    dense = nn.Conv2d(3, 4, 3)
    dense.load_state_dict(layer.state_dict())
    for _ in range(3):
        buffer[:] = values.standard_normal(buffer.shape)
        for module in (layer, dense):
            module.zero_grad()
            module(x).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, dense.weight.grad, rtol=0.02, atol=0.05)


def test_the_copy_dies_with_its_tensor_and_nothing_is_left_on_it():
    model, x = _network(), batches(1)[0][0]
    kept: list[Tensor] = []
    model.relu.register_forward_hook(lambda module, args, output: kept.append(output))
    model(x).sum().backward()
    assert set(vars(kept[0])) == set()
    file = io.BytesIO()
    torch.save([x, kept[0].detach()], file)
    file.seek(0)
    assert len(torch.load(file)) == 2
    ((_, packed),) = sharing._known[kept[0]].values()
    mask = weakref.ref(packed.mask)
    before = len(sharing._known)
    del packed
    kept.clear()
    gc.collect()
    assert len(sharing._known) == before - 1
    assert mask() is None


@pytest.mark.parametrize("kind", ["linear", "padded"])
def test_linear_and_padded_layers_share_too(kind):
    torch.manual_seed(0)
    settings = {"sparsity": 0.8, "backend": "sparse"}
    if kind == "linear":
        layers = [swat_ext.SWATLinear(64, 8, **settings) for _ in range(3)]
        x = torch.randn(32, 4, 64, requires_grad=True) * 1
    else:
        layers = [SWATConv2d(8, 8, 3, padding=1, padding_mode=mode, **settings) for mode in ("reflect", "circular")]
        layers += [SWATConv2d(8, 8, 3, padding=1, padding_mode="reflect", **settings)]
        x = torch.randn(4, 8, 8, 8, requires_grad=True) * 1
    saved: set[int] = set()

    def look(tensor: Tensor) -> Tensor:
        if tensor.dtype == x.dtype and tensor.dim() == 1 and tensor.numel() < x.numel():
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        outputs = [layer(x).sum() for layer in layers]
    assert len(saved) == {"linear": 1, "padded": 2}[kind]
    torch.stack(outputs).sum().backward()
