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
    input = torch.randn(16, 32, 16, 16, generator=generator).relu()
    weight = torch.randn(32, 32, 3, 3, generator=generator, requires_grad=True)
    thresholds = {
        f"{name}_threshold": functional.kth_magnitude(tensor, functional.keep_count(tensor.numel(), sparsity))
        for name, tensor in (("weight", weight), ("activation", input))
    }
    saved = _saved(lambda: functional.conv2d(input, weight, padding=1, **thresholds))
    # A byte of each kept value, a bit of each element, a rank for each 1024.
    numel = input.numel() + weight.numel()
    expected = sum(functional.keep_count(tensor.numel(), sparsity) for tensor in (input, weight)) * 4
    expected += numel // 8 + numel // 128
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    assert held <= 1.01 * expected + 64
    assert held < (0.25 if sparsity == 0.8 else 0.15) * 4 * numel


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
    assert sum(tensor.untyped_storage().nbytes() for tensor in saved) < 0.15 * 4 * (input.numel() + weight.numel())


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
    assert sum(tensor.nbytes for tensor in saved) == functional.compress(weight, 0.5).nbytes
