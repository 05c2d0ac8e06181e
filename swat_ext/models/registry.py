"""The networks by name."""

from collections.abc import Callable

from torch import nn

from swat_ext.models import densenet, resnet, vgg, wide_resnet

__all__ = ["MODELS", "STEMS", "build_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.resnet18,
    "resnet50": resnet.resnet50,
    "wrn50_2": resnet.wrn50_2,
    "vgg16": vgg.vgg16,
    "wrn16_8": wide_resnet.wrn16_8,
    "densenet121": densenet.densenet121,
}
#: The stems that each network may have.
STEMS: dict[str, tuple[str, ...]] = {
    "resnet18": resnet.STEMS,
    "resnet50": resnet.STEMS,
    "wrn50_2": resnet.STEMS,
    "vgg16": vgg.STEMS,
    "wrn16_8": wide_resnet.STEMS,
    "densenet121": densenet.STEMS,
}


def build_model(name: str, num_classes: int, *, in_channels: int, stem: str, width: float = 1.0) -> nn.Module:
    """The network called ``name`` in :data:`MODELS`; the other arguments as in its class.

    Raises:
        ValueError: ``name`` is unknown, or an argument is out of its range.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(sorted(MODELS))}, got {name!r}")
    return MODELS[name](num_classes, in_channels=in_channels, stem=stem, width=width)
