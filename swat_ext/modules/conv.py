"""A sparse :class:`torch.nn.Conv2d`."""

from collections.abc import Hashable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from swat_ext.functional import conv2d_packed
from swat_ext.modules.base import LayerOptions, SWATLayer, check_options
from swat_ext.ops.autocast import autocast_input

__all__ = ["SWATConv2d", "pad_by_index"]


class SWATConv2d(SWATLayer, nn.Conv2d):
    """:class:`torch.nn.Conv2d` that trains by SWAT (Raihan and Aamodt, arXiv 2001.01969, algorithm 1).

    Forward and input gradient use the largest weights alone; the weight gradient is dense and uses the largest inputs
    alone, which are all that is saved of the input.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in :class:`torch.nn.Conv2d`; dtype float32, float64, bfloat16 or float16.
        sparsity, options: ``sparsity``, ``activation_sparsity``, ``method``, ``granularity``, ``block_size``,
            ``topk_period``, ``weight_topk_period`` and ``backend`` as in :class:`swat_ext.SWATConfig`.

    Shape:
        ``[N, C, H, W]`` -> ``[N, O, H', W']``, or ``[C, H, W]`` -> ``[O, H', W']``.

    With a padding mode other than "zeros" the padded input is what is selected from and saved.

    Raises:
        TypeError, ValueError: an argument that does not fit, named; in forward, an input that does not.
        RuntimeError: second derivatives.
    """

    dense_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._set_up(check_options(sparsity, options), **options)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        if input.device.type == "meta":
            return super().forward(input)  # no values to select from: shapes alone
        source, input = input, autocast_input(input)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = pad_by_index(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        return conv2d_packed(
            input,
            self.weight,
            self.bias,
            self._select_weight(),
            self._select_activation(source, input.detach()),
            self.stride,  # type: ignore[arg-type]
            padding,
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            backend=self._choice.backend,
            from_weight=True,
        )

    @property
    def packed_form(self) -> Hashable:
        zeros = self.padding_mode == "zeros"
        return None if zeros else (self.padding_mode, *self._reversed_padding_repeated_twice)

    def _check_input(self, input: Tensor) -> None:
        super()._check_input(input)
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            channels = self.in_channels
            raise ValueError(
                f"input: expected [N, {channels}, H, W] or [{channels}, H, W], got shape {tuple(input.shape)}"
            )


def pad_by_index(input: Tensor, padding: list[int], mode: str) -> Tensor:
    """:func:`torch.nn.functional.pad` of the last two dimensions, saving nothing for backward but two rows of indices.

    PyTorch's own reflection and replication save their whole input.

    Args:
        input: ``[..., H, W]``.
        padding: left, right, top, bottom.
        mode: "reflect", "replicate" or "circular".

    Raises:
        ValueError: an input too small to be padded so.
    """
    for axis, (before, after) in ((-1, padding[:2]), (-2, padding[2:])):
        if before == after == 0:
            continue
        size = input.shape[axis]
        least = {"reflect": max(before, after) + 1, "replicate": 1, "circular": max(before, after)}[mode]
        if size < least:
            raise ValueError(
                f"input: expected a {'width' if axis == -1 else 'height'} of at least {least} for padding "
                f"({before}, {after}) of mode {mode!r}, got {size}"
            )
        index = torch.arange(-before, size + after, device=input.device)
        if mode == "reflect":
            index = (size - 1) - ((size - 1) - index.abs()).abs()
        elif mode == "replicate":
            index = index.clamp(0, size - 1)
        else:
            index = index % size
        input = input.index_select(axis, index)
    return input
