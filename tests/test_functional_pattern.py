"""Patterns in the functional interface: selected, packed, and multiplied by."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blockwise import GRANULARITIES, kept_of, top
from checks import assert_close, in_double

from swat_ext import functional


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_functions_take_patterns(granularity: str) -> None:
    generator = torch.Generator().manual_seed(0)
    options = GRANULARITIES[granularity]
    for size, x, function in (
        ((10, 6, 3, 3), torch.randn(2, 6, 7, 7, generator=generator), functional.conv2d),
        ((10, 6), torch.randn(5, 6, generator=generator), functional.linear),
    ):
        weight = torch.randn(size, generator=generator)
        kept = kept_of(weight, 0.6, *options.values())
        view = functional.linear_input_view(x) if x.dim() == 2 else x
        largest = functional.pattern(view, 0.5)
        assert torch.equal(functional.decompress(functional.pack(view, largest)), top(view, 0.5))
        plain = F.conv2d if x.dim() == 4 else F.linear
        w, i = in_double(weight, x)
        wanted = plain(i, w * kept)
        grad = torch.randn(wanted.shape, generator=generator)
        expected = [
            torch.autograd.grad(wanted, i, grad.double())[0],
            torch.autograd.grad(plain(top(x, 0.5).double(), w), w, grad.double())[0],
        ]
        x.requires_grad_(), weight.requires_grad_()
        chosen = functional.pattern(weight, 0.6, **options)
        got = function(x, weight, weight_threshold=chosen, activation_threshold=largest)
        assert_close(got.detach(), wanted.detach(), "output")
        for mine, reference in zip(torch.autograd.grad(got, [x, weight], grad), expected, strict=True):
            assert_close(mine, reference, "gradient")


def test_a_zero_in_a_pattern_stays() -> None:
    weight = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    pattern = functional.pattern(weight, 0.5, "block", (1, 2))
    assert pattern.dense().tolist() == [[True, True], [False, False]]
    assert functional.pack(weight, pattern).values.tolist() == [0.0, 3.0]
    assert functional.pattern(torch.empty(0, 4), 0.5, "filter").dense().shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 3), 1.0), ValueError, "^sparsity: expected a number in"),
        ((torch.ones(3, 3), 0.5, "channel"), ValueError, "^granularity: expected one of 'unstructured', .* 'channel'"),
        ((torch.ones(3, 3), 0.5, "block", (0, 1)), ValueError, "^block_size: expected"),
        ((torch.ones(3, 3), 0.5, "block", (1, 1.5)), TypeError, "^block_size: expected"),
        ((torch.ones(3, 3), 0.5, "block", 8), TypeError, "^block_size: expected"),
        ((torch.ones(3, 3), 0.5, "block", (8, 1, 1)), TypeError, "^block_size: expected"),
        (([1.0], 0.5), TypeError, "^weight: expected"),
        ((torch.ones(3, 3, dtype=torch.int64), 0.5), TypeError, "^weight: expected"),
        ((torch.ones(3), 0.5, "filter"), ValueError, "^weight: expected"),
        ((torch.ones(3, 3, 3), 0.5, "block"), ValueError, "^weight: expected"),
        ((torch.ones(()), 0.5, "kernel"), ValueError, "^weight: expected"),
    ],
)
def test_wrong_arguments_of_pattern(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.pattern(*arguments)


def test_wrong_patterns() -> None:
    pattern, weight = functional.pattern(torch.ones(4, 6), 0.5), torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"^pattern: expected a pattern of size \(6, 4\), got \(4, 6\)"):
        functional.pack(weight.T, pattern)
    with pytest.raises(TypeError, match=r"^pattern: expected a Pattern, got Tensor"):
        functional.pack(weight, weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^weight_threshold: expected a pattern of size"):
        functional.linear(torch.ones(2, 4), weight.T, weight_threshold=pattern, activation_threshold=0.0)
    with pytest.raises(ValueError, match=r"^activation_threshold: expected a pattern of size"):
        functional.linear(torch.ones(2, 6), weight, weight_threshold=pattern, activation_threshold=pattern)
    with pytest.raises(RuntimeError, match=r"mask|count"):
        functional.pack(weight, pattern._replace(mask=pattern.mask[:1]))
