"""A sparse :class:`torch.nn.Linear`."""

from collections.abc import Hashable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from swat_ext.functional import linear_input_view, linear_packed
from swat_ext.modules.base import LayerOptions, SWATLayer, check_options
from swat_ext.ops.autocast import autocast_input

__all__ = ["SWATLinear"]


class SWATLinear(SWATLayer, nn.Linear):
    """:class:`torch.nn.Linear` that trains by SWAT (Raihan and Aamodt, arXiv 2001.01969, algorithm 1).

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`; dtype float32, float64, bfloat16
            or float16.
        sparsity, options: ``sparsity``, ``activation_sparsity``, ``method``, ``granularity``, ``block_size``,
            ``topk_period``, ``weight_topk_period`` and ``backend`` as in :class:`swat_ext.SWATConfig`.

    Shape:
        ``[..., in_features]`` -> ``[..., out_features]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, named; in forward, an input that does not.
        RuntimeError: second derivatives.
    """

    dense_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_up(check_options(sparsity, options), **options)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        if input.device.type == "meta":
            return super().forward(input)  # no values to select from: shapes alone
        source, input = input, autocast_input(input)
        return linear_packed(
            input,
            self.weight,
            self.bias,
            self._select_weight(),
            self._select_activation(source, linear_input_view(input.detach())),
            backend=self._choice.backend,
            from_weight=True,
        )

    @property
    def packed_form(self) -> Hashable:
        return "rows"

    def _check_input(self, input: Tensor) -> None:
        super()._check_input(input)
        if input.dim() < 1 or input.shape[-1] != self.in_features:
            raise ValueError(f"input: expected [..., {self.in_features}], got shape {tuple(input.shape)}")
