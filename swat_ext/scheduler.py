"""What a training run needs beside its model and optimizer to go on exactly where it stopped."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from swat_ext.config import check_backend, check_period, check_sparsity
from swat_ext.modules import SWATLayer

__all__ = ["SWATScheduler"]

_FORMAT = 2


class SWATScheduler:
    """The state of a model's selections, for exact resume.

    Layers count the steps of their optimizer on their own, by torch's hook on all optimizers. With the state_dict of a
    scheduler beside those of model and optimizer, loaded in any order, training continues bit for bit.

    Args:
        model: a module that has sparse layers.
        optimizer: one optimizer or several, which among them have the weights of sparse layers. Wrappers that have
            ``param_groups``, such as accelerate's, will do.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``model`` has no sparse layer, no optimizer was given, one was given twice, or none of them has any
            of the weights.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        layers = _sparse_layers(model)
        if not layers:
            raise ValueError("model: expected at least one SWATConv2d or SWATLinear, found none; call sparsify_ first")
        owned = _parameter_ids(_as_optimizers(optimizer))
        if not any(id(parameter) in owned for layer in layers.values() for parameter in layer.parameters()):
            raise ValueError(
                "optimizer: none has any of the weights of model's sparse layers; make it from this model's parameters"
            )
        self._model = model

    @property
    def steps(self) -> int:
        """Optimizer steps made on the sparse layers: of the one that was stepped most often."""
        return max(layer.steps for layer in _sparse_layers(self._model).values())

    def state_dict(self) -> dict[str, Any]:
        """What decides the next selections beside the weights; ``torch.load(weights_only=True)`` reads it.

        Returns:
            ``format``, and ``layers``: for each name its weight's shape, sparsities, period and backend, and for weight
            and activation the threshold, the count of steps and the step of the last selection.
        """
        layers = _sparse_layers(self._model)
        return {"format": _FORMAT, "layers": {name: layer.selection_state() for name, layer in layers.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where another scheduler's :meth:`state_dict` was taken; the layers' settings come from it too.

        The model's and the optimizer's own state_dicts may be loaded before or after.

        Raises:
            TypeError: not a mapping. ValueError: not such a state_dict, or one of a model with other layers; nothing
            is loaded.
        """
        layers = _sparse_layers(self._model)
        _check_state(state_dict, layers)
        for name, layer in layers.items():
            layer.load_selection_state(state_dict["layers"][name])


def _sparse_layers(model: nn.Module) -> dict[str, SWATLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SWATLayer)}


def _parameter_ids(optimizers: list[Any]) -> set[int]:
    return {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }


def _as_optimizers(optimizer: Any) -> list[Any]:
    several = (
        list(optimizer) if isinstance(optimizer, Iterable) and not isinstance(optimizer, Optimizer) else [optimizer]
    )
    for item in several:
        if not hasattr(item, "param_groups"):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer or several, got {type(item).__name__}")
    if not several:
        raise ValueError("optimizer: expected at least one, got none")
    if len(set(map(id, several))) < len(several):
        raise ValueError("optimizer: expected each optimizer once")
    return several


# --- Checking what is loaded ------------------------------------------------------------------------------------------


def _check_state(state_dict: Any, layers: dict[str, SWATLayer]) -> None:
    """Raise unless ``state_dict`` fits ``layers`` in every respect."""
    saved = _entries("state_dict", state_dict, {"format", "layers"})
    if saved["format"] != _FORMAT:
        raise ValueError(f"state_dict: expected format {_FORMAT}, got {saved['format']!r}")
    states = _entries("state_dict['layers']", saved["layers"], set())
    if states.keys() != layers.keys():
        raise ValueError(
            "state_dict: expected the sparse layers of this model; "
            f"missing: {_some(layers.keys() - states.keys())}; not in the model: {_some(states.keys() - layers.keys())}"
        )
    for name, layer in layers.items():
        _check_layer(f"state_dict: layer {name!r}", states[name], layer)


def _check_layer(where: str, state: Any, layer: SWATLayer) -> None:
    expected = {"shape", "sparsity", "activation_sparsity", "topk_period", "backend", "weight", "activation"}
    state = _entries(where, state, expected)
    if not isinstance(state["shape"], (list, tuple)) or list(state["shape"]) != list(layer.weight.shape):
        raise ValueError(f"{where}: expected a weight of shape {tuple(layer.weight.shape)}, got {state['shape']!r}")
    try:
        check_sparsity("sparsity", state["sparsity"])
        if state["activation_sparsity"] is not None:
            check_sparsity("activation_sparsity", state["activation_sparsity"])
        check_period("topk_period", state["topk_period"])
        check_backend(state["backend"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    for operand in ("weight", "activation"):
        selection = _entries(f"{where}: {operand}", state[operand], {"threshold", "steps", "selected"})
        threshold = selection["threshold"]
        if not isinstance(threshold, Tensor) or threshold.shape != () or threshold.dtype != layer.weight.dtype:
            found = (
                f"{threshold.dtype} of shape {tuple(threshold.shape)}" if isinstance(threshold, Tensor) else threshold
            )
            raise ValueError(f"{where}: {operand}: threshold: expected a 0-dim {layer.weight.dtype}, got {found!r}")
        if threshold.item() < 0:
            raise ValueError(f"{where}: {operand}: threshold: expected at least 0, got {threshold.item()}")
        steps, selected = selection["steps"], selection["selected"]
        if type(steps) is not int or steps < 0:
            raise ValueError(f"{where}: {operand}: steps: expected an integer of at least 0, got {steps!r}")
        if type(selected) is not int or not -1 <= selected <= steps:
            raise ValueError(f"{where}: {operand}: selected: expected an integer from -1 to steps, got {selected!r}")


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
