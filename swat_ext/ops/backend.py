"""Which kernels a layer runs on, and why."""

from typing import Literal, NamedTuple

from swat_ext.config import Backend

__all__ = ["Choice", "choose_backend"]

# Sparse kernels win once they skip about this share of the multiplications: below it, dense ones' better blocking does.
_BREAK_EVEN = 0.5
# The sparse weight gradient vectorises over the output channels of a group; with fewer than this it mostly idles.
_LEAST_GROUP_CHANNELS = 8


class Choice(NamedTuple):
    """A backend, and the reason for it in a few words.

    Attributes:
        backend: the kernels; both compute the same and save the same.
        reason: why those, with the times where they were measured.
        speedup: how many times as fast as PyTorch's dense layer, below 1 for slower; None where not measured.
    """

    backend: Literal["sparse", "dense"]
    reason: str
    speedup: float | None = None


def choose_backend(requested: Backend, sparsity: float, activation_sparsity: float, group_out_channels: int) -> Choice:
    """Choose the kernels of one layer by a rule, which stands until the layer has been measured.

    Args:
        requested: "sparse" and "dense" are taken at their word; "auto" decides by the other arguments.
        sparsity, activation_sparsity: of the layer, in [0, 1).
        group_out_channels: output channels in one group (1 for a depthwise convolution).

    Returns:
        :class:`Choice`.
    """
    if requested != "auto":
        return Choice(requested, "asked for")
    if group_out_channels < _LEAST_GROUP_CHANNELS:
        return Choice("dense", f"only {group_out_channels} output channel{'s' * (group_out_channels > 1)} a group")
    # Two of the three passes skip by the weight, one by the activation.
    skipped = (2 * sparsity + activation_sparsity) / 3
    if skipped < _BREAK_EVEN:
        return Choice("dense", f"skips {skipped:.0%} of the work, under {_BREAK_EVEN:.0%}")
    return Choice("sparse", f"skips {skipped:.0%} of the work")
