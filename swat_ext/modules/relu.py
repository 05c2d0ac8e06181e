"""A ReLU that keeps one bit an element for its backward pass.

PyTorch's ReLU saves its output. In a dense network that costs nothing, for the convolution that follows saves the same
tensor. A sparse layer saves a packed one, and the ReLU would be all that keeps the dense tensor alive.
"""

import torch
from torch import Tensor, nn

from swat_ext.modules.lean import LeanLayer
from swat_ext.ops.around import has_kernels, relu

__all__ = ["SWATReLU"]


class SWATReLU(LeanLayer, nn.ReLU):
    """:class:`torch.nn.ReLU` in results and gradients, bit for bit; saves ``numel / 8`` bytes and not its output.

    For float32, float64, bfloat16 and float16. Elsewhere, and where no gradient is asked for, it is
    PyTorch's own.

    Args:
        inplace: as in :class:`torch.nn.ReLU`.
    """

    dense_class = nn.ReLU

    def forward(self, input: Tensor) -> Tensor:
        if not (has_kernels(input) and torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        if self.inplace and torch.compiler.is_compiling():
            return super().forward(input)  # the compiler knows who else reads the input, and plans the memory itself
        return relu(input, self.inplace)
