"""The CUDA kernels and their operators against the common oracle: on a GPU, and thread by thread on the CPU."""

import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_identical
from conftest import Kernels, emulator
from geometries import LAYOUTS, Geometry, in_layout, random_geometry, random_tensor, random_threshold
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swat_ext import reference
from swat_ext.ops import library as swat_ops
from swat_ext.ops.layout import memory_format

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Norm of the difference / norm of the float64 result. Half types: the rounding of the result, as sums are in float32.
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 64, 1025, 5000])
def test_kth_magnitude(kernels: Kernels, size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    plain = torch.randn(size, generator=generator).to(kernels.device, dtype)
    special = plain.clone()
    special[::3], special[1::7], special[2::11] = 0, torch.nan, -torch.inf
    for values in (plain, special, torch.full_like(plain, -0.3), plain.relu(), plain[::2]):
        for k in {1, 2, values.numel() // 10, values.numel()} & set(range(1, values.numel() + 1)):
            got, expected = kernels.ops.kth_magnitude(values, k), reference.kth_magnitude(values, k)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compress_and_decompress(kernels: Kernels, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    rng = random.Random(layout)
    sizes = [
        (2, 3, 5, 7),
        (3, 33, 7, 7),
        (2, 70, 8, 8),
        (1, 70, 1, 1),
        (2, 40, 12, 12),
        (70,),
        (1, 5, 1, 40),
        (0, 3, 4, 4),
        (3, 5, 7),
    ]
    for size in [*sizes, (2, 3, 2, 3, 4), (), (9, 130, 3, 3)]:
        values = torch.randn(size, generator=generator).to(kernels.device, dtype)
        if values.numel() > 20:
            values.view(-1)[3], values.view(-1)[9] = torch.nan, torch.inf
        input = in_layout(values, layout, rng)
        for threshold in (0.0, 0.75, 9.0, torch.nan):
            got = kernels.ops.compress(input, torch.tensor(threshold, dtype=dtype, device=kernels.device))
            expected = reference.compress(input, threshold)
            assert_identical(got[1], expected.mask, f"mask of {size}, threshold {threshold}")
            assert torch.equal(got[0].nan_to_num(7), expected.values.nan_to_num(7)), f"values of {size}"
            for channels_last in [False, True][: 1 + (input.dim() == 4)]:
                dense = kernels.ops.decompress(*got, size, channels_last)
                wanted = reference.decompress(expected)
                assert torch.equal(dense.nan_to_num(7), wanted.nan_to_num(7)), f"{size}, channels_last {channels_last}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_is_a_slice_of_the_whole(kernels: Kernels, dtype: torch.dtype, generator: torch.Generator) -> None:
    for size in [(7, 3, 5, 11), (5, 33, 16, 9), (70, 30), (9, 40, 1, 1), (3, 0, 2, 2), (4,)]:
        input = torch.randn(size, generator=generator).to(kernels.device, dtype)
        values, mask = kernels.ops.compress(input, torch.tensor(0.6, dtype=dtype, device=kernels.device))
        whole = reference.top(input, 0.6)
        for begin, end in ((0, size[0]), (1, 3), (2, 2), (0, 1), (size[0] - 1, size[0])):
            for channels_last in (False, True)[: 1 + (len(size) == 4)]:
                part = kernels.ops.decompress_part(values, mask, size, begin, end, channels_last)
                assert torch.equal(part, whole[begin:end]), f"{begin} to {end} of {size}, {channels_last}"
                assert not channels_last or part.is_contiguous(memory_format=torch.channels_last)
        for begin, end in ((-1, 2), (2, 1), (0, size[0] + 1)):
            with pytest.raises(RuntimeError, match="begin: expected 0 <= begin <= end <= size"):
                kernels.ops.decompress_part(values, mask, size, begin, end, False)


@pytest.mark.parametrize("values", ["gaussian", "ties", "relu", "nan"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_budget(kernels: Kernels, values: str, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    """Far too many or too few pass: select again; still too many: the last ties go. The same as on the CPU."""
    input = torch.randn(3, 40, 11, 9, generator=generator)
    some_nan = input.where(torch.rand(input.shape, generator=generator) > 0.1, torch.nan)
    input = {"gaussian": input, "ties": input.round(), "relu": input.relu(), "nan": some_nan}[values]
    input = input.contiguous(memory_format=memory_format)
    on_device = input.to(kernels.device)
    outcomes = set()
    slack = min(-(-input.numel() // 64), 64)
    for keep in (1, 300, 2000, input.numel()):
        most, limit = swat_ops.most_kept(keep, input.numel()), reference.kth_magnitude(input, keep)
        for threshold in (-1.0, 0.0, 1.0, 2.5, 100.0, torch.nan):
            what = f"keep {keep}, threshold {threshold}"
            stale = torch.tensor(threshold)
            exact = reference.compress(input, stale)
            count = exact.values.numel()
            few = threshold > 0 and count < min(keep - keep // 5, keep - slack)
            outcomes.add("many" if count > most else "few" if few else "stays")
            passing = reference.compress(input, limit) if count > most or few else exact
            for room in (None, most, keep // 2, (most + input.numel()) // 2):
                got = kernels.ops.compress(on_device, stale.to(kernels.device), keep=keep, room=room)
                expected = torch.ops.swat_ext.compress(input, stale, keep=keep, room=room)
                for ours, theirs in zip(got, expected, strict=True):
                    assert torch.equal(ours.cpu().nan_to_num(7), theirs.nan_to_num(7)), f"{what}, room {room}"
                if room is not None:
                    assert got[0].shape == (room,)
                    wanted = passing.values[:room].nan_to_num(7)
                    assert torch.equal(got[0][: wanted.numel()].cpu().nan_to_num(7), wanted), what
                    assert not got[0][wanted.numel() :].any(), what
                else:
                    assert_identical(got[1].cpu(), passing.mask, what)
    assert outcomes == {"many", "few", "stays"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(0, 3, 2, 2), (1,), (70,), (1100,), (2, 40, 9, 7), (1, 20, 57, 55)])
def test_room_is_the_length_whatever_is_kept(
    kernels: Kernels, size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Less, as much and more than is kept, without a budget and with one; what has no room is dropped, bits and all."""
    input = torch.randn(size, generator=generator).to(kernels.device, dtype)
    numel = input.numel()
    if numel > 20:
        input.view(-1)[5], input.view(-1)[-1] = torch.nan, torch.inf
    layouts = [torch.contiguous_format, torch.channels_last]
    for layout in layouts[: 1 + (len(size) == 4)]:
        input = input.contiguous(memory_format=layout)
        for threshold in (0.0, 0.7, 9.0):
            limit = torch.tensor(threshold, dtype=dtype, device=kernels.device)
            passing = reference.compress(input, threshold)
            kept = passing.values.numel()
            # A budget that what passes meets.
            for keep in (None, kept) if kept else (None,):
                rooms = {0, 1, kept // 2, kept - 1, kept, kept + 1, (kept + numel) // 2, numel} & {*range(numel + 1)}
                for room in rooms if numel < 10000 else {0, kept // 2, kept, numel}:
                    what = f"threshold {threshold}, keep {keep}, room {room}, kept {kept}"
                    values, mask = kernels.ops.compress(input, limit, keep=keep, room=room)
                    first = passing.values[:room]
                    assert values.shape == (room,), what
                    assert torch.equal(values[: first.numel()].nan_to_num(7), first.nan_to_num(7)), what
                    assert not values[first.numel() :].any(), what
                    wanted = reference.top(input, threshold).flatten()
                    wanted = wanted.where((wanted != 0).cumsum(0) <= room, 0).view(size)
                    assert_identical(mask, reference.compress(wanted, 0.0).mask, f"mask, {what}")
                    for channels_last in [False, True][: 1 + (len(size) == 4)]:
                        dense = kernels.ops.decompress(values, mask, size, channels_last)
                        assert torch.equal(dense.nan_to_num(7), wanted.nan_to_num(7)), what


_TILES = {
    "runs": ((3, 1, 100, 101), torch.contiguous_format),
    "whole runs": ((1, 1, 32, 1024), torch.contiguous_format),
    "planes": ((1, 20, 57, 55), torch.channels_last),
    "planes of sectors that tiles share": ((2, 13, 29, 28), torch.channels_last),
    "small planes": ((3, 601, 1, 3), torch.channels_last),
    "two passes": ((1, 17, 65, 64), torch.channels_last),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _TILES)
def test_tiles(kernels: Kernels, name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Several tiles, kept values that fit in shared memory and that do not; with a capacity and without."""
    size, memory_format = _TILES[name]
    input = torch.randn(size, generator=generator).to(dtype)
    input.view(-1)[5::1000] = torch.nan
    input[:, 0] = 0
    input = input.to(kernels.device).contiguous(memory_format=memory_format)
    for threshold in (0.0, 1.3, 9.0):
        limit = torch.tensor(threshold, dtype=dtype, device=kernels.device)
        expected = reference.compress(input, threshold)
        kept = expected.values.numel()
        got = [kernels.ops.compress(input, limit)]
        if kept:
            rooms = (None, kept, swat_ops.most_kept(kept, input.numel()), input.numel())
            got += [kernels.ops.compress(input, limit, keep=kept, room=room) for room in rooms]
        for values, mask in got:
            assert_identical(mask, expected.mask, f"mask, threshold {threshold}")
            assert torch.equal(values[:kept].nan_to_num(7), expected.values.nan_to_num(7))
            assert not values[kept:].any()
    # Ties beyond the capacity: the last of them in logical order go.
    ties = torch.full_like(input, -0.5)
    keep = ties.numel() // 2 + 1
    length = swat_ops.most_kept(keep, ties.numel())
    values, mask = kernels.ops.compress(ties, torch.zeros_like(limit), keep=keep, room=length)
    assert values.shape == (length,)
    assert (values == -0.5).all()
    dense = kernels.ops.decompress(values, mask, size, False).view(-1)
    assert dense[:length].all()
    assert not dense[length:].any()
    assert kernels.ops.compress(ties, torch.zeros_like(limit), keep=keep)[0].shape == (ties.numel(),)


@pytest.mark.parametrize("first", [0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_look_back(first: int, count: int, generator: torch.Generator) -> None:
    """The sum over earlier tiles: known in full, known tile by tile, and not yet known, when a tile has to wait."""
    emulator.load()
    own = torch.randint(0, 10000, (first + count,), generator=generator)
    before = own.cumsum(0) - own
    for complete in (0.0, 0.02, 1.0):
        states = torch.zeros(first + count, dtype=torch.int64)
        full = torch.rand(first, generator=generator) < complete
        full[:1] = True  # the first tile has none before it
        states[:first] = torch.where(full, (before + own)[:first] * 4 + 2, own[:first] * 4 + 1)
        got = torch.ops.swat_ext_emulated.look_back(states, own[first:], first)
        assert_identical(got, before[first:], f"sums, {complete} complete")
        assert_identical(states[first:], (before + own)[first:] * 4 + 2, "states left")


def _relative(got: Tensor, expected: Tensor) -> float:
    difference = (got.cpu().double() - expected).norm().item()
    return difference / expected.norm().item() if difference else 0.0


def _check(kernels: Kernels, geometry: Geometry, rng: random.Random, dtype: torch.dtype) -> None:
    sizes = (geometry.input_size, geometry.weight_size, geometry.output_size)
    positive = geometry.has_lone_sums or dtype not in (torch.float32, torch.float64)
    input, weight, grad = (
        in_layout(random_tensor(size, dtype, rng, positive=positive).to(kernels.device), rng.choice(LAYOUTS), rng)
        for size in sizes
    )
    bias = random_tensor(sizes[1][:1], dtype, rng, positive=positive).to(kernels.device) if rng.random() < 0.5 else None
    threshold = torch.tensor(random_threshold(weight.float(), rng), dtype=dtype, device=kernels.device)
    packed_weight = kernels.ops.compress(weight, threshold)
    arguments, channels_last = geometry.arguments, rng.random() < 0.5
    got = {
        "output": kernels.ops.conv2d(input, *packed_weight, weight.shape, bias, *arguments, channels_last),
        "input gradient": kernels.ops.conv2d_input_grad(
            grad, *packed_weight, weight.shape, input.shape, *arguments, channels_last
        ),
    }
    top, bottom, left, right = geometry.padding
    x = input.detach().cpu().double().contiguous().requires_grad_()
    kept = reference.top(weight, threshold).cpu().double().contiguous()
    b = None if bias is None else bias.cpu().double()
    output = F.conv2d(F.pad(x, (left, right, top, bottom)), kept, b, arguments[0], 0, arguments[2], arguments[3])
    expected = {"output": output, "input gradient": torch.autograd.grad(output, x, grad.cpu().double())[0]}
    for name, result in got.items():
        error = _relative(result, expected[name])
        assert error <= _TOLERANCE[dtype], f"{name} of {geometry}, {dtype}: {error:.3g}"
        assert result.is_contiguous(memory_format=memory_format(channels_last)), f"{name} of {geometry}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_convolutions(kernels: Kernels, dtype: torch.dtype) -> None:
    slow = torch.device(kernels.device).type == "cpu" and dtype in (torch.bfloat16, torch.float16)  # emulated
    for number in range(10 if slow else 30):
        rng = random.Random(f"{dtype} {number}")
        _check(kernels, random_geometry(rng), rng, dtype)


_LARGE = {
    "several blocks of rows, several passes over channels": Geometry(
        2, 1, 150, 140, 9, 9, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)
    ),
    "no patch fits": Geometry(1, 2, 3, 2, 150, 140, (2, 2), (1, 1), (0, 0, 0, 0), (120, 110)),
    "wide taps": Geometry(1, 1, 2, 3, 60, 8, (9, 7), (2, 1), (4, 3, 0, 5), (3, 1)),
    "7x7 stem": Geometry(2, 1, 3, 24, 30, 30, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    "linear": Geometry(1, 1, 90, 70, 1, 33, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _LARGE)
def test_large_convolutions(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    _check(kernels, _LARGE[name], random.Random(name), dtype)


def test_empty_lists(kernels: Kernels, generator: torch.Generator) -> None:
    """Rows and channels that nothing is kept of, in between others, and residues of the stride that no tap meets."""
    input = torch.randn(2, 200, 9, 9, generator=generator)
    for size, stride, groups in (((140, 200, 1, 1), 2, 1), ((72, 100, 2, 2), 3, 2), ((8, 200, 3, 3), 1, 1)):
        weight = torch.randn(size, generator=generator)
        weight[:, : size[1] * 2 // 3], weight[70:] = 0, 0
        threshold = torch.tensor(0.5)
        kept = reference.top(weight, threshold)
        values, mask = kernels.ops.compress(weight.to(kernels.device), threshold.to(kernels.device))
        geometry = ((stride, stride), (0, 0, 0, 0), (1, 1), groups)
        x = input.double().requires_grad_()
        expected = F.conv2d(x, kept.double(), None, stride, 0, 1, groups)
        grad = torch.randn(expected.shape, generator=generator)
        expected_grad = torch.autograd.grad(expected, x, grad.double())[0]
        on_device = (input.to(kernels.device), values, mask, size, None)
        for channels_last in (False, True):
            output = kernels.ops.conv2d(*on_device, *geometry, channels_last)
            got = kernels.ops.conv2d_input_grad(
                grad.to(kernels.device), values, mask, size, input.shape, *geometry, channels_last
            )
            assert _relative(output, expected.detach()) < 2e-5
            assert _relative(got, expected_grad) < 2e-5
            assert not got.cpu()[expected_grad == 0].any()


def test_linear(kernels: Kernels, generator: torch.Generator) -> None:
    """Rows of any strides; no rows, no features."""
    weight = torch.randn(37, 90, generator=generator)
    bias = torch.randn(37, generator=generator)
    kept = reference.top(weight, 1.0).double()
    packed = kernels.ops.compress(weight.to(kernels.device), torch.tensor(1.0).to(kernels.device))
    for make in (
        lambda size: torch.randn(5, 7, size, generator=generator),
        lambda size: torch.randn(size, generator=generator),
        lambda size: torch.randn(7, size, 5, generator=generator).permute(2, 0, 1),
        lambda size: torch.randn(size, generator=generator).expand(4, 3, size),
        lambda size: torch.randn(0, size, generator=generator),
    ):
        x, grad = make(90), make(37)
        output = kernels.ops.linear(x.to(kernels.device), *packed, (37, 90), bias.to(kernels.device))
        got = kernels.ops.linear_input_grad(grad.to(kernels.device), *packed, (37, 90))
        assert output.is_contiguous()
        assert got.is_contiguous()
        assert _relative(output, F.linear(x.double(), kept, bias.double())) < 2e-5
        assert _relative(got, grad.double() @ kept) < 2e-5


@pytest.mark.parametrize("room", [None, 100, 300, 500, 900])
def test_select(kernels: Kernels, room: int | None, generator: torch.Generator) -> None:
    """Before the first step, and a period later: a threshold of this input; in between that of before."""
    threshold, state = torch.zeros((), device=kernels.device), torch.tensor([0, -1, 3, 1, 3])
    expected = torch.tensor(0.0)
    twin, its_state = threshold.cpu().clone(), state.clone()
    for step in range(7):
        input = torch.randn(900, generator=generator)
        if step == 5:
            # Due at once where the period is shorter than the age; the budget falls.
            state[2:] = its_state[2:] = torch.tensor([2, 1, 4])
        state[0] = its_state[0] = step
        if step in (0, 3, 5):
            expected = reference.kth_magnitude(input, 300 if step < 5 else 225)
        got = kernels.ops.select(input.to(kernels.device), threshold, state, room)
        theirs = torch.ops.swat_ext.select(input, twin, its_state, room)
        assert state.tolist() == its_state.tolist()
        assert_identical(threshold.cpu(), expected, f"threshold of step {step}")
        wanted = reference.compress(input, expected).values[:room]
        assert got[0].shape == (wanted.numel() if room is None else room,)
        assert_identical(got[0][: wanted.numel()].cpu(), wanted, f"values of step {step}")
        assert not got[0][wanted.numel() :].any()
        for ours, other in zip(got, theirs, strict=True):
            assert_identical(ours.cpu(), other, f"of step {step}, as on the CPU")


def test_limits_that_make_no_sense_are_refused(kernels: Kernels) -> None:
    input = torch.randn(50, device=kernels.device)
    limit = torch.zeros((), device=kernels.device)
    for room in (-1, 51, 2**40):
        with pytest.raises(RuntimeError, match=f"room: expected from 0 to input.numel.. = 50, got {room}"):
            kernels.ops.compress(input, limit, room=room)
        with pytest.raises(RuntimeError, match="room: expected from 0 to"):
            kernels.ops.select(input, limit, torch.tensor([0, -1, 1, 1, 2]), room)
    for wrong, message in (([0, -1, 0, 1, 2], "a period of at least 1"), ([0, -1, 1, 3, 2], "a budget in")):
        with pytest.raises(RuntimeError, match=f"state: expected {message}"):
            kernels.ops.select(input, limit, torch.tensor(wrong), None)


def test_what_32_bits_do_not_count_is_refused(kernels: Kernels) -> None:
    packed = kernels.ops.compress(torch.ones(1, 1, 1, 1, device=kernels.device), torch.tensor(0.0).to(kernels.device))
    grad = torch.ones(1, 1, 1, 1, device=kernels.device)
    for stride in ((2**32, 1), (1, 2**31)):
        with pytest.raises(RuntimeError, match=r"2\^31|CUDA error"):
            kernels.ops.conv2d_input_grad(
                grad, *packed, (1, 1, 1, 1), (1, 1, 1, 1), stride, (0, 0, 0, 0), (1, 1), 1, False
            )


def _walk(batch: int, rows: tuple[int, ...], columns: tuple[int, ...], channels: int, element_bytes: int) -> list[int]:
    """The plan found by trying every number of pieces that each axis may be cut in."""
    room, best, least = (33 << 10) // element_bytes, [0, 0, 0, 0, 0, 1], 0
    for pieces_w in range(-(-columns[0] // 256), columns[0] + 1):
        width = -(-columns[0] // pieces_w)
        for pieces_h in range(-(-rows[0] // (256 // width)), rows[0] + 1):
            height = -(-rows[0] // pieces_h)
            area = ((height - 1) * rows[1] + rows[2]) * ((width - 1) * columns[1] + columns[2])
            if area > room - 1:
                continue
            samples = min(256 // (width * height), batch, (room - 1) // area)
            patch = samples * area | 1
            tiles = -(-batch // samples) * -(-rows[0] // height) * -(-columns[0] // width)
            cost = tiles * (512 + patch)
            if best[-1] or cost < least:
                best, least = [samples, height, width, patch, min(room // patch, channels), 0], cost
    return best


def test_plan_of_tiles() -> None:
    """As good as trying every cut, which for images of 10^12 pixels nobody could."""
    emulator.load()
    plan, rng = torch.ops.swat_ext_emulated.plan_gather, random.Random(0)

    def axis(longest: int) -> tuple[int, ...]:
        return (rng.randint(1, longest), rng.randint(1, 3), rng.choice([1, 1, 2, 3, 7, rng.randint(1, 300)]))

    for number in range(200):
        longest = rng.choice([8, 60, 300]) if number % 10 else 20000
        arguments = (rng.randint(1, 70), axis(1 if longest > 300 else longest), axis(longest), rng.randint(1, 99))
        for element_bytes in (4, 8):
            assert plan(*arguments, element_bytes) == _walk(*arguments, element_bytes), f"{arguments}"
    assert plan(1, (1, 1, 1), (10**12, 1, 1), 64, 4) == [1, 1, 256, 257, 32, 0]
    assert plan(1, (10**12, 1, 3), (10**12, 2, 5), 64, 4)[-1] == 0


# --- The tools and the emulator themselves ----------------------------------------------------------------------------


def test_each_block_starts_with_fresh_shared_memory() -> None:
    emulator.load()
    assert torch.ops.swat_ext_emulated.shared_memory(4096) == 0


def test_too_much_shared_memory_is_seen() -> None:
    """Static and dynamic bytes count together."""
    emulator.load()
    load = f"import sys; sys.path.insert(0, {str(Path(emulator.__file__).parent)!r}); import build; build.load()"
    call = f"{load}; import torch; torch.ops.swat_ext_emulated.shared_memory(int(sys.argv[1]))"
    assert torch.ops.swat_ext_emulated.shared_memory(48 * 1024 - 64) == 0
    result = subprocess.run(
        [sys.executable, "-c", call, str(48 * 1024 - 16)], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "bytes of shared memory" in result.stderr


def test_the_sanitizer_sees_every_operator() -> None:
    emulator.load()
    root = Path(emulator.__file__).parent.parent.parent
    sources = [(root / "csrc" / "ops" / name).read_text(encoding="utf-8") for name in ("cuda.cpp", "cuda_layers.cpp")]
    operators = {name for text in sources for name in re.findall(r'm\.impl\("(\w+)"', text)}
    assert "conv2d" in operators
    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            called.add(func.name().removeprefix("swat_ext_emulated::").split(".")[0])
            return func(*args, **(kwargs or {}))

    main = runpy.run_path(str(root / "tools" / "sanitize_cuda.py"))["main"]
    with Recorder():
        main(torch.ops.swat_ext_emulated, "cpu")
    assert operators <= called
