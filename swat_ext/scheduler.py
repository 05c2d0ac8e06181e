"""What moves while a sparse network trains, and what a run needs to go on exactly where it stopped."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from torch import nn
from torch.optim import Optimizer

from swat_ext.modules import SWATLayer
from swat_ext.scheduler_state import FORMAT, check_state
from swat_ext.topology.budget import Budget
from swat_ext.topology.distribution import by_momentum, cubic, momentum_of
from swat_ext.topology.methods import method_of
from swat_ext.topology.weights import Held, check_whole

__all__ = ["SWATScheduler"]


class SWATScheduler:
    """Moves budgets and patterns as training goes on, and has the state for exact resume.

    Layers count the steps of their optimizer on their own, by torch's hook on all optimizers; after each the scheduler
    does what is due: it raises sparsity, shares the budget by momentum (``distribution="momentum"``), and lets methods
    replace weights. With its state_dict beside those of model and optimizer, loaded in any order, training continues
    bit for bit. Nobody need hold it: the layers do.

    Args:
        model: a module that has sparse layers.
        optimizer: one optimizer or several, which among them have the weights of sparse layers. Wrappers that have
            ``param_groups``, such as accelerate's, will do.
        total_steps: optimizer steps of the whole training; needed for ``ramp`` and for methods that replace weights.
        ramp: share of ``total_steps``, in [0, 1], over which sparsity rises from 0 to what the layers have now, as
            ``1 - (1 - t)^3`` (Zhu and Gupta, arXiv 1710.01878). 0 starts at full sparsity.
        topk_warmup: first optimizer steps that select activations at every step (paper, section 3).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``model`` has no sparse layer, no optimizer was given, one was given twice, or none of them has any
            of the weights; a number out of its range, or one that is needed and missing.
        In ``optimizer.step()``: ValueError, where the optimizer keeps no momentum to share a budget by.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        total_steps: int | None = None,
        ramp: float = 0.0,
        topk_warmup: int = 0,
    ) -> None:
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
        _check_plan(layers, total_steps, ramp, topk_warmup)
        self._model = model
        self._total_steps, self._topk_warmup = total_steps, topk_warmup
        self._ramp_steps = ramp * (total_steps or 0)
        # What each layer has once its ramp and warm-up are over, and its momentum when it was last known.
        ends = {name: _end(layer) for name, layer in layers.items()}
        self._budgets = {name: budget for name, (budget, _) in ends.items()}
        self._periods = {name: period for name, (_, period) in ends.items()}
        self._momenta: dict[str, float] = {}
        for name, layer in layers.items():
            layer.driver = self
            if self._ramp_steps or layer.distribution == "momentum":
                layer.let_budgets_move()
            self._set(name, layer)

    @property
    def steps(self) -> int:
        """Optimizer steps made on the sparse layers: of the one that was stepped most often."""
        return max(layer.steps for layer in _sparse_layers(self._model).values())

    # --- Driving

    def drive(self, layers: list[SWATLayer], optimizer: Optimizer) -> None:
        """Do what is due after a step of ``optimizer`` on the weights of ``layers``; called by the hook."""
        moved = set(layers)
        named = {name: layer for name, layer in _sparse_layers(self._model).items() if layer in moved}
        for name, layer in named.items():
            # A layer that no gradient has reached yet has no momentum either.
            if layer.distribution == "momentum" and layer.weight.grad is not None:
                check_whole(layer.weight, "distribution 'momentum'")
                self._momenta[name] = float(momentum_of(layer.weight, optimizer, layer.kept_weight()))
            if isinstance(layer._weights, Held) and self._total_steps is not None:
                layer._weights.update(layer.weight, optimizer, self._total_steps)
        for name, layer in named.items():
            self._set(name, layer)
        self._share()

    def _set(self, name: str, layer: SWATLayer) -> None:
        """Bring a layer's period and budget to the step that it is at."""
        if layer.steps < self._topk_warmup:
            layer.topk_period = 1
        elif layer.steps == self._topk_warmup:
            layer.topk_period = self._periods[name]
        if self._ramp_steps and name not in self._momenta:
            layer.set_budget(self._ramped(name, layer))

    def _ramped(self, name: str, layer: SWATLayer) -> Budget:
        """The layer's own budget, less far on if its ramp is not over."""
        budget = self._budgets[name]
        if layer.steps >= self._ramp_steps:
            return budget
        numel = layer.weight.numel()
        dropped = cubic(layer.steps / self._ramp_steps) * (numel - budget.count(numel))
        return Budget.kept(numel - int(dropped), numel)

    def _share(self) -> None:
        """Share what the layers under "momentum" keep together by their momenta, a weight that several have once."""
        layers = {name: layer for name, layer in _sparse_layers(self._model).items() if name in self._momenta}
        owners: dict[int, list[str]] = {}
        for name, layer in layers.items():
            owners.setdefault(id(layer.weight), []).append(name)
        firsts = [names[0] for names in owners.values()]
        means = [self._momenta[name] for name in firsts]
        # Without any momentum there is nothing to go by, and what is not finite is a diverged run's.
        if not 0 < sum(means) < float("inf"):
            return
        numels = [layers[name].weight.numel() for name in firsts]
        # Not rounded up layer by layer: the shares are.
        shares = [Fraction(*self._ramped(name, layers[name])) for name in firsts]
        keep = sum(share * numel for share, numel in zip(shares, numels, strict=True))
        counts = by_momentum(means, numels, float(keep))
        for names, count, numel in zip(owners.values(), counts, numels, strict=True):
            for name in names:
                layers[name].set_budget(Budget.kept(count, numel))

    def end_of(self, layer: SWATLayer) -> tuple[Budget, int]:
        """What ``layer`` will have once what moves is over: its budget, and its period of selecting activations."""
        for name, other in _sparse_layers(self._model).items():
            if other is layer and name in self._budgets:
                rising, warming = layer.steps < self._ramp_steps, layer.steps < self._topk_warmup
                return (
                    self._budgets[name] if rising else layer.budget,
                    self._periods[name] if warming else layer.topk_period,
                )
        return layer.budget, layer.topk_period

    # --- Resuming

    def state_dict(self) -> dict[str, Any]:
        """What decides the next selections beside the weights; ``torch.load(weights_only=True)`` reads it.

        Returns:
            ``format``, and ``layers``: for each name its weight's shape, budgets, periods, topology and backend, where
            they will end, and for weight and activation the threshold or pattern, the count of steps and the step of
            the last selection.
        """
        layers = {}
        for name, layer in _sparse_layers(self._model).items():
            # A layer that was put in later has what it has.
            budget, period = self._budgets.get(name, layer.budget), self._periods.get(name, layer.topk_period)
            ends = {"budget": list(budget), "topk_period": period}
            layers[name] = layer.selection_state() | {"ends": ends, "momentum": self._momenta.get(name)}
        return {"format": FORMAT, "layers": layers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where another scheduler's :meth:`state_dict` was taken; the layers' settings come from it too.

        The model's and the optimizer's own state_dicts may be loaded before or after. The arguments of the scheduler
        are those that it was made with.

        Raises:
            TypeError: not a mapping. ValueError: not such a state_dict, or one of a model with other layers; nothing
            is loaded.
        """
        layers = _sparse_layers(self._model)
        check_state(state_dict, layers)
        for name, layer in layers.items():
            state = state_dict["layers"][name]
            layer.load_selection_state(state)
            self._budgets[name] = Budget(*state["ends"]["budget"])
            self._periods[name] = state["ends"]["topk_period"]
            self._momenta.pop(name, None)
            if state["momentum"] is not None:
                self._momenta[name] = state["momentum"]


def _sparse_layers(model: nn.Module) -> dict[str, SWATLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SWATLayer)}


def _end(layer: SWATLayer) -> tuple[Budget, int]:
    """Where a layer is to end: as it is, unless another scheduler is not done with it."""
    return layer.driver.end_of(layer) if isinstance(layer.driver, SWATScheduler) else (layer.budget, layer.topk_period)


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


def _check_plan(layers: dict[str, SWATLayer], total_steps: Any, ramp: Any, topk_warmup: Any) -> None:
    for name, value, least in (("total_steps", total_steps, 1), ("topk_warmup", topk_warmup, 0)):
        if value is None and name == "total_steps":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer of at least {least}, in optimizer steps, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, in optimizer steps, got {value!r}")
    if isinstance(ramp, bool) or not isinstance(ramp, (int, float)):
        raise TypeError(f"ramp: expected a number in [0, 1], the share of total_steps, got {ramp!r}")
    if not 0 <= ramp <= 1:
        raise ValueError(f"ramp: expected a number in [0, 1], the share of total_steps, got {ramp!r}")
    methods = [method for layer in layers.values() if (method := method_of(layer.method)) is not None]
    if ramp and methods:
        raise ValueError(f"ramp: expected 0 for method {methods[0].name!r}, which keeps a fixed number of weights")
    if total_steps is None and (ramp or any(method.moves for method in methods)):
        what = "ramp" if ramp else f"method {next(method.name for method in methods if method.moves)!r}"
        raise ValueError(f"total_steps: {what} needs it, the optimizer steps of the whole training")
