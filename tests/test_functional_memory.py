"""What a forward pass holds for the backward pass: bitmaps and kept values, and nothing else."""

import weakref

import pytest
import torch
from torch import Tensor

from swat_ext import functional


def _saved(forward: object) -> list[Tensor]:
    """Tensors that go through ``save_for_backward`` while ``forward`` runs."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # type: ignore[operator]
        assert output.requires_grad
    return saved


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
def test_conv2d_saves_the_packed_tensors_alone(sparsity: float, isa: str, generator: torch.Generator) -> None:
    input = torch.randn(16, 32, 16, 16, generator=generator).relu().requires_grad_()
    weight = torch.randn(32, 32, 3, 3, generator=generator, requires_grad=True)
    thresholds = {
        f"{name}_threshold": functional.kth_magnitude(tensor, functional.keep_count(tensor.numel(), sparsity))
        for name, tensor in (("weight", weight), ("activation", input))
    }
    saved = _saved(lambda: functional.conv2d(input, weight, padding=1, **thresholds))
    # Kept values of the input, and for both a bit of each element and a rank for each 1024. The weight is there anyway.
    numel = input.numel() + weight.numel()
    expected = functional.keep_count(input.numel(), sparsity) * 4
    expected += numel // 8 + numel // 128
    others = [tensor for tensor in saved if tensor.data_ptr() != weight.data_ptr()]
    assert len(others) == len(saved) - 1
    held = sum(tensor.untyped_storage().nbytes() for tensor in others)
    assert held <= 1.01 * expected + 64
    assert held < (0.25 if sparsity == 0.8 else 0.15) * 4 * numel


def _gradients(weight: Tensor, own: bool, backend: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    input = torch.randn(2, 4, 6, 6, generator=generator, requires_grad=True)
    packed = functional.compress(weight, 0.5), functional.compress(input, 0.5)
    output = functional.conv2d_packed(input, weight, None, *packed, backend=backend, from_weight=own)
    return torch.autograd.grad(output.square().sum(), (input, weight))


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kept_weights_are_taken_again(backend: str, memory_format: torch.memory_format, isa: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 4, 3, 3, generator=generator).to(memory_format=memory_format).requires_grad_()
    found = [_gradients(weight, own, backend, torch.Generator().manual_seed(6)) for own in (False, True)]
    for kept, taken in zip(*found, strict=True):
        assert torch.equal(kept, taken)


def test_a_weight_changed_before_the_backward_pass_is_refused(generator: torch.Generator) -> None:
    input = torch.randn(2, 4, 6, 6, generator=generator, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, generator=generator, requires_grad=True)
    thresholds = {"weight_threshold": 0.5, "activation_threshold": 0.5}
    output = functional.conv2d(input, weight, **thresholds)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    # A weight that was computed is saved packed: there is no parameter to take it from.
    computed = weight * 2
    output = functional.conv2d(input, computed, **thresholds)
    with torch.no_grad():
        computed.zero_()
    assert torch.autograd.grad(output.sum(), input)[0].abs().sum() > 0


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_the_weight_is_not_copied(backend: str, memory_format: torch.memory_format, isa: str) -> None:
    """It lies as the parameter does, so that autograd may keep it as it is."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 4, 3, 3, generator=generator).to(memory_format=memory_format).requires_grad_()
    input = torch.randn(2, 4, 6, 6, generator=generator)
    packed = functional.compress(weight, 0.5), functional.compress(input, 0.5)
    arrived = []
    weight.register_hook(lambda grad: arrived.append(grad.data_ptr()))
    functional.conv2d_packed(input, weight, None, *packed, backend=backend).sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()
    assert [weight.grad.data_ptr()] == arrived


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_the_dense_input_is_freed(backend: str, isa: str, generator: torch.Generator) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=generator, requires_grad=True)
    input = torch.randn(2, 4, 6, 6, generator=generator).requires_grad_().mul(2)
    packed = functional.compress(weight, 0.5), functional.compress(input, 0.5)
    output = functional.conv2d_packed(input, weight, None, *packed, backend=backend)
    reference = weakref.ref(input)
    del input
    assert reference() is None
    output.sum().backward()
    assert weight.grad is not None


def test_linear_saves_the_packed_tensors_alone(isa: str, generator: torch.Generator) -> None:
    input = torch.randn(64, 256, generator=generator)
    weight = torch.randn(128, 256, generator=generator, requires_grad=True)
    saved = _saved(lambda: functional.linear(input, weight, weight_threshold=1.6448536, activation_threshold=1.6448536))
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved if tensor.data_ptr() != weight.data_ptr())
    assert held < 0.15 * 4 * (input.numel() + weight.numel())


def test_nothing_is_saved_without_gradients(isa: str, generator: torch.Generator) -> None:
    input = torch.randn(2, 4, 6, 6, generator=generator)
    weight = torch.randn(6, 4, 3, 3, generator=generator, requires_grad=True)
    with torch.no_grad():
        output = functional.conv2d(input, weight, weight_threshold=0.5, activation_threshold=0.5)
    assert output.grad_fn is None
    # A frozen weight needs no activation.
    frozen = weight.detach()
    active = input.clone().requires_grad_()
    saved = _saved(lambda: functional.conv2d(active, frozen, weight_threshold=0.5, activation_threshold=0.5))
    others = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() != weight.data_ptr())
    assert others == functional.compress(weight, 0.5).mask.nbytes
