"""Counting optimizer steps from the optimizer itself, and resuming exactly."""

import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from swat_ext.modules import SWATLayer

__all__ = ["SWATScheduler"]

_FORMAT = 1
_LAYER_FIELDS = {
    "shape",
    "sparsity",
    "activation_sparsity",
    "topk_period",
    "steps",
    "due",
    "weight_threshold",
    "activation_threshold",
}

# Who follows an optimizer, so that no step is counted twice for one layer.
_FOLLOWERS: "weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[SWATScheduler]]" = weakref.WeakKeyDictionary()


class SWATScheduler:
    """Tells a model's sparse layers of each optimizer step, by the optimizer's own step hook.

    Layers count steps on their own too, by the version of their weight. A scheduler also counts steps of an optimizer
    that writes past the version counter (through ``weight.data``), and its state_dict makes resuming exact: with the
    state_dicts of model and optimizer, loaded in any order, training continues bit for bit.

    It is used as an object that lives with the optimizer, which holds it; it holds neither optimizer nor model.
    ``remove()``, or leaving a ``with`` block, stops it.

    Args:
        model: a module that has sparse layers.
        optimizer: one optimizer or several; each counts for the layers whose weight it has.

    Attributes:
        steps: optimizer steps seen, those of several optimizers together.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``model`` has no sparse layer, or no optimizer was given, or one has none of the weights.
        RuntimeError: a scheduler that was not removed follows the same optimizer for the same layer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        layers = _sparse_layers(model)
        if not layers:
            raise ValueError("model: expected at least one SWATConv2d or SWATLinear, found none; call sparsify_ first")
        optimizers = _as_optimizers(optimizer)
        for item in optimizers:
            _check_optimizer(item, layers)
        self._model = weakref.ref(model)
        self.steps = 0
        self._handles = [item.register_step_post_hook(self._after_step) for item in optimizers]
        for item in optimizers:
            _FOLLOWERS.setdefault(item, weakref.WeakSet()).add(self)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        model = self._model()
        if model is None:
            self.remove()
            return
        self.steps += 1
        stepped = _parameter_ids(optimizer)
        for layer in _sparse_layers(model).values():
            if id(layer.weight) in stepped:
                layer.advance()

    def remove(self) -> None:
        """Stop following the optimizers; layers go on counting by themselves."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for followers in list(_FOLLOWERS.values()):
            followers.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """What decides the next steps beside weights and optimizer; ``torch.load(weights_only=True)`` reads it.

        Returns:
            ``format``, ``steps``, and ``layers``: for each name its weight's shape, sparsities, period, count of
            steps, the steps of its last selections, and its thresholds.
        """
        layers = _sparse_layers(self._living_model())
        return {
            "format": _FORMAT,
            "steps": self.steps,
            "layers": {name: layer.selection_state() for name, layer in layers.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where another scheduler's :meth:`state_dict` was taken; the layers' settings come from it too.

        The model's and the optimizer's own state_dicts may be loaded before or after.

        Raises:
            TypeError: not a mapping. ValueError: not such a state_dict, or one of a model with other layers; nothing
            is loaded.
        """
        layers = _sparse_layers(self._living_model())
        _check_state(state_dict, layers)
        self.steps = state_dict["steps"]
        for name, layer in layers.items():
            layer.load_selection_state(state_dict["layers"][name])

    def _living_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("SWATScheduler: the model that it was made for is gone")
        return model

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("SWATScheduler cannot be pickled or copied; save scheduler.state_dict() instead")


def _sparse_layers(model: nn.Module) -> dict[str, SWATLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SWATLayer)}


def _parameter_ids(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _as_optimizers(optimizer: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    if isinstance(optimizer, Optimizer):
        return [optimizer]
    if not isinstance(optimizer, Iterable):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer or several, got {type(optimizer).__name__}")
    optimizers = list(optimizer)
    for item in optimizers:
        if not isinstance(item, Optimizer):
            raise TypeError(f"optimizer: expected torch.optim.Optimizer objects, got {type(item).__name__}")
    if not optimizers:
        raise ValueError("optimizer: expected at least one, got none")
    if len(set(map(id, optimizers))) < len(optimizers):
        raise ValueError("optimizer: expected each optimizer once")
    return optimizers


def _check_optimizer(optimizer: Optimizer, layers: dict[str, SWATLayer]) -> None:
    own = _parameter_ids(optimizer)
    if not any(id(layer.weight) in own for layer in layers.values()):
        raise ValueError(
            "optimizer: it has none of the weights of model's sparse layers; make it from this model's parameters"
        )
    for follower in _FOLLOWERS.get(optimizer, ()):
        model = follower._model()
        shared = set() if model is None else set(layers.values()) & set(_sparse_layers(model).values())
        if shared:
            raise RuntimeError(
                "optimizer: another SWATScheduler follows it for the same layers; call its remove() first"
            )


def _check_state(state_dict: Any, layers: dict[str, SWATLayer]) -> None:
    """Raise unless ``state_dict`` fits ``layers`` in every respect."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    if missing := {"format", "steps", "layers"} - state_dict.keys():
        raise ValueError(f"state_dict: expected that of a SWATScheduler, keys {sorted(missing)} are missing")
    if state_dict["format"] != _FORMAT:
        raise ValueError(f"state_dict: expected format {_FORMAT}, got {state_dict['format']!r}")
    saved = state_dict["layers"]
    if saved.keys() != layers.keys():
        raise ValueError(
            "state_dict: expected the sparse layers of this model; "
            f"missing: {_some(layers.keys() - saved.keys())}; not in the model: {_some(saved.keys() - layers.keys())}"
        )
    for name, layer in layers.items():
        state = saved[name]
        if missing := _LAYER_FIELDS - state.keys():
            raise ValueError(f"state_dict: layer {name!r} lacks {sorted(missing)}")
        if tuple(state["shape"]) != tuple(layer.weight.shape):
            raise ValueError(
                f"state_dict: layer {name!r}: expected a weight of shape {tuple(layer.weight.shape)}, "
                f"got {tuple(state['shape'])}"
            )
        for key in ("weight_threshold", "activation_threshold"):
            if state[key].dtype != layer.weight.dtype:
                raise ValueError(
                    f"state_dict: layer {name!r}: expected {key} of {layer.weight.dtype}, got {state[key].dtype}"
                )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(map(repr, shown)) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
