"""The sparse convolution and the sparse linear layer for autograd: one function, over the kernels of either backend.

What is not finite spreads by one rule, whichever kernels run: kept elements alone are multiplied, and padding is zeros
that are multiplied like any pixel, those around the output's gradient too. A dropped element multiplies nothing, not
even infinity. PyTorch's kernels multiply by every zero, so on the CPU operands that are not all finite go to this
library's kernels. Where nobody can look at values, in a compiled graph and on CUDA, the dense backend spreads further.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swat_ext.ops import dense, sparse
from swat_ext.ops.geometry import Geometry
from swat_ext.ops.layout import is_channels_last
from swat_ext.ops.packed import Packed

__all__ = ["BACKENDS", "convolve", "retakes"]

BACKENDS: dict[str, Any] = {"sparse": sparse, "dense": dense}


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_weight: Packed,
    packed_input: Packed | None,
    geometry: Geometry | None,
    *,
    backend: Literal["sparse", "dense"],
    from_weight: bool,
) -> Tensor:
    """``conv(input, packed_weight) + bias`` with the gradients of SWAT (spec: "One layer").

    Args:
        input, weight, bias, packed_weight, packed_input: as of :func:`swat_ext.functional.conv2d_packed`; they fit.
        geometry: None for a linear layer, whose weight is ``[out, in]`` and whose packed input is ``[in, rows]``.
        backend: the kernels.
        from_weight: whether the packed weight's elements are those of ``weight``. Those of a parameter on the CPU are
            then taken from it again in the backward pass by their bits: saving a parameter takes no memory.
    """
    retake = from_weight and retakes(weight)
    values, mask = (None, None) if packed_input is None else packed_input[:2]
    return _Convolution.apply(
        input, weight, bias, packed_weight.values, packed_weight.mask, values, mask, geometry, backend, retake
    )


def retakes(weight: Tensor) -> bool:
    """Whether kept elements of ``weight`` need not be saved: it is a parameter on the CPU, there all the same."""
    return weight.device.type == "cpu" and weight.is_leaf


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_values: Tensor,
        weight_mask: Tensor,
        input_values: Tensor | None,
        input_mask: Tensor | None,
        geometry: Geometry | None,
        backend: str,
        retake: bool,
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        # Without a gradient of the input the weight is free to change before the backward pass.
        kept_weight = (weight if retake else weight_values, weight_mask) if wanted[0] else (None, None)
        kept_input = (input_values, input_mask) if wanted[1] else (None, None)
        ctx.save_for_backward(*kept_weight, *kept_input)
        ctx.retaken = weight_values.shape[0] if retake else None
        ctx.sizes = input.shape, weight.shape
        ctx.geometry, ctx.backend = geometry, backend
        # PyTorch's rule for a convolution's layout: channels_last if an argument is that and not also contiguous.
        ctx.channels_last = is_channels_last(input) or is_channels_last(weight)
        ctx.weight_channels_last = is_channels_last(weight)
        kernels = _kernels(backend, input, weight_values)
        return kernels.forward(input, weight_values, weight_mask, weight.shape, bias, geometry, ctx.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output = grads[0]
        weight, weight_mask, input_values, input_mask = ctx.saved_tensors
        input_size, weight_size = ctx.sizes
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        if wants_input:
            if ctx.retaken is not None:
                weight = torch.ops.swat_ext.take(weight, weight_mask, ctx.retaken)
            grad_input = _kernels(ctx.backend, grad_output, weight).input_grad(
                grad_output, weight, weight_mask, weight_size, input_size, ctx.geometry, ctx.channels_last
            )
        if wants_weight:
            if input_values is None:
                raise RuntimeError("packed_input: the gradient of weight needs it, and it was None")
            # As the parameter lies: autograd copies a gradient that lies otherwise.
            grad_weight = _kernels(ctx.backend, grad_output, input_values).weight_grad(
                grad_output,
                input_values,
                input_mask,
                input_size,
                weight_size,
                ctx.geometry,
                ctx.weight_channels_last,
            )
        if wants_bias:
            grad_bias = _bias_grad(grad_output, -1 if ctx.geometry is None else 1)
        return grad_input, grad_weight, grad_bias, *[None] * 7


def _kernels(backend: str, dense_operand: Tensor, kept: Tensor) -> Any:
    """The kernels for these operands; see the module's docstring."""
    if backend != "dense" or dense_operand.device.type != "cpu" or torch.compiler.is_compiling():
        return BACKENDS[backend]
    # A sum is finite only where every element is; where it overflows, the sparse kernels are right as well.
    return dense if math.isfinite(dense_operand.sum().item() + kept.sum().item()) else sparse


def _bias_grad(grad_output: Tensor, dim: int) -> Tensor:
    if grad_output.device.type == "cpu":
        return torch.ops.swat_ext.bias_grad(grad_output, dim)
    dims = [axis for axis in range(grad_output.dim()) if axis != dim % grad_output.dim()]
    return grad_output.sum(dims)
