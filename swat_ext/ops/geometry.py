"""How a convolution walks over its input."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Geometry", "IntPair", "int_pair"]

IntPair = int | tuple[int, int] | list[int]


class Geometry(NamedTuple):
    """Stride, padding, dilation and groups, checked.

    Attributes:
        stride, dilation: ``(rows, columns)``, at least 1.
        padding: ``(top, bottom, left, right)``, at least 0.
        groups: at least 1.
    """

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: IntPair, padding: str | IntPair, dilation: IntPair, groups: int
    ) -> "Geometry":
        """From the arguments of :func:`torch.nn.functional.conv2d`, for a kernel of ``[rows, columns]``.

        Raises:
            TypeError, ValueError: an argument that is out of its range, named.
        """
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups: expected an integer of at least 1, got {groups!r}")
        strides, dilations = int_pair("stride", stride, 1), int_pair("dilation", dilation, 1)
        if not isinstance(padding, str):
            rows, columns = int_pair("padding", padding, 0)
            return cls(strides, (rows, rows, columns, columns), dilations, groups)
        if padding == "valid":
            return cls(strides, (0, 0, 0, 0), dilations, groups)
        if padding != "same":
            raise ValueError(f"padding: expected 'same', 'valid' or integers, got {padding!r}")
        if strides != (1, 1):
            raise ValueError(f"padding: 'same' needs stride 1, got stride {strides}")
        total = [dilations[axis] * (kernel[axis] - 1) for axis in range(2)]
        top, left = total[0] // 2, total[1] // 2
        return cls(strides, (top, total[0] - top, left, total[1] - left), dilations, groups)

    def output_size(self, input_size: Sequence[int], weight_size: Sequence[int]) -> list[int]:
        """``[N, O, H', W']`` of an input ``[N, C, H, W]`` and a weight ``[O, C / groups, kh, kw]``.

        Raises:
            ValueError: the input does not fit the weight, or the dilated kernel the padded input.
        """
        out_channels, group_channels, *kernel = weight_size
        if input_size[1] != group_channels * self.groups:
            raise ValueError(
                f"input: expected {group_channels * self.groups} channels (weight.shape[1] * groups), "
                f"got {input_size[1]} in shape {tuple(input_size)}"
            )
        if out_channels < 1 or out_channels % self.groups:
            raise ValueError(
                f"weight: expected at least 1 output channel, and a multiple of groups = {self.groups}, "
                f"got {out_channels}"
            )
        if min(kernel) < 1:
            raise ValueError(f"weight: expected a kernel of at least 1x1, got shape {tuple(weight_size)}")
        size = [input_size[0], out_channels]
        for axis in range(2):
            padded = input_size[2 + axis] + self.padding[2 * axis] + self.padding[2 * axis + 1]
            extent = self.dilation[axis] * (kernel[axis] - 1) + 1
            if padded < extent:
                raise ValueError(
                    f"input: expected a padded {('height', 'width')[axis]} of at least {extent} (the dilated kernel), "
                    f"got {padded}"
                )
            size.append((padded - extent) // self.stride[axis] + 1)
        return size


def int_pair(name: str, value: IntPair, least: int) -> tuple[int, int]:
    """One integer or two, each at least ``least``, as ``(rows, columns)``; TypeError or ValueError otherwise."""
    if type(value) is tuple and len(value) == 2 and all(type(item) is int and item >= least for item in value):
        return value
    pair = list(value) if isinstance(value, (tuple, list)) else [value]
    # Sizes being traced are torch.SymInt.
    if not all(isinstance(item, (int, torch.SymInt)) and not isinstance(item, bool) for item in pair):
        raise TypeError(f"{name}: expected one or two integers, got {value!r}")
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2:
        raise ValueError(f"{name}: expected one or two integers, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return pair[0], pair[1]
