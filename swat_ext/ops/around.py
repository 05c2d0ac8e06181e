"""The layers around the convolutions: one autograd function each, over the operators in ``torch.ops.swat_ext``.

A "bit mask" is int64 ``[ceil(numel / 64)]``: one bit an element in the order of memory, lowest bit first. Results and
gradients lie in memory as those of PyTorch's layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swat_ext import _C  # noqa: F401  (loading it registers the operators)
from swat_ext.ops.arguments import HAS_CUDA, SUPPORTED_DTYPES
from swat_ext.ops.layout import empty, is_channels_last, memory_format, suggests_channels_last
from swat_ext.ops.torch_private import transforms_active

__all__ = ["avg_pool2d", "batch_norm", "has_kernels", "is_traced", "max_pool2d", "normalises_with", "relu"]

_BITS_PER_WORD = 64


def is_traced() -> bool:
    """Whether torch.jit.trace or a transform of :mod:`torch.func` is at work, to which PyTorch's own kernels are left.

    torch.compile is none of them: it traces the autograd functions here.
    """
    return not torch.compiler.is_compiling() and (transforms_active() or torch.jit.is_tracing())  # type: ignore[attr-defined]


def has_kernels(input: object) -> bool:
    """Whether the layers around the convolutions have kernels for ``input``, a dense tensor on the CPU or on CUDA.

    On CUDA where this build has CUDA kernels. On shapes alone ("meta") they stand for the CPU's, so that what they
    would hold can be counted.
    """
    if not isinstance(input, Tensor) or input.layout != torch.strided or is_traced():
        return False
    kind = input.device.type
    return (kind in ("cpu", "meta") or (kind == "cuda" and HAS_CUDA)) and input.dtype in SUPPORTED_DTYPES


# --- ReLU -------------------------------------------------------------------------------------------------------------


def _fake_bits(input: Tensor) -> Tensor:
    return input.new_empty([-(-input.numel() // _BITS_PER_WORD)], dtype=torch.int64)


@torch.library.register_fake("swat_ext::relu")
def _(input: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.relu(input), _fake_bits(input)


@torch.library.register_fake("swat_ext::relu_")
def _(input: Tensor) -> Tensor:
    return _fake_bits(input)


@torch.library.register_fake("swat_ext::relu_backward")
def _(grad_output: Tensor, mask: Tensor) -> Tensor:
    output: Tensor = torch.ops.aten.relu(grad_output)
    return output


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(input)
            output, mask = input, torch.ops.swat_ext.relu_(input)
            # As the input lies, but for its gaps.
            ctx.stride = torch.empty_like(input, device="meta").stride()
        else:
            output, mask = torch.ops.swat_ext.relu(input)
            ctx.stride = output.stride()
        ctx.save_for_backward(mask)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _ReLUGrad.apply(*grads, *ctx.saved_tensors, ctx.stride), None


class _ReLUGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, mask: Tensor, stride: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.stride = stride
        if grad_output.stride() != stride:
            grad_output = grad_output.new_empty_strided(grad_output.shape, stride).copy_(grad_output)
        grad: Tensor = torch.ops.swat_ext.relu_backward(grad_output, mask)
        return grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _ReLUGrad.apply(*grads, *ctx.saved_tensors, ctx.stride), None, None


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.relu`` that saves one bit an element."""
    output: Tensor = _ReLU.apply(input, inplace)
    return output


# --- Batch normalisation ----------------------------------------------------------------------------------------------

_CODE_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What an input of ``dtype`` is computed in; weight and bias may have it too."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalises_with(input: Tensor, *weights: Tensor | None) -> bool:
    """Whether :func:`batch_norm` takes ``weights`` of these dtypes: the input's, or float32 beside a half input."""
    return {weight.dtype for weight in weights if weight is not None} in ({input.dtype}, {_wide(input.dtype)}, set())


