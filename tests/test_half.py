"""bfloat16 and float16 on the CPU: kept as such, computed in float32."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import assert_identical
from networks import batches, sgd, sparse_layers, train
from torch import Tensor, nn

import swat_ext
from swat_ext import SWATConfig, SWATConv2d, SWATLinear, functional
from swat_ext.ops.packed import Packed

ops = torch.ops.swat_ext
_HALF = [torch.bfloat16, torch.float16]
_LAYOUTS = [torch.contiguous_format, torch.channels_last]


def _randn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def _calls(dtype: torch.dtype, layout: torch.memory_format) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Operators, each with arguments in ``dtype``."""
    x, weight, bias = _randn(3, 8, 9, 7).to(dtype, memory_format=layout), _randn(16, 4, 3, 3).to(dtype), _randn(16)
    bias = bias.to(dtype)
    grad = _randn(3, 16, 9, 7).to(dtype, memory_format=layout)
    threshold = torch.tensor(0.8, dtype=dtype)
    kept_x, kept = ops.compress(x, threshold), ops.compress(weight, threshold)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 2, layout == torch.channels_last)
    rows, matrix = _randn(5, 2, 20).to(dtype), _randn(12, 20).to(dtype)
    kept_matrix = ops.compress(matrix, threshold)
    kept_rows = ops.compress(functional.linear_input_view(rows), threshold)
    row_grad = _randn(5, 2, 12).to(dtype)
    pool = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    codes = x.to(torch.bfloat16)
    _, mean, invstd, _, _, _ = ops.batch_norm(x, None, None, 1e-5, "exact", None)
    affine = (bias[:8], bias[8:])
    return {
        "kth_magnitude": (ops.kth_magnitude, (x, 17)),
        "compress": (ops.compress, (x, threshold)),
        "take": (ops.take, (x, kept_x[1], kept_x[0].numel())),
        "decompress": (ops.decompress, (*kept_x, x.shape, True)),
        "decompress_part": (ops.decompress_part, (*kept_x, x.shape, 1, 3, False)),
        "conv2d": (ops.conv2d, (x, *kept, weight.shape, bias, *geometry)),
        "conv2d without bias": (ops.conv2d, (x, *kept, weight.shape, None, *geometry)),
        "conv2d_input_grad": (ops.conv2d_input_grad, (grad, *kept, weight.shape, x.shape, *geometry)),
        "conv2d_weight_grad": (ops.conv2d_weight_grad, (grad, *kept_x, x.shape, weight.shape, *geometry)),
        "linear": (ops.linear, (rows, *kept_matrix, matrix.shape, bias[:12])),
        "linear_input_grad": (ops.linear_input_grad, (row_grad, *kept_matrix, matrix.shape)),
        "linear_weight_grad": (ops.linear_weight_grad, (row_grad, *kept_rows, matrix.shape)),
        "bias_grad": (ops.bias_grad, (grad, 1)),
        "relu": (ops.relu, (x,)),
        "relu_backward": (ops.relu_backward, (x, ops.relu(x)[1])),
        "max_pool2d": (ops.max_pool2d, (x, *pool)),
        "max_pool2d_backward": (
            ops.max_pool2d_backward,
            (ops.max_pool2d(x, *pool)[0], ops.max_pool2d(x, *pool)[1], x.shape, *pool),
        ),
        "batch_norm": (ops.batch_norm, (x, *affine, 1e-5, "exact", None)),
        "batch_norm bf16": (ops.batch_norm, (x, *affine, 1e-5, "bf16", None)),
        "batch_norm int8": (ops.batch_norm, (x, *(a.float() for a in affine), 1e-5, "int8", torch.tensor(3))),
        "batch_norm_backward": (ops.batch_norm_backward, (x, x, None, mean, invstd, affine[0], "exact")),
        "batch_norm_backward bf16": (ops.batch_norm_backward, (x, codes, None, mean, invstd, None, "bf16")),
        "batch_norm_backward wide": (
            ops.batch_norm_backward,
            (x, x, None, mean, invstd, affine[0].float(), "exact"),
        ),
    }


