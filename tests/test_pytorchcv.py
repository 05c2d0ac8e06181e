"""Models from elsewhere: swapped, they train some steps and report."""

import pytest
import torch
from networks import sparse_layers
from torch import nn

import swat_ext

model_provider = pytest.importorskip("pytorchcv.model_provider", reason="pytorchcv is not installed")

# Name, options, and the side of its input.
MODELS = [
    ("resnet20_cifar10", {}, 32),
    ("resnet18", {"num_classes": 10}, 64),
    ("resnet18_wd4", {"num_classes": 10}, 64),
    ("resnext20_16x4d_cifar10", {}, 16),
    ("wrn16_10_cifar10", {}, 8),
    ("densenet40_k12_cifar10", {}, 16),
    ("mobilenet_wd4", {"num_classes": 10}, 64),
    ("mobilenetv2_wd4", {"num_classes": 10}, 64),
]


@pytest.mark.parametrize(("name", "options", "side"), MODELS, ids=[name for name, _, _ in MODELS])
def test_it_trains(name, options, side, generator):
    torch.manual_seed(0)
    model = model_provider.get_model(name, **options)
    keys = list(model.state_dict())
    convolutions = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    result = swat_ext.sparsify_(model, swat_ext.SWATConfig(sparsity=0.8, topk_period=2, weight_topk_period=2))
    assert len(result.swapped) == convolutions - 1
    assert result.impossible == ()
    assert list(model.state_dict()) == keys

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    swat_ext.SWATScheduler(model, optimizer)
    size = (2, 3, side, side)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs fits inputs of one, larger, size alone
    x, y = torch.randn(size, generator=generator), torch.randint(10, (2,), generator=generator)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x).flatten(1), y)
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        for layer in sparse_layers(model):
            assert layer.weight.grad.isfinite().all()
            assert layer.weight.grad.any()
        optimizer.zero_grad()
    assert {layer.steps for layer in sparse_layers(model)} == {2}

    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(swat_ext.to_dense(model)(x), model(x), rtol=1e-3, atol=1e-4)
    found = swat_ext.report(model, size)
    assert len(found.layers) == convolutions
    assert all(row.calls == 1 for row in found.layers)
    assert 0.15 < found.swat_flops / found.dense_flops < 0.6
