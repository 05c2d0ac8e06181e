"""Sparse convolution and linear as pure functions, for anyone's own layer and for tests.

Nothing here keeps state. What multiplies is ``top(weight)``, the elements with ``|w| >= weight_threshold``; what is
saved for the gradient of the weight is ``top(input)``, packed. Gradients are those of SWAT (Raihan and Aamodt, arXiv
2001.01969): the input's uses the kept weights alone, the weight's is dense and uses the kept activations alone.

Tensors may be float32, float64, bfloat16 or float16. Half types are what is saved and returned; sums are in float32.
Under ``torch.autocast`` operands and results have its dtype, as those of PyTorch's layers have; weights are selected in
their own.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from swat_ext.config import check_block_size, check_name
from swat_ext.ops.arguments import as_threshold, check_like, check_tensor
from swat_ext.ops.autocast import autocast_input, autocast_of
from swat_ext.ops.convolution import BACKENDS, convolve
from swat_ext.ops.geometry import Geometry, IntPair
from swat_ext.ops.packed import Packed, Pattern
from swat_ext.ops.packed import pack as _pack
from swat_ext.topology.blocks import block_norms, block_of, spread
from swat_ext.topology.budget import Budget

__all__ = [
    "Packed",
    "Pattern",
    "compress",
    "conv2d",
    "conv2d_packed",
    "decompress",
    "keep_count",
    "kth_magnitude",
    "linear",
    "linear_input_view",
    "linear_packed",
    "pack",
    "pattern",
]


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
    return Budget.of(sparsity).count(numel)


def kth_magnitude(input: Tensor, k: int) -> Tensor:
    """The ``k``-th largest ``|input|``, exactly, in linear time (spec: "Selection").

    Args:
        input: any shape and strides. NaN counts as larger than infinity.
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
        input: any shape and strides.
        threshold: float or 0-dim tensor, at least 0. NaN and infinite elements are always kept.

    Returns:
        :class:`Packed`, without gradient.

    Raises:
        TypeError, ValueError: wrong type, dtype or threshold.
    """
    check_tensor("input", input)
    return _compress("threshold", input, threshold)


def pattern(
    weight: Tensor, sparsity: float, granularity: str = "unstructured", block_size: tuple[int, int] = (8, 1)
) -> Pattern:
    """The pattern that keeps the largest weights, or the blocks of weights with the largest L1 norms.

    Of the weights, or blocks, ``ceil((1 - sparsity) * number)`` are kept, and ties at the last of them (spec:
    "Granularity"). A kept weight that is exactly 0 stays in the pattern.

    Args:
        weight: ``[O, I, kh, kw]`` or ``[out, in]``; of any shape if "unstructured".
        sparsity: fraction to drop, in [0, 1).
        granularity: "unstructured", "kernel", "filter" or "block"; "kernel" and "filter" of a matrix are unstructured.
        block_size: output and input channels of a "block", which covers them at one tap.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """
    check_tensor("weight", weight)
    check_name("granularity", granularity)
    if granularity != "unstructured" and weight.dim() not in (2, 4):
        raise ValueError(f"weight: expected [O, I, kh, kw] or [out, in], got shape {tuple(weight.shape)}")
    block = block_of(granularity, weight.shape, check_block_size(block_size))
    norms = block_norms(weight.detach(), block)
    if not norms.numel():
        return Pattern.of(torch.zeros_like(weight, dtype=torch.bool))
    limit = kth_magnitude(norms, keep_count(norms.numel(), sparsity))
    return Pattern.of(spread(~(norms < limit), weight.shape, block))


def pack(tensor: Tensor, pattern: Pattern) -> Packed:
    """The elements of ``tensor`` that ``pattern`` keeps, zeros too, without gradient.

    Raises:
        TypeError, ValueError: a wrong type, or a pattern of another shape. RuntimeError: its parts do not go together.
    """
    check_tensor("tensor", tensor)
    _check_pattern("pattern", pattern, tensor.shape)
    return _pack(tensor, pattern)


def decompress(packed: Packed, *, channels_last: bool = False) -> Tensor:
    """The dense tensor of ``packed``, dropped elements zero; ``channels_last`` asks for that layout (4-D only).

    Raises:
        TypeError: not a :class:`Packed`. ValueError, RuntimeError: its parts do not go together.
    """
    _check_is_packed("packed", packed)
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
        TypeError, ValueError, NotImplementedError: an argument that does not fit, named. RuntimeError: the parts of a
        packed tensor do not go together; second derivatives.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight: expected 4 dimensions [O, C / groups, kh, kw], got shape {tuple(weight.shape)}")
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected [N, C, H, W] or [C, H, W], got shape {tuple(input.shape)}")
    geometry = Geometry.of(weight.shape[2:], stride, padding, dilation, groups)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output_size = geometry.output_size(batched.shape, weight.shape)
    _check_bias(bias, input, weight)
    _check_packed("packed_weight", packed_weight, weight.shape)
    if packed_input is not None:
        _check_packed("packed_input", packed_input, input.shape)
    if weight.shape[1] == 0:
        # A sum of nothing, which still leads back to both arguments.
        nothing = (batched.sum() + weight.sum()).expand(output_size)
        output = nothing.clone() if bias is None else nothing + bias[:, None, None]
    else:
        output = _cast_and_convolve(batched, weight, bias, packed_weight, packed_input, geometry, backend, from_weight)
    return output if input.dim() == 4 else output.squeeze(0)


def _cast_and_convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_weight: Packed,
    packed_input: Packed | None,
    geometry: Geometry | None,
    backend: Literal["sparse", "dense"],
    from_weight: bool,
) -> Tensor:
    """:func:`swat_ext.ops.convolution.convolve`, in the dtypes of autocast where that is on."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {sorted(BACKENDS)}, got {backend!r}")
    dtype = autocast_of(input)
    if dtype is None:
        check_tensor("input", input)
        check_like("weight", weight, "input", input)
        for name, packed in (("packed_weight", packed_weight), ("packed_input", packed_input)):
            if packed is not None:
                check_like(name, packed.values, "input", input)
        return convolve(
            input, weight, bias, packed_weight, packed_input, geometry, backend=backend, from_weight=from_weight
        )
    return convolve(
        input.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        packed_weight._replace(values=packed_weight.values.to(dtype)),
        None if packed_input is None else packed_input._replace(values=packed_input.values.to(dtype)),
        geometry,
        backend=backend,
        from_weight=from_weight,
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
    weight_threshold: float | Tensor | Pattern,
    activation_threshold: float | Tensor | Pattern,
) -> Tensor:
    """SWAT's convolution (paper, algorithm 1; spec: "One layer").

    ``output = conv(input, top(weight)) + bias``; saved for backward: ``top(weight)`` and ``top(input)``, packed,
    never the dense input. The gradient of ``input`` uses ``top(weight)``; that of ``weight`` uses ``top(input)`` and
    is dense.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, any strides, any batch size from 0.
        weight: ``[O, C / groups, kh, kw]``, same dtype.
        bias: ``[O]`` or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`; padding may be 'same' or 'valid'.
        weight_threshold: float or 0-dim tensor; weights with ``|w|`` below it are dropped; 0 is exactly dense. Or the
            :class:`Pattern` of those that are kept, as :func:`pattern` selects it.
        activation_threshold: the same for the input of the weight gradient.

    Returns:
        ``[N, O, H', W']`` or ``[O, H', W']``, channels_last where PyTorch's convolution would be.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument that does not fit, named. RuntimeError: second
        derivatives.
    """
    input = autocast_input(input)
    packed = _compress_both(input, input, weight, weight_threshold, activation_threshold)
    return conv2d_packed(input, weight, bias, *packed, stride, padding, dilation, groups, from_weight=True)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_threshold: float | Tensor | Pattern,
    activation_threshold: float | Tensor | Pattern,
) -> Tensor:
    """SWAT's linear layer: ``input @ top(weight).T + bias``; see :func:`conv2d` for what is saved and the gradients.

    Args:
        input: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, same dtype.
        bias: ``[out_features]`` or None.
        weight_threshold, activation_threshold: floats or 0-dim tensors, at least 0; 0 is exactly dense. Or patterns, as
            of :func:`conv2d`; that of the input has the size of ``linear_input_view(input)``.

    Returns:
        ``[..., out_features]``.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument that does not fit, named. RuntimeError: second
        derivatives.
    """
    input = autocast_input(input)
    check_tensor("input", input)
    check_tensor("weight", weight)
    _check_linear(input, weight)
    packed = _compress_both(input, linear_input_view(input), weight, weight_threshold, activation_threshold)
    return linear_packed(input, weight, bias, *packed, from_weight=True)


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
        ``[..., out_features]``, a tensor of its own.

    Raises:
        As :func:`conv2d_packed`.
    """
    _check_linear(input, weight)
    _check_bias(bias, input, weight)
    _check_packed("packed_weight", packed_weight, weight.shape)
    if packed_input is not None:
        rows = math.prod(input.shape[:-1])
        _check_packed("packed_input", packed_input, torch.Size((1, input.shape[-1], 1, rows)))
    if input.numel() == 0 or weight.numel() == 0:
        # Nothing to multiply: no image has so few pixels, and PyTorch's own layer costs nothing.
        return torch.nn.functional.linear(input, weight, bias)
    return _cast_and_convolve(input, weight, bias, packed_weight, packed_input, None, backend, from_weight)


def linear_input_view(input: Tensor) -> Tensor:
    """``[..., in_features]`` as ``[1, in_features, 1, rows]``: a channels_last image whose pixels are the rows."""
    return input.reshape(1, 1, math.prod(input.shape[:-1]), input.shape[-1]).permute(0, 3, 1, 2)


def _compress(name: str, tensor: Tensor, threshold: float | Tensor | Pattern) -> Packed:
    if isinstance(threshold, Pattern):
        _check_pattern(name, threshold, tensor.shape)
        return _pack(tensor, threshold)
    values, mask = torch.ops.swat_ext.compress(tensor.detach(), as_threshold(name, threshold, tensor))
    return Packed(values, mask, tensor.shape)


def _compress_both(
    input: Tensor,
    view: Tensor,
    weight: Tensor,
    weight_threshold: float | Tensor | Pattern,
    activation_threshold: float | Tensor | Pattern,
) -> tuple[Packed, Packed | None]:
    """``top(weight)``, and ``top(view)`` of the input where the weight's gradient will need it."""
    check_tensor("input", input)
    check_tensor("weight", weight)
    packed_weight = _compress("weight_threshold", weight, weight_threshold)
    if torch.is_grad_enabled() and weight.requires_grad:
        return packed_weight, _compress("activation_threshold", view, activation_threshold)
    if isinstance(activation_threshold, Pattern):
        _check_pattern("activation_threshold", activation_threshold, view.shape)
    else:
        as_threshold("activation_threshold", activation_threshold, input)
    return packed_weight, None


