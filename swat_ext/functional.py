"""Sparse convolution and linear as pure functions, for anyone's own layer and for tests.

Nothing here keeps state. What multiplies is ``top(weight)``, the elements with ``|w| >= weight_threshold``; what is
saved for the gradient of the weight is ``top(input)``, packed. Gradients are those of SWAT (Raihan and Aamodt, arXiv
2001.01969): the input's uses the kept weights alone, the weight's is dense and uses the kept activations alone.

Under ``torch.autocast`` results have its dtype, as those of PyTorch's layers have. On CUDA everything is multiplied and
saved in that dtype, with sums in float32; on the CPU in float32. Weights are selected in their own dtype.
"""

import math
from decimal import ROUND_CEILING, Decimal
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from swat_ext.ops.arguments import (
    IntPair,
    as_threshold,
    check_like,
    check_tensor,
    int_pair,
    padding_of_sides,
    prefers_channels_last,
)
from swat_ext.ops.autocast import autocast_call, autocast_input, autocast_of
from swat_ext.ops.library import CONVOLUTIONS, convolution_size

__all__ = [
    "Packed",
    "compress",
    "conv2d",
    "conv2d_packed",
    "decompress",
    "keep_count",
    "kth_magnitude",
    "linear",
    "linear_input_view",
    "linear_packed",
]


