"""What to make of a model: one immutable, checked description that :func:`swat_ext.sparsify_` follows."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

from swat_ext.topology.methods import METHODS, Method

__all__ = [
    "BATCHNORMS",
    "Backend",
    "SWATConfig",
    "check_block_size",
    "check_method",
    "check_name",
    "check_period",
    "check_sparsity",
]

Backend = Literal["auto", "sparse", "dense"]
# What a batch normalisation may keep for its backward pass.
BATCHNORMS = ("exact", "bf16", "int8")

# Every name that an argument may carry.
_NAMES: dict[str, tuple[str, ...]] = {
    "distribution": ("uniform", "erk", "momentum"),
    "granularity": ("unstructured", "kernel", "filter", "block"),
    "batchnorm": BATCHNORMS,
    "backend": get_args(Backend),
}


def check_sparsity(name: str, value: object) -> float:
    """``value`` as a float in [0, 1).

    Raises:
        TypeError: not a real number. ValueError: out of range or NaN. Both name ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1), the fraction of zeros, got {value!r}")
    if math.isnan(value) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), the fraction of zeros, got {value!r}")
    return float(value)


def check_period(name: str, value: object) -> int:
    """``value`` as an integer of at least 1; TypeError or ValueError, naming ``name``, otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer of at least 1, in optimizer steps, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, in optimizer steps, got {value!r}")
    return value


def check_name(kind: str, value: object, name: str | None = None) -> None:
    """Raise ValueError, naming ``name``, unless ``value`` is one of the names that an argument ``kind`` may carry."""
    if value not in _NAMES[kind]:
        known = ", ".join(map(repr, _NAMES[kind]))
        raise ValueError(f"{name or kind}: expected one of {known}, got {value!r}")


def check_method(value: object) -> None:
    """Raise unless ``value`` is a name of :data:`swat_ext.topology.METHODS` or a :class:`swat_ext.topology.Method`."""
    if not isinstance(value, Method) and not (isinstance(value, str) and value in METHODS):
        known = ", ".join(map(repr, METHODS))
        raise ValueError(f"method: expected one of {known} or a swat_ext.topology.Method, got {value!r}")


def check_block_size(value: object) -> tuple[int, int]:
    """``value`` as output and input channels of a block; TypeError or ValueError otherwise."""
    what = f"block_size: expected (output channels, input channels), integers of at least 1, got {value!r}"
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) != 2:
        raise TypeError(what)
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(what)
        if item < 1:
            raise ValueError(what)
    return value[0], value[1]


@dataclass(frozen=True)
class SWATConfig:
    """How :func:`swat_ext.sparsify_` makes a model sparse (Raihan and Aamodt, arXiv 2001.01969).

    Attributes:
        sparsity: fraction of zeros in each layer's weight, in [0, 1).
        activation_sparsity: fraction of zeros in the input saved for each weight gradient, in [0, 1); None means that
            of the layer's weight, whatever the distribution makes it.
        method: "swat" keeps the largest weights as they are at each moment. "static", "set" and "rigl" hold a pattern,
            random at first, outside which weights are exactly zero; or a :class:`swat_ext.topology.Method`.
        distribution: how one budget is shared over the layers. "uniform" (SWAT-U) gives each layer ``sparsity``; "erk"
            (SWAT-ERK) gives layers with fewer weights more of them; "momentum" (SWAT-M) gives more to layers that
            learn more, after each optimizer step anew, and needs a :class:`swat_ext.SWATScheduler`. Under the last two
            ``sparsity`` is that of all sparse layers together.
        granularity: what one decision keeps or drops: "unstructured" a weight, "kernel" ``W[o, i]``, "filter" ``W[o]``,
            "block" a rectangle of channels at one tap. Linear layers are unstructured under "kernel" and "filter".
        block_size: output and input channels of a "block".
        topk_period: optimizer steps from one selection of an activation's threshold to the next, at least 1. Published:
            10 or 20 for CIFAR, 5 for ImageNet.
        weight_topk_period: the same of a weight's. 1 keeps the budget of weights exactly, for some 3% of a step's time.
        skip: name patterns (:mod:`fnmatch`, case matters) of layers to leave dense. None leaves the first convolution
            dense under "uniform", as the paper does, and none under "erk" and "momentum"; an empty tuple leaves none. A
            layer without weights that a pattern matches stays PyTorch's own.
        batchnorm: what BatchNorm keeps for its backward pass; "exact" its input, "bf16" and "int8" the normalised input
            in two bytes or in one. See :class:`swat_ext.SWATBatchNorm2d`.
        backend: "sparse" for this library's kernels, "dense" for PyTorch's on unpacked tensors, "auto" for those that
            a table of measurements says are faster for such a layer, the same in every process. Each computes and saves
            the same. Neither need be as fast as PyTorch's own layer where a layer is small: :func:`swat_ext.tune_`
            measures all three, and ``skip`` leaves a layer dense.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    sparsity: float
    activation_sparsity: float | None = None
    _: KW_ONLY
    method: str | Method = "swat"
    distribution: str = "uniform"
    granularity: str = "unstructured"
    block_size: tuple[int, int] = (8, 1)
    topk_period: int = 10
    weight_topk_period: int = 1
    skip: Sequence[str] | None = None
    batchnorm: str = "exact"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity("sparsity", self.sparsity))
        if self.activation_sparsity is not None:
            checked = check_sparsity("activation_sparsity", self.activation_sparsity)
            object.__setattr__(self, "activation_sparsity", checked)
        check_period("topk_period", self.topk_period)
        check_period("weight_topk_period", self.weight_topk_period)
        for name in _NAMES:
            check_name(name, getattr(self, name))
        check_method(self.method)
        object.__setattr__(self, "block_size", check_block_size(self.block_size))
        if self.distribution == "momentum" and self.method != "swat":
            raise ValueError(
                f"distribution: expected 'uniform' or 'erk' for method {self.method!r}, which keeps a fixed number of "
                "weights in each layer, got 'momentum'"
            )
        if self.skip is not None:
            object.__setattr__(self, "skip", _patterns(self.skip))


def _patterns(skip: object) -> tuple[str, ...]:
    # A lone string is a sequence of strings too; taken as one it would match single letters.
    if isinstance(skip, (str, bytes)) or not isinstance(skip, Sequence):
        raise TypeError(f"skip: expected None or a sequence of name patterns, got {skip!r}")
    for pattern in skip:
        if not isinstance(pattern, str):
            raise TypeError(f"skip: expected name patterns of type str, got {pattern!r}")
    return tuple(skip)
