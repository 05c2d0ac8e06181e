"""What to make of a model: one immutable, checked description that :func:`swat_ext.sparsify_` follows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "BATCHNORMS",
    "Backend",
    "SWATConfig",
    "check_backend",
    "check_batchnorm",
    "check_period",
    "check_sparsity",
]

Backend = Literal["auto", "sparse", "dense"]
# What a batch normalisation may keep for its backward pass.
BATCHNORMS = ("exact", "bf16", "int8")

# Every name that an argument may carry, and the ones of them that this version can do.
_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "distribution": (("uniform", "erk", "momentum"), ("uniform",)),
    "granularity": (("unstructured", "kernel", "filter", "block"), ("unstructured",)),
    "batchnorm": (BATCHNORMS, BATCHNORMS),
    "backend": (get_args(Backend), get_args(Backend)),
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


def check_backend(value: object) -> None:
    """Raise ValueError unless ``value`` is "auto", "sparse" or "dense"."""
    _check_name("backend", value)


def check_batchnorm(name: str, value: object) -> None:
    """Raise ValueError, naming ``name``, unless ``value`` is "exact", "bf16" or "int8"."""
    _check_name("batchnorm", value, name)


def _check_name(kind: str, value: object, name: str | None = None) -> None:
    known, available = _NAMES[kind]
    name = name or kind
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    if value not in available:
        raise NotImplementedError(
            f"{name}: {value!r} is not implemented yet; this version has {', '.join(map(repr, available))}"
        )


@dataclass(frozen=True)
class SWATConfig:
    """How :func:`swat_ext.sparsify_` makes a model sparse (Raihan and Aamodt, arXiv 2001.01969).

    Attributes:
        sparsity: fraction of zeros in each layer's weight, in [0, 1).
        activation_sparsity: fraction of zeros in the input saved for each weight gradient, in [0, 1); None means that
            of the layer's weight.
        distribution: how the budget is shared over the layers; "uniform" (SWAT-U) gives each layer ``sparsity``.
        granularity: what one decision keeps or drops; "unstructured" decides on each element.
        topk_period: optimizer steps from one selection of a threshold to the next, at least 1. Published: 10 or 20 for
            CIFAR, 5 for ImageNet.
        skip: name patterns (:mod:`fnmatch`, case matters) of layers to leave dense. None leaves the first convolution
            dense under "uniform", as the paper does; an empty tuple leaves none. A layer without weights that a pattern
            matches stays PyTorch's own.
        batchnorm: what BatchNorm keeps for its backward pass; "exact" its input, "bf16" and "int8" the normalised input
            in two bytes or in one. See :class:`swat_ext.SWATBatchNorm2d`.
        backend: "sparse" for this library's kernels, "dense" for PyTorch's on unpacked tensors, "auto" for those that
            a table of measurements says are faster for such a layer, the same in every process. Each computes and saves
            the same. Neither need be as fast as PyTorch's own layer where a layer is small: :func:`swat_ext.tune_`
            measures all three, and ``skip`` leaves a layer dense.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
        NotImplementedError: a name that is known and not available in this version.
    """

    sparsity: float
    activation_sparsity: float | None = None
    distribution: str = "uniform"
    granularity: str = "unstructured"
    topk_period: int = 10
    skip: Sequence[str] | None = None
    batchnorm: str = "exact"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity("sparsity", self.sparsity))
        if self.activation_sparsity is not None:
            checked = check_sparsity("activation_sparsity", self.activation_sparsity)
            object.__setattr__(self, "activation_sparsity", checked)
        check_period("topk_period", self.topk_period)
        for name in _NAMES:
            _check_name(name, getattr(self, name))
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
