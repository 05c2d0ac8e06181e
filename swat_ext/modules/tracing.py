"""What does not go through a sparse layer, which selects by value."""

import torch
from torch import nn

from swat_ext.ops.torch_private import transforms_active

__all__ = ["refuse_scripting", "refuse_tracing"]


def refuse_scripting() -> None:
    """Raise RuntimeError: for torch.jit.script, which asks each module whether it can be compiled."""
    raise RuntimeError(
        "torch.jit.script cannot compile a sparse layer, which selects by value; script swat_ext.to_dense(model), "
        "which computes what model.eval() does"
    )


def refuse_tracing(layer: nn.Module, input: object) -> None:
    """Raise where a tracer records operators without their values, or a transform of :mod:`torch.func` is at work.

    Raises:
        RuntimeError: torch.jit.trace or torch.fx.symbolic_trace. NotImplementedError: a transform.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(input, torch.fx.Proxy) or torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "input: a sparse layer selects by value, which torch.jit.trace, torch.fx.symbolic_trace and exports by "
            "them cannot record; trace swat_ext.to_dense(model), which computes what model.eval() does, or let "
            "is_leaf_module of your own fx.Tracer name swat_ext.SWATLayer"
        )
    if transforms_active():
        raise NotImplementedError(
            f"{type(layer).__name__}: the transforms of torch.func (grad, vmap, jvp) do not go through a sparse "
            "layer; use swat_ext.to_dense(model) where they are needed"
        )
