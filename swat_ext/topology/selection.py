"""Which elements are the largest, by a threshold that lives through training or by one for a call alone."""

from typing import Any

import torch
from torch import Tensor

from swat_ext.ops.packed import Packed

__all__ = ["Selection", "select_exactly"]

_NEVER = -1


class Selection:
    """The largest elements of a tensor that changes, by a threshold that is selected anew every so many steps.

    In between, the threshold meets the current values (spec: "Selection"). Whatever those are, each call keeps between
    0.8 and 1.25 times its budget, or up to 64 elements less or more where that is wider. Where the threshold would not,
    the call selects for itself and leaves the threshold as it is: a checkpoint may yet repeat an earlier call with it.

    Attributes:
        threshold: 0-dim, on the device and in the dtype of the layer's weight.
        clock: int64 ``[2]`` on the CPU, a tensor so that a compiled graph reads it anew at each call: optimizer steps
            made, and the step of the last selection, -1 before the first.
        kept: elements kept and elements in all at the last call; None before it and where to know would wait.
    """

    def __init__(self, like: Tensor) -> None:
        self.threshold = torch.zeros((), dtype=like.dtype, device=like.device)
        # Explicitly on the CPU: under torch.device("meta") a default would have no values.
        self.clock = torch.tensor([0, _NEVER], dtype=torch.int64, device="cpu")
        self.kept: tuple[int, int] | None = None
        self._exact: Tensor | None = None  # the threshold of the last exact selection

    @property
    def steps(self) -> int:
        """Optimizer steps counted."""
        return int(self.clock[0])

    @property
    def age(self) -> int | None:
        """Optimizer steps since the last selection; None before the first."""
        steps, selected = self.clock.tolist()
        return None if selected == _NEVER else steps - selected

    def advance(self) -> None:
        """Count an optimizer step."""
        self.clock[0] += 1

    def forget(self) -> None:
        """Select anew at the next call."""
        self.clock[1] = _NEVER

    def move(self, like: Tensor) -> None:
        """Follow the weight to its device and dtype."""
        if self.threshold.is_meta or like.is_meta:
            self.threshold = torch.zeros((), dtype=like.dtype, device=like.device)
            self.forget()
        self.threshold = self.threshold.to(like.device, like.dtype)

    def select(self, tensor: Tensor, keep: int, period: int) -> Packed:
        """About the ``keep`` largest elements of ``tensor``, packed; see the class.

        Args:
            tensor: any shape and strides.
            keep: the budget, at least 1 unless ``tensor`` is empty.
            period: optimizer steps from one selection of the threshold to the next.
        """
        values, mask = torch.ops.swat_ext.select(tensor, self.threshold, self.clock, keep, period, _is_padded(tensor))
        packed = Packed(values, mask, tensor.shape)
        self.note(packed, tensor)
        return packed

    def select_exactly(self, tensor: Tensor, keep: int) -> Packed:
        """The ``keep`` largest elements, ties at the threshold all kept, whatever was selected before.

        On the CPU the threshold of the last exact selection is tried first. It fits if exactly ``keep`` elements reach
        it: those are then the largest. On CUDA the host would have to wait for their number.
        """
        if self._exact is not None and not _is_padded(tensor) and self._exact.dtype == tensor.dtype:
            values, mask = torch.ops.swat_ext.compress(tensor, self._exact)
            if values.numel() == keep:
                return Packed(values, mask, tensor.shape)
        packed, threshold = select_exactly(tensor, keep)
        if not torch.compiler.is_compiling():
            self._exact = threshold
        return packed

    def note(self, packed: Packed, tensor: Tensor) -> None:
        """Remember how much of ``tensor`` is kept."""
        if not torch.compiler.is_compiling():
            self.kept = None if _is_padded(tensor) else (packed.values.numel(), tensor.numel())

    def state(self) -> dict[str, Any]:
        """What decides the next selections, in tensors and numbers alone."""
        steps, selected = self.clock.tolist()
        return {"threshold": self.threshold.clone(), "steps": steps, "selected": selected}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`."""
        self.threshold.copy_(state["threshold"])
        self.clock.copy_(torch.tensor([state["steps"], state["selected"]]))


def select_exactly(tensor: Tensor, keep: int) -> tuple[Packed, Tensor]:
    """The ``keep`` largest elements of ``tensor``, ties at the threshold all kept, and that threshold (0-dim).

    Of ties on CUDA and in compiled graphs, where lengths are known beforehand, only as many as have room.
    """
    if not tensor.numel():
        nothing = tensor.new_zeros(())
        values, mask = torch.ops.swat_ext.compress(tensor, nothing)
        return Packed(values, mask, tensor.shape), nothing
    threshold = torch.ops.swat_ext.kth_magnitude(tensor, keep)
    budget: dict[str, Any] = {"keep": keep, "padded": True} if _is_padded(tensor) else {}
    values, mask = torch.ops.swat_ext.compress(tensor, threshold, **budget)
    return Packed(values, mask, tensor.shape), threshold


def _is_padded(tensor: Tensor) -> bool:
    """Whether the length of packed values is to follow from sizes alone: to know it would wait, or cannot be traced."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"
