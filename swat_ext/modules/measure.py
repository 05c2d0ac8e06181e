"""The faster kernels of a layer, by measurement: ours, or PyTorch's on tensors unpacked for the moment.

Both compute the same and save the same packed tensors. Each is timed over all that a training step does with the layer:
packing of weight and input, forward, both gradients, Python. Left out is the selection of thresholds, of which a step
has one in ``topk_period``. Beside them PyTorch's own dense layer is timed, on an input in the same layout: no
candidate, but what the choice says how it compares with.

Each combination of device, threads, dtype, shapes and sparsities is measured once in a process. Which is faster can
change from run to run where they are close, and with it the rounding: ask for "sparse" or "dense" where separate runs
must repeat bit for bit. A resumed run takes its choices from the checkpoint.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from swat_ext import _C
from swat_ext.ops import library as ops
from swat_ext.ops.arguments import padding_of_sides, prefers_channels_last
from swat_ext.ops.backend import Choice
from swat_ext.ops.layout import memory_format
from swat_ext.topology.selection import kept
from swat_ext.topology.sharing import has_identity

if TYPE_CHECKING:
    from swat_ext.modules.base import SWATLayer

__all__ = ["Key", "Problem", "can_measure", "key_of", "measured_choice", "problem_of", "remember", "representative"]

_ROUNDS = 5
_WARMUPS = {"cpu": 1, "cuda": 2}
# Long rounds end once one backend takes this much longer: more of them would not turn it around.
_CLEAR, _CLEAR_MILLISECONDS = 1.3, 50
# A round lasts about so long or repeats so often: a few microseconds cannot be told apart by one call.
_ROUND_MILLISECONDS, _MOST_REPEATS = 1.0, 10
# On the CPU time grows evenly with the batch from here on, so that a part of it tells which backend is faster.
_CPU_SAMPLES = 32
_CPU_ROWS = 4096

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
    layer: "SWATLayer", problem: Problem, dtype: torch.dtype, device: torch.device, otherwise: Choice
) -> tuple[Choice, Key | None]:
    """The backend that was faster over a step, or with ``problem.backward`` False over forward alone.

    Args:
        layer: whose steps to time; it is not changed.
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
        times = _measure(layer, problem, dtype, device)
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


def _measure(layer: "SWATLayer", problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Least milliseconds of "sparse", "dense" and "pytorch", interleaved; no "sparse" where its kernels refuse."""
    # Nothing of the caller's may see or change what runs here: modes, hooks on saved tensors, autocast.
    hooks = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
    isolated = (_disable_current_modes(), torch.inference_mode(False), torch.autocast(device.type, enabled=False))
    with isolated[0], isolated[1], isolated[2], hooks, torch.set_grad_enabled(problem.backward):
        return _least_times(_steps(layer, problem, dtype, device), device)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _least_times(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
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
    spent = 0.0
    for _ in range(_ROUNDS):
        for name, times in samples.items():
            times.append(timed(steps[name], device, repeats))
        ours = sorted(min(times) for name, times in samples.items() if name != "pytorch")
        spent += repeats * sum(times[-1] for times in samples.values())
        if spent > _CLEAR_MILLISECONDS and ours[-1] > _CLEAR * ours[0]:
            break
    return {name: min(times) for name, times in samples.items()}  # other work of the machine only adds


def _steps(
    layer: "SWATLayer", problem: Problem, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """What each contender does in a step, on random inputs and the layer's own weight."""
    generator = torch.Generator(device=device).manual_seed(0)
    format = memory_format(problem.channels_last)
    source = torch.randn(problem.input_size, generator=generator, dtype=dtype, device=device)
    source = source.contiguous(memory_format=format)
    if layer.weight.dim() == 2:  # a linear layer, whose rows are pixels
        source = source[0, :, 0].t().contiguous()

    def step(twin: "SWATLayer", forward: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        grad: Tensor | None = None

        def run() -> None:
            nonlocal grad
            input = source.detach().requires_grad_(problem.backward)
            output = forward(input)
            if problem.backward:
                if grad is None:
                    grad = torch.randn(output.shape, generator=generator, dtype=dtype, device=device)
                    grad = torch.empty_like(output, requires_grad=False).copy_(grad)
                torch.autograd.grad(output, (input, *twin.parameters()), grad)

        return run

    twins = {name: _twin(layer, problem, dtype, name) for name in ("sparse", "dense")}
    steps = {name: step(twin, twin.forward) for name, twin in twins.items()}
    dense = twins["dense"]
    return {**steps, "pytorch": step(dense, functools.partial(dense.dense_class.forward, dense))}


def _twin(layer: "SWATLayer", problem: Problem, dtype: torch.dtype, backend: Any) -> "SWATLayer":
    """A layer over the same weights, with neither the hooks nor the state of ``layer``."""
    # Parametrizations have put a class of their own before it.
    made = next(base for base in type(layer).__mro__ if "dense_class" in vars(base))
    twin: Any = object.__new__(made)
    nn.Module.__init__(twin)
    for name, value in vars(layer).items():
        twin.__dict__.setdefault(name, value)
    if getattr(twin, "padding_mode", "zeros") != "zeros":  # the input has been padded already
        twin.padding, twin.padding_mode = (0, 0), "zeros"
    for name in ("weight", "bias"):
        values = getattr(layer, name)
        if values is not None:
            values = values.detach().clone() if values.is_inference() else values.detach()
            values = nn.Parameter(values.to(dtype), requires_grad=problem.backward)
        twin.__dict__.pop(name, None)
        twin.register_parameter(name, values)
    activation_sparsity = layer.activation_sparsity
    twin._set_up(sparsity=layer.sparsity, activation_sparsity=activation_sparsity, backend=backend)
    twin.training = layer.training
    return twin  # type: ignore[no-any-return]


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
