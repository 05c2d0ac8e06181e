"""A swapped BatchNorm and the ReLU after it, whoever else looks at what lies between them: as PyTorch's two layers."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from networks import batches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swat_ext import SWATBatchNorm2d, SWATConfig, SWATReLU, sparsify_
from swat_ext.modules.around import become_plain


class Net(nn.Module):
    """A stem that ends in a BatchNorm, the ReLU that reads it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.stem(x)))


class _DoublesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        ctx.mark_dirty(input)
        return input.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def _saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor.detach(), file)
    file.seek(0)
    return torch.load(file)


Look = Callable[[Net, Tensor], list[Tensor]]
LOOKS: dict[str, Look] = {}


def _look(function: Look) -> Look:
    LOOKS[function.__name__] = function
    return function


@_look
def nobody_else(net, x):
    return [net(x)]


@_look
def gradient_hook_after_the_relu(net, x):
    norm = net.stem(x)
    output = net.relu(norm)
    norm.register_hook(lambda grad: grad * 2)
    return [net.head(output)]


@_look
def retained_gradient(net, x):
    norm = net.stem(x)
    norm.retain_grad()
    output = net.head(net.relu(norm))
    output.square().sum().backward(retain_graph=True)
    return [output, norm.grad]


@_look
def inplace_function_between(net, x):
    return [net.head(net.relu(_DoublesInPlace.apply(net.stem(x))))]


@_look
def inplace_operation_between(net, x):
    return [net.head(net.relu(net.stem(x).mul_(2)))]


@_look
def inplace_relu_without_gradient(net, x):
    norm = net.stem(x)
    net.relu.inplace = True
    with torch.no_grad():
        net.relu(norm)
    return [norm, net.head(norm)]


@_look
def inplace_relu(net, x):
    norm = net.stem(x)
    net.relu.inplace = True
    output = net.relu(norm)
    return [norm, net.head(output) + net.head(norm)]


@_look
def data(net, x):
    norm = net.stem(x)
    least = norm.data.min()
    norm.data.add_(1)
    return [norm, least, net.head(net.relu(norm))]


@_look
def forward_hooks(net, x):
    seen = []
    net.stem[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    net.stem.register_forward_hook(lambda module, args, output: output + 1)
    net.relu.register_forward_pre_hook(lambda module, args: seen.append(args[0] * 1))
    return [net(x), *seen]


@_look
def backward_hooks(net, x):
    seen = []
    net.relu.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
    net.stem[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
    output = net(x)
    output.square().sum().backward(retain_graph=True)
    return [output, *seen]


@_look
def second_reader(net, x):
    norm = net.stem(x)
    return [net.head(net.relu(norm)) + net.head(norm)]


@_look
def two_relus(net, x):
    norm = net.stem(x)
    return [net.head(net.relu(norm) + 1) + net.head(net.relu(norm))]


@_look
def another_nonlinearity(net, x):
    return [net.head(nn.functional.leaky_relu(net.stem(x)))]


@_look
def views_and_files(net, x):
    norm = net.stem(x)
    return [net.head(net.relu(norm[:, :, 1:])), norm.detach(), _saved(norm), copy.deepcopy(norm.detach())]


@_look
def checkpoints(net, x):
    norm = checkpoint(net.stem, x, use_reentrant=False)
    return [checkpoint(nn.Sequential(net.relu, net.head), norm, use_reentrant=False)]


@_look
def reentrant_checkpoint(net, x):
    return [checkpoint(nn.Sequential(net.stem, net.relu, net.head), x, use_reentrant=True)]


# Norm of the difference of gradients / norm of PyTorch's.
TOLERANCE = {"exact": 1e-9, "bf16": 0.03, "int8": 0.1}


@pytest.mark.parametrize("batchnorm", TOLERANCE)
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_it_is_pytorchs_pair(look: Look, batchnorm: str) -> None:
    torch.manual_seed(0)
    ours = Net().double()
    sparsify_(ours, SWATConfig(sparsity=0.5, backend="sparse", skip=(), batchnorm=batchnorm))
    theirs = copy.deepcopy(ours)
    assert (type(ours.stem[1]), type(ours.relu)) == (SWATBatchNorm2d, SWATReLU)
    for module in theirs.modules():
        become_plain(module)
    assert (type(theirs.stem[1]), type(theirs.relu)) == (nn.BatchNorm2d, nn.ReLU)
    results = []
    for net in (ours, theirs):
        x = batches(1, dtype=torch.float64)[0][0].requires_grad_()
        seen = look(net, x)
        sum((each.square().sum() for each in seen if each.requires_grad), start=torch.zeros(())).backward()
        results.append((seen, [x.grad, *(each.grad for each in net.parameters())]))
    (values, grads), (their_values, their_grads) = results
    for mine, other in zip(values, their_values, strict=True):
        assert type(mine) is Tensor
        assert mine.requires_grad == other.requires_grad
        tolerance = TOLERANCE[batchnorm] if "backward" in look.__name__ else 1e-9
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    for mine, other in zip(grads, their_grads, strict=True):
        assert (mine - other).norm() <= TOLERANCE[batchnorm] * other.norm() + 1e-9
