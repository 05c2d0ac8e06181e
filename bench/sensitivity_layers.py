"""Convolutions and linear layers that drop elements of one operand: an emulation, for what is learned, not for speed.

The operands are those of the three products of a layer:

    forward            y  = conv(x, W)                      weights_forward, weights_both
    input gradient     dx = conv_input_grad(dy, W)          weights_backward, weights_both, gradients
    weight gradient    dW = conv_weight_grad(dy, x)         activations, gradients

One of them at a time loses its elements, the others are dense. So with "weights_forward" the input gradient is not that
of the forward pass: it has the dropped weights too. "weights_both" is the pair that belongs together, and what SWAT
does. Every weight gets a gradient. The gradient of a bias is always dense: it is no product. Nothing is scaled up for
what was dropped, as the method does not.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from swat_ext import functional

OPERANDS = {
    "weights_forward": "weights, forward",
    "weights_backward": "weights, backward",
    "weights_both": "weights, both passes",
    "activations": "activations, backward",
    "gradients": "output gradients, backward",
}
# Those that change what the network computes, and so what is evaluated.
_FORWARD = ("weights_forward", "weights_both")
CHOICES = {"topk": "top-K", "random": "random"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which operand of every layer loses how much, and how the rest is chosen.

    Attributes:
        operand: one of :data:`OPERANDS`.
        choice: "topk" keeps the largest magnitudes of the tensor, "random" any as many.
        sparsity: fraction that is dropped, in [0, 1).
    """

    operand: str
    choice: str
    sparsity: float

    def mask(self, values: Tensor) -> Tensor:
        """Which of ``values`` to keep: bool, of the same shape. NaN is kept; of zeros at the threshold all are."""
        scores = values.detach() if self.choice == "topk" else torch.empty_like(values).uniform_()
        threshold = functional.kth_magnitude(scores, functional.keep_count(values.numel(), self.sparsity))
        return ~(scores.abs() < threshold)


class _Convolution(torch.autograd.Function):
    """``conv2d`` whose operands are chosen by a rule, anew at each call, but for the weights of the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None, rule: Rule, geometry: Any
    ) -> Tensor:
        used = weight if kept is None else weight * kept
        ctx.save_for_backward(x, used if rule.operand == "weights_both" else weight)
        ctx.rule, ctx.geometry = rule, geometry
        return nn.functional.conv2d(x, used, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rule, (stride, padding, dilation, groups) = ctx.rule, ctx.geometry
        bias_grad = dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        if rule.operand == "weights_backward":
            weight = weight * rule.mask(weight)
        elif rule.operand == "activations":
            x = x * rule.mask(x)
        elif rule.operand == "gradients":
            dy = dy * rule.mask(dy)
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        # What conv2d's own backward calls; it takes x for the weight's gradient alone, and the weight for x's.
        x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return x_grad, weight_grad, bias_grad, None, None, None


class Emulated(nn.Module):
    """``layer``, a ``Conv2d`` (padded by zeros) or a ``Linear`` of ``[N, features]``, with one operand of ``rule``.

    A random choice of forward weights is made once, here: a network that is another one at each step could not be
    evaluated. Every other choice is made at each step.
    """

    kept: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, rule: Rule) -> None:
        super().__init__()
        self.layer, self.rule = layer, rule
        fixed = rule.operand in _FORWARD and rule.choice == "random"
        self.register_buffer("kept", rule.mask(layer.weight) if fixed else None)

    def forward(self, x: Tensor) -> Tensor:
        layer, kept = self.layer, self.kept
        if self.rule.operand in _FORWARD and kept is None:
            kept = self.rule.mask(layer.weight)
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return _Convolution.apply(x, layer.weight, layer.bias, kept, self.rule, geometry)
        # A linear layer is a convolution of one pixel.
        weight, kept = layer.weight[:, :, None, None], None if kept is None else kept[:, :, None, None]
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        return _Convolution.apply(x[:, :, None, None], weight, layer.bias, kept, self.rule, geometry).flatten(1)


def emulate_(model: nn.Module, rule: Rule) -> int:
    """Put :class:`Emulated` around each convolution and linear layer of ``model``, but for the first convolution, which
    stays dense as in the paper's uniform networks; returns how many."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for name, layer in layers[1:]:
        model.set_submodule(name, Emulated(layer, rule))
    return len(layers) - 1
