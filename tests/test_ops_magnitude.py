"""swat_ext::kth_magnitude is exactly what sorting would give."""

import random

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from checks import assert_identical
from geometries import LAYOUTS, in_layout
from torch import Tensor

from swat_ext import functional, reference

DTYPES = (torch.float32, torch.float64)


def _adversarial(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors that a radix selection, a histogram or a partition could get wrong."""
    info = torch.finfo(dtype)
    gen = torch.Generator().manual_seed(7)
    random_values = torch.randn(5000, generator=gen, dtype=dtype)
    powers = torch.tensor([2.0**e for e in range(-40, 41)], dtype=dtype)
    infinity = torch.tensor(torch.inf, dtype=dtype)
    beside_powers = torch.cat((powers, torch.nextafter(powers, infinity), torch.nextafter(powers, -infinity)))
    one = torch.ones(1000, dtype=dtype)
    mixed = random_values.clone()
    mixed[::7], mixed[::11], mixed[::13], mixed[::17] = torch.nan, torch.inf, -torch.inf, 0.0
    # Every bit pattern family: exponents and low bits of the mantissa that only the last radix pass can tell apart.
    steps = torch.arange(3000, dtype=torch.int32 if dtype == torch.float32 else torch.int64)
    last_bits = (one[:1].view(steps.dtype) + steps).view(dtype)
    return {
        "one element": torch.tensor([-3.0], dtype=dtype),
        "all equal": one * 0.1,
        "all equal, both signs": torch.cat((one, -one)),
        "all zero": one * 0,
        "both zeros": torch.cat((one * 0, one * -0.0)),
        "powers of two and their neighbours": beside_powers,
        "last bits of the mantissa": last_bits,
        "sorted": random_values.sort().values,
        "sorted downwards": random_values.sort(descending=True).values,
        "two values": torch.where(random_values > 1, one[0], one[0] * 2),
        "extremes": torch.tensor(
            [info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal / 8, 0.0, -0.0, torch.inf], dtype=dtype
        ),
        "denormals": random_values * info.smallest_normal,
        "all NaN": one * torch.nan,
        "all infinite": torch.cat((one, -one)) * torch.inf,
        "NaN, infinity, zeros": mixed,
        "wide range": random_values * torch.exp(20 * torch.randn(5000, generator=gen, dtype=dtype)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(_adversarial(torch.float32)))
def test_equals_sorting_on_adversarial_values(name: str, dtype: torch.dtype, isa: str) -> None:
    values = _adversarial(dtype)[name]
    n = values.numel()
    for k in sorted({1, 2, 3, n // 10, n // 2, n - 1, n} & set(range(1, n + 1))):
        got = functional.kth_magnitude(values, k)
        expected = reference.kth_magnitude(values, k)
        assert got.shape == ()
        assert got.dtype == dtype
        torch.testing.assert_close(
            got, expected, rtol=0, atol=0, equal_nan=True, msg=f"{name}, k = {k}: {got} {expected}"
        )
        assert not torch.signbit(got) or got.isnan(), f"{name}, k = {k}: a magnitude with a minus sign"


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_sorting_on_every_k(dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    values = torch.randn(777, generator=generator, dtype=dtype)
    expected = values.abs().sort(descending=True).values
    for k in range(1, 778):
        assert functional.kth_magnitude(values, k).item() == expected[k - 1].item()


@pytest.mark.parametrize("size", [63, 64, 65, 1023, 1024, 1025, 4095, 4097, 32767, 32769, 65537, 262147])
def test_sizes_around_blocks(size: int, isa: str, generator: torch.Generator) -> None:
    values = torch.randn(size, generator=generator)
    # The largest sits where a loop's tail or a thread's last range would be lost.
    values[-1] = 100.0
    expected = values.abs().sort(descending=True).values
    for k in (1, 2, size // 10, size):
        assert functional.kth_magnitude(values, k).item() == expected[k - 1].item()


@pytest.mark.parametrize("order", ["random", "sorted", "all equal", "half zero"])
def test_two_million_elements(order: str, isa: str, generator: torch.Generator) -> None:
    values = torch.randn(2**21, generator=generator)
    if order == "sorted":
        values = values.sort().values
    elif order == "all equal":
        values = torch.full_like(values, 0.3)
    elif order == "half zero":
        values = values.relu()
    expected = values.abs().sort(descending=True).values
    for k in (1, 2**21 // 20, 2**21 // 5, 2**20 + 1, 2**21):
        assert functional.kth_magnitude(values, k).item() == expected[k - 1].item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, isa: str, generator: torch.Generator) -> None:
    rng = random.Random(layout)
    for size in ((5, 7, 9, 11), (16, 32, 8, 8), (1, 1, 1, 1), (33, 1, 1, 5)):
        values = in_layout(torch.randn(size, generator=generator), layout, rng)
        before = values.clone()
        k = rng.randint(1, values.numel())
        assert functional.kth_magnitude(values, k).item() == reference.kth_magnitude(values, k).item()
        assert_identical(values, before, "input after the call")


def test_zero_dimensional(isa: str) -> None:
    assert functional.kth_magnitude(torch.tensor(-2.5), 1).item() == 2.5


@hypothesis.given(
    values=st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=300),
    repeats=st.integers(1, 9),
    position=st.floats(0, 1),
)
def test_property_equals_sorting(values: list[float], repeats: int, position: float) -> None:
    tensor = torch.tensor(values * repeats, dtype=torch.float32)
    k = 1 + round(position * (tensor.numel() - 1))
    got, expected = functional.kth_magnitude(tensor, k), reference.kth_magnitude(tensor, k)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_threads_do_not_matter(isa: str, generator: torch.Generator, restore_threads: None) -> None:
    values = torch.randn(300_001, generator=generator)
    results = set()
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results |= {functional.kth_magnitude(values, 30_000).item() for _ in range(3)}
    assert len(results) == 1


def test_device(device: torch.device, generator: torch.Generator) -> None:
    values = torch.randn(4097, generator=generator).to(device)
    got = functional.kth_magnitude(values, 410)
    assert got.device.type == device.type
    assert got.item() == reference.kth_magnitude(values.cpu(), 410).item()


def test_has_no_gradient(isa: str) -> None:
    values = torch.randn(10, requires_grad=True)
    assert not functional.kth_magnitude(values, 3).requires_grad
