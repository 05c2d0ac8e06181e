"""Choosing kernels by measurement, where the rule of ``backend="auto"`` is not good enough."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swat_ext.inspect.shapes import copy_model
from swat_ext.inspect.table import render
from swat_ext.modules.base import SWATLayer

__all__ = ["LayerTimes", "Tuning", "step_milliseconds", "tune_"]


@dataclass(frozen=True)
class LayerTimes:
    """Least milliseconds of a training step of one layer, over all its calls in one forward of the model.

    Attributes:
        name: of the layer.
        sparse, dense: with either backend, all included: selection, packing, forward, gradients.
        pytorch: of PyTorch's own layer.
        backend: the faster, which the layer keeps.
    """

    name: str
    sparse: float
    dense: float
    pytorch: float

    @property
    def backend(self) -> str:
        return "sparse" if self.sparse <= self.dense else "dense"

    @property
    def speedup(self) -> float:
        """How many times as fast as PyTorch's own layer; below 1 for slower."""
        return self.pytorch / min(self.sparse, self.dense)


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune_` found; ``print`` it."""

    layers: tuple[LayerTimes, ...]

    def __str__(self) -> str:
        rows = [
            (x.name, f"{x.sparse:.2f}", f"{x.dense:.2f}", f"{x.pytorch:.2f}", x.backend, f"{x.speedup:.2g}x")
            for x in self.layers
        ]
        table = render(("layer", "sparse, ms", "dense, ms", "PyTorch, ms", "kept", "speed"), rows, "<>>><>")
        slower = [x.name for x in self.layers if x.speedup < 1]
        if not slower:
            return table
        return f"{table}\n\nSlower than PyTorch's: {', '.join(slower)}; SWATConfig(skip=...) leaves layers dense."


def tune_(model: nn.Module, *inputs: Any, rounds: int = 7) -> Tuning:
    """Time both backends of every sparse layer at the inputs that it meets, and let it keep the faster, in place.

    Measured on a copy: weights, buffers, gradients and selections of ``model`` stay as they are. The choice may differ
    from run to run where the two are close; the layers' ``backend`` is then "sparse" or "dense", which the state_dict
    of a :class:`swat_ext.SWATScheduler` holds.

    Args:
        model: a module with sparse layers.
        inputs: what its forward takes, of the size and layout that it will train on.
        rounds: times that each is timed, in turn; the least counts.

    Returns:
        :class:`Tuning`: times of each layer that was called.

    Raises:
        TypeError, ValueError: ``model`` is no module or has no sparse layer, or ``rounds`` is below 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SWATLayer)}
    if not layers:
        raise ValueError("model: expected at least one SWATConv2d or SWATLinear, found none; call sparsify_ first")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    met = _inputs_of(model, list(layers), inputs)
    found = []
    for name, tensors in met.items():
        times = [step_milliseconds(layers[name], tensor, rounds) for tensor in tensors]
        found.append(LayerTimes(name, *(sum(each[kind] for each in times) for kind in _KINDS)))
        layers[name].backend = found[-1].backend  # type: ignore[assignment]
    return Tuning(tuple(found))


_KINDS = ("sparse", "dense", "pytorch")


def step_milliseconds(layer: SWATLayer, input: Tensor, rounds: int) -> dict[str, float]:
    """Least time of a training step of "sparse", "dense" and "pytorch", in turn.

    Args:
        layer: not changed.
        input: what to run it on; not changed.
    """
    copies: dict[str, Any] = {}
    for kind in _KINDS[:2]:
        copies[kind] = copy_model(layer).train()
        copies[kind].backend = kind
    copies["pytorch"] = copy_model(layer).to_dense().train()  # type: ignore[operator]
    least = dict.fromkeys(_KINDS, float("inf"))
    grad: Tensor | None = None
    with torch.enable_grad():
        for number in range(rounds + 1):
            for kind, module in copies.items():
                _wait(input)
                start = time.perf_counter()
                output = module(input.detach().requires_grad_())
                grad = torch.randn_like(output, requires_grad=False) if grad is None else grad
                output.backward(grad)
                _wait(input)
                if number:  # the first calls allocate and select
                    least[kind] = min(least[kind], (time.perf_counter() - start) * 1e3)
    return least


def _wait(like: Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)


def _inputs_of(model: nn.Module, names: list[str], inputs: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """What the layers called ``names`` are given in one forward of a copy of ``model``, in the order of first calls."""
    met: dict[str, list[Tensor]] = {}
    twin = copy_model(model).train()

    def watch(name: str) -> None:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            met.setdefault(name, []).append(args[0].detach())

        twin.get_submodule(name).register_forward_pre_hook(note)

    for name in names:
        watch(name)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin(*inputs)
    return met
