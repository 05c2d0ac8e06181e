"""A ReLU that keeps one bit an element for its backward pass.

PyTorch's ReLU saves its output. In a dense network that costs nothing, for the convolution that follows saves the same
tensor. A sparse layer saves a packed one, and the ReLU would be all that keeps the dense tensor alive.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BitReLU", "pack_bits", "swap_relus_", "unpack_bits"]

# Eight booleans, read as one int64, times this: bit 56 + i is byte i, as no two partial products meet in one bit.
_GATHER = 0x0102040810204080
_ONES = 0x0101010101010101
_BIT_OF_BYTE = 0x8040201008040201 - 2**64  # bit i of byte i
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_bits(flags: Tensor) -> Tensor:
    """Booleans ``[n]`` as uint8 ``[ceil(n / 8)]``: boolean i is bit ``i % 8`` of byte ``i // 8``, lowest bit first."""
    missing = -len(flags) % 8
    if missing:
        flags = torch.cat([flags, flags.new_zeros(missing)])
    return (flags.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The first ``count`` booleans of :func:`pack_bits`' uint8 result, as int8: -1 for true and 0 for false."""
    # A copy of the byte in each byte of a word, of which bit i stays in byte i; adding 127 carries it to the top bit.
    words = bits.to(torch.int64).mul_(_ONES).bitwise_and_(_BIT_OF_BYTE).add_(0x7F * _ONES)
    return words.bitwise_right_shift_(7).bitwise_and_(_ONES).mul_(0xFF).view(torch.int8)[:count]


class _Mask(torch.autograd.Function):
    """``grad`` where a bit is set, 0 elsewhere; exact for NaN and infinity, and much faster than masked_fill."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.channels_last = channels_last
        ordered = (grad.permute(0, 2, 3, 1) if channels_last else grad).contiguous()
        integer = _INTEGERS[grad.element_size()]
        mask = unpack_bits(bits, grad.numel()).to(integer).view(ordered.shape)
        result = mask.bitwise_and_(ordered.view(integer)).view(grad.dtype)
        return result.permute(0, 3, 1, 2) if channels_last else result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Mask.apply(grads[0], *ctx.saved_tensors, ctx.channels_last), None, None


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool) -> Tensor:
        if inplace:
            output = input.relu_()
            ctx.mark_dirty(input)
        else:
            output = input.relu()
        # Bits follow memory, so that channels_last needs no copy.
        ctx.channels_last = output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last)
        ordered = output.permute(0, 2, 3, 1) if ctx.channels_last else output
        # bool() is true for NaN, whose gradient PyTorch's ReLU lets pass too, and much faster than a comparison.
        ctx.save_for_backward(pack_bits(ordered.contiguous().view(-1).bool()))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Mask.apply(grads[0], *ctx.saved_tensors, ctx.channels_last), None


class BitReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` in results and gradients, bit for bit; saves ``numel / 8`` bytes and not its output."""

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        # A compiled graph has no use for in-place operations: the compiler plans the memory itself.
        inplace = self.inplace and not torch.compiler.is_compiling()
        output: Tensor = _ReLU.apply(input, inplace)
        return output


def swap_relus_(model: nn.Module) -> int:
    """Turn every module of ``model`` that is exactly an ``nn.ReLU`` into a :class:`BitReLU`, in place.

    Calls of ``torch.nn.functional.relu`` are no modules and stay as they are.

    Returns:
        The number of modules changed.
    """
    relus = [module for module in model.modules() if type(module) is nn.ReLU]
    for module in relus:
        module.__class__ = BitReLU
    return len(relus)
