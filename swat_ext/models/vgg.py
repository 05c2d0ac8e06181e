"""VGG-16 with BatchNorm (Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015), in its CIFAR form.

Thirteen 3x3 convolutions, each with a bias and BatchNorm as is usual, five max-pools, and one linear layer in place of
the three of the ImageNet form. The max-pools round sizes up, so that images under 32 pixels pass too.
"""

from torch import Tensor, nn

from swat_ext.models.parts import check_images, initialise_, scaled_channels

__all__ = ["VGG", "vgg16"]

STEMS = ("cifar",)

# Convolutions and their channels between one max-pool and the next.
_STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class VGG(nn.Module):
    """VGG-16, ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        stem: "cifar", the one form that there is.
        width: factor on every stage's channels, rounded to a multiple of 8, at least 8.

    Raises:
        ValueError: an argument out of its range, or ``stem`` unknown.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, stem: str = "cifar", width: float = 1.0) -> None:
        super().__init__()
        check_images(num_classes, in_channels, stem, STEMS)
        self.features = nn.Sequential()
        inputs = in_channels
        for convolutions, channels in _STAGES:
            outputs = scaled_channels(channels, width)
            for _ in range(convolutions):
                self.features.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                self.features.append(nn.BatchNorm2d(outputs))
                self.features.append(nn.ReLU(inplace=True))
                inputs = outputs
            self.features.append(nn.MaxPool2d(2, ceil_mode=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg16(num_classes: int, *, in_channels: int = 3, stem: str = "cifar", width: float = 1.0) -> VGG:
    """VGG-16 with BatchNorm; arguments as in :class:`VGG`. 14.7 million parameters with 10 classes."""
    return VGG(num_classes, in_channels=in_channels, stem=stem, width=width)
