"""BatchNorm computes the ReLU that alone reads it: the same bits, less held, and never at the wrong place."""

import copy
import pickle
import warnings

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


def test_a_network_changed_afterwards_says_so_and_is_right_again():
    model, x = _network(), batches(1)[0][0]
    model.relu = nn.Identity()
    model(x)
    with pytest.warns(UserWarning, match="did not get its last output"):
        output = model(x)
    assert not model.bn1._rectifies
    wanted = _network(fused=False)
    wanted.relu = nn.Identity()
    wanted(x)
    assert torch.equal(output, wanted(x))


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
    assert not {"_rectifies", "_marked"} & set(vars(dense.bn1))
