"""The faster kernels of a layer on CUDA, by measurement: ours, or PyTorch's on tensors unpacked for the moment.

Both save the same packed tensors, so that memory is saved either way. Each combination of device, dtype, shapes and
sparsities is measured once in a process. Which is faster can change from run to run where they are close, and with it
the rounding: ask for "sparse" or "dense" where runs must repeat bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from swat_ext import ops
from swat_ext.modules.backend import Choice

__all__ = ["Problem", "measured_choice"]

_WARMUPS = 2
_ROUNDS = 5
_PREFIXES: dict[Literal["sparse", "dense"], str] = {"sparse": "", "dense": "masked_"}


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


_known: dict[tuple[object, ...], Choice] = {}


def measured_choice(problem: Problem, dtype: torch.dtype, device: torch.device, otherwise: Choice) -> Choice:
    """The backend that was faster over forward, input gradient and weight gradient.

    Args:
        problem: shapes and numbers of elements kept.
        dtype: dtype that the layer computes in.
        device: a CUDA device.
        otherwise: what to take where nothing can be measured: while a CUDA graph is captured, or out of memory.

    Returns:
        :class:`Choice`; random numbers of the user's generators are not touched.
    """
    precision = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    key = (problem, dtype, torch.cuda.get_device_name(device), precision)
    if key in _known:
        return _known[key]
    if torch.cuda.is_current_stream_capturing():
        return otherwise
    try:
        with torch.no_grad(), torch.cuda.device(device), torch.autocast("cuda", enabled=False):
            times = _measure(problem, dtype, device)
    except torch.OutOfMemoryError:
        return Choice(otherwise.backend, f"{otherwise.reason} (no memory to measure in)")
    faster: Literal["sparse", "dense"] = "sparse" if times["sparse"] <= times["dense"] else "dense"
    _known[key] = Choice(faster, f"measured: sparse {times['sparse']:.2f} ms, dense {times['dense']:.2f} ms")
    return _known[key]


def _measure(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each backend, interleaved."""
    generator = torch.Generator(device=device).manual_seed(0)

    def random(size: Sequence[int]) -> Tensor:
        tensor = torch.randn(tuple(size), generator=generator, dtype=dtype, device=device)
        format_ = torch.channels_last if problem.channels_last else torch.contiguous_format
        return tensor.contiguous(memory_format=format_)

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
            input_grad(grad, *packed_weight, weight.shape, input.shape, *geometry, problem.channels_last)
            weight_grad(grad, *packed_input, input.shape, weight.shape, *geometry)

        return run

    steps = {name: step(prefix) for name, prefix in _PREFIXES.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(_WARMUPS + _ROUNDS):
        for name, run in steps.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            if number >= _WARMUPS:
                samples[name].append(start.elapsed_time(stop))
    return {name: sorted(times)[len(times) // 2] for name, times in samples.items()}


def _packed(tensor: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    threshold = torch.ops.swat_ext.kth_magnitude(tensor, keep)
    return torch.ops.swat_ext.compress(tensor, threshold, keep=keep, capacity=ops.capacity(keep, tensor.numel()))
