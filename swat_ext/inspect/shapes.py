"""Copies of a model and of its arguments: without values, for a run on shapes alone, or with them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swat_ext.ops.torch_private import own_hooks

__all__ = ["arguments", "copy_model", "map_tensors", "on_meta", "tensors_in"]


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype without values, on the meta device; a parameter stays one."""
    empty = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def copy_model(model: nn.Module, change: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A deep copy without the user's hooks, whose tensors are those that ``change`` makes of the model's."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo.update(own_hooks(module))  # a user's would see an input that is not there
        if change is not None:
            tensors = (*vars(module).values(), *module.parameters(recurse=False), *module.buffers(recurse=False))
            memo.update({id(value): change(value) for value in tensors if isinstance(value, Tensor)})
    return copy.deepcopy(model, memo)


def arguments(name: str, given: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model, from a tensor, a tuple or list of the first or a dict of the second.

    Raises:
        TypeError: ``given``, called ``name``, is something else.
    """
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    raise TypeError(f"{name}: expected a Tensor, or a tuple or dict of arguments, got {type(given).__name__}")


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor in nested tuples, lists and mappings replaced by what ``change`` makes of it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
