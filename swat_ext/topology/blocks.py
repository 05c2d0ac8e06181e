"""What one decision keeps or drops: a single weight, a kernel, a filter, or a block of channels (spec: "Granularity").

A block is a rectangle of a weight: ``(o, i, kh, kw)`` of a convolution's, ``(o, i)`` of a linear layer's. Blocks tile
the weight from its first element on; those at its ends may be smaller.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Block", "block_norms", "block_of", "grid_of", "spread"]

Block = tuple[int, ...]


def block_of(granularity: str, size: Sequence[int], block_size: tuple[int, int] = (8, 1)) -> Block | None:
    """The block of a weight of ``size``, or None where each weight is decided on alone.

    Args:
        granularity: "unstructured", "kernel", "filter" or "block". Linear layers, which have no kernels, are
            unstructured under the middle two (paper, section 3).
        size: ``[O, I, kh, kw]`` or ``[out, in]``.
        block_size: output and input channels of a "block", which covers them at one tap.
    """
    if granularity == "block":
        sides = (*block_size, *[1] * (len(size) - 2))
    elif granularity == "unstructured" or len(size) == 2:
        return None
    else:
        sides = (1, 1 if granularity == "kernel" else size[1], *size[2:])
    block = tuple(min(side, max(extent, 1)) for side, extent in zip(sides, size, strict=True))
    return block if math.prod(block) > 1 else None


def grid_of(size: Sequence[int], block: Block | None) -> list[int]:
    """Numbers of blocks along each axis; without blocks ``size``."""
    if block is None:
        return list(size)
    return [-(-extent // side) for extent, side in zip(size, block, strict=True)]


def block_norms(weight: Tensor, block: Block | None) -> Tensor:
    """The L1 norm of each block: ``[ceil(O / o), ceil(I / i), ...]``; without blocks the magnitudes."""
    magnitudes = weight.abs()
    if block is None:
        return magnitudes
    short = [-extent % side for extent, side in zip(weight.shape, block, strict=True)]
    if any(short):
        magnitudes = pad(magnitudes, [side for before in reversed(short) for side in (0, before)])
    for axis in reversed(range(len(block))):
        magnitudes = magnitudes.unflatten(axis, (-1, block[axis]))
    return magnitudes.sum(list(range(1, 2 * len(block), 2)))


def spread(grid: Tensor, size: Sequence[int], block: Block | None) -> Tensor:
    """A tensor of ``size`` that has at each element what ``grid``, shaped as :func:`block_norms`, has for its block.

    A view where every axis has one block or blocks of one element.
    """
    if block is None:
        return grid
    for axis, (extent, side) in enumerate(zip(size, block, strict=True)):
        if side >= extent:
            grid = grid.expand([*grid.shape[:axis], extent, *grid.shape[axis + 1 :]])
        elif side > 1:
            grid = torch.repeat_interleave(grid, side, axis).narrow(axis, 0, extent)
    return grid