def _check_linear(input: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [out_features, in_features], got shape {tuple(weight.shape)}")
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input: expected a last dimension of {weight.shape[1]}, got shape {tuple(input.shape)}")


def _check_bias(bias: Tensor | None, input: Tensor, weight: Tensor) -> None:
    if bias is None:
        return
    if autocast_of(input) is None:
        check_like("bias", bias, "input", input)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_is_packed(name: str, packed: object) -> None:
    if not isinstance(packed, Packed):
        raise TypeError(f"{name}: expected a Packed, got {type(packed).__name__}")
    for part in ("values", "mask"):
        if not isinstance(getattr(packed, part), Tensor):
            raise TypeError(f"{name}: expected {part} to be a Tensor, got {type(getattr(packed, part)).__name__}")
    if packed.values.device != packed.mask.device:
        devices = f"{packed.values.device} and {packed.mask.device}"
        raise ValueError(f"{name}: expected values and mask on one device, got {devices}")


def _check_pattern(name: str, pattern: object, size: torch.Size) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"{name}: expected a Pattern, got {type(pattern).__name__}")
    if pattern.size != size:
        raise ValueError(f"{name}: expected a pattern of size {tuple(size)}, got {tuple(pattern.size)}")


def _check_packed(name: str, packed: Packed, size: torch.Size) -> None:
    _check_is_packed(name, packed)
    if packed.size != size:
        raise ValueError(f"{name}: expected size {tuple(size)}, got {tuple(packed.size)}")
