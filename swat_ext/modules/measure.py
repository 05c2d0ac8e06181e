"""The faster kernels of a layer, by measurement: ours, or PyTorch's on tensors unpacked for the moment.

Both save the same packed tensors, so that memory is saved either way. Each combination of device, threads, dtype,
shapes and sparsities is measured once in a process. Which is faster can change from run to run where they are close,
and with it the rounding: ask for "sparse" or "dense" where separate runs must repeat bit for bit. A resumed run takes
its choices from the checkpoint.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from swat_ext import _C, ops
from swat_ext.arguments import padding_of_sides, prefers_channels_last
from swat_ext.layout import memory_format
from swat_ext.modules.backend import Choice
from swat_ext.modules.selection import kept
from swat_ext.modules.shared import has_identity

__all__ = ["Problem", "can_measure", "measured_choice", "problem_of", "recall", "remember", "representative"]

_ROUNDS = 5
_WARMUPS = {"cpu": 1, "cuda": 2}
# Rounds end early once one backend takes this much longer: more of them would not turn it around.
_CLEAR = 1.3
_PREFIXES: dict[Literal["sparse", "dense"], str] = {"sparse": "", "dense": "masked_"}
# On the CPU time grows evenly with the batch from here on, so that a part of it tells which backend is faster.
_CPU_SAMPLES = 32
_CPU_ROWS = 4096


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
    """What to measure for a 4-D input and weight, or None if they do not fit, which the convolution will say.

    Args:
        geometry: stride, padding, dilation and groups as :func:`torch.nn.functional.conv2d` takes them.
        weight_ratio, activation_ratio: kept shares, as :func:`kept` takes them.
    """
    kernel, strides, dilations = list(weight.shape[2:]), list(geometry[0]), list(geometry[2])
    paddings = padding_of_sides(geometry[1], kernel, strides, dilations)
    if min(ops.convolution_size(input.shape, weight.shape, strides, paddings, dilations)) < 1:
        return None
    input_size = representative(input.shape, input.device)
    return Problem(
        input_size,
        tuple(weight.shape),
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
_known: dict[tuple[Any, ...], Choice] = {}


def representative(size: Sequence[int], device: torch.device) -> tuple[int, ...]:
    """The input size to measure in place of ``[N, C, H, W]``: on the CPU a batch that is a small power of two."""
    batch, channels, height, width = size
    if device.type != "cpu":
        return (batch, channels, height, width)
    if batch == height == 1:  # a linear layer, whose rows are pixels
        return (1, channels, 1, min(_power_of_two(width), _CPU_ROWS))
    return (min(_power_of_two(batch), _CPU_SAMPLES), channels, height, width)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _key(problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    sizes = tuple(tuple(field) if isinstance(field, tuple) else field for field in problem)
    if device.type == "cpu":
        return (*sizes, str(dtype), "cpu", _C.isa(), torch.get_num_threads())
    precision = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return (*sizes, str(dtype), torch.cuda.get_device_name(device), *precision)


def recall(key: tuple[Any, ...]) -> Choice:
    """The choice known under a key that :func:`measured_choice` returned."""
    return _known[key]


def remember(key: tuple[Any, ...], choice: Choice) -> None:
    """Take over what an earlier process measured, unless this one has measured it too."""
    _known.setdefault(key, choice)


def measured_choice(
    problem: Problem, dtype: torch.dtype, device: torch.device, otherwise: Choice
) -> tuple[Choice, tuple[Any, ...] | None]:
    """The backend that was faster over forward and, with ``problem.backward``, both gradients.

    Args:
        problem: shapes and numbers of elements kept.
        dtype: dtype that the layer computes in.
        device: a CPU or a CUDA device.
        otherwise: what to take where nothing can be measured: while a CUDA graph is captured, or out of memory.

    Returns:
        :class:`Choice` and the key that it is known by, None where nothing was measured. Random numbers of the user's
        generators are not touched.
    """
    key = _key(problem, dtype, device)
    if key in _known:
        return _known[key], key
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return otherwise, None
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            times = _measure(problem, dtype, device)
    except torch.OutOfMemoryError:
        return Choice(otherwise.backend, f"{otherwise.reason} (no memory to measure in)"), None
    faster: Literal["sparse", "dense"] = "sparse" if times["sparse"] <= times["dense"] else "dense"
    gain = max(times.values()) / min(times.values())
    reason = f"measured: {gain:.1f}x faster, sparse {times['sparse']:.2f} ms, dense {times['dense']:.2f} ms"
    _known[key] = Choice(faster, reason)
    return _known[key], key


def _measure(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each backend, interleaved."""
    generator = torch.Generator(device=device).manual_seed(0)

    def random(size: Sequence[int]) -> Tensor:
        tensor = torch.randn(tuple(size), generator=generator, dtype=dtype, device=device)
        return tensor.contiguous(memory_format=memory_format(problem.channels_last))

    input, weight = random(problem.input_size), random(problem.weight_size)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    grad = random(ops.convolution_size(problem.input_size, problem.weight_size, *geometry[:3]))
    packed_weight, packed_input = (
        _packed(tensor, keep) for tensor, keep in ((weight, problem.weight_keep), (input, problem.activation_keep))
    )

    def step(prefix: str) -> Callable[[], None]:
        forward, input_grad, weight_grad = (
            getattr(torch.ops.swat_ext, f"{prefix}conv2d{suffix}") for suffix in ("", "_input_grad", "_weight_grad")
        )
        if not prefix:
            weight_grad = ops.weight_grad

        def run() -> None:
            forward(input, weight, None, *packed_weight, *packed_input, *geometry, problem.channels_last)
            if problem.backward:
                input_grad(grad, *packed_weight, weight.shape, input.shape, *geometry, problem.channels_last)
                weight_grad(grad, *packed_input, input.shape, weight.shape, *geometry)

        return run

    steps = {name: step(prefix) for name, prefix in _PREFIXES.items()}
    timed = _cuda_milliseconds if device.type == "cuda" else _cpu_milliseconds
    for _ in range(_WARMUPS[device.type]):
        for run in steps.values():
            timed(run, device)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, run in steps.items():
            samples[name].append(timed(run, device))
        fastest = sorted(min(times) for times in samples.values())
        if fastest[1] > _CLEAR * fastest[0]:
            break
    return {name: sorted(times)[len(times) // 2] for name, times in samples.items()}


def _cpu_milliseconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cuda_milliseconds(run: Callable[[], None], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


def _packed(tensor: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    threshold = torch.ops.swat_ext.kth_magnitude(tensor, keep)
    if tensor.device.type == "cpu":
        return torch.ops.swat_ext.compress(tensor, threshold)
    return torch.ops.swat_ext.compress(tensor, threshold, keep=keep, capacity=ops.capacity(keep, tensor.numel()))
