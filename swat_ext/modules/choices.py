"""What ``backend="auto"`` chose for the inputs of one layer."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swat_ext.modules.measure import Key, Problem, environment, key_of, measured_choice, problem_of, remember
from swat_ext.ops.backend import Choice

if TYPE_CHECKING:
    from swat_ext.modules.base import SWATLayer

__all__ = ["MOST_MEASUREMENTS", "Choices"]

# Of one layer in one mode; inputs of further sizes take the choice of the nearest that was measured.
MOST_MEASUREMENTS = 6
_SIZE_FIELDS = (Problem._fields.index("input_size"), Problem._fields.index("activation_keep"))


class Choices:
    """Choices by what was measured; they travel with copies, pickles and checkpoints of the layer."""

    def __init__(self) -> None:
        self._chosen: dict[Key, Choice] = {}
        self._last: tuple[object, Choice] | None = None  # the last call's arguments, and its result

    def choose(
        self,
        layer: "SWATLayer",
        input: Tensor,
        geometry: tuple[Any, Any, Any, int],
        weight_ratio: tuple[int, int],
        activation_ratio: tuple[int, int],
        *,
        backward: bool,
        otherwise: Choice,
    ) -> Choice:
        """The choice for this input of ``layer``, measured if need be; other arguments as of :func:`problem_of`."""
        weight = layer.weight
        like = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in (input, weight)]
        call = (like, geometry, weight_ratio, activation_ratio, backward, environment(input.device))
        if self._last is not None and self._last[0] == call:
            return self._last[1]
        problem = problem_of(input, weight, geometry, weight_ratio, activation_ratio, backward=backward)
        if problem is None:
            return otherwise
        choice, lasting = self._choice_of(layer, problem, input.dtype, input.device, otherwise)
        self._last = (call, choice) if lasting else None
        return choice

    def _choice_of(
        self, layer: "SWATLayer", problem: Problem, dtype: torch.dtype, device: torch.device, otherwise: Choice
    ) -> tuple[Choice, bool]:
        """The choice, and whether it stands the next time."""
        key = key_of(problem, dtype, device)
        if key in self._chosen:
            return self._chosen[key], True
        alike = [known for known in self._chosen if _without_size(known) == _without_size(key)]
        if len(alike) >= MOST_MEASUREMENTS:
            return self._chosen[min(alike, key=lambda known: _distance(known, key))], True
        choice, measured = measured_choice(layer, problem, dtype, device, otherwise)
        if measured is not None:
            self._chosen[key] = choice
        return choice, measured is not None

    def only(self) -> Choice | None:
        """The choice, if there is exactly one."""
        return next(iter(self._chosen.values())) if len(self._chosen) == 1 else None

    def state(self) -> list[tuple[Any, ...]]:
        """Numbers, strings and tuples alone, for :meth:`load`."""
        return [(key, *choice) for key, choice in self._chosen.items()]

    def load(self, state: Iterable[Sequence[Any]]) -> None:
        """Take over a :meth:`state`, in place of what was chosen so far; one without speedups (0.1) does too."""
        self._chosen = {key: Choice(*choice) for key, *choice in state}
        self._last = None
        for key, choice in self._chosen.items():
            remember(key, choice)


def _without_size(key: Key) -> Key:
    return tuple(field for place, field in enumerate(key) if place not in _SIZE_FIELDS)


def _distance(known: Key, key: Key) -> float:
    return abs(math.log(math.prod(known[_SIZE_FIELDS[0]]) / math.prod(key[_SIZE_FIELDS[0]])))
