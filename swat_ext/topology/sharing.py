"""One packed copy for all layers that read the same tensor, such as a block's first convolution and its shortcut.

The copy is found again only by a layer that is given the very same tensor object, unchanged. Only tensors that a graph
made are remembered: a leaf may lie in memory that others write to, a batch's buffer that is filled again, and its
version would not tell. What holds the copy is the graph, for its backward pass; here are weak references alone.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from swat_ext.functional import Packed

__all__ = ["SharedPack", "attach", "find", "has_identity", "is_traced"]


class SharedPack(NamedTuple):
    """What a layer kept of a tensor, and what another has to agree on to use it too.

    Attributes:
        packed: the kept elements.
        key: what was made of the tensor before it was packed, and how many elements were to be kept.
        selection: stands for one selection of a threshold: layers that hold the same object hold equal thresholds.
            None for a selection that counts for one call alone.
        fresh: whether the threshold was selected from this very tensor.
        threshold: 0-dim, what was packed with; None with ``selection`` None.
        remaining: optimizer steps until the threshold is due again.
    """

    packed: Packed
    key: Hashable
    selection: object | None
    fresh: bool
    threshold: Tensor | None
    remaining: int


class _Known(NamedTuple):
    """A :class:`SharedPack` that keeps no packed element alive; ``version`` is the tensor's when it was packed."""

    shared: SharedPack
    values: TensorWeakRef
    mask: TensorWeakRef
    version: int


# By the tensor, then by key.
_known = WeakTensorKeyDictionary()


def has_identity(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for values of its own: not while it is traced."""
    return not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def is_traced(tensor: Tensor) -> bool:
    """Whether operators on ``tensor`` have to go through the dispatcher whole, for the compiler or a mode to see."""
    return not has_identity(tensor) or torch._C._len_torch_dispatch_stack() > 0


def attach(tensor: Tensor, shared: SharedPack) -> None:
    """Remember a packed copy of a tensor that a graph made; nothing else is remembered."""
    if tensor.grad_fn is None:
        return
    values, mask, size = shared.packed
    bare = shared._replace(packed=Packed(values.new_empty(0), mask.new_empty(0), size))
    _known.setdefault(tensor, {})[shared.key] = _Known(
        bare, TensorWeakRef(values), TensorWeakRef(mask), tensor._version
    )


def find(tensor: Tensor, key: Hashable) -> SharedPack | None:
    """The copy under ``key`` that a graph holds of ``tensor``, unless the tensor changed since."""
    known: _Known | None = _known.get(tensor, {}).get(key) if tensor.grad_fn is not None else None
    if known is None or known.version != tensor._version:
        return None
    values, mask = known.values(), known.mask()
    if values is None or mask is None:
        return None
    return known.shared._replace(packed=Packed(values, mask, known.shared.packed.size))
