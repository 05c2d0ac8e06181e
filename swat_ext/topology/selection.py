"""Which elements are the largest, by a threshold that lives through training or by one for a call alone."""

from typing import Any

import torch
from torch import Tensor

from swat_ext.ops.library import most_kept
from swat_ext.ops.packed import Packed
from swat_ext.topology.budget import Budget

__all__ = ["Selection", "is_padded", "select_exactly"]

_NEVER = -1
_STEPS, _SELECTED, _PERIOD = 0, 1, 2
_BUDGET = slice(3, 5)


class Selection:
    """The largest elements of a tensor that changes, by a threshold that is selected anew every so many steps.

    In between, the threshold meets the current values (spec: "Selection"). Whatever those are, each call keeps between
    0.8 and 1.25 times its budget; of small tensors up to a 64th of the elements more or less, at most 64. Where the
    threshold would not, the call selects for itself and leaves the threshold as it is: a checkpoint may yet repeat an
    earlier call with it.

    Attributes:
        threshold: 0-dim, on the device and in the dtype of the layer's weight.
        state: int64 ``[5]`` on the CPU, a tensor so that a compiled graph reads it anew at each call: optimizer steps
            made, the step of the last selection (-1 before the first), the period, and the budget as a fraction.
        moves: whether the budget changes while training. A compiled graph, whose sizes must not follow, then has room
            for all elements.
        kept: elements kept and elements in all at the last call; None before it and where to know would wait.
    """

    def __init__(self, like: Tensor, budget: Budget, period: int) -> None:
        # A weight on the meta device has no values yet; what is known of it has.
        self.threshold = torch.zeros((), dtype=like.dtype, device="cpu" if like.is_meta else like.device)
        # Explicitly on the CPU: under torch.device("meta") a default would have no values.
        self.state = torch.tensor([0, _NEVER, period, *budget], dtype=torch.int64, device="cpu")
        self.moves = False
        self.kept: tuple[int, int] | None = None
        self._budget, self._period = budget, period
        self._exact: Tensor | None = None  # the threshold of the last exact selection

    @property
    def budget(self) -> Budget:
        """The share of elements to keep."""
        return self._budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        if value != self._budget:
            self._budget = value
            self.state[_BUDGET] = torch.tensor(value)

    @property
    def period(self) -> int:
        """Optimizer steps from one selection of the threshold to the next."""
        return self._period

    @period.setter
    def period(self, value: int) -> None:
        if value != self._period:
            self._period = value
            self.state[_PERIOD] = value

    @property
    def steps(self) -> int:
        """Optimizer steps counted."""
        return int(self.state[_STEPS])

    @property
    def age(self) -> int | None:
        """Optimizer steps since the last selection; None before the first."""
        steps, selected = self.state[:_PERIOD].tolist()
        return None if selected == _NEVER else steps - selected

    def advance(self) -> None:
        """Count an optimizer step."""
        self.state[_STEPS] += 1

    def forget(self) -> None:
        """Select anew at the next call."""
        self.state[_SELECTED] = _NEVER

    def move(self, like: Tensor) -> None:
        """Follow the weight to its device and dtype."""
        device = self.threshold.device if like.is_meta else like.device
        self.threshold = self.threshold.to(device, like.dtype)
        self._exact = None

    def select(self, tensor: Tensor) -> Packed:
        """About the largest elements of ``tensor`` (any shape and strides), packed; see the class."""
        room = self.room(tensor.numel()) if is_padded(tensor) else None
        values, mask = torch.ops.swat_ext.select(tensor, self.threshold, self.state, room)
        packed = Packed(values, mask, tensor.shape)
        self.note(packed, tensor)
        return packed

    def select_exactly(self, tensor: Tensor) -> Packed:
        """The largest elements of ``tensor``, ties at the threshold all kept, whatever was selected before.

        On the CPU the threshold of the last exact selection is tried first. It fits if exactly as many elements as are
        to be kept reach it: those are then the largest. On CUDA the host would have to wait for their number.
        """
        if self.moves and torch.compiler.is_compiling():
            return self.select_once(tensor)
        keep = self._budget.count(tensor.numel())
        if self._exact is not None and not is_padded(tensor) and self._exact.dtype == tensor.dtype:
            values, mask = torch.ops.swat_ext.compress(tensor, self._exact)
            if values.numel() == keep:
                return Packed(values, mask, tensor.shape)
        packed, threshold = select_exactly(tensor, keep)
        if not torch.compiler.is_compiling():
            self._exact = threshold
        return packed

    def select_once(self, tensor: Tensor) -> Packed:
        """The largest elements of ``tensor``, ties at the threshold all kept, leaving nothing behind."""
        if self.moves and torch.compiler.is_compiling():
            # The budget is read when the graph runs: as a number it would be a part of the graph.
            state = self.state.clone()
            state[_SELECTED] = _NEVER
            threshold = torch.zeros_like(self.threshold)
            values, mask = torch.ops.swat_ext.select(tensor, threshold, state, tensor.numel())
            return Packed(values, mask, tensor.shape)
        return select_exactly(tensor, self._budget.count(tensor.numel()))[0]

    def repeat(self, tensor: Tensor) -> Packed:
        """What the threshold as it stands selects of ``tensor``, whether a selection is due or not."""
        keep = self._budget.count(tensor.numel())
        room = self.room(tensor.numel()) if is_padded(tensor) else None
        threshold = self.threshold.to(tensor.dtype)
        values, mask = torch.ops.swat_ext.compress(tensor, threshold, keep=keep, room=room)
        return Packed(values, mask, tensor.shape)

    def room(self, numel: int) -> int:
        """Length of the packed values of a tensor, where it is to follow from sizes alone."""
        if self.moves and torch.compiler.is_compiling():
            return numel
        return most_kept(self._budget.count(numel), numel)

    def note(self, packed: Packed, tensor: Tensor) -> None:
        """Remember how much of ``tensor`` is kept."""
        if not torch.compiler.is_compiling():
            self.kept = None if is_padded(tensor) else (packed.values.numel(), tensor.numel())

    def get_state(self) -> dict[str, Any]:
        """What decides the next selections beside budget and period, in tensors and numbers alone."""
        steps, selected = self.state[:_PERIOD].tolist()
        return {"threshold": self.threshold.clone(), "steps": steps, "selected": selected}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`get_state` gave."""
        self.threshold.copy_(state["threshold"])
        self.state[:_PERIOD] = torch.tensor([state["steps"], state["selected"]])


def select_exactly(tensor: Tensor, keep: int) -> tuple[Packed, Tensor]:
    """The ``keep`` largest elements of ``tensor``, ties at the threshold all kept, and that threshold (0-dim).

    Of ties on CUDA and in compiled graphs, where lengths are known beforehand, only as many as have room.
    """
    if not tensor.numel():
        nothing = tensor.new_zeros(())
        values, mask = torch.ops.swat_ext.compress(tensor, nothing)
        return Packed(values, mask, tensor.shape), nothing
    threshold = torch.ops.swat_ext.kth_magnitude(tensor, keep)
    padded = is_padded(tensor)
    bounds: dict[str, Any] = {"keep": keep, "room": most_kept(keep, tensor.numel())} if padded else {}
    values, mask = torch.ops.swat_ext.compress(tensor, threshold, **bounds)
    return Packed(values, mask, tensor.shape), threshold


def is_padded(tensor: Tensor) -> bool:
    """Whether the length of packed values is to follow from sizes alone: to know it would wait, or cannot be traced."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"
