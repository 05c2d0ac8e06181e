"""Calls of the operators that make no sense raise and name an argument; large geometries are computed or refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close
from torch import Tensor

from swat_ext import _C  # noqa: F401  (loading it registers the operators)

ops = torch.ops.swat_ext
_FAR = 2**62


def _tensor(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def _calls() -> dict[str, dict[str, Any]]:
    """Arguments of a right call of each operator. More than one block of 1024 elements in each mask."""
    input, weight, output = _tensor(3, 8, 12, 10), _tensor(16, 8, 3, 3), _tensor(3, 16, 12, 10)
    threshold = torch.tensor(0.5)
    values, mask = ops.compress(input, threshold)
    weight_values, weight_mask = ops.compress(weight, threshold)
    packed_weight = {"weight_values": weight_values, "weight_mask": weight_mask}
    packed_input = {"input_values": values, "input_mask": mask}
    geometry = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1, "channels_last": False}
    both = {"input_size": list(input.shape), "weight_size": list(weight.shape)}
    matrix, rows = _tensor(40, 60), _tensor(2, 25, 60)
    matrix_values, matrix_mask = ops.compress(matrix, threshold)
    packed_matrix = {"weight_values": matrix_values, "weight_mask": matrix_mask, "weight_size": [40, 60]}
    row_values, row_mask = ops.compress(rows.flatten(0, 1).t(), threshold)
    packed = {"values": values, "mask": mask, "size": list(input.shape), "channels_last": False}
    return {
        "kth_magnitude": {"input": input, "k": 5},
        "compress": {"input": input, "threshold": threshold, "keep": 700, "room": 875},
        "select": {
            "input": input,
            "threshold": threshold.clone(),
            "state": torch.tensor([5, 3, 2, 1, 4]),
            "room": 875,
        },
        "take": {"input": input, "mask": mask, "count": values.numel()},
        "decompress": packed,
        "decompress_part": {**packed, "begin": 1, "end": 3},
        "conv2d": {
            "input": input,
            **packed_weight,
            "weight_size": both["weight_size"],
            "bias": _tensor(16),
            **geometry,
        },
        "conv2d_input_grad": {"grad_output": output, **packed_weight, **both, **geometry},
        "conv2d_weight_grad": {"grad_output": output, **packed_input, **both, **geometry},
        "linear": {"input": rows, **packed_matrix, "bias": _tensor(40)},
        "linear_input_grad": {"grad_output": _tensor(2, 25, 40), **packed_matrix},
        "linear_weight_grad": {
            "grad_output": _tensor(2, 25, 40),
            "input_values": row_values,
            "input_mask": row_mask,
            "weight_size": [40, 60],
        },
        "whole_filters": {"mask": weight_mask, "size": both["weight_size"]},
        "bias_grad": {"grad_output": output, "dim": 1},
    }


def _changed(mask: Tensor, index: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    copy = mask.clone()
    copy[index] = change(copy[index])
    return copy


def _bad_values(values: Tensor) -> dict[str, Any]:
    return {
        "too short": values[:-1],
        "empty": values[:0],
        "another dtype": values.double(),
        "integers": values.to(torch.int32),
        "two dimensions": values[None],
        "strided": values.repeat_interleave(2)[::2],
    }


def _bad_masks(mask: Tensor) -> dict[str, Any]:
    # [words, ranks]: 1024 elements are 16 words, and have one rank.
    blocks = -(-mask.numel() // 17)
    return {
        "too short": mask[:-1],
        "too long": torch.cat((mask, mask[:1])),
        "empty": mask[:0],
        "int32": mask.to(torch.int32),
        "two dimensions": mask[None],
        "strided": mask.repeat_interleave(2)[::2],
        "all bits set": _changed(mask, 0, lambda word: word | -1),
        "bits missing": _changed(mask, 0, lambda word: word & 0),
        "the first rank": _changed(mask, mask.numel() - blocks, lambda rank: rank + 1),
        "a rank below 0": _changed(mask, mask.numel() - 1, lambda rank: rank - 2**40),
        "the last rank": _changed(mask, mask.numel() - 1, lambda rank: rank + 1000),
        "a rank that wraps": _changed(mask, mask.numel() - 1, lambda rank: rank | -(2**63)),
        "every rank": torch.cat((mask[:-blocks], mask[-blocks:] + 64)),
        "past the end": None,
    }


_FEW = {"below 0": -1, "far below 0": -_FAR}
_LISTS = {
    "stride": {"0": [0, 1], "below 0": [1, -1], "three": [1, 1, 1]},
    "dilation": {"0": [0, 1], "below 0": [1, -_FAR], "three": [1, 1, 1]},
    "padding": {
        "below 0": [0, 0, -1, 0],
        "two": [1, 1],
        "past 2^31": [2**31, 0, 0, 0],
        "sums that wrap": [_FAR, _FAR, 0, 0],
        "all wrap": [_FAR, _FAR, _FAR, _FAR],
        "an output past counting": [2**29, 2**29, 2**29, 2**29],
    },
    "groups": {"0": 0, **_FEW, "not a divisor": 3, "wraps": 2**61},
}
_SIZES = {
    "below 0": lambda size: [-size[0], *size[1:]],
    "two below 0": lambda size: [-size[0], -size[1], *size[2:]],
    "fewer dimensions": lambda size: size[1:],
    "more dimensions": lambda size: [1, *size],
    "wraps to 0": lambda size: [2**32, 2**32, *size[2:]],
    "wraps to itself": lambda size: [size[0] + 2**62, 4, *size[2:]],
    "larger": lambda size: [size[0] + 1, *size[1:]],
}
_OTHERS = {
    "k": {"0": 0, **_FEW, "above": 10**6},
    "keep": {"0": 0, **_FEW, "above": 10**6, "far above": _FAR},
    "room": {**_FEW, "one more": 2881, "far above": _FAR},
    "state": {
        "four": torch.tensor([5, 3, 2, 1]),
        "six": torch.tensor([5, 3, 2, 1, 4, 0]),
        "empty": torch.tensor([], dtype=torch.int64),
        "two dimensions": torch.tensor([[5, 3, 2, 1, 4]]),
        "int32": torch.tensor([5, 3, 2, 1, 4], dtype=torch.int32),
        "numbers": torch.tensor([5.0, 3.0, 2.0, 1.0, 4.0]),
        "strided": torch.tensor([5, 3, 2, 1, 4]).repeat_interleave(2)[::2],
        "a period of 0": torch.tensor([5, 3, 0, 1, 4]),
        "a period below 0": torch.tensor([5, 3, -_FAR, 1, 4]),
        "a budget of 0": torch.tensor([5, 3, 2, 0, 4]),
        "a budget below 0": torch.tensor([5, 3, 2, -1, 4]),
        "a budget of two numbers below 0": torch.tensor([5, 3, 2, -1, -4]),
        "a budget above 1": torch.tensor([5, 3, 2, 5, 4]),
        "a budget far above 1": torch.tensor([5, 3, 2, _FAR, 1]),
        "a denominator of 0": torch.tensor([5, 3, 2, 1, 0]),
    },
    "count": {**_FEW, "one fewer": 1000, "more than there are": 10**6, "far above": _FAR},
    "begin": {**_FEW, "after end": 4},
    "end": {**_FEW, "past the end": 4, "far past": _FAR},
    "dim": {"past": 4, "before": -5, "far": _FAR},
    "bias": {"shorter": _tensor(3), "two dimensions": _tensor(16, 1), "double": _tensor(16).double()},
    "threshold": {"two": _tensor(2), "none": _tensor(0), "double": torch.tensor(0.5).double()},
}


# Operators of one tensor.
_ALONE = ("kth_magnitude", "compress", "select", "bias_grad", "decompress", "decompress_part", "whole_filters")


def _table() -> list[tuple[str, str, str]]:
    """(operator, argument, what is wrong)."""
    rows = []
    for operator, arguments in _calls().items():
        for name, value in arguments.items():
            alone = operator in _ALONE
            if name.endswith("values"):
                wrongs = [wrong for wrong in _bad_values(value) if not alone or wrong != "another dtype"]
            elif name.endswith("mask"):
                wrongs = [wrong for wrong in _bad_masks(value) if wrong != "past the end" or _elements(arguments) % 64]
            elif name.endswith("size"):
                wrongs = [wrong for wrong in _SIZES if not alone or wrong != "more dimensions"]
            elif name in ("input", "grad_output"):
                half = ["half"] * (
                    operator not in ("kth_magnitude", "select", "take", "bias_grad")
                )  # beside others of float32
                wrongs = ["int64", *half] + ["smaller", "no dimensions"] * (not alone and operator != "conv2d")
            else:
                wrongs = list({**_LISTS, **_OTHERS}.get(name, {}))
                if operator == "select" and name == "threshold":
                    wrongs.remove("double")  # under autocast an input has not the dtype of the weight
            rows += [(operator, name, wrong) for wrong in wrongs]
    return rows


def _elements(arguments: dict[str, Any]) -> int:
    """Elements of a call's packed tensor."""
    if "count" in arguments:
        return arguments["input"].numel()
    if "input_values" in arguments:
        return math.prod(arguments.get("input_size", [50, 60]))
    return math.prod(arguments.get("size") or arguments["weight_size"])


