"""Which layers of a model meet which shapes, found without touching the model."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Call", "copy_model", "on_meta", "run_a_copy", "trace_calls"]

_Result = TypeVar("_Result")

_HOOK_REGISTRIES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Call(NamedTuple):
    """One call of one layer.

    Attributes:
        input_size, output_size: shapes, batch included.
        itemsize: bytes of one element of the input.
        memory: the same number for inputs that share memory, such as one tensor that two layers read.
        tensor: the same for inputs that are one tensor object, unchanged between the calls.
    """

    input_size: torch.Size
    output_size: torch.Size
    itemsize: int
    memory: int
    tensor: tuple[int, int]


def trace_calls(model: nn.Module, input_size: Sequence[int], dtype: torch.dtype | None = None) -> dict[str, list[Call]]:
    """Run a copy of ``model`` once, in evaluation mode and without gradients, and note each call of each module.

    The copy runs on the meta device, on shapes alone; only if the model cannot do that, on the values of a random
    input. The model, its buffers, its hooks and the random state of torch stay as they were.

    Args:
        model: any module whose forward takes one tensor.
        input_size: shape of that tensor, batch included.
        dtype: its dtype; None means that of the first floating-point parameter.

    Returns:
        For the name of each module that was called with a tensor, its calls in order.

    Raises:
        RuntimeError: the model did not run on such an input.
    """
    return run_a_copy(model, input_size, dtype, _run)


def run_a_copy(
    model: nn.Module, input_size: Sequence[int], dtype: torch.dtype | None, run: Callable[[nn.Module, Tensor], _Result]
) -> _Result:
    """``run(copy, input)`` on the meta device, or if that fails on the values of a random input.

    Args:
        model, input_size, dtype: as in :func:`trace_calls`.
        run: what to do with a copy of ``model`` and an input for it.

    Raises:
        RuntimeError: both failed; says so of ``input_size``.
    """
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    device = floating[0].device if floating else torch.device("cpu")
    dtype = dtype or (floating[0].dtype if floating else torch.float32)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            return run(copy_model(model, on_meta), torch.empty(list(input_size), dtype=dtype, device="meta"))
        except Exception:  # on shapes alone a model may fail in any way; the second try tells
            pass
        try:
            values = torch.randn(list(input_size), device=device) if dtype.is_floating_point else torch.zeros(())
            return run(copy_model(model), values.to(device, dtype).expand(list(input_size)).contiguous())
        except Exception as error:
            raise RuntimeError(
                f"input_size: the model did not run on one {dtype} tensor of shape {tuple(input_size)}: {error}"
            ) from error


def _run(model: nn.Module, input: Tensor) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = {}
    alive: list[Tensor] = []  # inputs, so that no address stands for two of them

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            result = next((value for value in outputs if isinstance(value, Tensor)), None)
            if tensor is not None and result is not None:
                alive.append(tensor)
                memory, same = tensor.untyped_storage()._cdata, (id(tensor), tensor._version)
                call = Call(tensor.shape, result.shape, tensor.element_size(), memory, same)
                calls.setdefault(name, []).append(call)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(watch(name), with_kwargs=True)
    model.eval()
    with torch.no_grad():
        model(input)
    return calls


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype without values, on the meta device; a parameter stays one."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def copy_model(model: nn.Module, change: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A deep copy without the user's hooks, whose tensors are those that ``change`` makes of the model's."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _HOOK_REGISTRIES:
            hooks = getattr(module, name)
            # PyTorch's own hooks compute weights (weight_norm, pruning); a user's would see an input that is not there.
            own = ((key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils"))
            memo[id(hooks)] = OrderedDict(own)
        if change is not None:
            tensors = (*vars(module).values(), *module._parameters.values(), *module._buffers.values())
            memo.update({id(value): change(value) for value in tensors if isinstance(value, Tensor)})
    return copy.deepcopy(model, memo)
