"""An average pooling that keeps nothing for its backward pass."""

import torch
from torch import Tensor, nn

from swat_ext.modules.lean import LeanLayer
from swat_ext.ops.around import avg_pool2d, is_traced
from swat_ext.ops.geometry import int_pair

__all__ = ["SWATAvgPool2d"]


class SWATAvgPool2d(LeanLayer, nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` in results and gradients, bit for bit; saves nothing.

    PyTorch's saves its input, of which the backward pass reads the shape.

    Under torch.jit.trace, the transforms of torch.func and where no gradient is asked for, it is PyTorch's own.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in
            :class:`torch.nn.AvgPool2d`.

    Raises:
        RuntimeError: second derivatives. And as PyTorch's layer does.
    """

    dense_class = nn.AvgPool2d

    def forward(self, input: Tensor) -> Tensor:
        learns = isinstance(input, Tensor) and torch.is_grad_enabled() and input.requires_grad
        if not learns or input.dim() != 4 or is_traced():
            return super().forward(input)
        return avg_pool2d(
            input,
            int_pair("kernel_size", self.kernel_size, 1),
            int_pair("stride", self.stride, 1),
            int_pair("padding", self.padding, 0),
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
