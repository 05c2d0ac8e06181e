"""ResNet-18 and ResNet-50 (He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016), and
WRN-50-2 (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016).

Two stems: ``"imagenet"`` is the paper's 7x7 stride-2 convolution and 3x3 stride-2 max-pool; ``"cifar"`` is a 3x3
stride-1 convolution without pooling, for images of some 32 pixels. Shortcuts that change shape are 1x1 projections (the
paper's option B). A bottleneck strides in its 3x3 convolution, as is now usual, not in its first 1x1. Parameters carry
the names that most ResNet checkpoints use (``conv1``, ``layer1.0.conv1``, ``layer2.0.downsample.0``, ``fc``).
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from swat_ext.models.parts import check_images, conv, initialise_, scaled_channels

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "resnet18", "resnet50", "wrn50_2"]

STEMS = ("cifar", "imagenet")


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[N, in_channels, H, W]`` to ``[N, channels, H / stride, W / stride]``."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut: ``[N, in_channels, H, W]`` to ``[N, 4 * channels, H / stride, W / stride]``."""

    expansion: ClassVar[int] = 4
    widening: ClassVar[int] = 1  # factor on the channels inside

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        channels *= self.widening
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class WideBottleneck(Bottleneck):
    """With twice the channels inside."""

    widening = 2


class ResNet(nn.Module):
    """A residual network of four stages, ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: blocks in each of the four stages.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        stem: "cifar" or "imagenet", see the module's docstring.
        width: factor on every stage's 64, 128, 256 and 512 channels, rounded to a multiple of 8, at least 8.

    Raises:
        ValueError: an argument out of its range, or ``stem`` unknown.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        stem: str = "cifar",
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_images(num_classes, in_channels, stem, STEMS)
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers: expected four numbers of at least 1, got {tuple(layers)}")
        channels = [scaled_channels(64 * 2**i, width) for i in range(4)]

        if stem == "cifar":
            self.conv1 = conv(in_channels, channels[0], 3)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = conv(in_channels, channels[0], 7, stride=2)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        stages, inputs = [], channels[0]
        for i, (blocks, outputs) in enumerate(zip(layers, channels, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(block(inputs, outputs, stride))
                inputs = outputs * block.expansion
            stages.append(stage)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(num_classes: int, *, in_channels: int = 3, stem: str = "cifar", width: float = 1.0) -> ResNet:
    """ResNet-18; arguments as in :class:`ResNet`. 11.2 million parameters with 10 classes and the CIFAR stem."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, stem=stem, width=width)


def resnet50(num_classes: int, *, in_channels: int = 3, stem: str = "imagenet", width: float = 1.0) -> ResNet:
    """ResNet-50; arguments as in :class:`ResNet`. 25.6 million parameters with 1000 classes and the ImageNet stem."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, stem=stem, width=width)


def wrn50_2(num_classes: int, *, in_channels: int = 3, stem: str = "imagenet", width: float = 1.0) -> ResNet:
    """WRN-50-2; arguments as in :class:`ResNet`. 68.9 million parameters with 1000 classes and the ImageNet stem."""
    blocks = (3, 4, 6, 3)
    return ResNet(WideBottleneck, blocks, num_classes=num_classes, in_channels=in_channels, stem=stem, width=width)