class Packed(NamedTuple):
    """A tensor with most elements dropped.

    Attributes:
        values: ``[kept]``, the kept elements in logical row-major order; may be longer, the rest is not read.
        mask: int64 ``[ceil(numel / 64) + ceil(numel / 1024)]``: a bit an element, then the kept before each 1024.
        size: shape of the dense tensor.
    """

    values: Tensor
    mask: Tensor
    size: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes held by ``values`` and ``mask``."""
        return self.values.nbytes + self.mask.nbytes


def keep_count(numel: int, sparsity: float) -> int:
    """Elements kept of ``numel`` at ``sparsity``: ``ceil((1 - sparsity) * numel)`` (spec: "Selection").

    ``sparsity`` is taken as the decimal number that it prints as, so that 0.9 of 1000 keeps 100 and not 101.

    Raises:
        ValueError: ``sparsity`` is not in [0, 1), or ``numel`` is negative.
    """
    if not (isinstance(sparsity, (int, float)) and 0 <= sparsity < 1):
        raise ValueError(f"sparsity: expected a number in [0, 1), got {sparsity!r}")
    if numel < 0:
        raise ValueError(f"numel: expected at least 0, got {numel}")
    return int(((1 - Decimal(repr(float(sparsity)))) * numel).to_integral_value(ROUND_CEILING))


def _check_packed(name: str, packed: Packed, size: torch.Size, input: Tensor) -> None:
    if packed.size != size:
        raise ValueError(f"{name}: expected size {tuple(size)}, got {tuple(packed.size)}")
    check_like(name, packed.values, "input", input)


def kth_magnitude(input: Tensor, k: int) -> Tensor:
    """The ``k``-th largest ``|input|``, exactly, in linear time (spec: "Selection").

    Args:
        input: float32 or float64 (CUDA: bfloat16 or float16 too), any shape and strides. NaN counts as larger than
            infinity.
        k: from 1 to ``input.numel()``.

    Returns:
        0-dim tensor of ``input``'s dtype.

    Raises:
        TypeError: wrong type or dtype. ValueError: ``k`` out of range.
    """
    check_tensor("input", input)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an integer, got {k!r}")
    if not 1 <= k <= input.numel():
        raise ValueError(f"k: expected from 1 to input.numel() = {input.numel()}, got {k}")
    return torch.ops.swat_ext.kth_magnitude(input.detach(), k)


def compress(input: Tensor, threshold: float | Tensor) -> Packed:
    """Pack the elements of ``input`` that are not below ``threshold`` in magnitude and not exactly zero.

    On CUDA this waits for the device, which alone knows how many those are; layers, which have a budget, do not wait.

    Args:
        input: float32 or float64 (CUDA: bfloat16 or float16 too), any shape and strides.
        threshold: float or 0-dim tensor, at least 0. NaN and infinite elements are always kept.

    Returns:
        :class:`Packed`, without gradient.

    Raises:
        TypeError, ValueError: wrong type, dtype or threshold.
    """
    check_tensor("input", input)
    values, mask = _compress("threshold", input, threshold)
    return Packed(values, mask, input.shape)


def decompress(packed: Packed, *, channels_last: bool = False) -> Tensor:
    """The dense tensor of ``packed``, dropped elements zero; ``channels_last`` asks for that layout (4-D only)."""
    if channels_last and len(packed.size) != 4:
        raise ValueError(f"channels_last: expected a 4-D packed tensor, got size {tuple(packed.size)}")
    return torch.ops.swat_ext.decompress(packed.values, packed.mask, packed.size, channels_last)


def conv2d_packed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_weight: Packed,
    packed_input: Packed | None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    backend: Literal["sparse", "dense"] = "sparse",
    from_weight: bool = False,
) -> Tensor:
    """Convolution whose weight, and input for the backward pass, are already packed.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: ``[O, C / groups, kh, kw]``: receives the gradient; what multiplies is ``packed_weight``.
        bias: ``[O]`` or None.
        packed_weight: ``weight``, packed.
        packed_input: ``input``, packed, batched or not; None saves nothing, and the gradient of ``weight`` then raises.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        backend: "sparse" for this library's kernels, "dense" for PyTorch's on tensors unpacked for the moment.
        from_weight: whether ``packed_weight`` holds elements of ``weight`` as it is now. On the CPU a parameter's kept
            elements are then not saved for the backward pass, which takes them from ``weight`` again by their bits;
            as with PyTorch's layers, it raises if ``weight`` was changed in place in between.

    Returns:
        ``[N, O, H', W']`` or ``[O, H', W']``, channels_last where PyTorch's convolution would be.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument that does not fit, named.
    """
    cast = autocast_of(input)
    if cast is not None:
        geometry = (stride, padding, dilation, groups)
        return autocast_call(
            conv2d_packed,
            cast,
            input,
            weight,
            bias,
            packed_weight,
            packed_input,
            *geometry,
            backend=backend,
            from_weight=from_weight,
        )
    retake = from_weight and takes_again(weight)
    return _conv2d_packed(
        input, weight, bias, packed_weight, packed_input, stride, padding, dilation, groups, backend, retake
    )


def takes_again(weight: Tensor) -> bool:
    """Whether kept elements of ``weight`` need not be saved: it is a parameter on the CPU, there all the same."""
    return weight.device.type == "cpu" and weight.is_leaf


def _conv2d_packed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_weight: Packed,
    packed_input: Packed | None,
    stride: IntPair,
    padding: str | IntPair,
    dilation: IntPair,
    groups: int,
    backend: Literal["sparse", "dense"],
    retake_weight: bool,
) -> Tensor:
    """:func:`conv2d_packed` without autocast; ``retake_weight``: save ``weight`` in place of its kept elements."""
    if backend not in CONVOLUTIONS:
        raise ValueError(f"backend: expected one of {sorted(CONVOLUTIONS)}, got {backend!r}")
    check_tensor("input", input)
    check_like("weight", weight, "input", input)
    if weight.dim() != 4:
        raise ValueError(f"weight: expected 4 dimensions [O, C / groups, kh, kw], got shape {tuple(weight.shape)}")
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected [N, C, H, W] or [C, H, W], got shape {tuple(input.shape)}")
    if input.dim() == 3:
        batched = None if packed_input is None else packed_input._replace(size=torch.Size((1, *input.shape)))
        output = _conv2d_packed(
            input.unsqueeze(0),
            weight,
            bias,
            packed_weight,
            batched,
            stride,
            padding,
            dilation,
            groups,
            backend,
            retake_weight,
        )
        return output.squeeze(0)

    out_channels, group_channels, *kernel = weight.shape
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: expected an integer of at least 1, got {groups!r}")
    if input.shape[1] != group_channels * groups:
        raise ValueError(
            f"input: expected {group_channels * groups} channels (weight.shape[1] * groups), got {input.shape[1]} "
            f"in shape {tuple(input.shape)}"
        )
    if out_channels < 1 or out_channels % groups:
        raise ValueError(
            f"weight: expected at least 1 output channel, and a multiple of groups = {groups}, got {out_channels}"
        )
    if min(kernel) < 1:
        raise ValueError(f"weight: expected a kernel of at least 1x1, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_like("bias", bias, "input", input)
        if bias.shape != (out_channels,):
            raise ValueError(f"bias: expected shape ({out_channels},), got {tuple(bias.shape)}")
    strides = int_pair("stride", stride, 1)
    dilations = int_pair("dilation", dilation, 1)
    paddings = padding_of_sides(padding, kernel, strides, dilations)
    output_size = convolution_size(input.shape, weight.shape, strides, paddings, dilations)
    for axis, extent in enumerate(output_size[2:]):
        if extent < 1:
            padded = input.shape[2 + axis] + paddings[2 * axis] + paddings[2 * axis + 1]
            raise ValueError(
                f"input: expected a padded {('height', 'width')[axis]} of at least "
                f"{dilations[axis] * (kernel[axis] - 1) + 1} (the dilated kernel), got {padded}"
            )
    _check_packed("packed_weight", packed_weight, weight.shape, input)
    if packed_input is not None:
        _check_packed("packed_input", packed_input, input.shape, input)
    if group_channels == 0:
        # A sum of nothing, which still leads back to both arguments.
        nothing = (input.sum() + weight.sum()).expand(output_size)
        return nothing.clone() if bias is None else nothing + bias[:, None, None]
    return CONVOLUTIONS[backend](
        input,
        weight,
        bias,
        packed_weight.values,
        packed_weight.mask,
        None if packed_input is None else packed_input.values,
        None if packed_input is None else packed_input.mask,
        strides,
        paddings,
        dilations,
        groups,
        prefers_channels_last(input, weight),
        retake_weight,
    )


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    weight_threshold: float | Tensor,
    activation_threshold: float | Tensor,
) -> Tensor:
    """SWAT's convolution (paper, algorithm 1; spec: "One layer").

    ``output = conv(input, top(weight)) + bias``; saved for backward: ``top(weight)`` and ``top(input)``, packed,
    never the dense input. The gradient of ``input`` uses ``top(weight)``; that of ``weight`` uses ``top(input)`` and
    is dense.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, float32 or float64, any strides, any batch size from 0.
        weight: ``[O, C / groups, kh, kw]``, same dtype.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`; padding may be 'same' or 'valid'.
        weight_threshold: float or 0-dim tensor; weights with ``|w|`` below it are dropped; 0 is exactly dense.
        activation_threshold: the same for the input of the weight gradient.

    Returns:
        ``[N, O, H', W']`` or ``[O, H', W']``, channels_last where PyTorch's convolution would be.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument that does not fit, named. Second derivatives raise
        NotImplementedError.
    """
    input = autocast_input(input)
    check_tensor("input", input)
    check_tensor("weight", weight)
    packed_input = None
    if torch.is_grad_enabled() and weight.requires_grad:
        packed_input = Packed(*_compress("activation_threshold", input, activation_threshold), input.shape)
    else:
        as_threshold("activation_threshold", activation_threshold, input)
    packed_weight = Packed(*_compress("weight_threshold", weight, weight_threshold), weight.shape)
    return conv2d_packed(
        input, weight, bias, packed_weight, packed_input, stride, padding, dilation, groups, from_weight=True
    )


def _compress(name: str, tensor: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.swat_ext.compress(tensor.detach(), as_threshold(name, threshold, tensor))


def linear_input_view(input: Tensor) -> Tensor:
    """``[..., in_features]`` as ``[1, in_features, 1, rows]``: a channels_last image whose pixels are the rows."""
    return input.reshape(1, 1, math.prod(input.shape[:-1]), input.shape[-1]).permute(0, 3, 1, 2)


def linear_packed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_weight: Packed,
    packed_input: Packed | None,
    *,
    backend: Literal["sparse", "dense"] = "sparse",
    from_weight: bool = False,
) -> Tensor:
    """Linear layer whose weight, and input for the backward pass, are already packed.

    Args:
        input: ``[..., in_features]``.
        weight: ``[out_features, in_features]``: receives the gradient; what multiplies is ``packed_weight``.
        bias: ``[out_features]`` or None.
        packed_weight: ``weight``, packed.
        packed_input: ``linear_input_view(input)``, packed; None saves nothing.
        backend, from_weight: as in :func:`conv2d_packed`.

    Returns:
        ``[..., out_features]``.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument that does not fit, named.
    """
    cast = autocast_of(input)
    if cast is not None:
        return autocast_call(
            linear_packed,
            cast,
            input,
            weight,
            bias,
            packed_weight,
            packed_input,
            backend=backend,
            from_weight=from_weight,
        )
    _check_linear(input, weight)
    if input.numel() == 0 or weight.numel() == 0:
        # Nothing to multiply: no image has so few pixels, and PyTorch's own layer costs nothing.
        return torch.nn.functional.linear(input, weight, bias)
    size = torch.Size((*weight.shape, 1, 1))
    output = _conv2d_packed(
        linear_input_view(input),
        weight[:, :, None, None],
        bias,
        packed_weight._replace(size=size),
        packed_input,
        1,
        0,
        1,
        1,
        backend,
        from_weight and takes_again(weight),
    )
    return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], weight.shape[0])


def _check_linear(input: Tensor, weight: Tensor) -> None:
    check_tensor("input", input)
    if autocast_of(input) is None:
        check_like("weight", weight, "input", input)
    else:
        check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [out_features, in_features], got shape {tuple(weight.shape)}")
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input: expected a last dimension of {weight.shape[1]}, got shape {tuple(input.shape)}")


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_threshold: float | Tensor,
    activation_threshold: float | Tensor,
) -> Tensor:
    """SWAT's linear layer: ``input @ top(weight).T + bias``; see :func:`conv2d` for what is saved and the gradients.

    Args:
        input: ``[..., in_features]``, float32 or float64.
        weight: ``[out_features, in_features]``, same dtype.
        bias: ``[out_features]`` or None.
        weight_threshold, activation_threshold: floats or 0-dim tensors, at least 0; 0 is exactly dense.

    Returns:
        ``[..., out_features]``.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument that does not fit, named.
    """
    input = autocast_input(input)
    _check_linear(input, weight)
    packed_input = None
    if torch.is_grad_enabled() and weight.requires_grad:
        view = linear_input_view(input)
        packed_input = Packed(*_compress("activation_threshold", view, activation_threshold), view.shape)
    else:
        as_threshold("activation_threshold", activation_threshold, input)
    packed_weight = Packed(*_compress("weight_threshold", weight, weight_threshold), weight.shape)
    return linear_packed(input, weight, bias, packed_weight, packed_input, from_weight=True)
