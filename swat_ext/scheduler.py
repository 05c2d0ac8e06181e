"""What moves while a sparse network trains, and what a run needs to go on exactly where it stopped."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from swat_ext.config import check_period
from swat_ext.modules import SWATLayer
from swat_ext.scheduler_state import FORMAT, check_state
from swat_ext.topology.budget import Budget
from swat_ext.topology.distribution import by_momentum, cubic, momentum_of
from swat_ext.topology.methods import method_of
from swat_ext.topology.weights import check_whole

__all__ = ["SWATScheduler"]


class SWATScheduler:
    """Moves budgets and patterns as training goes on, and has the state for exact resume.

    Layers count the steps of their optimizer on their own, by torch's hook on all optimizers; after each the scheduler
    does what is due: it raises sparsity, shares the budget by momentum (``distribution="momentum"``), and lets methods
    replace weights. With its state_dict beside those of model and optimizer, loaded in any order, training continues
    bit for bit. Nobody need hold it: layers that it moves do.

    Args:
        model: a module that has sparse layers.
        optimizer: one optimizer or several, which among them have the weights of sparse layers. Wrappers that have
            ``param_groups``, such as accelerate's, will do.
        total_steps: optimizer steps of the whole training; needed for ``ramp`` and for methods that replace weights.
        ramp: share of ``total_steps``, in [0, 1], over which sparsity rises from 0 to what the layers have now, as
            ``1 - (1 - t)^3`` (Zhu and Gupta, arXiv 1710.01878), that of activations with it where they follow their
            weights. 0 starts at full sparsity. A layer that no optimizer has is at its end from the start.
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
        for layer in layers.values():
            # A layer that no optimizer steps would stay at the beginning for ever.
            steps = layer.steps if id(layer.weight) in owned else None
            moves = steps is not None and (ramp > 0 or topk_warmup > 0 or layer.needs_driver)
            layer.driver = self if moves else None
            if moves and (ramp or layer.distribution == "momentum"):
                layer.let_budgets_move()
            self._bring(layer, steps)

    @property
    def steps(self) -> int:
        """Optimizer steps made on the sparse layers: of the one that was stepped most often."""
        return max(layer.steps for layer in _sparse_layers(self._model).values())

    # --- Driving

    def drive(self, layers: list[SWATLayer], optimizer: Optimizer) -> None:
        """Do what is due after a step of ``optimizer`` on the weights of ``layers``; called by the hook."""
        self._note_momenta(layers, optimizer)
        for layer in layers:
            self._bring(layer, layer.steps)
            if self._total_steps is not None:
                layer.update_pattern(optimizer, self._total_steps)
        if any(layer.momentum is not None for layer in layers):
            self._share()

    def _bring(self, layer: SWATLayer, steps: int | None) -> None:
        """Bring a layer's period and budget to where they are after so many steps; None is the end."""
        layer.set_period(1 if steps is not None and steps < self._topk_warmup else layer.end_period)
        if layer.momentum is None:
            layer.set_budget(self._ramped(layer, steps))

    def _ramped(self, layer: SWATLayer, steps: int | None) -> Budget:
        """The layer's own budget, less far on if its ramp is not over."""
        budget = layer.end_budget
        if steps is None or steps >= self._ramp_steps:
            return budget
        numel = layer.weight.numel()
        dropped = cubic(steps / self._ramp_steps) * (numel - budget.count(numel))
        return Budget.kept(numel - int(dropped), numel)

    def _note_momenta(self, layers: list[SWATLayer], optimizer: Optimizer) -> None:
        # A layer that no gradient has reached yet has no momentum either.
        found = [layer for layer in layers if layer.distribution == "momentum" and layer.weight.grad is not None]
        for layer in found:
            check_whole(layer.weight, "distribution 'momentum'")
        means = [momentum_of(layer.weight, optimizer, layer.kept_weight()) for layer in found]
        # Together, so that a device is waited for once.
        for layer, mean in zip(found, torch.stack(means).tolist() if means else (), strict=True):
            layer.momentum = mean

    def _share(self) -> None:
        """Share what the layers under "momentum" keep together by their momenta, a weight that several have once."""
        owners: dict[int, list[SWATLayer]] = {}
        for layer in _sparse_layers(self._model).values():
            if layer.momentum is not None:
                owners.setdefault(id(layer.weight), []).append(layer)
        firsts = [layers[0] for layers in owners.values()]
        means = [layer.momentum or 0.0 for layer in firsts]
        # Without any momentum there is nothing to go by, and what is not finite is a diverged run's.
        if not 0 < sum(means) < float("inf"):
            return
        numels = [layer.weight.numel() for layer in firsts]
        # Not rounded up layer by layer: the shares are.
        shares = [Fraction(*self._ramped(layer, layer.steps)) for layer in firsts]
        keep = sum(share * numel for share, numel in zip(shares, numels, strict=True))
        counts = by_momentum(means, numels, float(keep))
        for layers, count, numel in zip(owners.values(), counts, numels, strict=True):
            for layer in layers:
                layer.set_budget(Budget.kept(count, numel))

    def copy_to(self, model: nn.Module) -> None:
        """Give the sparse layers of ``model`` the budgets, patterns and thresholds that those of this one have now.

        For a copy whose weights follow this model's, such as an average of weights (EMA, SWA), before it is evaluated:
        what moves is in no parameter and in no buffer.

        Args:
            model: with sparse layers of the same names, settings and shapes, such as ``AveragedModel(...).module``.

        Raises:
            TypeError, ValueError: another kind of model; nothing is copied.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        _load(self.state_dict(), model)

    # --- Resuming

    def state_dict(self) -> dict[str, Any]:
        """What decides the next selections beside the weights; ``torch.load(weights_only=True)`` reads it.

        Returns:
            ``format``, and ``layers``: for each name its weight's shape, budgets and periods now and at the end,
            topology, backend and momentum, and for weight and activation the threshold or pattern, the count of steps
            and the step of the last selection.
        """
        layers = _sparse_layers(self._model)
        return {"format": FORMAT, "layers": {name: layer.selection_state() for name, layer in layers.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where another scheduler's :meth:`state_dict` was taken; the layers' settings come from it too.

        The model's and the optimizer's own state_dicts may be loaded before or after. The arguments of the scheduler
        are those that it was made with.

        Raises:
            TypeError: not a mapping. ValueError: not such a state_dict, or one of a model with other layers; nothing
            is loaded.
        """
        _load(state_dict, self._model)
        for layer in _sparse_layers(self._model).values():
            # What nobody moves would stay where it was saved for ever.
            if layer.driver is None:
                self._bring(layer, None)


def _load(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    layers = _sparse_layers(model)
    check_state(state_dict, layers)
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


def _check_plan(layers: dict[str, SWATLayer], total_steps: Any, ramp: Any, topk_warmup: Any) -> None:
    if total_steps is not None:
        check_period("total_steps", total_steps)
    if isinstance(topk_warmup, bool) or not isinstance(topk_warmup, int):
        raise TypeError(f"topk_warmup: expected an integer of at least 0, in optimizer steps, got {topk_warmup!r}")
    if topk_warmup < 0:
        raise ValueError(f"topk_warmup: expected an integer of at least 0, in optimizer steps, got {topk_warmup!r}")
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
