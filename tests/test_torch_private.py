"""What the library uses of PyTorch beyond its documentation still does what it did with torch 2.13.0."""

import gc
import weakref

import pytest
import torch
from torch import nn

from swat_ext.ops.torch_private import WeakTensorKeyDictionary, hooks_on_top, is_compiled, own_hooks, transforms_active


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


def test_hooks_on_top_are_the_innermost() -> None:
    def outer(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def inner(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    assert hooks_on_top() is None
    with torch.autograd.graph.saved_tensors_hooks(outer, outer):
        with torch.autograd.graph.saved_tensors_hooks(inner, inner):
            assert hooks_on_top() is inner
        assert hooks_on_top() is outer
    assert hooks_on_top() is None


def test_is_compiled() -> None:
    module = nn.Linear(2, 2)
    assert not is_compiled(module)
    assert is_compiled(torch.compile(module))
    module.compile()
    assert is_compiled(module)


def test_own_hooks_are_torchs() -> None:
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.Linear(2, 2))
    module.register_forward_pre_hook(lambda *_: None)
    module.register_forward_hook(lambda *_: None)
    kept = [hook for hooks in own_hooks(module).values() for hook in hooks.values()]
    assert [type(hook).__name__ for hook in kept] == ["WeightNorm"]
    assert id(module._forward_pre_hooks) in own_hooks(module)


def test_a_storage_is_one_object_while_it_lives() -> None:
    """Counting by storage relies on it, and on weak references to storages."""
    tensor = torch.ones(4, requires_grad=True).exp()
    known = weakref.WeakSet([tensor.untyped_storage()])
    gc.collect()
    assert tensor.view(2, 2).untyped_storage() in known
    assert tensor.detach().untyped_storage() is tensor.untyped_storage()
    assert torch.ones(4).untyped_storage() not in known
    del tensor
    gc.collect()
    assert len(known) == 0
