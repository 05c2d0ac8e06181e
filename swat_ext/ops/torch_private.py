"""Every use that the library makes of what PyTorch does not document, each behind one name; seen with torch 2.13.0.

``tests/test_torch_private.py`` checks them, so that a release that changes one says which.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["WeakTensorKeyDictionary", "hooks_on_top", "is_compiled", "own_hooks", "transforms_active"]


def transforms_active() -> bool:
    """Whether a transform of :mod:`torch.func` is at work, whose tensors have no memory for a kernel to read."""
    return torch._C._are_functorch_transforms_active()


def hooks_on_top() -> Callable[..., Any] | None:
    """The pack hook of the innermost ``torch.autograd.graph.saved_tensors_hooks``, the only one asked; None without."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks else None


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of ``module`` go to what ``torch.compile`` or ``nn.Module.compile`` made."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def own_hooks(module: nn.Module) -> dict[int, OrderedDict[int, Any]]:
    """By the id of each registry of hooks of ``module``: what PyTorch itself put there, without the user's.

    PyTorch's own hooks compute weights (weight_norm, pruning).
    """
    registries = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return {
        id(hooks): OrderedDict(
            (key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils")
        )
        for hooks in registries
    }
