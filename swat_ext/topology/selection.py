"""How many elements a selection keeps, and a selection made for one call alone."""

from fractions import Fraction

import torch
from torch import Tensor

from swat_ext.functional import Packed
from swat_ext.ops import library as ops
from swat_ext.topology.sharing import is_traced

__all__ = ["kept", "kept_ratio", "refuse_tracing", "select_exactly", "select_exactly_again"]


def kept_ratio(sparsity: float) -> tuple[int, int]:
    """``1 - sparsity`` as numerator and denominator, of the decimal number that ``sparsity`` prints as."""
    return (1 - Fraction(repr(sparsity))).as_integer_ratio()


def kept(numel: int, ratio: tuple[int, int]) -> int:
    """``functional.keep_count`` in integers alone, which symbolic sizes of torch.compile pass through."""
    return -(-numel * ratio[0] // ratio[1])


def select_exactly(tensor: Tensor, ratio: tuple[int, int]) -> Packed:
    """``tensor`` packed with a threshold of its own."""
    return _packed(tensor, _threshold(tensor, ratio), ratio)


def select_exactly_again(
    tensor: Tensor, ratio: tuple[int, int], threshold: Tensor | None
) -> tuple[Packed, Tensor | None]:
    """:func:`select_exactly`, faster where ``threshold``, from the call before, still fits.

    On the CPU it fits if as many elements as are to be kept reach it: those are then the largest, whatever has happened
    to the tensor. On CUDA the host would have to wait for their number, and a selection takes less.

    Returns:
        What is kept, and the threshold for the next call.
    """
    if tensor.device.type != "cpu" or is_traced(tensor):
        return select_exactly(tensor, ratio), None
    if threshold is not None and threshold.dtype == tensor.dtype:
        packed = _packed(tensor, threshold, ratio)
        if packed.values.numel() == kept(tensor.numel(), ratio):
            return packed, threshold
    threshold = _threshold(tensor, ratio)
    return _packed(tensor, threshold, ratio), threshold


def _threshold(tensor: Tensor, ratio: tuple[int, int]) -> Tensor:
    if not tensor.numel():
        return tensor.new_zeros(())
    found: Tensor = torch.ops.swat_ext.kth_magnitude(tensor, kept(tensor.numel(), ratio))
    return found


def _packed(tensor: Tensor, threshold: Tensor, ratio: tuple[int, int]) -> Packed:
    limits = {}
    if tensor.device.type != "cpu":
        keep = kept(tensor.numel(), ratio)
        limits = {"keep": keep, "padded": True}
    values, mask = torch.ops.swat_ext.compress(tensor, threshold, **limits)
    return Packed(values, mask, tensor.shape)


def refuse_tracing(input: object) -> None:
    """Raise RuntimeError where a tracer records operators without their values, which a selection depends on."""
    if isinstance(input, torch.fx.Proxy) or torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "input: a sparse layer selects by value, which torch.jit.trace, torch.fx.symbolic_trace and exports by "
            "them cannot record; trace swat_ext.to_dense(model), which computes what model.eval() does, or let "
            "is_leaf_module of your own fx.Tracer name swat_ext.SWATLayer"
        )
