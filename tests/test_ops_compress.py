"""swat_ext::compress and decompress: which elements are kept, in which order, and how they are written."""

import math
import random
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from checks import assert_identical
from geometries import LAYOUTS, in_layout
from torch import Tensor

from swat_ext import functional, reference
from swat_ext.ops import library as swat_ops
from swat_ext.topology.budget import Budget

DTYPES = (torch.float32, torch.float64)
SIZES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 959, 960, 1023, 1024, 1025, 1087, 1088, 2047, 2048, 2049, 4095, 4096, 4097)


def _assert_same_as_reference(input: Tensor, threshold: float | Tensor, what: str) -> functional.Packed:
    packed, expected = functional.compress(input, threshold), reference.compress(input, threshold)
    assert packed.size == input.shape
    assert_identical(packed.mask, expected.mask, f"{what}: mask")
    assert_identical(packed.values, expected.values, f"{what}: values")
    assert_identical(functional.decompress(packed), reference.decompress(expected), f"{what}: decompressed")
    return packed


def test_format_by_hand(isa: str) -> None:
    input = torch.zeros(1024 + 70)
    input[[0, 3, 63, 64, 1023, 1024, 1093]] = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, 6.0, -7.0])
    packed = functional.compress(input, 1.0)
    words = [0] * 18
    words[0] = 0b1001 - 2**63  # elements 0, 3 and 63, which is the sign bit
    words[1] = 1
    words[15] = -(2**63)
    words[16] = 1
    words[17] = 1 << 5  # 1093 = 17 * 64 + 5
    assert packed.mask.tolist() == [*words, 0, 5]
    assert packed.values.tolist() == [1.0, -2.0, 3.0, -4.0, 5.0, 6.0, -7.0]
    assert packed.nbytes == 7 * 4 + 20 * 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_words_and_blocks(size: int, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    input = torch.randn(size, generator=generator, dtype=dtype)
    for threshold in (0.0, 0.5, 1.7, 100.0):
        _assert_same_as_reference(input, threshold, f"size {size}, threshold {threshold}")


@pytest.mark.parametrize("size", [65_536, 100_003, 1_048_577])
def test_many_elements(size: int, isa: str, generator: torch.Generator) -> None:
    input = torch.randn(size, generator=generator)
    for threshold in (0.0, 1.6448536):
        _assert_same_as_reference(input, threshold, f"size {size}, threshold {threshold}")
    # Kept elements in one end alone: the ranges of threads are then of very different length.
    input[: size // 2] = 0
    _assert_same_as_reference(input, 0.1, "empty half")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout(layout: str, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    rng = random.Random(layout)
    sizes = [(2, 3, 5, 7), (16, 64, 8, 8), (17, 33, 9, 5), (1, 70, 1, 1), (64, 1, 3, 3), (0, 3, 4, 4), (3, 1, 40, 1)]
    sizes += [(128, 64, 1, 1), (2, 256, 4, 4), (3, 8, 33, 31), (2, 40, 9, 9), (1, 2056, 8, 8)]
    for size in sizes:
        input = in_layout(torch.randn(size, generator=generator, dtype=dtype), layout, rng)
        before = input.clone()
        for threshold in (0.0, 1.3):
            packed = _assert_same_as_reference(input, threshold, f"{layout} {size}, threshold {threshold}")
            taken = torch.ops.swat_ext.take(input, packed.mask, packed.values.numel())
            assert_identical(taken, packed.values, "taken again")
            in_channels_last = functional.decompress(packed, channels_last=True)
            assert in_channels_last.is_contiguous(memory_format=torch.channels_last)
            assert_identical(in_channels_last, reference.top(before, threshold) + 0.0, "decompressed to channels_last")
        assert_identical(input, before, "input after the call")


@pytest.mark.parametrize("dims", range(6))
def test_any_number_of_dimensions(dims: int, isa: str, generator: torch.Generator) -> None:
    _assert_same_as_reference(torch.randn([3] * dims, generator=generator), 0.4, f"{dims} dimensions")


def test_ties_are_all_kept(isa: str) -> None:
    input = torch.tensor([0.1, -0.1, 0.2, 0.1, -0.3, 0.05] * 50)
    threshold = functional.kth_magnitude(input, 120)
    assert threshold.item() == torch.tensor(0.1).item()
    packed = functional.compress(input, threshold)
    assert packed.values.tolist() == input[input.abs() != torch.tensor(0.05)].tolist()
    # As a Python float the same threshold is the same number.
    assert_identical(functional.compress(input, threshold.item()).mask, packed.mask, "mask")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_neighbours_of_the_threshold(dtype: torch.dtype, isa: str) -> None:
    threshold = torch.tensor(0.1, dtype=dtype)
    below, above = torch.nextafter(threshold, threshold * 0), torch.nextafter(threshold, threshold * 2)
    input = torch.stack((below, threshold, above, -below, -threshold, -above)).repeat(40)
    packed = functional.compress(input, threshold)
    assert packed.values.tolist() == torch.stack((threshold, above, -threshold, -above)).repeat(40).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: torch.dtype, isa: str) -> None:
    smallest = torch.finfo(dtype).smallest_normal / 4
    input = torch.tensor(
        [torch.nan, -torch.inf, 0.0, -0.0, smallest, -smallest, 1.0, -torch.nan, torch.inf], dtype=dtype
    )
    for repeats in (1, 7, 200):
        repeated = input.repeat(repeats)
        for threshold in (0.0, smallest, 2.0, torch.inf, torch.tensor(torch.nan)):
            _assert_same_as_reference(repeated, threshold, f"threshold {threshold}")
    nonfinite = functional.compress(input, torch.inf).values
    assert nonfinite.isnan().sum() == 2, "NaN was dropped"
    assert nonfinite.isinf().sum() == 2, "infinity was dropped"
    assert functional.compress(input, torch.tensor(torch.nan)).values.numel() == 7, (
        "a threshold of NaN keeps all but zeros"
    )
    assert functional.compress(input, 0.0).values.numel() == 7, "zeros are not stored, denormals are"


@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -0.3, torch.nan, torch.inf])
def test_all_equal(value: float, isa: str) -> None:
    input = torch.full((5, 333), value)
    for threshold in (0.0, torch.tensor(0.3), 0.4):
        _assert_same_as_reference(input, threshold, f"all {value}, threshold {threshold}")


