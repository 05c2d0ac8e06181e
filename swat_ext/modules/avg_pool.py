"""An average pooling that keeps nothing for its backward pass."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swat_ext.ops.calls import transformed
from swat_ext.ops.geometry import int_pair
from swat_ext.ops.layout import is_channels_last, memory_format

__all__ = ["SWATAvgPool2d"]


class _AvgPool(torch.autograd.Function):
    """PyTorch's average pooling, whose backward pass reads the shape of its input and no value."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *geometry: Any) -> Tensor:
        ctx.like = (input.shape, input.dtype, input.device)
        ctx.channels_last = is_channels_last(input)
        ctx.geometry = geometry
        return torch.nn.functional.avg_pool2d(input, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        size, dtype, device = ctx.like
        # Memory that nothing touches: the shape and the layout are all that is looked at.
        input = torch.empty(size, dtype=dtype, device=device, memory_format=memory_format(ctx.channels_last))
        grad = torch.ops.aten.avg_pool2d_backward(grads[0], input, *ctx.geometry)
        return grad, *[None] * len(ctx.geometry)


class SWATAvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` in results and gradients, bit for bit; saves nothing.

    PyTorch's saves its input, of which the backward pass reads the shape.

    Under torch.compile, the transforms of torch.func and where no gradient is asked for, it is PyTorch's own.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in
            :class:`torch.nn.AvgPool2d`.

    Raises:
        RuntimeError: second derivatives. And as PyTorch's layer does.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.AvgPool2d

    def forward(self, input: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or transformed()
        if traced or input.dim() != 4 or not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        output: Tensor = _AvgPool.apply(
            input,
            int_pair("kernel_size", self.kernel_size, 1),
            int_pair("stride", self.stride, 1),
            int_pair("padding", self.padding, 0),
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
        return output
