"""BatchNorm computes the ReLU that alone reads it: the same bits, less held, and never at the wrong place."""

import copy
import io
import pickle
import random
import warnings
import weakref

import pytest
import torch
from held import saved_bytes
from networks import assert_same_state, batches, sgd, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swat_ext
from swat_ext import SWATBatchNorm2d, SWATConfig


class Network(nn.Module):
    """Two BatchNorms, of which a ReLU alone reads the first; what reads the second is told to the constructor."""

    def __init__(self, end: str = "add") -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.end = end

    def forward(self, input: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.first(input)))
        y = self.bn2(self.second(x))
        if self.end == "add":
            y = self.relu(y + x)
        elif self.end == "twice":
            y = self.relu(y) + y
        elif self.end == "functional":
            y = nn.functional.relu(y)
        elif self.end == "values" and float(y.sum()) > 1e9:
            y = -y
        return self.head(y.mean((2, 3)))


def _network(end: str = "add", fused: bool = True, **settings: object) -> Network:
    torch.manual_seed(0)
    model = Network(end)
    swat_ext.sparsify_(model, SWATConfig(sparsity=0.8, backend="sparse", **settings))
    if not fused:
        for module in model.modules():
            if isinstance(module, SWATBatchNorm2d):
                module._rectifies = False
    return model


def _held(model: nn.Module, x: Tensor) -> int:
    return saved_bytes(lambda: model(x), exclude=[*model.parameters(), *model.buffers(), x])


@pytest.mark.parametrize("batchnorm", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_bits_and_less_held(batchnorm, channels_last):
    mine, other = _network(batchnorm=batchnorm), _network(batchnorm=batchnorm, fused=False)
    assert (mine.bn1._rectifies, mine.bn2._rectifies) == (True, False)
    data = batches(6)
    if channels_last:
        data = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (train(model, sgd(model), data) for model in (mine, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_same_state(mine, other)
    bits = 4 * 16 * 64 // 8
    # From an exact input the sign is found again; its layer's bits are all that the codes have to add.
    assert _held(other, data[0][0]) - _held(mine, data[0][0]) == (bits if batchnorm == "exact" else 0)


@pytest.mark.parametrize("end", ["add", "twice", "functional", "none"])
def test_only_a_relu_that_reads_alone_is_computed(end):
    model = _network(end)
    assert (model.bn1._rectifies, model.bn2._rectifies) == (True, False)
    x, _ = batches(1)[0]
    torch.testing.assert_close(model(x), _network(end, fused=False)(x), rtol=0, atol=0)


def test_what_cannot_be_traced_stays_apart():
    assert not _network("values").bn1._rectifies


def test_a_shared_batch_norm_has_to_agree_everywhere():
    torch.manual_seed(0)
    norm, relu = nn.BatchNorm2d(8), nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, relu, nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 8, 1), relu)
    swat_ext.sparsify_(model, SWATConfig(0.5))
    assert not norm._rectifies
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), relu, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), relu)
    relu.__class__ = nn.ReLU
    swat_ext.sparsify_(model, SWATConfig(0.5))
    assert model[1]._rectifies
    assert model[4]._rectifies


def test_hooks_see_what_batch_norm_is_said_to_return():
    model, x = _network(), batches(1)[0][0]
    outputs = []
    handle = model.bn1.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    model(x)
    assert outputs[0].min() < 0
    handle.remove()
    model(x)
    model.eval()
    with torch.no_grad():
        model(x)
    grads = []
    model.relu.inplace = False  # PyTorch allows nothing else after a full backward hook
    model.train().bn1.register_full_backward_hook(lambda module, inputs, outputs: grads.append(outputs[0]))
    model(x).sum().backward()
    assert len(grads) == 1


