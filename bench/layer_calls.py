"""The layers that layers.py times, and every pass of one: dense in PyTorch, sparse here, and SparseProp's."""

import dataclasses
from collections.abc import Callable

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from swat_ext import functional

Calls = dict[str, Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A square convolution with ``padding = kernel // 2``, or a linear layer.

    Attributes:
        channels, outputs, size, kernel, stride, groups: as in ``torch.nn.Conv2d``, ``size`` pixels along each side.
        count: how many of them a network has, for sums.
        batch: images; None leaves it to ``--batch``.
        linear: ``torch.nn.Linear`` from ``channels`` to ``outputs``; size, kernel and stride are 1.
    """

    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int
    count: int = 1
    groups: int = 1
    batch: int | None = None
    linear: bool = False

    @property
    def name(self) -> str:
        if self.linear:
            return f"Linear {self.channels}->{self.outputs}"
        stride = f" /{self.stride}" if self.stride > 1 else ""
        groups = ""
        if self.groups > 1:
            groups = " depthwise" if self.groups == self.channels else f" {self.groups} groups"
        return f"{self.kernel}x{self.kernel} {self.channels}->{self.outputs} @{self.size}{stride}{groups}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def outputs_side(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def macs(self, batch: int) -> int:
        """Multiply-adds of one dense pass."""
        taps = self.channels // self.groups * self.kernel * self.kernel
        return batch * self.outputs * self.outputs_side**2 * taps


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What one layer works on, in one memory layout; of a linear layer matrices, which have but one."""

    input: Tensor
    weight: Tensor
    grad_output: Tensor

    def contiguous(self, memory_format: torch.memory_format) -> "Tensors":
        if self.input.dim() != 4:
            return self
        fields = (
            tensor.contiguous(memory_format=memory_format) for tensor in (self.input, self.weight, self.grad_output)
        )
        return Tensors(*fields)


def tensors_of(layer: Layer, batch: int, inputs: str) -> Tensors:
    """Input ``[N, C, H, W]``, weight ``[O, C / groups, K, K]`` and gradient of the output; ``[N, C]`` if linear."""
    generator = torch.Generator().manual_seed(0)
    channels, image, output = layer.channels // layer.groups, [layer.size] * 2, [layer.outputs_side] * 2
    kernel = [layer.kernel] * 2
    if layer.linear:
        image = output = kernel = []
    weight = torch.randn(layer.outputs, channels, *kernel, generator=generator)
    return Tensors(
        common.activations((batch, layer.channels, *image), inputs, generator),
        weight / (channels * layer.kernel**2) ** 0.5,
        torch.randn(batch, layer.outputs, *output, generator=generator),
    )


def _step(function: Callable[[Tensor, Tensor], Tensor], tensors: Tensors) -> Callable[[], object]:
    """Forward and backward through autograd."""
    input, weight = tensors.input.detach().requires_grad_(), tensors.weight.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(input, weight), (input, weight), tensors.grad_output)


def dense_calls(layer: Layer, tensors: Tensors, layout: str) -> Calls:
    """PyTorch's passes and step; ``layout`` is what ``tensors`` are in, by name."""
    prefix, input, weight, grad_output = f"dense {layout}", tensors.input, tensors.weight, tensors.grad_output
    if layer.linear:
        return {
            f"{prefix} forward": lambda: F.linear(input, weight),
            f"{prefix} input grad": lambda: grad_output @ weight,
            f"{prefix} weight grad": lambda: grad_output.t() @ input,
            f"{prefix} step": _step(F.linear, tensors),
        }

    def convolution(input: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(input, weight, None, layer.stride, layer.padding, 1, layer.groups)

    def gradient(wanted: list[bool]) -> object:
        strides, paddings = [layer.stride] * 2, [layer.padding] * 2
        geometry = (strides, paddings, [1, 1], False, [0, 0], layer.groups)
        return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, wanted)

    return {
        f"{prefix} forward": lambda: convolution(input, weight),
        f"{prefix} input grad": lambda: gradient([True, False, False]),
        f"{prefix} weight grad": lambda: gradient([False, True, False]),
        f"{prefix} step": _step(convolution, tensors),
    }


def swat_calls(layer: Layer, tensors: Tensors, sparsity: float) -> Calls:
    """``tensors`` is in the layout that the model would be in."""
    input, weight, grad_output = tensors.input, tensors.weight, tensors.grad_output
    view = functional.linear_input_view(input) if layer.linear else input
    thresholds = {name: common.select(t, sparsity) for name, t in (("weight", weight), ("activation", view))}
    packed_weight = functional.compress(weight, thresholds["weight"])
    packed_input = functional.compress(view, thresholds["activation"])
    ops = torch.ops.swat_ext
    chosen = {"weight_threshold": thresholds["weight"], "activation_threshold": thresholds["activation"]}
    kept_weight = (*packed_weight[:2], weight.shape)
    if layer.linear:
        passes: Calls = {
            "forward": lambda: ops.linear(input, *kept_weight, None),
            "input grad": lambda: ops.linear_input_grad(grad_output, *kept_weight),
            "weight grad": lambda: ops.linear_weight_grad(grad_output, *packed_input[:2], weight.shape),
        }
    else:
        geometry = ([layer.stride] * 2, [layer.padding] * 4, [1, 1], layer.groups, not input.is_contiguous())
        kept_input = (*packed_input[:2], input.shape)
        passes = {
            "forward": lambda: ops.conv2d(input, *kept_weight, None, *geometry),
            "input grad": lambda: ops.conv2d_input_grad(grad_output, *kept_weight, input.shape, *geometry),
            "weight grad": lambda: ops.conv2d_weight_grad(grad_output, *kept_input, weight.shape, *geometry),
        }

    def function(input: Tensor, weight: Tensor) -> Tensor:
        if layer.linear:
            return functional.linear(input, weight, None, **chosen)
        return functional.conv2d(input, weight, None, layer.stride, layer.padding, 1, layer.groups, **chosen)

    def compress() -> None:
        functional.compress(weight, thresholds["weight"])
        functional.compress(view, thresholds["activation"])

    def selection() -> None:
        common.select(weight, sparsity)
        common.select(view, sparsity)

    passes |= {"compress": compress, "select": selection, "step": _step(function, tensors)}
    return {f"{sparsity:.2f} {name}": call for name, call in passes.items()}


def sparseprop_calls(layer: Layer, tensors: Tensors, sparsity: float) -> Calls:
    """SparseProp's layer, if it is installed: ``pip install --no-build-isolation sparseprop``. Nothing otherwise.

    Nor for a layer with groups, which it ignores, or a linear one.
    """
    if layer.groups > 1 or layer.linear:
        return {}
    try:
        from sparseprop.modules import SparseConv2d
    except ImportError:
        return {}
    kept = functional.decompress(functional.compress(tensors.weight, common.select(tensors.weight, sparsity)))
    conv = torch.nn.Conv2d(layer.channels, layer.outputs, layer.kernel, layer.stride, layer.padding, bias=False)
    conv.weight.data.copy_(kept)
    # Which of its two kernels is faster differs by layer; its users time both.
    modules = {over: SparseConv2d.from_dense(conv, vectorizing_over_on=over) for over in (False, True)}
    input = tensors.input.contiguous().requires_grad_()
    grad_output = tensors.grad_output.contiguous()

    def step(module: torch.nn.Module) -> object:
        output = module(input)
        return torch.autograd.grad(output, [input, *module.parameters()], grad_output, allow_unused=True)

    return {
        f"{sparsity:.2f} sparseprop {'outputs' if over else 'inputs'}": lambda module=module: step(module)
        for over, module in modules.items()
    }
