"""Wide ResNet (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016) for images of some 32 pixels.

Blocks are pre-activated: BatchNorm and ReLU come before each convolution. Where a block changes the shape, its shortcut
is a 1x1 convolution of the activated input. There is no dropout.
"""

from torch import Tensor, nn

from swat_ext.models.parts import check_images, conv, initialise_, scaled_channels

__all__ = ["PreActBlock", "WideResNet", "wrn16_8"]

STEMS = ("cifar",)


class PreActBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[N, in_channels, H, W]`` to ``[N, channels, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(channels, channels, 3)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        out += x if self.shortcut is None else self.shortcut(active)
        return out


class WideResNet(nn.Module):
    """A wide residual network of three stages, ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Args:
        depth: convolutions on the longest way, and the classifier: ``6 * blocks + 4``, as papers count it.
        widen: factor on the 16, 32 and 64 channels of the thin network's stages.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        stem: "cifar", the one form that there is.
        width: a further factor on every stage's channels, rounded to a multiple of 8, at least 8.

    Raises:
        ValueError: an argument out of its range, or ``stem`` unknown.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        *,
        num_classes: int,
        in_channels: int = 3,
        stem: str = "cifar",
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_images(num_classes, in_channels, stem, STEMS)
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth: expected 6 * blocks + 4 with at least one block, got {depth}")
        if widen < 1:
            raise ValueError(f"widen: expected at least 1, got {widen}")
        inputs = scaled_channels(16, width)
        self.conv1 = conv(in_channels, inputs, 3)
        stages = []
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            outputs = scaled_channels(channels * widen, width)
            stage = nn.Sequential()
            for number in range(blocks):
                stage.append(PreActBlock(inputs, outputs, stride if number == 0 else 1))
                inputs = outputs
            stages.append(stage)
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))


def wrn16_8(num_classes: int, *, in_channels: int = 3, stem: str = "cifar", width: float = 1.0) -> WideResNet:
    """WRN-16-8; arguments as in :class:`WideResNet`. 11.0 million parameters with 10 classes."""
    return WideResNet(16, 8, num_classes=num_classes, in_channels=in_channels, stem=stem, width=width)
