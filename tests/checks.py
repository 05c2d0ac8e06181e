"""What tests ask of a result."""

import torch
from torch import Tensor

# Norm of the difference / norm of the float64 reference: what the project promises, and what float64 itself allows.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}


def assert_close(got: Tensor, reference: Tensor, what: str) -> None:
    """``|got - reference| <= tolerance * |reference|`` in the Frobenius norm; equal where the reference is all zero."""
    assert got.shape == reference.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    exact = reference.to(torch.float64)
    assert exact.isfinite().all(), f"{what}: the reference itself is not finite"
    error = (got.to(torch.float64) - exact).norm().item()
    limit = TOLERANCE[got.dtype] * exact.norm().item()
    # Written so that NaN fails.
    assert error <= limit, f"{what}: |difference| {error:.3g}, more than {limit:.3g}; norm {exact.norm().item():.3g}"


def assert_identical(got: Tensor, expected: Tensor, what: str) -> None:
    """Every bit equal, the sign of zero and the payload of NaN too."""
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    different = (got.contiguous().view(integer) != expected.contiguous().view(integer)).sum().item()
    assert different == 0, f"{what}: {different} of {got.numel()} elements differ"


def in_double(*tensors: Tensor) -> list[Tensor]:
    """Contiguous float64 copies that require gradients, for the reference."""
    return [tensor.detach().to(torch.float64).contiguous().clone().requires_grad_() for tensor in tensors]
