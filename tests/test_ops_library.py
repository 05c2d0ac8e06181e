"""Every registered operator has a fake kernel and autograd that agree with it: torch.library.opcheck on all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import assert_close

from swat_ext import functional

_THRESHOLD = 0.7


def _registered() -> list[str]:
    """Names of all operators of the library, wherever they were defined."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split("::")[1].split(".")[0] for name in names if name.startswith("swat_ext::")})


def _randn(*size: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator, dtype=dtype).requires_grad_(requires_grad)


def _problems() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[Any]]]:
    """Input, weight, bias and geometry: layouts, groups, uneven padding, no bias, an empty batch."""
    samples = []
    for batch, groups, padding, channels_last, with_bias in (
        (3, 1, (1, 1, 1, 1), False, True),
        (3, 1, (1, 1, 1, 1), True, False),
        (2, 2, (0, 1, 2, 0), True, True),
        (0, 1, (0, 0, 0, 0), False, True),
    ):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        input = _randn(batch, 4, 6, 5).contiguous(memory_format=memory_format)
        bias = _randn(6) if with_bias else None
        samples.append(
            (input, _randn(6, 4 // groups, 3, 2), bias, [[2, 1], list(padding), [1, 2], groups, channels_last])
        )
    return samples


def _packed(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return functional.compress(tensor, _THRESHOLD)[:2]


def _convolutions() -> list[tuple[Any, ...]]:
    return [(x, *_packed(w), list(w.shape), bias, *geometry) for x, w, bias, geometry in _problems()]


def _input_grads() -> list[tuple[Any, ...]]:
    return [
        (_randn(*_output_size(x, w, geometry)), *_packed(w), list(w.shape), list(x.shape), *geometry)
        for x, w, _, geometry in _problems()
    ]


def _weight_grads() -> list[tuple[Any, ...]]:
    return [
        (_randn(*_output_size(x, w, geometry)), *_packed(x), list(x.shape), list(w.shape), *geometry)
        for x, w, _, geometry in _problems()
    ]


def _linears() -> list[tuple[Any, ...]]:
    packed = (*_packed(_randn(5, 7)), [5, 7])
    strided = _randn(7, 3).t()
    return [(_randn(3, 7), *packed, _randn(5)), (_randn(2, 3, 7), *packed, None), (strided, *packed, _randn(5))]


def _linear_input_grads() -> list[tuple[Any, ...]]:
    packed = (*_packed(_randn(5, 7)), [5, 7])
    return [(_randn(*lead, 5), *packed) for lead in ((3,), (2, 3), (0,))]


def _linear_weight_grads() -> list[tuple[Any, ...]]:
    return [(_randn(3, 5), *_packed(_randn(7, 3)), [5, 7]), (_randn(2, 3, 5), *_packed(_randn(7, 6)), [5, 7])]


def _bias_grads() -> list[tuple[Any, ...]]:
    return [(_randn(2, 3, 4, 5), 1), (_randn(4, 5), -1), (_randn(1).expand(2, 3, 4, 5), 1), (_randn(0, 3), 1)]


def _output_size(input: torch.Tensor, weight: torch.Tensor, geometry: list[Any]) -> tuple[int, ...]:
    stride, (top, bottom, left, right), dilation, groups, _ = geometry
    padded = torch.nn.functional.pad(input, (left, right, top, bottom))
    return tuple(torch.nn.functional.conv2d(padded, weight, None, stride, 0, dilation, groups).shape)


def _magnitudes() -> list[tuple[Any, ...]]:
    return [(_randn(7, 9), 5), (_randn(7, 9, dtype=torch.float64).t(), 63), (torch.tensor(-1.0), 1)]


def _compressions() -> list[tuple[Any, ...]]:
    threshold = torch.tensor(_THRESHOLD)
    strided = _randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    return [(_randn(1100), threshold), (strided, threshold), (_randn(3, 0), threshold), (_randn(9), threshold * 100)]


def _budgeted() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """With a budget, with a length of its own, with both."""
    weight, threshold = _randn(4, 6, 3, 3), torch.tensor(_THRESHOLD)
    limits = [{"keep": 40}, {"room": 30}, {"room": 216}, {"keep": 40, "room": 50}, {"keep": 40, "room": 0}]
    return [((weight, threshold), limit) for limit in limits]


def _decompressions() -> list[tuple[Any, ...]]:
    packed = functional.compress(_randn(2, 3, 5, 7), _THRESHOLD)
    return [(packed.values, packed.mask, list(packed.size), last) for last in (False, True)] + [
        (packed.values, packed.mask, [210], False)
    ]


def _parts() -> list[tuple[Any, ...]]:
    return [
        (*packed, size, 0, size[0] // 2, channels_last) for *packed, size, channels_last in _decompressions() if size
    ]


def _takes() -> list[tuple[Any, ...]]:
    inputs = [_randn(2, 3, 5, 7), _randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last), _randn(3, 0)]
    packed = [functional.compress(input, _THRESHOLD) for input in inputs]
    return [(input, pack.mask, pack.values.numel()) for input, pack in zip(inputs, packed, strict=True)]


def _selections() -> list[tuple[Any, ...]]:
    """A first selection, one that is due, one that is not, and thresholds that let too much and too little pass."""
    weight = _randn(4, 6, 3, 3)
    return [
        (weight, torch.tensor(threshold), torch.tensor([*steps, 3, 5, 27]), room)
        for steps, threshold in (([0, -1], 0.0), ([5, 0], 0.1), ([5, 4], 1.2), ([5, 4], 0.0), ([5, 4], 3.0))
        for room in (None, 0, 20, 50, weight.numel())
    ]


def _lying(*size: int) -> list[torch.Tensor]:
    """Images contiguous, channels_last, sliced by channel of both, permuted and expanded."""
    doubled = _randn(size[0], 2 * size[1], *size[2:])
    last = doubled.to(memory_format=torch.channels_last)
    plain = [_randn(*size), _randn(*size).to(memory_format=torch.channels_last)]
    return [
        *plain,
        *(tensor[:, 1 : 1 + size[1]] for tensor in (doubled, last)),
        _randn(size[1], size[0], *size[2:]).transpose(0, 1),
        *(tensor[:1].expand(size) for tensor in plain),
    ]


def _filters() -> list[tuple[Any, ...]]:
    weight = _randn(7, 5, 3, 2)
    weight[[0, 4]] = 0
    return [(_packed(weight.abs() + _THRESHOLD * (weight != 0))[1], list(weight.shape)), (_packed(weight)[1], [70, 3])]


def _relus() -> list[tuple[Any, ...]]:
    samples = [_randn(3, 5), _randn(0, 4), _randn(9, dtype=torch.float64), *_lying(2, 3, 5, 7), _randn(4, 5, 6).mT]
    return [(sample,) for sample in samples]


def _inplace_relus() -> list[tuple[Any, ...]]:
    return [(sample,) for (sample,) in _relus() if 0 not in sample.stride()]


def _relu_grads() -> list[tuple[Any, ...]]:
    grads = [_randn(2, 3, 5, 7), _randn(2, 3, 5, 7).to(memory_format=torch.channels_last), _randn(2, 3, 7, 5, 1).mT]
    return [(grad, torch.ops.swat_ext.relu(torch.ones_like(grad))[1]) for grad in grads]


def _norms() -> list[tuple[Any, ...]]:
    """Arguments of batch_norm: layouts, forms of what is saved, with and without affine parameters."""
    samples: list[tuple[Any, ...]] = []
    for number, input in enumerate(_lying(3, 5, 4, 2)):
        weight, bias = [_randn(5) if number % 2 else None for _ in range(2)]
        samples.append((input, weight, bias, 1e-5, ("exact", "bf16", "int8")[number % 3], torch.tensor(3)))
    return [*samples, (_randn(7, 5), None, None, 1e-5, "exact", None)]


def _norm_grads() -> list[tuple[Any, ...]]:
    samples = []
    for input, weight, bias, eps, saved, seed in _norms():
        _, mean, invstd, _, codes, scale = torch.ops.swat_ext.batch_norm(input, weight, bias, eps, saved, seed)
        kept = (input, None) if saved == "exact" else (codes, scale if saved == "int8" else None)
        samples.append((_randn(*input.shape), *kept, mean, invstd, weight, saved))
    return samples


def _pools() -> list[tuple[Any, ...]]:
    inputs = [*_lying(2, 3, 8, 7), *_lying(3, 1, 8, 7)[:2]]
    return [(input, [3, 2], [2, 3], [1, 0], [1, 2], number % 2 == 0) for number, input in enumerate(inputs)]


def _pool_grads() -> list[tuple[Any, ...]]:
    samples = []
    for input, *geometry in _pools():
        output, positions = torch.ops.swat_ext.max_pool2d(input, *geometry)
        samples.append((torch.ones_like(output), positions, input.shape, *geometry))
    return samples


_SAMPLES: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "batch_norm": _norms,
    "batch_norm_backward": _norm_grads,
    "bias_grad": _bias_grads,
    "compress": _compressions,
    "conv2d": _convolutions,
    "conv2d_input_grad": _input_grads,
    "conv2d_weight_grad": _weight_grads,
    "decompress": _decompressions,
    "decompress_part": _parts,
    "kth_magnitude": _magnitudes,
    "linear": _linears,
    "linear_input_grad": _linear_input_grads,
    "linear_weight_grad": _linear_weight_grads,
    "max_pool2d": _pools,
    "max_pool2d_backward": _pool_grads,
    "relu": _relus,
    "relu_": _inplace_relus,
    "relu_backward": _relu_grads,
    "select": _selections,
    "take": _takes,
    "whole_filters": _filters,
}


def test_every_operator_has_samples() -> None:
    assert _registered() == sorted(_SAMPLES)


@pytest.mark.parametrize("name", _registered())
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.swat_ext, name).default
    for sample in _SAMPLES[name]():
        torch.library.opcheck(operator, sample)


def test_opcheck_of_compress_with_a_budget_and_room() -> None:
    for sample, limits in _budgeted():
        torch.library.opcheck(torch.ops.swat_ext.compress.default, sample, limits)


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_conv2d_compiles_to_one_graph(backend: str) -> None:
    weight, bias = _randn(6, 4, 3, 3, requires_grad=True), _randn(6, requires_grad=True)

    def function(input: torch.Tensor) -> torch.Tensor:
        packed_weight = functional.compress(weight, torch.tensor(_THRESHOLD))
        packed_input = functional.compress(input, _THRESHOLD)
        return functional.conv2d_packed(
            input, weight, bias, packed_weight, packed_input, padding="same", backend=backend
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        input = _randn(batch, 4, 7, 6, requires_grad=True)
        results = []
        for call in (function, compiled):
            output = call(input)
            gradients = torch.autograd.grad(output.square().sum(), (input, weight, bias))
            results.append((output, *gradients))
        for eager, traced in zip(*results, strict=True):
            assert_close(traced, eager.double(), "compiled")


def test_linear_compiles_to_one_graph() -> None:
    weight = _randn(6, 9, requires_grad=True)

    def function(input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, weight, weight_threshold=_THRESHOLD, activation_threshold=_THRESHOLD)

    input = _randn(2, 5, 9, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(input), function(input).double(), "compiled")
    gradients = [torch.autograd.grad(call(input).square().sum(), (input, weight)) for call in (function, compiled)]
    for eager, traced in zip(*gradients, strict=True):
        assert_close(traced, eager.double(), "compiled gradient")
