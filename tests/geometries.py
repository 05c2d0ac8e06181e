"""Random convolutions: shapes, layouts and sparsities, drawn so that every edge of the kernels is met often."""

import dataclasses
import math
import random

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "padded", "expanded")

# Multiply-adds of one pass, and elements of one tensor: a thousand geometries take about half a minute.
_MOST_MACS = 3_000_000
_MOST_ELEMENTS = 150_000


@dataclasses.dataclass(frozen=True)
class Geometry:
    """One convolution. ``padding`` is ``(top, bottom, left, right)``."""

    batch: int
    groups: int
    group_channels: int
    group_outputs: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return (self.batch, self.groups * self.group_channels, self.height, self.width)

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return (self.groups * self.group_outputs, self.group_channels, *self.kernel)

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        top, bottom, left, right = self.padding
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        height = (self.height + top + bottom - dh * (kh - 1) - 1) // sh + 1
        width = (self.width + left + right - dw * (kw - 1) - 1) // sw + 1
        return (self.batch, self.groups * self.group_outputs, height, width)

    @property
    def arguments(self) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
        """``stride, padding, dilation, groups`` as the operators take them."""
        return (self.stride, self.padding, self.dilation, self.groups)

    @property
    def has_lone_sums(self) -> bool:
        """Is some result only a few sums? A chance cancellation in them would look like an error of the kernel."""
        sizes = (self.input_size, self.weight_size, self.output_size)
        return any(math.prod(size) <= 8 for size in sizes) or self.weight_size[0] <= 2

    def is_usual(self) -> bool:
        """Is padding at most half of the dilated kernel? PyTorch's own CPU convolution has crashed on wider ones."""
        spans = [dilation * (kernel - 1) for dilation, kernel in zip(self.dilation, self.kernel, strict=True)]
        return all(2 * padding <= spans[side // 2] + 1 for side, padding in enumerate(self.padding))

    def fits(self) -> bool:
        """Is there an output, and is it cheap enough for a test?"""
        batch, outputs, height, width = self.output_size
        macs = batch * outputs * height * width * self.group_channels * self.kernel[0] * self.kernel[1]
        elements = max(math.prod(size) for size in (self.input_size, self.weight_size, self.output_size))
        return height >= 1 and width >= 1 and macs <= _MOST_MACS and elements <= _MOST_ELEMENTS


def _around_vectors(rng: random.Random, most: int) -> int:
    """1..most, half of the time at or beside a multiple of a vector width."""
    if rng.random() < 0.5:
        near = rng.choice([4, 8, 16, 32, 64]) + rng.choice([-1, 0, 0, 1])
        if near <= most:
            return near
    # Squaring favours small numbers, so that some other dimension may be large.
    return 1 + int(rng.random() ** 2 * most)


def random_geometry(rng: random.Random) -> Geometry:
    """A convolution with an output, of at most a few million multiply-adds."""
    while True:
        # Whole batch blocks and vectors of channels, which fast paths are for, fit the budget in small images alone.
        many = rng.random() < 0.3
        kind = rng.choices(["full", "grouped", "depthwise", "multiplier"], [6, 2, 1, 1])[0]
        channels, outputs = _around_vectors(rng, 70), _around_vectors(rng, 70)
        if many:
            channels, outputs = max(channels, rng.randint(1, 40)), max(outputs, rng.randint(1, 70))
        groups = 1
        if kind == "grouped":
            groups = rng.choice([2, 3, 4, 8])
            channels, outputs = -(-channels // groups), -(-outputs // groups)
        elif kind != "full":
            groups, channels, outputs = channels, 1, 1 if kind == "depthwise" else rng.choice([2, 3])
        kernel = rng.choice([(1, 1), (3, 3), (3, 3), (rng.randint(1, 7), rng.randint(1, 7)), (1, rng.randint(1, 7))])
        plain = rng.random() < 0.3
        longest_stride = 24 if rng.random() < 0.05 else 3
        stride = (1, 1) if plain else (rng.randint(1, longest_stride), rng.randint(1, longest_stride))
        dilation = (1, 1) if plain or rng.random() < 0.5 else (rng.randint(1, 3), rng.randint(1, 3))
        # 'same', symmetric, any four numbers, some of them wider than the kernel: whole windows then see padding alone.
        style = rng.choice(["none", "same", "symmetric", "any"])
        spans = [dilation[axis] * (kernel[axis] - 1) for axis in range(2)]
        if style == "same":
            padding = (spans[0] // 2, spans[0] - spans[0] // 2, spans[1] // 2, spans[1] - spans[1] // 2)
        elif style == "symmetric":
            rows, columns = rng.randint(0, spans[0] + 1), rng.randint(0, spans[1] + 1)
            padding = (rows, rows, columns, columns)
        else:
            most = 0 if style == "none" else 4
            padding = (rng.randint(0, most), rng.randint(0, most), rng.randint(0, most), rng.randint(0, most))
        batches = [15, 16, 17, 31, 32, 33, 35] if many else [0, 1, 2, 3, 7, 8, 9, 16, rng.randint(0, 35)]
        longest = 9 if many else 40
        square = rng.randint(1, longest)
        geometry = Geometry(
            batch=rng.choice(batches),
            groups=groups,
            group_channels=channels,
            group_outputs=outputs,
            height=square,
            width=square if rng.random() < 0.4 else rng.randint(1, longest),
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
        if geometry.fits():
            return geometry


def in_layout(tensor: Tensor, layout: str, rng: random.Random) -> Tensor:
    """``tensor`` with other strides; the values stay, but for "expanded", which repeats one slice with stride 0."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()
    if layout == "permuted":
        order = list(range(tensor.dim()))
        rng.shuffle(order)
        back = [order.index(axis) for axis in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)
    if layout == "sliced":
        steps = [rng.randint(1, 2) for _ in tensor.shape]
        starts = [rng.randint(0, 2) for _ in tensor.shape]
        sizes = [start + size * step for start, size, step in zip(starts, tensor.shape, steps, strict=True)]
        slices = [
            slice(start, start + size * step, step)
            for start, size, step in zip(starts, tensor.shape, steps, strict=True)
        ]
        # NaN around it: reading a wrong element cannot go unseen.
        view = torch.full(sizes, torch.nan, dtype=tensor.dtype, device=tensor.device)[tuple(slices)]
        return view.copy_(tensor)
    if layout == "padded" and tensor.dim() > 0:
        shape = [*tensor.shape[:-1], tensor.shape[-1] + rng.randint(1, 9)]
        view = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)[..., : tensor.shape[-1]]
        return view.copy_(tensor)
    if layout == "expanded":
        axes = [axis for axis, size in enumerate(tensor.shape) if size > 1]
        if not axes:
            return tensor.contiguous()
        axis = rng.choice(axes)
        return tensor.narrow(axis, 0, 1).expand_as(tensor)
    if layout == "padded":
        return tensor.contiguous()
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def random_tensor(size: tuple[int, ...], dtype: torch.dtype, rng: random.Random, *, positive: bool = False) -> Tensor:
    """Gaussian, ReLU-like or with many ties; ``positive`` takes absolute values, so that no sum cancels."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    tensor = torch.randn(size, generator=generator, dtype=torch.float64)
    kind = rng.choice(["gaussian", "gaussian", "relu", "ties"])
    if kind == "relu":
        tensor = tensor.clamp(min=0)
    elif kind == "ties":
        tensor = (tensor * 4).round() / 4
    return (tensor.abs() if positive else tensor).to(dtype)


def random_threshold(tensor: Tensor, rng: random.Random) -> float:
    """0, a threshold at a random sparsity (an element of the tensor: ties matter), or one above everything."""
    style = rng.choices(["dense", "middle", "above"], [2, 7, 1])[0]
    if style == "dense" or tensor.numel() == 0:
        return 0.0
    if style == "above":
        return 2 * tensor.abs().max().item() + 1
    sparsity = rng.choice([0.2, 0.5, 0.8, 0.9, 0.95, 0.99])
    magnitudes = tensor.abs().flatten().sort(descending=True).values
    return magnitudes[int((1 - sparsity) * (tensor.numel() - 1))].item()
