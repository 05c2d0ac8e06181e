"""What PyTorch's compiler and autograd need to know of the operators in ``torch.ops.swat_ext``.

The operators themselves are C++ (``csrc/ops``). Here each gets a fake kernel, and the convolutions get their
gradient, so that they trace under ``torch.compile`` and pass ``torch.library.opcheck``. Two are written here because
they are pure composition: ``masked_conv2d`` (the same convolution by PyTorch's own kernels, see ``masked.py``) and
``select`` (threshold and compression).

A tensor is "packed" as two tensors: ``values`` (its kept elements in logical row-major order) and ``mask`` (int64:
one bit an element, 64 to a word, lowest bit first, then for each 1024 elements the number of kept elements before
them). With ``keep``, ``swat_ext::compress`` selects the ``keep``-th magnitude anew where what passes the threshold is
too far from that many (``KeptBounds`` in ``csrc/ops/checks.h``); ``padded``, it returns :func:`most_kept` values,
zeros after those that the mask counts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swat_ext import _C  # noqa: F401  (loading it registers the operators)
from swat_ext.ops import dense as masked
from swat_ext.ops.calls import gradient, refuse_second_derivative, with_gradient
from swat_ext.ops.layout import empty, is_channels_last

__all__ = [
    "CONVOLUTIONS",
    "REFRESH_SLACK",
    "bias_grad",
    "convolution_size",
    "mask_words",
    "most_kept",
    "select",
    "weight_grad",
]

_BITS_PER_WORD = 64
_BITS_PER_BLOCK = 1024

# A stale threshold may let a quarter more than its budget pass, or 64 elements more, before it is selected again.
REFRESH_SLACK = 1.25
_REFRESH_FLOOR = 64

# Parts of a lone bias gradient that are summed apart: their number does not follow that of the threads.
_BIAS_PARTS = 64
_LEAST_SPLIT = 1 << 14  # elements; PyTorch shares no sum of fewer than twice as many

# Fields of a layer's clock, an int64 tensor on the CPU; slot i is due for selection at the step in field CLOCK_DUE + i.
CLOCK_STEPS, CLOCK_VERSION, CLOCK_POINTER, CLOCK_DUE = 0, 1, 2, 4
CLOCK_SIZE = 8


def mask_words(numel: int) -> int:
    """Number of int64 elements in the mask of a packed tensor of ``numel`` elements."""
    return -(-numel // _BITS_PER_WORD) + -(-numel // _BITS_PER_BLOCK)


def most_kept(keep: int, numel: int) -> int:
    """Most elements of ``numel`` that a selection of ``keep`` may hold; integers alone: symbolic sizes pass through."""
    return torch.sym_min(torch.sym_max(keep + keep // 4, keep + _REFRESH_FLOOR), numel)


def convolution_size(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Size ``[N, O, H', W']`` of a convolution's output; ``padding`` is ``(top, bottom, left, right)``."""
    size = [input_size[0], weight_size[0]]
    for axis in range(2):
        padded = input_size[2 + axis] + padding[2 * axis] + padding[2 * axis + 1]
        size.append((padded - dilation[axis] * (weight_size[2 + axis] - 1) - 1) // stride[axis] + 1)
    return size


@torch.library.register_fake("swat_ext::kth_magnitude")
def _(input: Tensor, k: int) -> Tensor:
    return input.new_empty(())


@torch.library.register_fake("swat_ext::compress")
def _(input: Tensor, threshold: Tensor, *, keep: int | None = None, padded: bool = False) -> tuple[Tensor, Tensor]:
    return _fake_packed(input, most_kept(keep, input.numel()) if padded and keep is not None else None)


def _fake_packed(input: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    if length is None:
        length = torch.library.get_ctx().new_dynamic_size()
    return input.new_empty([length]), input.new_empty([mask_words(input.numel())], dtype=torch.int64)


@torch.library.register_fake("swat_ext::take")
def _(input: Tensor, mask: Tensor, count: int) -> Tensor:
    return input.new_empty([count])


@torch.library.register_fake("swat_ext::decompress")
def _(values: Tensor, mask: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    return empty(values, size, channels_last)


@torch.library.register_fake("swat_ext::decompress_part")
def _(values: Tensor, mask: Tensor, size: Sequence[int], begin: int, end: int, channels_last: bool) -> Tensor:
    return empty(values, [end - begin, *size[1:]], channels_last)


@torch.library.register_fake("swat_ext::conv2d")
def _(
    input: Tensor,
    weight_values: Tensor,
    weight_mask: Tensor,
    weight_size: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    return empty(input, convolution_size(input.shape, weight_size, stride, padding, dilation), channels_last)


@torch.library.register_fake("swat_ext::conv2d_input_grad")
def _fake_input_grad(
    grad_output: Tensor,
    weight_values: Tensor,
    weight_mask: Tensor,
    weight_size: Sequence[int],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    return empty(grad_output, input_size, channels_last)


@torch.library.register_fake("swat_ext::conv2d_weight_grad")
def _fake_weight_grad(
    grad_output: Tensor,
    input_values: Tensor,
    input_mask: Tensor,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
    *,
    allow_tf32: bool = False,
) -> Tensor:
    return empty(grad_output, weight_size, channels_last)


@torch.library.register_fake("swat_ext::linear")
def _(
    input: Tensor, weight_values: Tensor, weight_mask: Tensor, weight_size: Sequence[int], bias: Tensor | None
) -> Tensor:
    return input.new_empty([*input.shape[:-1], weight_size[0]])


@torch.library.register_fake("swat_ext::linear_input_grad")
def _(grad_output: Tensor, weight_values: Tensor, weight_mask: Tensor, weight_size: Sequence[int]) -> Tensor:
    return grad_output.new_empty([*grad_output.shape[:-1], weight_size[1]])


@torch.library.register_fake("swat_ext::linear_weight_grad")
def _(
    grad_output: Tensor,
    input_values: Tensor,
    input_mask: Tensor,
    weight_size: Sequence[int],
    *,
    allow_tf32: bool = False,
) -> Tensor:
    return grad_output.new_empty(list(weight_size))


@torch.library.register_fake("swat_ext::bias_grad")
def _(grad_output: Tensor, dim: int) -> Tensor:
    return grad_output.new_empty([grad_output.shape[dim]])


# --- The same convolution by PyTorch's own kernels, on tensors unpacked for the moment of the call --------------------

def _fake_masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_values: Tensor,
    weight_mask: Tensor,
    input_values: Tensor | None,
    input_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    retake_weight: bool = False,
) -> Tensor:
    return empty(input, convolution_size(input.shape, weight.shape, stride, padding, dilation), channels_last)


for _suffix, _function, _fake in (
    ("", masked.conv2d, _fake_masked_conv2d),
    ("_input_grad", masked.input_grad, _fake_input_grad),
    ("_weight_grad", masked.weight_grad, _fake_weight_grad),
):
    torch.library.custom_op(f"swat_ext::masked_conv2d{_suffix}", _function, mutates_args=()).register_fake(_fake)


# --- Gradients --------------------------------------------------------------------------------------------------------


def weight_grad(grad_output: Tensor, *arguments: Any) -> Tensor:
    """``conv2d_weight_grad`` at the float32 precision that the user allows PyTorch's own."""
    if grad_output.device.type != "cuda" or grad_output.dtype != torch.float32:
        return torch.ops.swat_ext.conv2d_weight_grad(grad_output, *arguments)
    input_size, weight_size = arguments[2:4]
    # A linear layer comes as one row of 1x1 pixels.
    linear = tuple(weight_size[2:]) == (1, 1) and input_size[2] == 1
    allowed = torch.backends.cuda.matmul.allow_tf32 if linear else torch.backends.cudnn.allow_tf32
    return torch.ops.swat_ext.conv2d_weight_grad(grad_output, *arguments, allow_tf32=allowed)


def bias_grad(grad_output: Tensor) -> Tensor:
    """Sum of ``grad_output`` ``[N, O, H, W]`` over all but its channels, the same bits for any number of threads.

    PyTorch shares channels over its threads, but splits a sum that is one number by how many threads there are.
    """
    count = grad_output.numel()
    if grad_output.shape[1] != 1 or grad_output.device.type != "cpu" or count < _LEAST_SPLIT:
        return grad_output.sum((0, 2, 3))
    flat = grad_output.reshape(-1)
    share, rest = divmod(count, _BIAS_PARTS)
    total = flat.narrow(0, 0, count - rest).view(_BIAS_PARTS, share).sum(1).sum(0, keepdim=True)
    return total + flat.narrow(0, count - rest, rest).sum() if rest else total


def _register_gradient(
    name: str,
    input_grad: Callable[..., Tensor],
    weight_grad: Callable[..., Tensor],
    plain: tuple[Callable[..., Tensor], ...] = (),
) -> Callable[..., Any]:
    """Give convolution ``name`` its gradient (spec: "One layer"), and return how layers call it.

    Only packed tensors are saved for the gradient, and only those that it needs.

    With ``retake_weight`` the kept weights are taken from the weight once more: saving a parameter takes no memory.

    Args:
        plain: the functions that the convolution and its two gradients are made of, where they are Python.
    """
    convolution, plain_input_grad, plain_weight_grad = plain or (None, None, None)

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        input, weight, _, weight_values, weight_mask, input_values, input_mask, *geometry, channels_last, retake = (
            inputs
        )
        # Without a gradient of the input the weight is free to change before the backward pass.
        packed_weight = (weight if retake else weight_values, weight_mask) if ctx.needs_input_grad[0] else (None, None)
        ctx.save_for_backward(*packed_weight, input_values, input_mask)
        ctx.retake = retake
        ctx.kept = weight_values.shape[0]
        ctx.sizes = (input.shape, weight.shape)
        ctx.geometry = geometry
        ctx.channels_last = channels_last
        ctx.weight_channels_last = is_channels_last(weight)

    def backward(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
        weight, weight_mask, input_values, input_mask = ctx.saved_tensors
        input_size, weight_size = ctx.sizes
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight_values = torch.ops.swat_ext.take(weight, weight_mask, ctx.kept) if ctx.retake else weight
            grad_input = gradient(
                input_grad,
                grad_output,
                weight_values,
                weight_mask,
                weight_size,
                input_size,
                *ctx.geometry,
                ctx.channels_last,
                plain=plain_input_grad,
            )
        if ctx.needs_input_grad[1]:
            if input_values is None:
                raise RuntimeError(
                    f"swat_ext::{name}: the gradient of weight needs input_values and input_mask, which were None"
                )
            # As the parameter lies: autograd copies a gradient that lies otherwise.
            grad_weight = gradient(
                weight_grad,
                grad_output,
                input_values,
                input_mask,
                input_size,
                weight_size,
                *ctx.geometry,
                ctx.weight_channels_last,
                plain=plain_weight_grad,
            )
        if ctx.needs_input_grad[2]:
            grad_bias = bias_grad(grad_output)
        return grad_input, grad_weight, grad_bias, *[None] * 10

    return with_gradient(name, setup_context, backward, plain=convolution)


#: The convolution of each backend, as layers call it: positional arguments of ``swat_ext::conv2d``.
CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "sparse": _register_gradient("conv2d", torch.ops.swat_ext.conv2d_input_grad, weight_grad),
    "dense": _register_gradient(
        "masked_conv2d",
        torch.ops.swat_ext.masked_conv2d_input_grad,
        torch.ops.swat_ext.masked_conv2d_weight_grad,
        (masked.conv2d, masked.input_grad, masked.weight_grad),
    ),
}
for _name in ("conv2d", "masked_conv2d"):
    refuse_second_derivative(f"{_name}_input_grad")
    refuse_second_derivative(f"{_name}_weight_grad")


# --- Thresholds that live through training ----------------------------------------------------------------------------


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def select(
    input: Tensor, owner: Tensor, threshold: Tensor, clock: Tensor, slot: int, keep: int, period: int
) -> tuple[Tensor, Tensor]:
    """Bring a threshold up to date and compress with it (spec: "Selection").

    Args:
        input: the tensor to compress, any shape.
        owner: the layer's weight; a new version of it counts as an optimizer step, however many forwards pass between.
        threshold: 0-dim; replaced by the ``keep``-th largest magnitude of ``input`` when it is due.
        clock: int64 ``[8]`` on the CPU: steps seen, version and data pointer of ``owner`` at the last look (version -1:
            not known, adopt it without counting a step), spare, then the step from which each slot is due (-1: at
            once).
        slot: 0 for the weight, 1 for the activation.
        keep: number of elements to keep, at least 1 unless ``input`` is empty.
        period: optimizer steps from one selection to the next.

    Returns:
        ``(values, mask)``, the packed input. On the CPU ``values`` holds exactly what is kept. On CUDA its length is
        :func:`most_kept`, known without waiting for the device; where more pass, the device selects again at once, for
        this call alone, and of ties beyond the capacity the last in logical order are dropped.
    """
    fields = clock.tolist()
    steps, version, pointer = fields[:3]
    now, where = _version(owner), owner.data_ptr()
    if (version, pointer) != (now, where):
        steps += version >= 0
        clock.copy_(torch.tensor([steps, now, where, *fields[3:]]))
    due = CLOCK_DUE + slot
    fresh = input.numel() > 0 and fields[due] <= steps
    if fresh:
        threshold.copy_(torch.ops.swat_ext.kth_magnitude(input, keep))
        clock[due] = steps + period
    limit = threshold.to(input.dtype)  # under autocast inputs have another dtype than the buffer
    if input.device.type != "cpu":
        # The device decides by itself whether to select again: asking how much passed would wait for it.
        return torch.ops.swat_ext.compress(input, limit, keep=keep, padded=True)
    packed = torch.ops.swat_ext.compress(input, limit)
    if not fresh and packed[0].numel() > max(REFRESH_SLACK * keep, keep + _REFRESH_FLOOR):
        # The stored threshold stays as it is until the next step: a checkpoint may yet repeat an earlier call with it.
        clock[due] = steps + 1
        packed = torch.ops.swat_ext.compress(input, torch.ops.swat_ext.kth_magnitude(input, keep))
    return packed


# For what traces: layers call the function itself otherwise, at a third of the cost.
_select_op = torch.library.custom_op("swat_ext::select", select, mutates_args=("threshold", "clock"))


@_select_op.register_fake
def _(
    input: Tensor, owner: Tensor, threshold: Tensor, clock: Tensor, slot: int, keep: int, period: int
) -> tuple[Tensor, Tensor]:
    return _fake_packed(input, None if input.device.type == "cpu" else most_kept(keep, input.numel()))