@torch.library.register_fake("swat_ext::batch_norm")
def _(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, saved: str, seed: Tensor | None
) -> tuple[Tensor, ...]:
    channels, channels_last = input.shape[1], is_channels_last(input)
    statistics = [input.new_empty([channels], dtype=torch.float64) for _ in range(3)]
    code_dtype = _CODE_DTYPES.get(saved)
    codes = input.new_empty([0]) if code_dtype is None else empty(input, input.shape, channels_last, code_dtype)
    scale = input.new_empty([channels if saved == "int8" else 0], dtype=_wide(input.dtype))
    return empty(input, input.shape, channels_last), *statistics, codes, scale


@torch.library.register_fake("swat_ext::batch_norm_backward")
def _(
    grad_output: Tensor,
    saved: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    saved_as: str,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = saved.shape[1]
    grad_input = empty(grad_output, saved.shape, is_channels_last(saved))
    like = grad_output if weight is None else weight
    return grad_input, like.new_empty([channels]), like.new_empty([channels])


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        saved: str,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = torch.ops.swat_ext.batch_norm(input, weight, bias, eps, saved, seed)
        output, mean, invstd, variance, codes, scale = found
        kept = (input, None) if saved == "exact" else (codes, scale if saved == "int8" else None)
        ctx.save_for_backward(*kept, mean, invstd, weight)
        ctx.saved_as = saved
        ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.swat_ext.batch_norm_backward(grads[0], *ctx.saved_tensors, ctx.saved_as)
        wanted = [grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=False)]
        return *wanted, None, None, None


def batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, saved: str, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the statistics of the batch.

    Args:
        input: ``[N, C, H, W]`` or ``[N, C]``, more than one value a channel.
        weight, bias: ``[C]``, None for ones and zeros.
        eps: added to the variance.
        saved: what is kept for the backward pass, as in :class:`swat_ext.SWATBatchNorm2d`.
        seed: one int64 number, of the random rounding of "int8"; None for 0.

    Returns:
        The output, and without gradients, ``[C]`` in float64, the mean and the variance with the divisor count - 1.
    """
    found: tuple[Tensor, Tensor, Tensor] = _BatchNorm.apply(input, weight, bias, eps, saved, seed)
    return found


# --- Pooling ----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("swat_ext::max_pool2d")
def _(input: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    output, indices = torch.ops.aten.max_pool2d_with_indices(input, *geometry)
    return output, torch.empty_like(indices, dtype=torch.uint8)


@torch.library.register_fake("swat_ext::max_pool2d_backward")
def _(grad_output: Tensor, positions: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:
    return empty(grad_output, input_size, suggests_channels_last(positions))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, *geometry: Any) -> Tensor:
        output, positions = torch.ops.swat_ext.max_pool2d(input, *geometry)
        ctx.save_for_backward(positions)
        ctx.size = input.shape
        ctx.geometry = geometry
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.ops.swat_ext.max_pool2d_backward(*grads, *ctx.saved_tensors, ctx.size, *ctx.geometry)
        return grad, *[None] * len(ctx.geometry)


def max_pool2d(input: Tensor, *geometry: Any) -> Tensor:
    """``F.max_pool2d(input, *geometry)``, saving one byte an output; its arguments to ``ceil_mode``, sizes in pairs."""
    output: Tensor = _MaxPool.apply(input, *geometry)
    return output


class _AvgPool(torch.autograd.Function):
    """PyTorch's average pooling, whose backward pass reads the shape of its input and no value."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *geometry: Any) -> Tensor:
        ctx.size = input.shape
        ctx.format = memory_format(suggests_channels_last(input))
        ctx.geometry = geometry
        return torch.nn.functional.avg_pool2d(input, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Memory that nothing touches: the shape and the layout are all that is looked at.
        input = torch.empty(ctx.size, dtype=grads[0].dtype, device=grads[0].device, memory_format=ctx.format)
        grad = torch.ops.aten.avg_pool2d_backward(*grads, input, *ctx.geometry)
        return grad, *[None] * len(ctx.geometry)


def avg_pool2d(input: Tensor, *geometry: Any) -> Tensor:
    """``F.avg_pool2d(input, *geometry)`` of ``[N, C, H, W]``, saving nothing; all its arguments, sizes in pairs."""
    output: Tensor = _AvgPool.apply(input, *geometry)
    return output
