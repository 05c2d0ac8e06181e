"""How operators with a gradient are called: without the detours that cost small layers more than they do.

An operator whose gradient is registered with ``torch.library`` passes through Python twice at every call, whether a
gradient is wanted or not. Outside the compiler, which needs the operator whole, an ``autograd.Function`` with the same
gradient around the bare operator does the same in a fraction of the time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradient", "refuse_second_derivative", "transformed", "with_gradient"]


def transformed() -> bool:
    """Whether a transform of :mod:`torch.func` is at work, whose tensors have no memory for a kernel to read."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


Plain = Callable[..., Any] | None


def _below_autograd(operator: Callable[..., Any], plain: Plain, *arguments: Any) -> Any:
    if plain is not None and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        operator = plain
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def gradient(operator: Callable[..., Any], *arguments: Any, plain: Plain = None) -> Any:
    """Call a backward operator; by its own gradient, or the refusal of one, only where that may be asked for.

    With ``plain``, the Python function that the operator was made of, it is called in its place where nothing traces.
    """
    if torch.is_grad_enabled():
        return operator(*arguments)
    return _below_autograd(operator, plain, *arguments)


def with_gradient(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any], plain: Plain = None
) -> Callable[..., Any]:
    """Register the gradient of operator ``swat_ext::name``; returns what layers call, with positional arguments.

    ``plain``: as in :func:`gradient`.
    """
    operator = getattr(torch.ops.swat_ext, name)
    torch.library.register_autograd(f"swat_ext::{name}", backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _below_autograd(operator, plain, *inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if torch.compiler.is_compiling() else function.apply(*inputs)

    return call


def refuse_second_derivative(name: str) -> None:
    """Let the derivative of backward operator ``swat_ext::name`` raise NotImplementedError."""

    def setup_context(ctx, inputs, output, keyword_only_inputs=None) -> None:  # type: ignore[no-untyped-def]
        pass

    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            f"swat_ext::{name} has no derivative: second derivatives through a sparse layer are not supported; "
            "use swat_ext.to_dense(model) where they are needed"
        )

    torch.library.register_autograd(f"swat_ext::{name}", backward, setup_context=setup_context)
