"""A batch normalisation that is fast in channels_last, and may keep a quarter of its input for the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn

from swat_ext.config import check_name
from swat_ext.modules.lean import LeanLayer
from swat_ext.ops.around import batch_norm, has_kernels, normalises_with

__all__ = ["SWATBatchNorm2d"]


class SWATBatchNorm2d(LeanLayer, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, which in training keeps its input in the form ``saved`` for the backward pass.

    Outputs and statistics are those of PyTorch's layer, within rounding, whatever is saved. With "exact" the gradients
    are too. The others keep the normalised input ``h`` alone, of which the layer's gradient is a function: "bf16" in
    bfloat16, a half of the bytes, with a relative error of at most 1 / 256 in each element; "int8" in 127 steps of its
    channel's largest ``|h|``, a quarter of the bytes, rounded up or down at random so that the gradients of weight and
    bias stay unbiased. The random numbers depend on ``num_batches_tracked``, the position and the statistics alone: the
    same step gives the same bits, on any number of threads, though not on another instruction set or device.

    For ``[N, C, H, W]`` in float32, float64, bfloat16 and float16; beside the last two weights may be float32.
    Elsewhere, in evaluation with running statistics, and where weight and input differ otherwise, it is PyTorch's own.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`.
        saved: "exact", "bf16" or "int8".

    Raises:
        ValueError: ``saved`` is another name; and as PyTorch's layer does.
        RuntimeError: second derivatives.
    """

    dense_class = nn.BatchNorm2d

    _saved: str = "exact"

    def __init__(self, *args: Any, saved: str = "exact", **keywords: Any) -> None:
        check_name("batchnorm", saved, "saved")
        super().__init__(*args, **keywords)
        self._saved = saved

    @property
    def saved(self) -> str:
        """What is kept for the backward pass; may be set at any time."""
        return self._saved

    @saved.setter
    def saved(self, value: str) -> None:
        check_name("batchnorm", value, "saved")
        self._saved = value

    def forward(self, input: Tensor) -> Tensor:
        recorded = self._recorded(input)  # not even PyTorch's own layer is traced by torch.fx
        if recorded is not None:
            return recorded
        if not self._has_kernels(input):
            return super().forward(input)
        tracks = self.training and self.track_running_stats and self.running_mean is not None
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # Without a gradient nothing is saved: codes would be made for nobody.
        leaves = (input, self.weight, self.bias)
        learns = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
        saved = self._saved if learns else "exact"
        output, mean, variance = batch_norm(input, self.weight, self.bias, self.eps, saved, self.num_batches_tracked)
        if tracks:
            self._track(mean, variance)
        return output

    def _has_kernels(self, input: Tensor) -> bool:
        """Whether this is a call for our kernels; all others, wrong ones among them, are PyTorch's."""
        return (
            has_kernels(input)
            and (self.running_mean is None) == (self.running_var is None)
            and (self.training or self.running_mean is None)
            and self.eps > 0
            and input.dim() == 4
            and input.shape[1] == self.num_features
            and input.numel() > self.num_features
            and normalises_with(input, self.weight, self.bias)
        )

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        factor: float | Tensor = 0.0
        if self.momentum is not None:
            factor = self.momentum
        elif self.num_batches_tracked is not None:
            factor = 1.0 / self.num_batches_tracked.double()  # a tensor: a number would not trace
        for running, found in ((self.running_mean, mean), (self.running_var, variance)):
            if running is None:
                continue
            if isinstance(factor, Tensor):
                running.mul_(1 - factor).add_(found * factor)
            else:
                running.mul_(1 - factor).add_(found, alpha=factor)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, saved={self._saved!r}"
