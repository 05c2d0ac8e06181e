"""The count of optimizer steps: layers are told of each optimizer step by torch's own hook on all optimizers.

A layer counts a step when an optimizer that has its weight has made one. So the count is right whatever the optimizer
(fused, foreach, one per layer), under gradient accumulation, and where LBFGS calls its closure many times. An optimizer
that steps another one inside its own step, as ZeroRedundancyOptimizer does, counts once.
"""

import threading
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["follow", "unfollow"]


_lock = threading.Lock()
_hooks: list[Any] = []  # of torch, from the first follower on
_followers: WeakSet[Any] = WeakSet()
# Numbers of the counted steps: when each running step of an optimizer began, and the last that each module counted.
_now = 0
_began: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_counted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def follow(module: nn.Module) -> None:
    """Call ``module.advance(optimizer)`` after each optimizer step on its weight, from now on; it is held weakly.

    After that, where some modules have a ``driver``, ``driver.drive(modules, optimizer)``.
    """
    with _lock:
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before))
            _hooks.append(register_optimizer_step_post_hook(_after))
        _followers.add(module)


def unfollow(module: nn.Module) -> None:
    with _lock:
        _followers.discard(module)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with _lock:
        _began[optimizer] = _now


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _now
    if _was_skipped(optimizer):
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    with _lock:
        began = _began.pop(optimizer, _now)
        _now += 1
        # What an inner optimizer stepped within this step is counted already.
        moved = [
            module
            for module in _followers
            if _counted.get(module, 0) <= began and any(id(weight) in stepped for weight in _weights(module))
        ]
        _counted.update(dict.fromkeys(moved, _now))
    driven: dict[Any, list[Any]] = {}
    for module in moved:
        module.advance(optimizer)
        if module.driver is not None:
            driven.setdefault(module.driver, []).append(module)
    for driver, modules in driven.items():
        driver.drive(modules, optimizer)


def _weights(module: Any) -> list[Tensor]:
    """What the weight is made from: itself, or what a parametrization has put in its place."""
    weight = module._parameters.get("weight")
    if weight is not None:
        return [weight]
    return [parameter for name, parameter in module.named_parameters() if name != "bias"]


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether GradScaler has let a fused optimizer skip its step; on CUDA to know would wait for the device."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and found_inf.device.type == "cpu" and bool(found_inf.item())
