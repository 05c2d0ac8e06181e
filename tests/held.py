"""Bytes that autograd holds between a forward pass and its backward pass: a second count, to test the library's by."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that ``forward`` leaves saved for its backward pass.

    Whole storages are counted, for a saved view keeps all of its storage alive; a storage saved twice is counted once.

    Args:
        forward: computes something to call backward on; run once, with gradients.
        exclude: tensors whose storages do not count, such as a model's parameters and buffers, which live on anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # The saved tensors themselves stay in this dict: were one freed, its address could be given to the next.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            saved.setdefault(pointer, tensor.detach())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del output
    return total
