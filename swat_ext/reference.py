"""What :mod:`swat_ext.functional` computes, in plain PyTorch: the oracle of tests and benches, not used by the library.

Dense tensors with zeros in them, PyTorch's own convolution, PyTorch's own derivative of it: slow, and easy to see
right. Everything is computed in the dtype that is given; pass float64 to judge float32.

Raihan and Aamodt, "Sparse Weight Activation Training", NeurIPS 2020, arXiv 2001.01969, algorithm 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Packed", "compress", "conv2d", "decompress", "kth_magnitude", "linear", "top"]

_WORD = 64
_BLOCK = 1024

IntPair = int | tuple[int, int] | list[int]


class Packed(NamedTuple):
    """``values`` ``[kept]``, ``mask`` int64 ``[ceil(numel / 64) + ceil(numel / 1024)]`` and the dense ``size``."""

    values: Tensor
    mask: Tensor
    size: torch.Size


def kth_magnitude(input: Tensor, k: int) -> Tensor:
    """The ``k``-th entry of ``|input|`` sorted from the largest down, NaN first: ``sort(|v|)[k - 1]``.

    Args:
        input: floating point, any shape, at least one element.
        k: from 1 to ``input.numel()``.

    Returns:
        0-dim tensor of ``input``'s dtype.
    """
    if not 1 <= k <= input.numel():
        raise ValueError(f"k: expected from 1 to {input.numel()}, got {k}")
    return input.detach().abs().flatten().sort(descending=True).values[k - 1]


def _kept(input: Tensor, threshold: float | Tensor) -> Tensor:
    """``not |v| < t``: NaN and infinity are kept, ties are kept, and a threshold of NaN keeps everything."""
    return ~(input.abs() < torch.as_tensor(threshold, dtype=input.dtype, device=input.device))


def top(input: Tensor, threshold: float | Tensor) -> Tensor:
    """``top(v) = v where not |v| < t, else 0``, same shape, dense (spec: "Selection")."""
    return torch.where(_kept(input, threshold), input, torch.zeros_like(input))


def compress(input: Tensor, threshold: float | Tensor) -> Packed:
    """The stored elements of ``input`` in logical row-major order, and where they were.

    Element ``i`` of the flattened input is stored if ``not |v_i| < t`` and ``v_i != 0``. Then bit ``i % 64`` (lowest
    first) of ``mask[i // 64]`` is set; ``mask[ceil(n / 64) + j]`` counts the stored elements before ``1024 * j``.
    """
    flat = input.detach().flatten()
    stored = _kept(flat, threshold) & (flat != 0)
    bits = F.pad(stored.to(torch.int64), (0, -flat.numel() % _WORD)).view(-1, _WORD)
    # Bit 63 is the sign bit; a sum of distinct powers of two wraps to exactly that pattern.
    words = (bits << torch.arange(_WORD, device=flat.device)).sum(1)
    per_block = F.pad(stored.to(torch.int64), (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK).sum(1)
    before = per_block.cumsum(0) - per_block
    return Packed(flat[stored], torch.cat((words, before)), input.shape)


def decompress(packed: Packed) -> Tensor:
    """The dense, contiguous tensor of ``packed``: ``values`` where a bit is set, in order, and 0 elsewhere."""
    numel = packed.size.numel()
    words = packed.mask[: -(-numel // _WORD)]
    bits = (words[:, None] >> torch.arange(_WORD, device=words.device)) & 1
    dense = packed.values.new_zeros(numel)
    dense[bits.flatten()[:numel].bool()] = packed.values
    return dense.view(packed.size)


class _Swat(torch.autograd.Function):
    """An operation linear in the input and in the weight, with SWAT's gradients in place of its own.

    ============  ==========================================================
    forward       ``y  = op(x, top(W), b)``
    input         ``dx = (d op / d x)(x, top(W)) . dy``
    weight        ``dW = (d op / d W)(top(x), W) . dy``, for every weight
    bias          ``db = (d op / d b) . dy``
    ============  ==========================================================
    """

    @staticmethod
    def forward(
        ctx: Any,
        operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_threshold: float | Tensor,
        activation_threshold: float | Tensor,
    ) -> Tensor:
        ctx.operation = operation
        ctx.save_for_backward(input, weight, bias)
        ctx.thresholds = (weight_threshold, activation_threshold)
        return operation(input, top(weight, weight_threshold), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        weight_threshold, activation_threshold = ctx.thresholds
        grads: list[Tensor | None] = [None, None, None]
        # At which input and weight the dense operation is differentiated, for each of its arguments.
        points = (
            (input, top(weight, weight_threshold)),
            (top(input, activation_threshold), weight),
            (input, weight),
        )
        for index, (at_input, at_weight) in enumerate(points):
            if not ctx.needs_input_grad[1 + index]:
                continue
            arguments = [at_input.detach(), at_weight.detach(), bias if bias is None else bias.detach()]
            variable = arguments[index] = arguments[index].requires_grad_()
            with torch.enable_grad():
                output = ctx.operation(*arguments)
            grads[index] = torch.autograd.grad(output, variable, grad_output)[0]
        return None, *grads, None, None


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
    """:func:`torch.nn.functional.conv2d` with SWAT's forward and gradients; see :func:`swat_ext.functional.conv2d`.

    ``y[n, o] = b[o] + sum_i top(W)[o, i] * x[n, i]``,
    ``dx[n, i] = sum_o top(W)[o, i] *' dy[n, o]``,
    ``dW[o, i] = sum_n dy[n, o] *' top(x)[n, i]``, ``db[o] = sum_{n, h, w} dy[n, o, h, w]``.
    """

    def operation(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    return _Swat.apply(operation, input, weight, bias, weight_threshold, activation_threshold)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_threshold: float | Tensor,
    activation_threshold: float | Tensor,
) -> Tensor:
    """:func:`torch.nn.functional.linear` with SWAT's forward and gradients; see :func:`swat_ext.functional.linear`.

    ``y = x top(W)^T + b``, ``dx = dy top(W)``, ``dW = dy^T top(x)``, ``db = sum of dy``.
    """
    return _Swat.apply(F.linear, input, weight, bias, weight_threshold, activation_threshold)