class Branching(nn.Module):
    """Returns a normalisation's output, or feeds it to a second head, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()
        self.head, self.auxiliary = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.mode = "plain"

    def forward(self, x: Tensor) -> Tensor:
        before = self.stem(x)
        if self.mode == "auxiliary first":
            return self.auxiliary(before) + self.head(self.relu(before))
        y = self.head(self.relu(before))
        if self.mode == "auxiliary":
            y = y + self.auxiliary(before)
        elif self.mode == "in place":
            y = y + self.auxiliary(before.mul_(2))
        elif self.mode == "returned":
            y = torch.cat([y, before], 1)
        elif self.mode == "not rectified":
            y = self.head(nn.functional.leaky_relu(before))
        return y


def _branching(mode: str, batchnorm: str = "exact", inplace: bool = False) -> tuple[Branching, Branching]:
    """Two equal networks, one of which computes ReLUs with the normalisation, sent another way after sparsify_."""
    torch.manual_seed(0)
    model = Branching()
    model.relu.inplace = inplace
    swat_ext.sparsify_(model, SWATConfig(sparsity=0.5, backend="sparse", skip=(), batchnorm=batchnorm))
    assert model.stem[1]._rectifies
    apart = copy.deepcopy(model)
    apart.stem[1]._rectifies = False
    model.mode = apart.mode = mode
    return model, apart


def _assert_same_steps(model: nn.Module, apart: nn.Module) -> None:
    for x, _ in batches(2):
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        first, second = model(one), apart(two)
        assert torch.equal(first, second)
        model.zero_grad()
        apart.zero_grad()
        first.square().sum().backward()
        second.square().sum().backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-5)
        for (name, mine), other in zip(model.named_parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-4, msg=name)
        assert_same_state(model, apart)


@pytest.mark.parametrize("batchnorm", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("mode", ["plain", "auxiliary", "auxiliary first", "in place", "returned", "not rectified"])
def test_whatever_else_reads_the_output_sees_the_plain_one(mode, batchnorm):
    model, apart = _branching(mode, batchnorm)
    if batchnorm != "exact" and mode not in ("plain", "not rectified"):
        # Two readers, two sets of rounded codes: the sum of their gradients is rounded otherwise.
        x = batches(1)[0][0]
        assert torch.equal(model(x), apart(x))
        return
    _assert_same_steps(model, apart)


@pytest.mark.parametrize("mode", ["auxiliary", "in place"])
def test_after_a_relu_in_place_the_others_see_it_rectified(mode):
    model, apart = _branching(mode, inplace=True)
    _assert_same_steps(model, apart)


def test_a_look_before_a_relu_in_place():
    model, apart = _branching("plain", inplace=True)
    x = batches(1)[0][0]
    results = []
    for network in (model, apart):
        before = network.stem(x)
        least = before.min().item()
        rectified = network.relu(before)
        (network.head(rectified) + network.auxiliary(before)).square().sum().backward()
        results.append((least, before.min().item(), network.stem[0].weight.grad))
    assert results[0][:2] == results[1][:2]
    assert results[0][0] < 0 <= results[0][1]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-4)


def test_every_hook_and_every_part_sees_the_plain_output():
    model, apart = _branching("plain")
    x = batches(1)[0][0]
    seen: dict[nn.Module, list[Tensor]] = {model: [], apart: []}
    for network in (model, apart):
        see = seen[network]
        network.stem.register_forward_hook(lambda module, args, output, see=see: see.append(output.detach().clone()))
        network.relu.register_forward_pre_hook(lambda module, args, see=see: see.append(args[0] + 0))
        network.relu.register_full_backward_hook(lambda module, grads, outputs, see=see: see.append(grads[0]))
        network(x).sum().backward()
        see.append(nn.Sequential(network.stem[0], network.stem[1])(x))
    assert len(seen[model]) == 4
    for mine, other in zip(seen[model], seen[apart], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert seen[model][0].min() < 0


def test_an_autograd_function_and_a_file_take_the_plain_output():
    model, apart = _branching("plain")
    x = batches(1)[0][0]

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    for network in (model, apart):
        Twice.apply(network.stem(x)).square().sum().backward()
    torch.testing.assert_close(model.stem[0].weight.grad, apart.stem[0].weight.grad, rtol=1e-5, atol=1e-4)
    file = io.BytesIO()
    torch.save(model.stem(x), file)
    file.seek(0)
    assert torch.equal(torch.load(file), apart.stem(x))
    assert torch.equal(copy.deepcopy(model.stem(x).detach()), apart.stem(x))
    output = model.stem(x)
    assert isinstance(output, Tensor)
    assert output.size(1) == output.dim() * 2 == 8
    assert output.requires_grad
    assert (output.shape, output.dtype, output.is_leaf) == (torch.Size([len(x), 8, 8, 8]), torch.float32, False)
    assert output._plain is None
    assert repr(output.detach()) == repr(apart.stem(x).detach())


def test_an_input_changed_before_the_look_is_refused():
    model, _ = _branching("plain")
    before = model.stem[0](batches(1)[0][0])
    output = model.stem[1](before)
    with torch.no_grad():
        before.zero_()
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        output.sum()


def test_reentrant_checkpoints_and_no_grad_in_between():
    model, apart = _branching("plain")
    x = batches(1)[0][0].requires_grad_()
    for network in (model, apart):
        before = checkpoint(network.stem, x, use_reentrant=True)
        checkpoint(
            lambda y, network=network: network.head(network.relu(y)), before, use_reentrant=True
        ).sum().backward()
    torch.testing.assert_close(model.stem[0].weight.grad, apart.stem[0].weight.grad, rtol=1e-5, atol=1e-4)
    output = model.stem(x)
    with torch.no_grad():
        assert not model.relu(output).requires_grad


@pytest.mark.parametrize("inplace", [False, True])
def test_several_relus_and_checkpoints_that_begin_with_one(inplace):
    model, apart = _branching("plain", inplace=inplace)
    x = batches(1)[0][0]
    results = []
    for network in (model, apart):
        network.zero_grad()
        if not inplace:  # PyTorch's own checkpoint refuses to change its input
            before = network.stem(x)
            first = checkpoint(nn.Sequential(network.relu, network.head), before, use_reentrant=False)
            first.square().sum().backward()
        before = network.stem(x)
        first, second = network.relu(before), network.relu(before)
        third = nn.functional.relu(before)
        if not inplace:
            first.add_(1)
            assert not torch.equal(first, second)
            second = second + network.relu(before)
        (network.head(first) + network.head(second) + network.head(third)).square().sum().backward()
        results.append([first, second, third, network.stem[0].weight.grad])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def test_nothing_is_held_for_a_plain_output_that_nobody_asked_for():
    model, _ = _branching("plain", "int8")
    before = model.stem[0](batches(1)[0][0])
    alive = weakref.ref(before.untyped_storage())
    output = model.relu(model.stem[1](before))
    del before
    assert alive() is None
    output.sum().backward()


def test_tracing_leaves_the_random_state():
    class Random(Network):
        def forward(self, input: Tensor) -> Tensor:
            if random.random() < 2 and torch.rand(()).is_floating_point():
                return super().forward(input)
            return input

    model = Random()
    python, torch_state = random.getstate(), torch.get_rng_state()
    swat_ext.sparsify_(model, SWATConfig(0.5))
    assert model.bn1._rectifies
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_copies_and_checkpoints_and_back():
    model, x = _network(), batches(1)[0][0]
    model(x)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    wanted = model(x)
    for twin in twins:
        assert twin.bn1._rectifies
        assert torch.equal(twin(x), wanted)
    wanted.sum().backward()
    fresh = copy.deepcopy(twins[0])
    checkpoint(fresh, x, use_reentrant=False).sum().backward()
    dense = swat_ext.to_dense(model)
    assert type(dense.bn1) is nn.BatchNorm2d
    assert "_rectifies" not in vars(dense.bn1)
