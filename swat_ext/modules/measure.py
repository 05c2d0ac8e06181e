"""The faster kernels of a layer, by measurement: ours, or PyTorch's on tensors unpacked for the moment.

Both compute the same and save the same packed tensors. Each is timed over what a training step does with the layer:
packing of weight and input, forward, both gradients, autograd. Left out is the selection of thresholds, of which a step
has one in ``topk_period``. Beside them PyTorch's own dense layer is timed, on an input in the same layout: no
candidate, but what the choice says how it compares with.

Each combination of device, threads, dtype, shapes and sparsities is measured once in a process. Which is faster can
change from run to run where they are close, and with it the rounding: ask for "sparse" or "dense" where separate runs
must repeat bit for bit. A resumed run takes its choices from the checkpoint.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from swat_ext import _C, ops
from swat_ext.arguments import padding_of_sides, prefers_channels_last
from swat_ext.functional import takes_again
from swat_ext.layout import memory_format
from swat_ext.modules.backend import Choice
from swat_ext.modules.selection import kept
from swat_ext.modules.shared import has_identity

__all__ = ["Key", "Problem", "can_measure", "key_of", "measured_choice", "problem_of", "remember", "representative"]

_ROUNDS = 5
_WARMUPS = {"cpu": 1, "cuda": 2}
# Rounds end once one backend takes this much longer: more of them would not turn it around.
_CLEAR_ROUNDS, _CLEAR = 2, 1.3
# A round lasts about so long or repeats so often: a few microseconds cannot be told apart by one call.
_ROUND_MILLISECONDS, _MOST_REPEATS = 1.0, 10
# On the CPU time grows evenly with the batch from here on, so that a part of it tells which backend is faster.
_CPU_SAMPLES = 32
_CPU_ROWS = 4096
_NEVER = 2**62

Key = tuple[Any, ...]


class Problem(NamedTuple):
    """What decides how long a layer takes; sizes are ``[N, C, H, W]`` and ``[O, C / groups, kh, kw]``."""

    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    channels_last: bool
    weight_keep: int
    activation_keep: int
    backward: bool


def can_measure(input: Tensor) -> bool:
    """Whether kernels can be timed for this input now: not on shapes alone, and not while they are traced."""
    return input.numel() > 0 and input.device.type in ("cpu", "cuda") and has_identity(input)


def problem_of(
    input: Tensor,
    weight: Tensor,
    geometry: tuple[Any, Any, Any, int],
    weight_ratio: tuple[int, int],
    activation_ratio: tuple[int, int],
    *,
    backward: bool,
) -> Problem | None:
    """What to measure for a 4-D input and a weight, or None if they do not fit, which the convolution will say.

    Args:
        weight: ``[O, C / groups, kh, kw]``, or ``[O, C]`` of a linear layer, whose rows are the pixels of ``input``.
        geometry: stride, padding, dilation and groups as :func:`torch.nn.functional.conv2d` takes them.
        weight_ratio, activation_ratio: kept shares, as :func:`kept` takes them.
    """
    weight_size = (*weight.shape, 1, 1)[:4]
    kernel, strides, dilations = list(weight_size[2:]), list(geometry[0]), list(geometry[2])
    paddings = padding_of_sides(geometry[1], kernel, strides, dilations)
    if min(ops.convolution_size(input.shape, weight_size, strides, paddings, dilations)) < 1:
        return None
    input_size = representative(input.shape, input.device)
    return Problem(
        input_size,
        weight_size,
        (strides[0], strides[1]),
        tuple(paddings),  # type: ignore[arg-type]
        (dilations[0], dilations[1]),
        geometry[3],
        prefers_channels_last(input, weight),
        kept(weight.numel(), weight_ratio),
        kept(math.prod(input_size), activation_ratio),
        backward,
    )


# By a key of plain values, which a checkpoint can hold.
_known: dict[Key, Choice] = {}


def representative(size: Sequence[int], device: torch.device) -> tuple[int, ...]:
    """The input size to measure in place of ``[N, C, H, W]``: on the CPU a batch that is a small power of two.

    Heights and widths are rounded up there to three binary digits, at most a quarter more: 24, 28, 32, 40, 48, 56, 64.
    """
    batch, channels, height, width = size
    if device.type != "cpu":
        return (batch, channels, height, width)
    if batch == height == 1:  # a linear layer, whose rows are pixels
        return (1, channels, 1, min(_rounded_up(width, 1), _CPU_ROWS))
    return (min(_rounded_up(batch, 1), _CPU_SAMPLES), channels, _rounded_up(height, 3), _rounded_up(width, 3))


def _rounded_up(count: int, digits: int) -> int:
    """The least number that is not below ``count`` and has only so many significant binary digits."""
    shift = max(0, (count - 1).bit_length() - digits)
    return -(-count >> shift) << shift


def key_of(problem: Problem, dtype: torch.dtype, device: torch.device) -> Key:
    """All that a measurement depends on, as numbers, strings and tuples; fields of ``problem`` first."""
    sizes = tuple(tuple(field) if isinstance(field, tuple) else field for field in problem)
    return (*sizes, str(dtype), *environment(device))


def environment(device: torch.device) -> Key:
    """What a measurement depends on beside the layer and its input."""
    if device.type == "cpu":
        return ("cpu", _C.isa(), torch.get_num_threads())
    precision = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return (torch.cuda.get_device_name(device), *precision)


def remember(key: Key, choice: Choice) -> None:
    """Take over what an earlier process measured, unless this one has measured it too."""
    _known.setdefault(key, choice)


def measured_choice(
    problem: Problem, dtype: torch.dtype, device: torch.device, otherwise: Choice
) -> tuple[Choice, Key | None]:
    """The backend that was faster over a step, or with ``problem.backward`` False over forward alone.

    Args:
        problem: shapes and numbers of elements kept.
        dtype: dtype that the layer computes in.
        device: a CPU or a CUDA device.
        otherwise: what to take where nothing can be measured: while a CUDA graph is captured, or out of memory.

    Returns:
        :class:`Choice` and the key that it is known by, None where nothing was measured. Random numbers of the user's
        generators are not touched.
    """
    key = key_of(problem, dtype, device)
    if key in _known:
        return _known[key], key
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return otherwise, None
    try:
        times = _measure(problem, dtype, device)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        note = " (no memory to measure in)"
        return otherwise._replace(reason=otherwise.reason.removesuffix(note) + note), None
    _known[key] = _judged(times)
    return _known[key], key


def _is_out_of_memory(error: Exception) -> bool:
    """Of CUDA, of PyTorch's CPU allocator, or of ours: the latter two have no exception of their own."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "cannot allocate" in text or "can't allocate memory" in text


