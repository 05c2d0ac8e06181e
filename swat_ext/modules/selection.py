"""How many elements a selection keeps, and a selection made for one call alone."""

import weakref
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swat_ext import ops
from swat_ext.functional import Packed
from swat_ext.modules.shared import has_identity

__all__ = ["Evaluated", "evaluated", "kept", "kept_ratio", "refuse_tracing", "select_exactly"]

_SAMPLES = 64


def kept_ratio(sparsity: float) -> tuple[int, int]:
    """``1 - sparsity`` as numerator and denominator, of the decimal number that ``sparsity`` prints as."""
    return (1 - Fraction(repr(sparsity))).as_integer_ratio()


def kept(numel: int, ratio: tuple[int, int]) -> int:
    """``functional.keep_count`` in integers alone, which symbolic sizes of torch.compile pass through."""
    return -(-numel * ratio[0] // ratio[1])


def select_exactly(tensor: Tensor, ratio: tuple[int, int]) -> Packed:
    """``tensor`` packed with a threshold of its own."""
    if tensor.numel():
        threshold = torch.ops.swat_ext.kth_magnitude(tensor, kept(tensor.numel(), ratio))
    else:
        threshold = tensor.new_zeros(())
    limits = {}
    if tensor.device.type != "cpu":
        keep = kept(tensor.numel(), ratio)
        limits = {"keep": keep, "capacity": ops.capacity(keep, tensor.numel())}
    values, mask = torch.ops.swat_ext.compress(tensor, threshold, **limits)
    return Packed(values, mask, tensor.shape)


class Evaluated(NamedTuple):
    """The packed weight of an evaluation, for the next one.

    Attributes:
        weight: the parameter that it was selected from.
        state: its version, address, dtype and strides, and the share kept.
        sample: some of its elements. ``weight.data.mul_()``, as averages of models are often written, changes no
            version: what changes all elements shows here, a few changed by ``.data`` pass unseen, as by autograd.
        packed: what was selected.
    """

    weight: weakref.ref[Tensor]
    state: tuple[object, ...]
    sample: Tensor
    packed: Packed


def evaluated(weight: Tensor, ratio: tuple[int, int], before: Evaluated | None) -> Evaluated | None:
    """``before`` if it still holds for ``weight``, else a new selection; None where none may be kept.

    Kept are selections from parameters on the CPU whose changes show: not from inference tensors, which count no
    versions, and not what is traced. Looking at a sample would wait for a CUDA device, which selects in less.
    """
    if not has_identity(weight) or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.is_inference():
        return None
    if weight.numel() == 0 or not _is_dense(weight):
        return None
    # Of inference mode it would serve inference mode alone.
    with torch.inference_mode(False), torch.no_grad():
        state = (weight._version, weight.data_ptr(), weight.dtype, weight.stride(), ratio)
        step = max(1, weight.numel() // _SAMPLES)
        # As it lies in memory: in logical order a channels_last weight would be copied first.
        sample = weight.as_strided((weight.numel() // step,), (step,))
        known = before is not None and before.weight() is weight and before.state == state
        if before is not None and known and torch.equal(before.sample, sample):
            return before
        return Evaluated(weakref.ref(weight), state, sample.clone(), select_exactly(weight.detach(), ratio))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def refuse_tracing(input: object) -> None:
    """Raise RuntimeError where a tracer records operators without their values, which a selection depends on."""
    if isinstance(input, torch.fx.Proxy) or torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "input: a sparse layer selects by value, which torch.jit.trace, torch.fx.symbolic_trace and exports by "
            "them cannot record; trace swat_ext.to_dense(model), which computes what model.eval() does, or let "
            "is_leaf_module of your own fx.Tracer name swat_ext.SWATLayer"
        )
