"""The networks."""

import pytest
import torch
from torch import nn

from swat_ext import SWATConfig, sparsify_
from swat_ext.models import (
    MODELS,
    STEMS,
    WideResNet,
    build_model,
    densenet121,
    resnet18,
    resnet50,
    vgg16,
    wrn16_8,
    wrn50_2,
)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert _parameters(resnet18(1000, stem="imagenet")) == 11_689_512
        assert _parameters(resnet50(1000)) == 25_557_032
        assert _parameters(wrn50_2(1000)) == 68_883_240
        assert _parameters(resnet18(10)) == 11_173_962
        assert _parameters(vgg16(10)) == 14_728_266
        assert _parameters(wrn16_8(10)) == 10_961_370
        assert _parameters(densenet121(10)) == 6_956_298
        assert _parameters(densenet121(1000, stem="imagenet")) == 7_978_856


@pytest.mark.parametrize(("name", "stem"), [(name, stem) for name, stems in STEMS.items() for stem in stems])
def test_every_network_trains_sparse(name: str, stem: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 7, in_channels=2, stem=stem, width=0.125)
    side = 32 if stem == "cifar" else 64
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 2, side, side)).shape == (1, 7)
    sparsify_(model.train(), SWATConfig(0.9))
    assert not any(type(module) is nn.ReLU for module in model.modules())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    images = torch.randn(4, 2, side, side).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = nn.functional.cross_entropy(model(images), torch.randint(7, (4,)))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
    # A bias before BatchNorm has no gradient but rounding.
    unchanged = [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]
    assert all(key.endswith("bias") for key in unchanged), unchanged


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", [8, 28])
def test_smaller_images_pass(name: str, side: int) -> None:
    model = build_model(name, 10, in_channels=1, stem="cifar", width=0.125)
    assert model(torch.randn(2, 1, side, side)).shape == (2, 10)


def test_the_imagenet_stem_is_the_published_one() -> None:
    with torch.device("meta"):
        model = resnet50(1000)
        sizes: list[torch.Size] = []
        for stage in (model.maxpool, model.layer1, model.layer4):
            stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert [tuple(size) for size in sizes] == [(2, 64, 56, 56), (2, 256, 56, 56), (2, 2048, 7, 7)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("stem", "shrinks"), [("cifar", 1), ("imagenet", 4)])
def test_stages_of_resnet(name: str, stem: str, shrinks: int) -> None:
    model = build_model(name, 7, in_channels=2, stem=stem, width=0.125)
    sizes: list[torch.Size] = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    assert model(torch.randn(2, 2, 64, 64)).shape == (2, 7)
    expansion = 4 if name == "resnet50" else 1
    expected = [(2, 8 * 2**i * expansion, 64 // shrinks // 2**i, 64 // shrinks // 2**i) for i in range(4)]
    assert [tuple(size) for size in sizes] == expected


@pytest.mark.parametrize(("width", "channels"), [(1, 64), (0.25, 16), (0.3, 16), (0.001, 8), (2, 128)])
def test_width_rounds_to_eight_channels(width: float, channels: int) -> None:
    with torch.device("meta"):
        assert resnet18(10, width=width).conv1.out_channels == channels


@pytest.mark.parametrize(
    ("argument", "value"),
    [("stem", "tall"), ("width", 0.0), ("width", float("inf")), ("num_classes", 0), ("in_channels", 0)],
)
@pytest.mark.parametrize("name", MODELS)
def test_wrong_arguments_are_named(name: str, argument: str, value: object) -> None:
    arguments = {"num_classes": 10, "in_channels": 3, "stem": "cifar", argument: value}
    with pytest.raises(ValueError, match=argument):
        build_model(name, **arguments)  # type: ignore[arg-type]


def test_a_stem_that_a_network_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="stem: expected one of cifar, got 'imagenet'"):
        build_model("vgg16", 10, in_channels=3, stem="imagenet")
    with pytest.raises(ValueError, match="depth: expected 6"):
        WideResNet(15, 8, num_classes=10)


def test_unknown_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="resnet18, resnet50, vgg16, wrn16_8, wrn50_2, got 'resnet19'"):
        build_model("resnet19", 10, in_channels=3, stem="cifar")
