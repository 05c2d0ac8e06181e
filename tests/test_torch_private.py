"""What the library uses of PyTorch beyond its documentation still does what it did with torch 2.13.0."""

import gc

import torch

from swat_ext.ops.torch_private import WeakTensorKeyDictionary, transforms_active


def test_transforms_active() -> None:
    assert not transforms_active()
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(transforms_active())
        return x.sum()

    torch.func.grad(look)(torch.ones(3))
    torch.func.vmap(look)(torch.ones(2, 3))
    assert seen == [True, True]
    assert not transforms_active()


def test_weak_tensor_keys_are_compared_by_identity_and_let_go() -> None:
    known = WeakTensorKeyDictionary()
    first, second = torch.ones(2), torch.ones(2)
    known[first], known[second] = 1, 2
    assert (known[first], known[second]) == (1, 2)
    del first
    gc.collect()
    assert len(known) == 1
