"""How one budget is shared over the layers (spec: "Distribution")."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from swat_ext.ops.packed import Packed, take

__all__ = ["by_momentum", "cubic", "erk", "momentum_of"]

# From this share on a layer is dense (spec: "Distribution").
_FULL = 0.99
# Of sums of floating point numbers that should be whole.
_ROUNDING = 1e-9


def erk(sizes: Sequence[Sequence[int]], sparsity: float) -> list[int]:
    """Weights that each layer keeps: in proportion to the sum of its sides over their product, all at ``1 - sparsity``.

    Erdos-Renyi-Kernel (Evci et al., ICML 2020, section 3): density ``eps * (O + I + kh + kw) / (O * I * kh * kw)``, of
    a linear layer ``eps * (O + I) / (O * I)``. Layers that would pass 1 are dense, and eps is solved again over the
    rest. Each count is rounded up, so that their sum passes the budget by less than the number of layers.

    Args:
        sizes: of the layers' weights.
        sparsity: of all of them together, in [0, 1).
    """
    numels = [math.prod(size) for size in sizes]
    budget = (1 - sparsity) * sum(numels)
    dense: set[int] = set()
    while True:
        rest = [layer for layer in range(len(sizes)) if layer not in dense]
        if not rest:
            return numels
        eps = (budget - sum(numels[layer] for layer in dense)) / sum(sum(sizes[layer]) for layer in rest)
        full = {layer for layer in rest if eps * sum(sizes[layer]) > numels[layer]}
        if not full:
            break
        dense |= full
    return [
        numel if layer in dense else max(1, math.ceil(eps * sum(size) - _ROUNDING))
        for layer, (size, numel) in enumerate(zip(sizes, numels, strict=True))
    ]


def by_momentum(means: Sequence[float], numels: Sequence[int], keep: float) -> list[int]:
    """Weights that each layer keeps: in proportion to its mean magnitude of momentum (SWAT-M).

    ``ceil(m_l / sum(m) * keep)``. A layer that would pass 0.99 of its size is dense, and what it had too much is shared
    equally over the others, until none is left.

    Args:
        means: of each layer, at least 0 and not all 0.
        numels: elements of each layer's weight.
        keep: weights to keep in all; their sum passes it by less than the number of layers.
    """
    total = sum(means)
    kept = [mean / total * keep for mean in means]
    open_ = set(range(len(kept)))
    while full := {layer for layer in open_ if kept[layer] > _FULL * numels[layer]}:
        open_ -= full
        excess = sum(kept[layer] - numels[layer] for layer in full)
        for layer in full:
            kept[layer] = numels[layer]
        for layer in open_:
            kept[layer] += excess / len(open_)
    return [min(max(1, math.ceil(count - _ROUNDING)), numel) for count, numel in zip(kept, numels, strict=True)]


def momentum_of(weight: Tensor, optimizer: Optimizer, kept: Packed) -> Tensor:
    """The mean magnitude of ``optimizer``'s momentum over the kept elements of ``weight``, a 0-dim tensor.

    SGD: ``momentum_buffer``; Adam and its kin: ``exp_avg / (sqrt(exp_avg_sq) + 1e-8)``.

    Raises:
        ValueError: ``optimizer`` keeps neither for this weight.
    """
    state = optimizer.state.get(weight, {})

    def kept_of(name: str) -> Tensor:
        return take(state[name], kept.mask, kept.values.shape[0])

    if isinstance(state.get("momentum_buffer"), Tensor):
        momentum = kept_of("momentum_buffer")
    elif isinstance(state.get("exp_avg"), Tensor) and isinstance(state.get("exp_avg_sq"), Tensor):
        momentum = kept_of("exp_avg") / (kept_of("exp_avg_sq").sqrt() + 1e-8)
    else:
        raise ValueError(
            f"optimizer: expected SGD with momentum or one of Adam's kin for distribution='momentum', got "
            f"{type(optimizer).__name__} with {sorted(map(str, state)) or 'nothing'} kept for a weight"
        )
    # Values past the last kept one are zeros; on CUDA there are some.
    number = (kept.values != 0).sum() if kept.values.device.type != "cpu" else max(1, kept.values.numel())
    return momentum.abs().sum(dtype=torch.float64) / number


def cubic(progress: float) -> float:
    """The share of the final sparsity at the share ``progress`` of the ramp: from 0 to 1 (Zhu and Gupta 2017)."""
    return 1 - (1 - min(max(progress, 0.0), 1.0)) ** 3
