"""Fake kernels of the operators that pack and convolve, so that they trace and pass ``torch.library.opcheck``.

The operators themselves are C++ (``csrc/ops``). A tensor is "packed" as two tensors: ``values`` (its kept elements in
logical row-major order, perhaps zeros after them) and ``mask`` (int64: one bit an element, 64 to a word, lowest bit
first, then for each 1024 elements the number of kept elements before them).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swat_ext import _C  # noqa: F401  (loading it registers the operators)
from swat_ext.ops.geometry import Geometry
from swat_ext.ops.layout import empty

__all__ = ["mask_words", "most_kept"]

_BITS_PER_WORD = 64
_BITS_PER_BLOCK = 1024


def mask_words(numel: int) -> int:
    """Number of int64 elements in the mask of a packed tensor of ``numel`` elements."""
    return -(-numel // _BITS_PER_WORD) + -(-numel // _BITS_PER_BLOCK)


def most_kept(keep: int, numel: int) -> int:
    """Most elements of ``numel`` that pass for a budget of ``keep``.

    A quarter more; or a 64th of all, at most 64, where that is more.
    """
    slack = torch.sym_min(-(-numel // 64), 64)
    return torch.sym_min(torch.sym_max(keep + keep // 4, keep + slack), numel)


def _check_devices(tensor: Tensor, **others: Tensor | None) -> None:
    """Raise where one is elsewhere: among tensors on the CPU, one on "meta" brings the call here."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise RuntimeError(
                f"{name}: expected the device of the other arguments, {tensor.device}, got {other.device}"
            )


@torch.library.register_fake("swat_ext::kth_magnitude")
def _(input: Tensor, k: int) -> Tensor:
    return input.new_empty(())


@torch.library.register_fake("swat_ext::compress")
def _compress(
    input: Tensor, threshold: Tensor, *, keep: int | None = None, room: int | None = None
) -> tuple[Tensor, Tensor]:
    _check_devices(input, threshold=threshold)
    length = torch.library.get_ctx().new_dynamic_size() if room is None else room
    return input.new_empty([length]), input.new_empty([mask_words(input.numel())], dtype=torch.int64)


@torch.library.register_fake("swat_ext::select")
def _(input: Tensor, threshold: Tensor, state: Tensor, room: int | None) -> tuple[Tensor, Tensor]:
    if state.device.type != "cpu":
        raise RuntimeError(f"state: expected the device cpu, got {state.device}")
    return _compress(input, threshold, room=room)


@torch.library.register_fake("swat_ext::take")
def _(input: Tensor, mask: Tensor, count: int) -> Tensor:
    _check_devices(input, mask=mask)
    return input.new_empty([count])


@torch.library.register_fake("swat_ext::whole_filters")
def _(mask: Tensor, size: Sequence[int]) -> Tensor:
    return mask.new_empty([torch.library.get_ctx().new_dynamic_size()])


@torch.library.register_fake("swat_ext::decompress")
def _(values: Tensor, mask: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    _check_devices(values, mask=mask)
    return empty(values, size, channels_last)


@torch.library.register_fake("swat_ext::decompress_part")
def _(values: Tensor, mask: Tensor, size: Sequence[int], begin: int, end: int, channels_last: bool) -> Tensor:
    _check_devices(values, mask=mask)
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
    _check_devices(input, weight_values=weight_values, weight_mask=weight_mask, bias=bias)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]
    return empty(input, geometry.output_size(input.shape, weight_size), channels_last)


@torch.library.register_fake("swat_ext::conv2d_input_grad")
def _(
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
    _check_devices(grad_output, weight_values=weight_values, weight_mask=weight_mask)
    return empty(grad_output, input_size, channels_last)


@torch.library.register_fake("swat_ext::conv2d_weight_grad")
def _(
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
) -> Tensor:
    _check_devices(grad_output, input_values=input_values, input_mask=input_mask)
    return empty(grad_output, weight_size, channels_last)


@torch.library.register_fake("swat_ext::linear")
def _(
    input: Tensor, weight_values: Tensor, weight_mask: Tensor, weight_size: Sequence[int], bias: Tensor | None
) -> Tensor:
    _check_devices(input, weight_values=weight_values, weight_mask=weight_mask, bias=bias)
    return input.new_empty([*input.shape[:-1], weight_size[0]])


@torch.library.register_fake("swat_ext::linear_input_grad")
def _(grad_output: Tensor, weight_values: Tensor, weight_mask: Tensor, weight_size: Sequence[int]) -> Tensor:
    _check_devices(grad_output, weight_values=weight_values, weight_mask=weight_mask)
    return grad_output.new_empty([*grad_output.shape[:-1], weight_size[1]])


@torch.library.register_fake("swat_ext::linear_weight_grad")
def _(grad_output: Tensor, input_values: Tensor, input_mask: Tensor, weight_size: Sequence[int]) -> Tensor:
    _check_devices(grad_output, input_values=input_values, input_mask=input_mask)
    return grad_output.new_empty(list(weight_size))


@torch.library.register_fake("swat_ext::bias_grad")
def _(grad_output: Tensor, dim: int) -> Tensor:
    return grad_output.new_empty([grad_output.shape[dim]])
