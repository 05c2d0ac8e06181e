"""What the spec keeps of a weight by kernels, filters and blocks: found by a loop, for tests."""

import itertools
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

GRANULARITIES: dict[str, dict[str, Any]] = {
    "kernel": {"granularity": "kernel"},
    "filter": {"granularity": "filter"},
    **{
        f"block {o}x{i}": {"granularity": "block", "block_size": (o, i)}
        for o, i in ((8, 1), (3, 2), (1, 1), (1, 4), (5, 3), (100, 100))
    },
}


def sides_of(size: tuple[int, ...], granularity: str, block_size: tuple[int, int] = (8, 1)) -> tuple[int, ...]:
    if len(size) == 2:
        return block_size if granularity == "block" else (1, 1)
    inputs, *taps = size[1:]
    return {"kernel": (1, 1, *taps), "filter": (1, inputs, *taps), "block": (*block_size, 1, 1)}[granularity]


def blocks_of(size: tuple[int, ...], sides: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Where each block is; those at the ends are what is left."""
    corners = itertools.product(*(range(0, extent, side) for extent, side in zip(size, sides, strict=True)))
    return [tuple(slice(at, at + side) for at, side in zip(corner, sides, strict=True)) for corner in corners]


def kept_of(weight: Tensor, sparsity: float, granularity: str, block_size: tuple[int, int] = (8, 1)) -> Tensor:
    """Bool: what the spec keeps of ``weight``, block by block."""
    size = tuple(weight.shape)
    blocks = blocks_of(size, sides_of(size, granularity, block_size))
    norms = torch.stack([weight.detach().cpu().double()[block].abs().sum() for block in blocks])
    threshold = norms.sort(descending=True).values[math.ceil((1 - Fraction(str(sparsity))) * len(blocks)) - 1]
    kept = torch.zeros(size, dtype=torch.bool)
    for block, norm in zip(blocks, norms, strict=True):
        kept[block] = bool(~(norm < threshold))
    return kept


def top(x: Tensor, sparsity: float) -> Tensor:
    keep = math.ceil((1 - Fraction(str(sparsity))) * x.numel())
    return x * (x.abs() >= x.abs().flatten().sort(descending=True).values[keep - 1])
