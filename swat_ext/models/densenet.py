"""DenseNet-BC (Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks", CVPR 2017).

Bottlenecks of four times the growth rate, and transitions that halve the channels. Two stems: ``"imagenet"`` is the
paper's 7x7 stride-2 convolution, BatchNorm, ReLU and 3x3 stride-2 max-pool; ``"cifar"`` is a 3x3 stride-1 convolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swat_ext.models.parts import check_images, conv, initialise_, scaled_channels

__all__ = ["DenseLayer", "DenseNet", "Transition", "densenet121"]

STEMS = ("cifar", "imagenet")

_BOTTLENECK = 4


class DenseLayer(nn.Module):
    """1x1 and 3x3, pre-activated, appended to their input: ``[N, C, H, W]`` to ``[N, C + growth, H, W]``."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv(in_channels, _BOTTLENECK * growth, 1)
        self.bn2 = nn.BatchNorm2d(_BOTTLENECK * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(_BOTTLENECK * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.bn1(x)))
        out = self.conv2(self.relu2(self.bn2(out)))
        return torch.cat([x, out], 1)


class Transition(nn.Sequential):
    """Half the channels and half the size: ``[N, C, H, W]`` to ``[N, C / 2, H / 2, W / 2]``."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            conv(in_channels, in_channels // 2, 1),
            nn.AvgPool2d(2),
        )


class DenseNet(nn.Module):
    """A densely connected network, ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Args:
        blocks: layers in each dense block.
        growth: channels that a layer adds.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        stem: "cifar" or "imagenet", see the module's docstring.
        width: factor on ``growth``, rounded to a multiple of 8, at least 8.

    Raises:
        ValueError: an argument out of its range, or ``stem`` unknown.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        growth: int,
        *,
        num_classes: int,
        in_channels: int = 3,
        stem: str = "cifar",
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_images(num_classes, in_channels, stem, STEMS)
        if not blocks or min(blocks) < 1:
            raise ValueError(f"blocks: expected numbers of at least 1, got {tuple(blocks)}")
        growth = scaled_channels(growth, width)
        channels = 2 * growth
        if stem == "cifar":
            self.stem: nn.Module = conv(in_channels, channels, 3)
        else:
            self.stem = nn.Sequential(
                conv(in_channels, channels, 7, stride=2),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        self.features = nn.Sequential()
        for number, layers in enumerate(blocks):
            if number:
                self.features.append(Transition(channels))
                channels //= 2
            block = nn.Sequential()
            for _ in range(layers):
                block.append(DenseLayer(channels, growth))
                channels += growth
            self.features.append(block)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.features(self.stem(x))))
        return self.classifier(self.avgpool(x).flatten(1))


def densenet121(num_classes: int, *, in_channels: int = 3, stem: str = "cifar", width: float = 1.0) -> DenseNet:
    """DenseNet-121, growth 32; arguments as in :class:`DenseNet`. 6.96 million parameters with 10 classes."""
    return DenseNet((6, 12, 24, 16), 32, num_classes=num_classes, in_channels=in_channels, stem=stem, width=width)
