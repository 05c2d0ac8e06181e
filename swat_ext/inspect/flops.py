"""What one layer is, its work and its memory (Raihan and Aamodt, arXiv 2001.01969)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from swat_ext.modules import SWATLayer
from swat_ext.ops.convolution import retakes
from swat_ext.ops.library import mask_words

__all__ = [
    "COUNTED",
    "describe",
    "kept_bytes",
    "layer_macs",
    "packed_bytes",
    "saved_input_size",
    "training_flops",
    "weight_bytes",
]

# The classes whose work can be counted.
COUNTED = (nn.Linear, nn.modules.conv._ConvNd)


def layer_macs(
    layer: nn.Linear | nn.modules.conv._ConvNd, input_size: Sequence[int], output_size: Sequence[int]
) -> int:
    """Multiplications of one dense forward of ``layer``, those with padding included.

    Args:
        layer: a convolution of any dimension, transposed or not, or a linear layer.
        input_size, output_size: shapes of its input and output, batch included.
    """
    if isinstance(layer, nn.Linear):
        return math.prod(output_size) * layer.in_features
    kernel: tuple[int, ...] = layer.kernel_size
    # Each input of a transposed convolution, each output of another, meets one kernel over the channels of its group.
    met, channels = (input_size, layer.out_channels) if layer.transposed else (output_size, layer.in_channels)
    return math.prod(met) * (channels // layer.groups) * math.prod(kernel)


def training_flops(macs: int, sparsity: float = 0.0, activation_sparsity: float = 0.0) -> float:
    """FLOPs of one training step of a layer: forward, input gradient and weight gradient, 2 a multiplication each.

    The first two scale with the kept weights, the third with the kept activations. The first layer of a network is
    counted the same, though nobody needs its input gradient.
    """
    return 2.0 * macs * (2 * (1 - sparsity) + (1 - activation_sparsity))


def packed_bytes(numel: int, kept: int, itemsize: int) -> int:
    """Bytes of a packed tensor right after a selection: kept elements and mask; fewer if some of those are zero."""
    return kept * itemsize + mask_words(numel) * 8


def saved_input_size(layer: nn.Module, input_size: Sequence[int]) -> list[int]:
    """Shape of the input that ``layer`` saves for its weight gradient: padded where the padding mode is not zeros."""
    size = list(input_size)
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.padding_mode != "zeros":
        for axis in range(-len(layer.kernel_size), 0):
            if layer.padding == "same":
                size[axis] += layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            elif layer.padding != "valid":
                size[axis] += 2 * int(layer.padding[axis])
    return size


def kept_bytes(layer: nn.Module, input: Tensor) -> tuple[int, int]:
    """What PyTorch's layer keeps of an input for the backward pass, and what this one does by its budget.

    PyTorch's convolution keeps it even if its weight is frozen.
    """
    numel, itemsize = math.prod(saved_input_size(layer, input.shape)), input.element_size()
    frozen = not layer.weight.requires_grad
    dense = 0 if frozen and isinstance(layer, nn.Linear) else numel * itemsize
    if not isinstance(layer, SWATLayer):
        return dense, dense
    return dense, 0 if frozen else packed_bytes(numel, layer.activation_budget.count(numel), itemsize)


def weight_bytes(layer: SWATLayer) -> int:
    """What a call of ``layer`` keeps of its weight for the backward pass, beside the parameter."""
    numel = layer.weight.numel()
    if retakes(layer.weight):
        return 8 * mask_words(numel)
    return packed_bytes(numel, layer.kept_weights, layer.weight.element_size())


def describe(layer: nn.Module) -> str:
    """Its class, sizes, and what is unusual: ``Conv2d 3x3 64->128, /2`` has a stride of 2."""
    name = type(layer).__name__.removeprefix("SWAT").removeprefix("Parametrized")
    if isinstance(layer, nn.Linear):
        return f"{name} {layer.in_features}->{layer.out_features}"
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return name
    parts = [f"{name} {'x'.join(map(str, layer.kernel_size))} {layer.in_channels}->{layer.out_channels}"]
    for label, value in (("/", layer.stride), ("dilation ", layer.dilation)):
        if any(item != 1 for item in value):
            parts.append(label + ("x".join(map(str, value)) if len(set(value)) > 1 else str(value[0])))
    if layer.groups != 1:
        parts.append("depthwise" if layer.groups == layer.in_channels else f"{layer.groups} groups")
    return ", ".join(parts)