def test_every_single_bit(isa: str) -> None:
    for position in range(1025):
        input = torch.zeros(1025)
        input[position] = 1.0
        packed = functional.compress(input, 0.5)
        bits = [packed.mask[word].item() & (2**64 - 1) for word in range(17)]
        assert sum(bit << (64 * word) for word, bit in enumerate(bits)) == 1 << position


@hypothesis.given(
    values=st.lists(st.floats(width=32), max_size=80),
    repeats=st.integers(1, 40),
    threshold=st.floats(min_value=0, width=32) | st.just(torch.tensor(math.nan)),
)
def test_property_same_as_reference(values: list[float], repeats: int, threshold: float | Tensor) -> None:
    input = torch.tensor(values * repeats, dtype=torch.float32)
    packed = _assert_same_as_reference(input, threshold, "hypothesis")
    dense = functional.decompress(packed)
    kept = ~(input.abs() < threshold) & (input != 0)
    assert_identical(dense[kept], input[kept], "kept")
    assert not dense[~kept].any()


def test_threads_do_not_matter(isa: str, generator: torch.Generator, restore_threads: None) -> None:
    input = torch.randn(37, 33, 29, 17, generator=generator)
    expected = reference.compress(input, 1.2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        strided = input.contiguous(memory_format=memory_format)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for _ in range(3):
                packed = functional.compress(strided, 1.2)
                assert_identical(packed.values, expected.values, f"values with {threads} threads")
                assert_identical(packed.mask, expected.mask, f"mask with {threads} threads")
                decompressed = functional.decompress(packed, channels_last=memory_format is torch.channels_last)
                assert_identical(decompressed, reference.top(input, 1.2), f"decompressed with {threads} threads")


def test_device(device: torch.device, generator: torch.Generator) -> None:
    input = torch.randn(3, 5, 7, 11, generator=generator)
    packed, expected = functional.compress(input.to(device), 0.9), reference.compress(input, 0.9)
    assert packed.values.device.type == packed.mask.device.type == device.type
    assert_identical(packed.values.cpu(), expected.values, "values")
    assert_identical(packed.mask.cpu(), expected.mask, "mask")
    assert_identical(functional.decompress(packed).cpu(), reference.decompress(expected), "decompressed")


def test_take_reads_the_tensor_as_it_is_now(isa: str, generator: torch.Generator) -> None:
    input = torch.randn(8, 16, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    packed = functional.compress(input, 1.0)
    input.mul_(3)
    taken = torch.ops.swat_ext.take(input, packed.mask, packed.values.numel())
    assert_identical(taken, packed.values * 3, "taken")


def test_take_refuses_what_does_not_fit() -> None:
    input = torch.arange(100.0)
    packed = functional.compress(input, 50.0)
    for count in (-1, 49, 101):
        with pytest.raises(RuntimeError, match=f"count: expected from 50, as the mask counts, .* got {count}"):
            torch.ops.swat_ext.take(input, packed.mask, count)
    with pytest.raises(RuntimeError, match="mask: expected 2 words for 50 elements, got 3"):
        torch.ops.swat_ext.take(input[:50], packed.mask, 50)
    with pytest.raises(RuntimeError, match="input: expected"):
        torch.ops.swat_ext.take(input.long(), packed.mask, 50)


def _bounds(keep: int, numel: int) -> tuple[int, int]:
    """Fewest and most elements that a selection of ``keep`` may hold: 4 / 5 and 5 / 4 of it, or the slack of few.

    That is a 64th of all elements, rounded up, at most 64.
    """
    slack = min(math.ceil(numel / 64), 64)
    return max(min(keep - keep // 5, keep - slack), 0), min(max(keep + keep // 4, keep + slack), numel)


@pytest.mark.parametrize("kind", ["gaussian", "small", "ties", "half zero", "all zero", "large", "NaN"])
@pytest.mark.parametrize("numel", [0, 1, 50, 100, 1500, 5000])
def test_a_budget_is_kept_on_both_sides(kind: str, numel: int, isa: str, generator: torch.Generator) -> None:
    """A stale threshold is replaced for the call where it lets too many or too few pass."""
    input = torch.randn(numel, generator=generator)
    input = {
        "gaussian": input,
        "small": input / 20,
        "ties": input.round(),
        "half zero": input.relu(),
        "all zero": input * 0,
        "large": input * 100,
        "NaN": torch.where(input > 1, torch.nan, input),
    }[kind]
    for keep in {0, 1, numel // 10, numel // 2, numel} & set(range(min(numel, 1), numel + 1)):
        least, most = _bounds(keep, numel)
        assert swat_ops.most_kept(keep, numel) == most
        for threshold in (0.0, 0.5, 1.2816, 3.0, torch.inf, torch.nan):
            stale = torch.tensor(threshold)
            passing = int((~(input.abs() < stale) & (input != 0)).sum())
            stays = passing <= most and (passing >= least or not threshold > 0)
            limit = stale if stays else reference.kth_magnitude(input, keep)
            expected = reference.compress(input, limit)
            values, mask = torch.ops.swat_ext.compress(input, stale, keep=keep)
            described = f"keep {keep}, threshold {threshold}, {passing} pass"
            assert_identical(mask, expected.mask, f"mask, {described}")
            assert_identical(values, expected.values, f"values, {described}")
            padded = torch.ops.swat_ext.compress(input, stale, keep=keep, room=most)
            _check_room(input, expected, padded, most, described)


def _check_room(input: Tensor, expected: reference.Packed, got: tuple[Tensor, Tensor], room: int, what: str) -> None:
    """Of ``expected``, packed into ``room`` values: the first of them that fit, and zeros."""
    values, mask = got
    what = f"{what}, room {room}"
    assert values.shape == (room,), what
    assert values.untyped_storage().nbytes() <= values.nbytes + 64, what
    kept = min(expected.values.numel(), room)
    assert_identical(values[:kept], expected.values[:kept], f"values, {what}")
    assert not values[kept:].any(), what
    first = reference.decompress(expected).flatten()
    if kept < expected.values.numel():
        first = first.where((first != 0).cumsum(0) <= room, 0)
    assert_identical(mask, reference.compress(first.view(input.shape), 0.0).mask, f"mask, {what}")
    dense = torch.ops.swat_ext.decompress(values, mask, list(input.shape), False)
    assert_identical(dense, first.view(input.shape), f"unpacked, {what}")
    assert_identical(torch.ops.swat_ext.take(input, mask, room), values, f"taken, {what}")


@pytest.mark.parametrize("size", [(0,), (1,), (63,), (5000,), (3, 20, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_room_is_the_length_whatever_is_kept(
    size: tuple[int, ...], dtype: torch.dtype, isa: str, generator: torch.Generator
) -> None:
    """Less, as much and more than is kept, without a budget and with one, whose bounds it neither moves nor follows."""
    input = torch.randn(size, dtype=dtype, generator=generator)
    numel = input.numel()
    if numel > 20:
        input.view(-1)[5], input.view(-1)[-1] = torch.nan, torch.inf
    for last in [False, True][: 1 + (len(size) == 4)]:
        input = input.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for threshold in (0.0, 0.7, 9.0, torch.nan):
            stale = torch.tensor(threshold, dtype=dtype)
            for keep in {None, min(numel, 1), numel // 3 or numel, numel}:
                described = f"{last}, threshold {threshold}, keep {keep}"
                limit = {} if keep is None else {"keep": keep}
                free = reference.Packed(*torch.ops.swat_ext.compress(input, stale, **limit), input.shape)
                if keep is None:
                    assert_identical(free.mask, reference.compress(input, stale).mask, described)
                kept = free.values.numel()
                for room in {0, 1, kept // 2, kept - 1, kept, kept + 1, (kept + numel) // 2, numel} & {
                    *range(numel + 1)
                }:
                    got = torch.ops.swat_ext.compress(input, stale, **limit, room=room)
                    _check_room(input, free, got, room, described)


@pytest.mark.parametrize("room", [None, 0, 7, 299, 300, 301, 900])
def test_select_follows_its_state(room: int | None, isa: str, generator: torch.Generator) -> None:
    """Steps, period and budget are read at each call; the step of the selection is written."""
    threshold, state = torch.zeros(()), torch.tensor([4, -1, 3, 1, 3])
    expected, selected = torch.zeros(()), -1
    alone = 0
    for steps, period, share in (
        (4, 3, (1, 3)),
        (6, 3, (1, 3)),
        (7, 3, (2, 6)),
        (8, 1, (1, 4)),
        (9, 2, (1, 3)),  # too few pass for a budget that has grown: selected anew for this call alone
        (9, 2, (1, 4)),
        (9, 1, (1, 3)),
    ):
        input = torch.randn(900, generator=generator)
        state[0], state[2], state[3:] = steps, period, torch.tensor(share)
        keep = 900 * share[0] // share[1]
        if selected < 0 or steps - selected >= period:
            expected, selected = reference.kth_magnitude(input, keep), steps
        described = f"step {steps}, period {period}, share {share}"
        values, mask = torch.ops.swat_ext.select(input, threshold, state, room)
        assert state.tolist() == [steps, selected, period, *share]
        assert_identical(threshold, expected, described)
        packed = reference.compress(input, expected)
        least, most = _bounds(keep, 900)
        if not least <= packed.values.numel() <= most:
            alone += 1
            packed = reference.compress(input, reference.kth_magnitude(input, keep))
        if room is None:
            assert_identical(values, packed.values, described)
            assert_identical(mask, packed.mask, described)
        else:
            _check_room(input, packed, (values, mask), room, described)
    assert (selected, alone) == (9, 1)


@pytest.mark.parametrize(
    ("numerator", "denominator"), [(1, 1), (1, 3), (2**62 - 1, 2**62), (1, 2**62), (4 * 10**18, 4 * 10**18 + 3)]
)
def test_the_budget_of_a_state_is_rounded_up_from_any_fraction(numerator: int, denominator: int) -> None:
    input = torch.arange(1.0, 1001.0)
    keep = math.ceil(Fraction(numerator, denominator) * 1000)
    assert keep == Budget(numerator, denominator).count(1000)
    state = torch.tensor([0, -1, 1, numerator, denominator])
    values, _ = torch.ops.swat_ext.select(input, torch.zeros(()), state, None)
    assert_identical(values, input[1000 - keep :], "the largest")


def test_results_own_their_memory(isa: str, generator: torch.Generator) -> None:
    input = torch.randn(1000, generator=generator)
    packed = functional.compress(input, 1.0)
    # What is saved for backward holds these bytes; a view of a full-size buffer would hold the full size.
    assert packed.values.untyped_storage().nbytes() <= packed.values.nbytes + 64
    assert packed.mask.untyped_storage().nbytes() <= packed.mask.nbytes + 64
    values = packed.values.clone()
    input.zero_()
    assert_identical(packed.values, values, "values after the input was overwritten")


@pytest.mark.parametrize("size", [(7, 3, 5, 11), (5, 2, 32, 32), (2000, 3), (9, 70, 1, 1), (3, 0, 2, 2), (4,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_part_is_a_slice_of_the_whole(size: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    input = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    values, mask, _ = functional.compress(input, 0.6)
    whole = torch.ops.swat_ext.decompress(values, mask, size, False)
    for begin, end in ((0, size[0]), (1, 3), (2, 2), (0, 1), (size[0] - 1, size[0])):
        for channels_last in (False, True)[: 1 + (len(size) == 4)]:
            part = torch.ops.swat_ext.decompress_part(values, mask, size, begin, end, channels_last)
            assert torch.equal(part, whole[begin:end])
    for begin, end in ((-1, 2), (2, 1), (0, size[0] + 1)):
        with pytest.raises(RuntimeError, match="begin: expected 0 <= begin <= end <= size"):
            torch.ops.swat_ext.decompress_part(values, mask, size, begin, end, False)
