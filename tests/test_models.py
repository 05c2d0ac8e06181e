"""The networks."""

import pytest
import torch
from torch import nn

from swat_ext.models import MODELS, build_model, resnet18, resnet50


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert _parameters(resnet18(1000, stem="imagenet")) == 11_689_512
        assert _parameters(resnet50(1000)) == 25_557_032
        assert _parameters(resnet18(10)) == 11_173_962


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("stem", "shrinks"), [("cifar", 1), ("imagenet", 4)])
def test_shapes(name: str, stem: str, shrinks: int) -> None:
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
def test_wrong_arguments_are_named(argument: str, value: object) -> None:
    arguments = {"num_classes": 10, "in_channels": 3, "stem": "cifar", argument: value}
    with pytest.raises(ValueError, match=argument):
        build_model("resnet18", **arguments)  # type: ignore[arg-type]


def test_unknown_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="resnet18, resnet50, got 'resnet19'"):
        build_model("resnet19", 10, in_channels=3, stem="cifar")
