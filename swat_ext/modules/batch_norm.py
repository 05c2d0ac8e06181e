"""A batch normalisation that is fast in channels_last, and may keep a quarter of its input for the backward pass."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swat_ext.config import check_batchnorm
from swat_ext.modules.rectified import rectified_output
from swat_ext.ops.around import batch_norm, has_kernels, normalises_with
from swat_ext.topology.sharing import has_identity

__all__ = ["SWATBatchNorm2d"]


class SWATBatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, which in training keeps its input in the form ``saved`` for the backward pass.

    Outputs and statistics are those of PyTorch's layer, within rounding, whatever is saved. With "exact" the gradients
    are too. The others keep the normalised input ``h`` alone, of which the layer's gradient is a function: "bf16" in
    bfloat16, a half of the bytes, with a relative error of at most 1 / 256 in each element; "int8" in 127 steps of its
    channel's largest ``|h|``, a quarter of the bytes, rounded up or down at random so that the gradients of weight and
    bias stay unbiased. The random numbers depend on ``num_batches_tracked``, the position and the statistics alone: the
    same step gives the same bits, on any number of threads, though not on another instruction set or device.

    Where :func:`swat_ext.sparsify_` finds that a ReLU alone reads the output, the layer computes that too while it
    learns, unless it has hooks. What it returns then is a :class:`torch.Tensor` that gives its ReLU the rectified
    values, and everything else that should read it, the plain ones, which are computed for it.

    For ``[N, C, H, W]`` in float32 and float64, and in bfloat16 and float16 on CUDA, where weights may be float32.
    Elsewhere, in evaluation with running statistics, and where weight and input differ otherwise, it is PyTorch's own.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`.
        saved: "exact", "bf16" or "int8".

    Raises:
        ValueError: ``saved`` is another name; and as PyTorch's layer does.
        NotImplementedError: second derivatives.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.BatchNorm2d

    _saved: str = "exact"
    # Set by sparsify_ where a ReLU alone seems to read the output.
    _rectifies: bool = False

    def __init__(self, *args: Any, saved: str = "exact", **keywords: Any) -> None:
        check_batchnorm("saved", saved)
        super().__init__(*args, **keywords)
        self._saved = saved

    @property
    def saved(self) -> str:
        """What is kept for the backward pass; may be set at any time."""
        return self._saved

    @saved.setter
    def saved(self, value: str) -> None:
        check_batchnorm("saved", value)
        self._saved = value

    def forward(self, input: Tensor) -> Tensor:
        if not self._has_kernels(input):
            return super().forward(input)
        tracks = self.training and self.track_running_stats and self.running_mean is not None
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # Without a gradient nothing is saved: codes would be made for nobody.
        leaves = (input, self.weight, self.bias)
        learns = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
        saved = self._saved if learns else "exact"
        rectify = self._rectifies and learns and self._may_rectify(input)
        output, mean, _, variance, *_ = batch_norm(
            input, self.weight, self.bias, self.eps, saved, self.num_batches_tracked, rectify
        )
        if tracks:
            self._track(mean, variance)
        if rectify:
            return rectified_output(output, self._alone(saved), *leaves)
        return output

    def _alone(self, saved: str) -> Callable[..., Tensor]:
        """This call's normalisation without the ReLU, as a function of input, weight and bias."""
        eps = self.eps
        # The count goes on with the next step; it matters to random rounding alone.
        seed = self.num_batches_tracked.clone() if saved == "int8" and self.num_batches_tracked is not None else None

        def normalise(*leaves: Tensor | None) -> Tensor:
            output: Tensor = batch_norm(*leaves, eps, saved, seed, False)[0]
            return output

        return normalise

    def _may_rectify(self, input: Tensor) -> bool:
        """Whether this call may compute the ReLU too: not while it is traced, and not for hooks, which look first."""
        # A library's own hooks look at what is saved, not at the output.
        watched = not all(_is_own(hook) for hook in self._forward_hooks.values())
        return has_identity(input) and not (watched or self._backward_hooks or self._backward_pre_hooks)

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


def _is_own(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("swat_ext.")
