"""One packed copy for all layers that read the same tensor, such as a block's first convolution and its shortcut.

The copy travels on the tensor itself, as a Python attribute: it is found again only by a layer that is given the very
same tensor object, unchanged, and it dies with it (the graph keeps what the backward pass needs).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from swat_ext.functional import Packed

__all__ = ["SharedPack", "attach", "find", "has_identity"]

_ATTRIBUTE = "_swat_packed"


class SharedPack(NamedTuple):
    """What a layer kept of a tensor, and what another has to agree on to use it too.

    Attributes:
        packed: the kept elements.
        version: of the tensor when it was packed.
        keep: elements that the layer was to keep.
        selection: stands for one selection of a threshold: layers that hold the same object hold equal thresholds.
            None for a selection that counts for one call alone.
        fresh: whether the threshold was selected from this very tensor.
        threshold: 0-dim, what was packed with; None with ``selection`` None.
        remaining: optimizer steps until the threshold is due again.
    """

    packed: Packed
    version: int
    keep: int
    selection: object | None
    fresh: bool
    threshold: Tensor | None
    remaining: int


def has_identity(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for values of its own: not while it is traced."""
    return not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def attach(tensor: Tensor, shared: SharedPack) -> None:
    """Leave a packed copy with the tensor that it was made of."""
    setattr(tensor, _ATTRIBUTE, shared)


def find(tensor: Tensor, keep: int) -> SharedPack | None:
    """The copy of ``keep`` elements that travels with ``tensor``, unless the tensor has changed since."""
    shared: SharedPack | None = getattr(tensor, _ATTRIBUTE, None)
    if shared is None or shared.version != tensor._version or shared.keep != keep:
        return None
    return shared
