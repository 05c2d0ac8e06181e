"""A max pooling that is fast in channels_last, and keeps one byte an output for its backward pass."""

from torch import Tensor, nn

from swat_ext.modules.lean import LeanLayer
from swat_ext.ops.around import has_kernels, max_pool2d
from swat_ext.ops.geometry import int_pair

__all__ = ["SWATMaxPool2d"]

_MOST_TAPS = 256


class SWATMaxPool2d(LeanLayer, nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` in results and gradients, bit for bit.

    Saves one byte an output, the position of the maximum in its window, where PyTorch's saves the input and eight bytes
    an output.

    For ``[N, C, H, W]`` in float32, float64, bfloat16 and float16, and windows of at most 256
    elements. Elsewhere, and with ``return_indices``, it is PyTorch's own.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: as in :class:`torch.nn.MaxPool2d`.

    Raises:
        RuntimeError: second derivatives. And as PyTorch's layer does.
    """

    dense_class = nn.MaxPool2d

    def forward(self, input: Tensor) -> Tensor:
        if self.return_indices or not has_kernels(input) or input.dim() != 4:
            return super().forward(input)
        kernel_size = int_pair("kernel_size", self.kernel_size, 1)
        stride = int_pair("stride", self.stride, 1)
        padding = int_pair("padding", self.padding, 0)
        dilation = int_pair("dilation", self.dilation, 1)
        # What is wrong is left to PyTorch, whose messages users know.
        fits = all(2 * pad <= size for pad, size in zip(padding, kernel_size, strict=True))
        if not fits or kernel_size[0] * kernel_size[1] > _MOST_TAPS or 0 in input.shape[1:]:
            return super().forward(input)
        return max_pool2d(input, kernel_size, stride, padding, dilation, self.ceil_mode)
