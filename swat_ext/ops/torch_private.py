"""Every use that the library makes of what PyTorch does not document, each behind one name; seen with torch 2.13.0.

``tests/test_torch_private.py`` checks them, so that a release that changes one says which.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["WeakTensorKeyDictionary", "transforms_active"]


def transforms_active() -> bool:
    """Whether a transform of :mod:`torch.func` is at work, whose tensors have no memory for a kernel to read."""
    return torch._C._are_functorch_transforms_active()
