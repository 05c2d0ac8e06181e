"""What the networks share: convolutions without bias, channels to a factor, checks, initial weights."""

from torch import nn

__all__ = ["CHANNEL_MULTIPLE", "check_images", "conv", "initialise_", "scaled_channels"]

# Channels are a multiple of this, so that a narrow network still fills vector registers.
CHANNEL_MULTIPLE = 8
# PyTorch 2.13 writes past its memory in the weight gradient of a strided 1x1 convolution of 2 to 7 channels, with AVX2.
_LEAST_CHANNELS = 8


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded so that stride 1 keeps the size of an odd kernel's image."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


def scaled_channels(channels: int, width: float) -> int:
    """``channels * width``, rounded to a multiple of 8, at least 8.

    Raises:
        ValueError: ``width`` is not positive and finite.
    """
    if not 0 < width < float("inf"):
        raise ValueError(f"width: expected a positive number, got {width}")
    return max(_LEAST_CHANNELS, CHANNEL_MULTIPLE * round(channels * width / CHANNEL_MULTIPLE))


def check_images(num_classes: int, in_channels: int, stem: str, stems: tuple[str, ...]) -> None:
    """Raise ValueError unless there is a class and a channel, and ``stem`` is one of ``stems``."""
    if stem not in stems:
        raise ValueError(f"stem: expected one of {', '.join(stems)}, got {stem!r}")
    if num_classes < 1 or in_channels < 1:
        raise ValueError(f"num_classes, in_channels: expected at least 1, got {num_classes} and {in_channels}")


def initialise_(model: nn.Module) -> None:
    """Weights of the convolutions by He's rule for ReLU, over the outputs; the rest stays as PyTorch made it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