def _judged(times: dict[str, float]) -> Choice:
    faster: Literal["sparse", "dense"] = "dense"
    sparse = "sparse kernels do not take it"
    if "sparse" in times:
        sparse = f"sparse {times['sparse']:.2f} ms"
        faster = "sparse" if times["sparse"] <= times["dense"] else "dense"
    speedup = times["pytorch"] / times[faster]
    both = f"{sparse}, dense kernels {times['dense']:.2f} ms, PyTorch's dense layer {times['pytorch']:.2f} ms"
    return Choice(faster, f"measured: {both}: {speedup:.2g}x as fast as dense", speedup)


def _measure(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Median milliseconds of "sparse", "dense" and "pytorch", interleaved; no "sparse" where its kernels refuse."""
    # Nothing of the caller's may see or change what runs here: modes, hooks on saved tensors, autocast.
    hooks = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
    isolated = (_disable_current_modes(), torch.inference_mode(False), torch.autocast(device.type, enabled=False))
    with isolated[0], isolated[1], isolated[2], hooks, torch.set_grad_enabled(problem.backward):
        return _medians(_steps(problem, dtype, device), device)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _medians(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    timed = _cuda_milliseconds if device.type == "cuda" else _cpu_milliseconds
    samples: dict[str, list[float]] = {}
    for name, run in steps.items():
        try:
            once = min(timed(run, device, 1) for _ in range(_WARMUPS[device.type]))
        except (RuntimeError, ValueError) as error:
            if name != "sparse" or _is_out_of_memory(error):
                raise
        else:
            samples[name] = [once]
    slowest = max(once for (once,) in samples.values())
    repeats = max(1, min(_MOST_REPEATS, int(_ROUND_MILLISECONDS / slowest))) if slowest else _MOST_REPEATS
    samples = {name: [] for name in samples}
    for number in range(_ROUNDS):
        for name, times in samples.items():
            times.append(timed(steps[name], device, repeats))
        ours = sorted(min(times) for name, times in samples.items() if name != "pytorch")
        if number + 1 >= _CLEAR_ROUNDS and ours[-1] > _CLEAR * ours[0]:
            break
    return {name: sorted(times)[(len(times) - 1) // 2] for name, times in samples.items()}


def _steps(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """What each contender does in a step, on random numbers."""
    generator = torch.Generator(device=device).manual_seed(0)

    def random(size: Sequence[int]) -> Tensor:
        tensor = torch.randn(tuple(size), generator=generator, dtype=dtype, device=device)
        return tensor.contiguous(memory_format=memory_format(problem.channels_last))

    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    input, weight = random(problem.input_size), random(problem.weight_size)
    grad = random(ops.convolution_size(problem.input_size, problem.weight_size, *geometry[:3]))
    for tensor in (input, weight):
        tensor.requires_grad_(problem.backward)
    pack_weight, pack_input = _packer(weight, problem.weight_keep, 0), _packer(input, problem.activation_keep, 1)
    evaluated = None if problem.backward else pack_weight()  # evaluation keeps its packed weight

    def ours(backend: str) -> Callable[[], object]:
        def run() -> None:
            packed_weight = evaluated or pack_weight()
            packed_input = pack_input() if problem.backward else (None, None)
            packed = (*packed_weight, *packed_input)
            retake = takes_again(weight)
            output = ops.CONVOLUTIONS[backend](input, weight, None, *packed, *geometry, problem.channels_last, retake)
            if problem.backward:
                torch.autograd.grad(output, (input, weight), grad)

        return run

    return {"sparse": ours("sparse"), "dense": ours("dense"), "pytorch": _pytorch(problem, input, weight, grad)}


def _pytorch(problem: Problem, input: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], object]:
    """A step of PyTorch's own layer on the same tensors."""
    top, bottom, left, right = problem.padding
    # A linear layer comes as one row of 1x1 pixels.
    linear = problem.input_size[0] == problem.input_size[2] == 1 and problem.weight_size[2:] == (1, 1)
    if linear:
        input, grad = (tensor.detach()[0, :, 0].t().contiguous() for tensor in (input, grad))
        weight = weight.detach()[:, :, 0, 0]
        input.requires_grad_(problem.backward)
        weight.requires_grad_(problem.backward)

    def forward() -> Tensor:
        if linear:
            return torch.nn.functional.linear(input, weight)
        even = top == bottom and left == right
        padded = input if even else torch.nn.functional.pad(input, (left, right, top, bottom))
        padding = (top, left) if even else (0, 0)
        return torch.nn.functional.conv2d(
            padded, weight, None, problem.stride, padding, problem.dilation, problem.groups
        )

    def run() -> None:
        output = forward()
        if problem.backward:
            torch.autograd.grad(output, (input, weight), grad)

    return run


def _packer(tensor: Tensor, keep: int, slot: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Packs as a layer does in a step whose threshold is not yet due."""
    source = tensor.detach()
    threshold = torch.ops.swat_ext.kth_magnitude(source, keep)
    clock = torch.full((ops.CLOCK_SIZE,), _NEVER, device="cpu")
    clock[ops.CLOCK_STEPS], clock[ops.CLOCK_VERSION] = 0, -1

    def pack() -> tuple[Tensor, Tensor]:
        return ops.select(source, source, threshold, clock, slot, keep, 1)

    return pack


def _cpu_milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats * 1e3


def _cuda_milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    with torch.cuda.device(device):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / repeats
