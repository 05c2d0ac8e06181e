"""What PyTorch's compiler and autograd need to know of the operators for the layers around the convolutions.

As :mod:`swat_ext.ops` does for the convolutions. A "bit mask" is int64 ``[ceil(numel / 64)]``: one bit an element in
the order of memory, lowest bit first. "The memory format of a tensor" is channels_last where it lies so and is not also
contiguous, and contiguous otherwise; results lie in that of the input, and gradients too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swat_ext import _C  # noqa: F401  (loading it registers the operators)
from swat_ext.ops.arguments import HAS_CUDA, supported_dtypes
from swat_ext.ops.calls import gradient, refuse_second_derivative, transformed, with_gradient
from swat_ext.ops.layout import empty, is_channels_last

__all__ = [
    "batch_norm",
    "has_kernels",
    "max_pool2d",
    "normalises_with",
    "pooled_size",
    "relu",
    "relu_",
]

_BITS_PER_WORD = 64


def has_kernels(input: object) -> bool:
    """Whether the layers around the convolutions have kernels for ``input``, a dense tensor on the CPU or on CUDA.

    On the CPU in float32 and float64, on CUDA in bfloat16 and float16 too, where this build has CUDA kernels; not under
    the transforms of :mod:`torch.func`. On shapes alone ("meta") they stand for the CPU's, so that what they would hold
    can be counted.
    """
    if not isinstance(input, Tensor) or input.layout != torch.strided or transformed():
        return False
    kind = input.device.type
    return (kind in ("cpu", "meta") or (kind == "cuda" and HAS_CUDA)) and input.dtype in supported_dtypes(input.device)


def _fake_bits(input: Tensor) -> Tensor:
    return input.new_empty([-(-input.numel() // _BITS_PER_WORD)], dtype=torch.int64)


# --- ReLU -------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("swat_ext::relu")
def _(input: Tensor) -> tuple[Tensor, Tensor]:
    return empty(input, input.shape, is_channels_last(input)), _fake_bits(input)


@torch.library.register_fake("swat_ext::relu_")
def _(input: Tensor) -> Tensor:
    return _fake_bits(input)


@torch.library.register_fake("swat_ext::relu_backward")
def _(grad_output: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    return empty(grad_output, grad_output.shape, channels_last)


def _save_mask(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # or the mask, which has no gradient, would get one of zeros
    ctx.save_for_backward(output[1])
    ctx.channels_last = is_channels_last(inputs[0])


def _relu_grad(ctx, grad_output: Tensor | None, *_: object) -> Tensor | None:  # type: ignore[no-untyped-def]
    if grad_output is None:
        return None
    return gradient(torch.ops.swat_ext.relu_backward, grad_output, *ctx.saved_tensors, ctx.channels_last)


def _keep_mask(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])
    ctx.channels_last = inputs[2]


def _relu_grad_grad(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
    return torch.ops.swat_ext.relu_backward(grad, *ctx.saved_tensors, ctx.channels_last), None, None


relu = with_gradient("relu", _save_mask, _relu_grad)
torch.library.register_autograd("swat_ext::relu_backward", _relu_grad_grad, setup_context=_keep_mask)


class _InplaceReLU(torch.autograd.Function):
    """``swat_ext::relu_`` with its gradient, which an operator that writes to its argument cannot have itself."""

    @staticmethod
    def forward(ctx, input: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.channels_last = is_channels_last(input)
        ctx.save_for_backward(torch.ops.swat_ext.relu_(input))
        ctx.mark_dirty(input)
        return input

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return gradient(torch.ops.swat_ext.relu_backward, grads[0], *ctx.saved_tensors, ctx.channels_last)


def relu_(input: Tensor) -> Tensor:
    """ReLU of ``input`` in place, which saves one bit an element; returns ``input``.

    Raises:
        RuntimeError: elements of ``input`` share memory, as those of an expanded tensor do.
    """
    shared = any(step == 0 and size > 1 for size, step in zip(input.shape, input.stride(), strict=True))
    if shared and input.numel() > 0:
        raise RuntimeError(
            "input: more than one element of the tensor to write to refers to a single memory location, as in an "
            f"expanded one, got shape {tuple(input.shape)} and stride {input.stride()}; clone() it first"
        )
    output: Tensor = _InplaceReLU.apply(input)
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
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    saved: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, channels_last = input.shape[1], is_channels_last(input)
    statistics = [input.new_empty([channels], dtype=torch.float64) for _ in range(3)]
    code_dtype = _CODE_DTYPES.get(saved)
    codes = input.new_empty([0]) if code_dtype is None else empty(input, input.shape, channels_last, code_dtype)
    return (
        empty(input, input.shape, channels_last),
        *statistics,  # type: ignore[return-value]
        codes,
        input.new_empty([channels if saved == "int8" else 0], dtype=_wide(input.dtype)),
    )


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


def _save_norm(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, _, _, saved, _ = inputs
    _, mean, invstd, variance, codes, scale = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, invstd, variance, codes, scale)
    kept = (input, None) if saved == "exact" else (codes, scale if saved == "int8" else None)
    ctx.save_for_backward(*kept, mean, invstd, weight)
    ctx.saved_as = saved


def _norm_grad(ctx, grad_output: Tensor | None, *_: object):  # type: ignore[no-untyped-def]
    if grad_output is None:
        return (None,) * 6
    grads = gradient(torch.ops.swat_ext.batch_norm_backward, grad_output, *ctx.saved_tensors, ctx.saved_as)
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*wanted, None, None, None)


batch_norm = with_gradient("batch_norm", _save_norm, _norm_grad)
refuse_second_derivative("batch_norm_backward")


# --- Max pooling ------------------------------------------------------------------------------------------------------


def pooled_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """Size ``[N, C, H', W']`` of a max pooling's output; an entry below 1 means that no window fits."""
    pooled = list(size[:2])
    for axis in range(2):
        length, step = size[2 + axis], stride[axis]
        spare = length + 2 * padding[axis] - dilation[axis] * (kernel_size[axis] - 1) - 1
        count = (spare + (step - 1 if ceil_mode else 0)) // step + 1
        # The last window must start inside the input or its leading padding.
        if ceil_mode and (count - 1) * step >= length + padding[axis]:
            count -= 1
        pooled.append(count)
    return pooled


@torch.library.register_fake("swat_ext::max_pool2d")
def _(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    size = pooled_size(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    channels_last = is_channels_last(input)
    return empty(input, size, channels_last), empty(input, size, channels_last, torch.uint8)


@torch.library.register_fake("swat_ext::max_pool2d_backward")
def _(
    grad_output: Tensor,
    positions: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    return empty(grad_output, input_size, is_channels_last(positions))


def _save_positions(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.size = inputs[0].shape
    ctx.geometry = inputs[1:]


def _pool_grad(ctx, grad_output: Tensor | None, *_: object):  # type: ignore[no-untyped-def]
    if grad_output is None:
        return (None,) * 6
    positions = ctx.saved_tensors[0]
    grad = gradient(torch.ops.swat_ext.max_pool2d_backward, grad_output, positions, ctx.size, *ctx.geometry)
    return grad, *[None] * 5


max_pool2d = with_gradient("max_pool2d", _save_positions, _pool_grad)
refuse_second_derivative("max_pool2d_backward")