def _wrong(operator: str, arguments: dict[str, Any], name: str, wrong: str) -> Any:
    value = arguments[name]
    if name.endswith("values"):
        return _bad_values(value)[wrong]
    if name.endswith("mask"):
        if wrong == "past the end":
            numel = _elements(arguments)
            return _changed(value, numel // 64, lambda word: word | (1 << (numel % 64)))
        return _bad_masks(value)[wrong]
    if name.endswith("size"):
        return _SIZES[wrong](value)
    if name in ("input", "grad_output"):
        tensors = {"int64": value.long(), "half": value.half(), "smaller": value[..., :-1], "no dimensions": value[0]}
        return tensors[wrong].sum() if wrong == "no dimensions" else tensors[wrong]
    return {**_LISTS, **_OTHERS}[name][wrong]


@pytest.mark.parametrize(("operator", "name", "wrong"), _table())
def test_a_call_that_makes_no_sense(operator: str, name: str, wrong: str) -> None:
    arguments = _calls()[operator]
    getattr(ops, operator)(**arguments)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as refused:
        getattr(ops, operator)(**{**arguments, name: _wrong(operator, arguments, name, wrong)})
    assert any(argument in str(refused.value).splitlines()[0] for argument in arguments), refused.value


def test_there_are_enough_of_them() -> None:
    assert len(_table()) > 250


@pytest.mark.parametrize("operator", list(_calls()))
def test_tensors_of_two_devices(operator: str) -> None:
    """A tensor without memory among others: none of them may be read."""
    arguments = _calls()[operator]
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name in tensors if len(tensors) > 1 else []:
        with pytest.raises((RuntimeError, NotImplementedError), match="device"):
            getattr(ops, operator)(**{**arguments, name: arguments[name].to("meta")})


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return ops.compress(tensor, torch.zeros((), dtype=tensor.dtype))


_EXTREME: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], tuple[int, ...], tuple[int, int], int]] = {
    # input, weight, stride, padding, dilation, groups
    "a stride past the image": ((2, 3, 9, 8), (4, 3, 3, 2), (2**62, 2**33), (1, 1, 0, 0), (1, 1), 1),
    "a stride as long as the padding": ((1, 2, 3, 3), (2, 2, 1, 1), (2**20, 2**20), (2**20, 0, 2**20, 0), (1, 1), 1),
    "a dilation between no taps": ((2, 3, 9, 8), (4, 3, 1, 1), (1, 1), (0, 0, 0, 0), (2**62, 2**32), 1),
    "taps far apart": ((1, 2, 3, 4), (3, 2, 2, 2), (1, 1), (20000, 20000, 0, 0), (20001, 2), 1),
    "taps far apart, strided": ((1, 2, 7, 4), (3, 2, 2, 1), (5, 1), (2**20, 2**20, 0, 0), (2**20, 1), 1),
    "a wide image": ((1, 1, 1, 9000), (2, 1, 1, 3), (1, 7), (0, 0, 1, 1), (1, 4000), 1),
    "a long stride over an image": ((1, 2, 900, 700), (3, 2, 2, 2), (200, 300), (0, 0, 0, 0), (1, 1), 1),
    "depthwise, a long stride": ((1, 20, 90, 70), (20, 1, 2, 2), (60, 50), (0, 0, 0, 0), (1, 1), 20),
    "depthwise, much padding": ((1, 20, 9, 7), (20, 1, 2, 2), (1000, 1000), (5000, 3, 9000, 1), (1, 1), 20),
    "a large kernel": ((1, 5, 61, 60), (3, 5, 60, 60), (1, 1), (0, 0, 0, 1), (1, 1), 1),
}


