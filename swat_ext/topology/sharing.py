"""One packed copy for all layers that read the same tensor, such as a block's first convolution and its shortcut.

The first reader's selection serves all readers of that tensor that keep as many elements of it. Only tensors that a
graph made are remembered: a leaf may lie in memory that others write to, such as a batch's buffer that is filled again,
and its version would not tell.
"""

from collections.abc import Callable, Hashable

from torch import Tensor

from swat_ext.ops.packed import Packed
from swat_ext.ops.torch_private import WeakTensorKeyDictionary

__all__ = ["shared"]

# By the tensor, then by what was made of it: its version, and the packed copy, which lives as long as the tensor.
_known = WeakTensorKeyDictionary()


def shared(tensor: Tensor, key: Hashable, pack: Callable[[], Packed]) -> Packed:
    """What an earlier reader of this very tensor, unchanged since, packed under ``key``; else ``pack()``."""
    if tensor.grad_fn is None or tensor.is_inference():
        return pack()
    copies: dict[Hashable, tuple[int, Packed]] = _known.setdefault(tensor, {})
    version, packed = copies.get(key, (-1, None))
    if packed is None or version != tensor._version:
        packed = pack()
        copies[key] = tensor._version, packed
    return packed
