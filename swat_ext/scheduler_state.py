"""Whether what :class:`swat_ext.SWATScheduler` is to load fits, in every respect, before anything is loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swat_ext.config import check_name, check_period
from swat_ext.modules import SWATLayer
from swat_ext.topology.weights import Held

__all__ = ["FORMAT", "check_state"]

FORMAT = 3


def check_state(state_dict: Any, layers: Mapping[str, SWATLayer]) -> None:
    """Raise TypeError or ValueError unless ``state_dict`` fits ``layers``."""
    saved = _entries("state_dict", state_dict, {"format", "layers"})
    if saved["format"] != FORMAT:
        raise ValueError(f"state_dict: expected format {FORMAT}, got {saved['format']!r}")
    states = _entries("state_dict['layers']", saved["layers"], set())
    if states.keys() != layers.keys():
        raise ValueError(
            "state_dict: expected the sparse layers of this model; "
            f"missing: {_some(layers.keys() - states.keys())}; not in the model: {_some(states.keys() - layers.keys())}"
        )
    for name, layer in layers.items():
        _check_layer(f"state_dict: layer {name!r}", states[name], layer)


def _check_layer(where: str, state: Any, layer: SWATLayer) -> None:
    state = _entries(where, state, set(layer.selection_state()))
    if not isinstance(state["shape"], (list, tuple)) or list(state["shape"]) != list(layer.weight.shape):
        raise ValueError(f"{where}: expected a weight of shape {tuple(layer.weight.shape)}, got {state['shape']!r}")
    if state["topology"] != layer.topology_name:
        raise ValueError(f"{where}: topology: expected {layer.topology_name!r}, got {state['topology']!r}")
    for name in ("budget", "end_budget"):
        _check_budget(f"{where}: {name}", state[name])
    if state["activation_budget"] is not None:
        _check_budget(f"{where}: activation_budget", state["activation_budget"])
    try:
        for name in ("topk_period", "end_period", "weight_topk_period"):
            check_period(name, state[name])
        check_name("backend", state["backend"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    momentum = state["momentum"]
    # One that is not a number is that of a diverged run.
    if momentum is not None and (not isinstance(momentum, float) or momentum < 0):
        raise ValueError(f"{where}: momentum: expected a number of at least 0 or None, got {momentum!r}")
    if isinstance(layer._weights, Held):
        _check_pattern(f"{where}: weight", state["weight"], layer._weights)
    else:
        _check_selection(f"{where}: weight", state["weight"], layer)
    _check_selection(f"{where}: activation", state["activation"], layer)


def _check_budget(where: str, value: Any) -> None:
    whole = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(item) is int for item in value)
    if not whole or not 0 < value[0] <= value[1]:
        raise ValueError(f"{where}: expected a fraction in (0, 1] as two integers, got {value!r}")


def _check_selection(where: str, state: Any, layer: SWATLayer) -> None:
    selection = _entries(where, state, {"threshold", "steps", "selected"})
    threshold = selection["threshold"]
    if not isinstance(threshold, Tensor) or threshold.shape != () or threshold.dtype != layer.weight.dtype:
        found = f"{threshold.dtype} of shape {tuple(threshold.shape)}" if isinstance(threshold, Tensor) else threshold
        raise ValueError(f"{where}: threshold: expected a 0-dim {layer.weight.dtype}, got {found!r}")
    if threshold.item() < 0:
        raise ValueError(f"{where}: threshold: expected at least 0, got {threshold.item()}")
    steps, selected = selection["steps"], selection["selected"]
    _check_steps(where, steps)
    if type(selected) is not int or not -1 <= selected <= steps:
        raise ValueError(f"{where}: selected: expected an integer from -1 to steps, got {selected!r}")


def _check_pattern(where: str, state: Any, held: Held) -> None:
    state = _entries(where, state, {"mask", "count", "steps"})
    mask, expected = state["mask"], held.pattern.mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.shape != expected.shape:
        found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else mask
        raise ValueError(f"{where}: mask: expected int64 of shape {tuple(expected.shape)}, got {found!r}")
    count = state["count"]
    numel = held.pattern.size.numel()
    if type(count) is not int or not 0 <= count <= numel:
        raise ValueError(f"{where}: count: expected an integer from 0 to {numel}, got {count!r}")
    try:
        taken = torch.ops.swat_ext.take(torch.ones(numel), mask.cpu(), count)
    except RuntimeError as error:
        raise ValueError(f"{where}: mask and count do not go together") from error
    # Past what the mask keeps there are zeros.
    if not taken.all():
        raise ValueError(f"{where}: mask and count do not go together")
    _check_steps(where, state["steps"])


def _check_steps(where: str, steps: Any) -> None:
    if type(steps) is not int or steps < 0:
        raise ValueError(f"{where}: steps: expected an integer of at least 0, got {steps!r}")


def _entries(where: str, value: Any, expected: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        kind = TypeError if where == "state_dict" else ValueError
        raise kind(f"{where}: expected a mapping, got {type(value).__name__}")
    if missing := expected - value.keys():
        raise ValueError(f"{where}: expected that of a SWATScheduler, keys {sorted(missing)} are missing")
    return value


def _some(names: set[str]) -> str:
    shown = sorted(map(str, names))[:5]
    return ", ".join(map(repr, shown)) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