# Its tables of pixels would be as large as the stride or the dilated kernel.
_NO_WEIGHT_GRAD = {
    "a stride past the image": "stride",
    "a stride as long as the padding": "stride",
    "taps far apart, strided": "dilation",
    "depthwise, much padding": "stride",
}


@pytest.mark.parametrize("name", _EXTREME)
def test_extreme_geometries(name: str, isa: str) -> None:
    """Computed by the operators as from its definition, one tap at a time."""
    input_size, weight_size, stride, padding, dilation, groups = _EXTREME[name]
    input, weight = _tensor(*input_size).double(), _tensor(*weight_size).double()
    # The output's own pixels, and for each tap the input pixels that they read: a product of small matrices.
    top, bottom, left, right = padding
    kernel = weight_size[2:]
    spans = [(input_size[2] + top + bottom), (input_size[3] + left + right)]
    out = [(spans[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]

    def reads(axis: int, pad: int) -> Tensor:
        """[tap, output pixel, input pixel]"""
        at = torch.arange(kernel[axis])[:, None] * (dilation[axis] if kernel[axis] > 1 else 1) - pad
        at = at + torch.arange(out[axis]) * (stride[axis] if out[axis] > 1 else 1)
        return F.one_hot(at.clamp(0, input_size[2 + axis] - 1), input_size[2 + axis]).double() * (
            (at >= 0) & (at < input_size[2 + axis])
        ).unsqueeze(-1)

    x, w = input.clone().requires_grad_(), weight.clone().requires_grad_()
    by_row = torch.einsum("ngchw,kih->ngckiw", x.unflatten(1, (groups, -1)), reads(0, top))
    patches = torch.einsum("ngckiw,ljw->ngckilj", by_row, reads(1, left))
    expected = torch.einsum("ngckilj,gockl->ngoij", patches, w.unflatten(0, (groups, -1))).flatten(1, 2)
    geometry = (stride, padding, dilation, groups, False)
    packed_weight, packed_input = _packed(weight), _packed(input)
    output = ops.conv2d(input, *packed_weight, weight_size, None, *geometry)
    assert output.shape == (input_size[0], weight_size[0], *out)
    grad = _tensor(*output.shape).double()
    gradients = torch.autograd.grad(expected, (x, w), grad)
    input_grad = ops.conv2d_input_grad(grad, *packed_weight, weight_size, input_size, *geometry)
    assert_close(output, expected.detach(), f"output of {name}")
    assert_close(input_grad, gradients[0], f"input gradient of {name}")

    def weight_grad() -> Tensor:
        return ops.conv2d_weight_grad(grad, *packed_input, input_size, weight_size, *geometry)

    if name in _NO_WEIGHT_GRAD:
        with pytest.raises(ValueError, match=_NO_WEIGHT_GRAD[name]):
            weight_grad()
    else:
        assert_close(weight_grad(), gradients[1], f"weight gradient of {name}")
