"""Which kernels a layer runs on, and why: a rule over the layer alone, so that it is the same in every process."""

import functools
import json
from collections.abc import Sequence
from importlib import resources
from typing import Literal, NamedTuple

from swat_ext import _C

__all__ = ["Choice", "choose_backend", "kind_of"]

# Not measured yet: these kernels are those of AVX2 with twice the registers, and so at least as fast.
_MEASURED_AS = {"avx512vl": "avx2"}


class Choice(NamedTuple):
    """A backend, and the reason for it in a few words.

    Attributes:
        backend: the kernels; both compute the same and save the same.
        reason: why those.
    """

    backend: Literal["sparse", "dense"]
    reason: str


def choose_backend(
    requested: str,
    weight_size: Sequence[int],
    groups: int,
    sparsity: float,
    activation_sparsity: float,
    device: str,
) -> Choice:
    """Choose the kernels of one layer.

    Args:
        requested: "sparse" and "dense" are taken at their word; "auto" decides by the other arguments and a table of
            measurements, ``break_even.json``, which ``bench/break_even.py`` makes.
        weight_size: ``[O, C / groups, kh, kw]`` or ``[out, in]``.
        groups: of the convolution.
        sparsity, activation_sparsity: of the layer, in [0, 1).
        device: type of the weight's device.
    """
    if requested != "auto":
        return Choice("sparse" if requested == "sparse" else "dense", "asked for")
    if device == "cuda":
        return Choice("dense", "no kernel has been timed on CUDA yet")
    # Two of the three passes skip by the weight, one by the activation.
    skipped = round((2 * sparsity + activation_sparsity) / 3, 9)
    kind = kind_of(weight_size, groups)
    least = _break_even(_C.isa(), kind, weight_size[0] // groups)
    if least > 1:
        return Choice("dense", f"{kind} layers of this size do not gain")
    reason = f"skips {skipped:.0%} of the work, and {kind} layers gain from {least:.0%}"
    return Choice("sparse" if skipped >= least else "dense", reason)


def kind_of(weight_size: Sequence[int], groups: int) -> str:
    """The row of the table that a layer belongs to."""
    if len(weight_size) == 2:
        return "linear"
    if groups > 1:
        return "grouped"
    return "1x1" if tuple(weight_size[2:]) == (1, 1) else "spatial"


def _break_even(isa: str, kind: str, channels: int) -> float:
    """The least share of the work to skip at which the sparse kernels are as fast, for so many output channels."""
    rows = _table()[_MEASURED_AS.get(isa, isa)][kind]
    return next((share for most, share in rows if channels <= most), rows[-1][1])


@functools.cache
def _table() -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By instruction set and kind: ``[output channels of a group at most, share]``, ascending."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = json.loads(
        resources.files("swat_ext.ops").joinpath("break_even.json").read_text()
    )["break_even"]
    return found