# Results that are not of the input's dtype, by their place; of the others the first alone is rounded.
_WIDE = {"batch_norm": [5], "batch_norm bf16": [5], "batch_norm int8": [5], "batch_norm_backward wide": [1, 2]}


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("dtype", _HALF)
@pytest.mark.parametrize("name", _calls(torch.bfloat16, torch.contiguous_format))
def test_an_operator_is_that_of_float32_rounded(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    function, arguments = _calls(dtype, layout)[name]

    def wide(argument: Any) -> Any:
        is_codes = name.endswith("backward bf16") and argument is arguments[1]
        half = isinstance(argument, Tensor) and argument.dtype == dtype and not is_codes
        return argument.float() if half else argument

    got, expected = function(*arguments), function(*map(wide, arguments))
    if isinstance(got, Tensor):
        got, expected = (got,), (expected,)
    for place, (mine, exact) in enumerate(zip(got, expected, strict=True)):
        if exact.dtype == torch.float32 and place not in _WIDE.get(name, ()):
            exact = exact.to(dtype)
        assert mine.stride() == exact.stride()
        if mine.is_floating_point() and mine.element_size() > 1:
            assert_identical(mine, exact, f"result {place}")
        else:
            assert torch.equal(mine, exact)
    torch.library.opcheck(getattr(ops, name.split()[0]).default, arguments)


@pytest.mark.parametrize("dtype", _HALF)
def test_a_relu_in_place(dtype: torch.dtype) -> None:
    for x in (_randn(4, 6, 5, 3).to(dtype), _randn(7, 9).to(dtype)[:, ::2]):
        expected, mask = ops.relu(x.clone(memory_format=torch.preserve_format))
        assert torch.equal(ops.relu_(x), mask)
        assert torch.equal(x, expected)


def test_a_selection_in_half_keeps_its_budget() -> None:
    x = _randn(1000).bfloat16()
    threshold, state = torch.zeros((), dtype=torch.bfloat16), torch.tensor([0, -1, 10, 1, 10])
    values, _ = ops.select(x, threshold, state, None)
    assert threshold.dtype == values.dtype == torch.bfloat16
    assert torch.equal(values, x[x.abs() >= threshold])
    assert 100 <= values.numel() <= 125  # ties, of which half types have many, all stay
    assert threshold == x.float().abs().sort(descending=True).values[99]


def test_dtypes_do_not_mix() -> None:
    x, weight = _randn(2, 4, 5, 5), _randn(3, 4, 3, 3)
    values, mask = ops.compress(weight, torch.tensor(0.5))
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1, False)
    for input, kept in ((x.bfloat16(), values), (x, values.bfloat16()), (x.half(), values.bfloat16())):
        with pytest.raises(RuntimeError, match=r"expected (the )?scalar type"):
            ops.conv2d(input, kept, mask, weight.shape, None, *geometry)
    with pytest.raises(TypeError, match=r"^weight: expected dtype torch.bfloat16"):
        functional.conv2d(x.bfloat16(), weight, weight_threshold=0.1, activation_threshold=0.1)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 16, 5),
    )


@pytest.mark.parametrize("granularity", ["unstructured", "kernel", "filter", "block"])
def test_a_bfloat16_model_learns_as_in_float32(granularity: str) -> None:
    dense = _model()
    images = [(x.repeat(1, 1, 1, 1), y) for x, y in batches(1)] * 25
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(dense).to(dtype)
        swat_ext.sparsify_(model, SWATConfig(0.5, granularity=granularity, backend="sparse"))
        losses[dtype] = train(model, sgd(model), [(x.to(dtype), y) for x, y in images])
        assert all(layer.weight.dtype == dtype for layer in sparse_layers(model))
    first, last = losses[torch.bfloat16][0], losses[torch.bfloat16][-1]
    assert last < 0.5 * first
    torch.testing.assert_close(first.float(), losses[torch.float32][0], rtol=0.05, atol=0.02)


def test_autocast_saves_half_of_the_bytes() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    layer = SWATConv2d(16, 16, 3, padding=1, sparsity=0.5, backend="sparse")
    x = _randn(4, 16, 20, 20).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    largest = max((tensor for tensor in saved if tensor.is_floating_point()), key=Tensor.numel)
    assert largest.dtype == torch.bfloat16
    assert largest.numel() == pytest.approx(0.5 * x.numel(), rel=0.02)
    output.float().sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


def test_packed_values_are_half() -> None:
    packed = functional.compress(_randn(64, 64).half(), 0.5)
    assert isinstance(packed, Packed)
    assert packed.values.dtype == torch.float16
    linear = SWATLinear(64, 8, sparsity=0.5).half()
    assert linear(_randn(3, 64).half()).dtype == torch.float16
