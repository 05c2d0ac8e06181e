"""A table of what a model's sparse layers save, and of which layers are not sparse and why."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from swat_ext.inspect.flops import COUNTED, layer_macs, packed_bytes, saved_input_size, training_flops
from swat_ext.inspect.rows import HeldByKind, held_by_kind
from swat_ext.inspect.shapes import Call, trace_calls
from swat_ext.inspect.table import human_bytes, human_count, human_share, render
from swat_ext.modules import SWATLayer
from swat_ext.ops.convolution import retakes
from swat_ext.ops.library import mask_words
from swat_ext.sparsify import LeftDense, Surveyed, survey

__all__ = ["LayerReport", "Report", "report"]


@dataclass(frozen=True)
class LayerReport:
    """One layer that multiplies by weights, over all its calls in one training step.

    Attributes:
        name, kind: its first name, and what it is in a few words.
        sparse: whether it trains sparse; if not, its two sparsities are 0 and ``reason`` says why.
        sparsity, activation_sparsity: fractions of zeros, in [0, 1).
        backend, reason: "sparse" or "dense" kernels, and why those.
        speedup: how many times as fast as PyTorch's dense layer it was when it was measured; None where it was not.
        calls: times that one forward of the model calls it; None where no ``input_size`` was given.
        input_size, output_size: of the first call, batch included; None where there was none.
        dense_flops, swat_flops: FLOPs of forward, input gradient and weight gradient; None where not known.
        dense_bytes: what PyTorch's layer keeps of its inputs for the backward pass; None where not known.
        activation_bytes, weight_bytes: what this layer keeps: packed inputs, and of the weight a bit an element (on
            CUDA, or where the weight is no parameter, its kept elements too), each time that it is called; for a dense
            layer its inputs.
    """

    name: str
    kind: str
    sparse: bool
    sparsity: float
    activation_sparsity: float
    backend: str
    reason: str
    speedup: float | None
    calls: int | None
    input_size: tuple[int, ...] | None
    output_size: tuple[int, ...] | None
    dense_flops: float | None
    swat_flops: float | None
    dense_bytes: int | None
    activation_bytes: int | None
    weight_bytes: int

    @property
    def saved_bytes(self) -> int | None:
        """Bytes that this layer holds between forward and backward."""
        return None if self.activation_bytes is None else self.activation_bytes + self.weight_bytes


@dataclass(frozen=True)
class Report:
    """What :func:`report` found; ``print`` it, or take :meth:`to_dict`.

    Attributes:
        model: name of the model's class.
        input_size: as given, or None.
        layers: one row a layer that multiplies by weights, in the order of registration.
        left_dense: those of them that are not sparse, by choice or because they cannot be.
        dense_flops, swat_flops: training FLOPs of the layers that can be counted, for one batch.
        dense_bytes: bytes that PyTorch's layers would hold for the backward pass; an input that several layers read
            counts once.
        saved_bytes: bytes that the layers hold now; a packed input that several of them share counts once.
        outside: what holds tensors beside these layers in a training step: for each kind of module how many and how
            many bytes; for a function called by containers its calls, the bytes, and the names of those containers. A
            tensor that a layer which is not sparse keeps too is in both. None if the model does not run in training
            mode.
        Without ``input_size`` these five are None.
        parameter_bytes: bytes of all parameters, which stay dense.
        gradient_bytes: bytes of the gradients of those that have one; momentum takes as much again.
    """

    model: str
    input_size: tuple[int, ...] | None
    layers: tuple[LayerReport, ...]
    left_dense: tuple[LeftDense, ...]
    dense_flops: float | None
    swat_flops: float | None
    dense_bytes: int | None
    saved_bytes: int | None
    outside: dict[str, HeldByKind] | None
    parameter_bytes: int
    gradient_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries and lists of plain values, ready for JSON."""
        found = asdict(self)
        found["left_dense"] = [layer._asdict() for layer in self.left_dense]
        for row, layer in zip(found["layers"], self.layers, strict=True):
            row["saved_bytes"] = layer.saved_bytes
        return found

    def __str__(self) -> str:
        swapped = sum(layer.sparse for layer in self.layers)
        title = f"{self.model}: {swapped} of {len(self.layers)} layers with weights train sparse"
        if self.input_size is None:
            notes = [*self._left_dense_lines(), *self._slower_lines(), self._parameters_line(), _NO_SIZE, _SPEED]
            return "\n".join([title, "", self._short_table(), "", *notes])
        title += f"; one training step on input {_shape(self.input_size)}"
        notes = [line for line in (*self._left_dense_lines(), *self._uncounted_lines()) if line]
        notes += [*self._slower_lines(), *self._outside_lines(), self._parameters_line()]
        return "\n".join([title, "", self._long_table(), "", *notes, *_NOTES, _SPEED])

    def _short_table(self) -> str:
        header = ("layer", "kind", "weight", "input", "speed", "kernels")
        rows = [(*_start(layer), _speed(layer), _kernels(layer)) for layer in self.layers]
        return render(header, rows, "<<>>><")

    def _long_table(self) -> str:
        header = ("layer", "kind", "weight", "input", "FLOPs dense", "SWAT", "held dense", "SWAT", "speed", "kernels")
        rows = [
            (
                *_start(layer),
                human_count(layer.dense_flops),
                human_count(layer.swat_flops),
                human_bytes(layer.dense_bytes),
                human_bytes(layer.saved_bytes),
                _speed(layer),
                _kernels(layer),
            )
            for layer in self.layers
        ]
        footer = (
            "total",
            "",
            "",
            "",
            human_count(self.dense_flops),
            human_count(self.swat_flops),
            human_bytes(self.dense_bytes),
            human_bytes(self.saved_bytes),
            "",
            f"{_change(self.dense_flops, self.swat_flops)} FLOPs, {_change(self.dense_bytes, self.saved_bytes)} held",
        )
        return render(header, rows, "<<>>>>>>><", footer)

    def _left_dense_lines(self) -> list[str]:
        if not self.left_dense:
            return ["Not sparse: none."]
        width = max(len(layer.name) for layer in self.left_dense)
        return ["Not sparse:"] + [f"  {layer.name:<{width}}  {layer.reason}" for layer in self.left_dense]

    def _slower_lines(self) -> list[str]:
        slower = [f"{layer.name or '(model)'} ({_speed(layer)})" for layer in self.layers if (layer.speedup or 1) < 1]
        if not slower:
            return []
        advice = "name them in SWATConfig.skip where their memory matters less than their time."
        return [f"Slower than PyTorch's dense layers: {', '.join(slower)}; {advice}"]

    def _uncounted_lines(self) -> list[str]:
        unreached = [layer.name for layer in self.layers if layer.calls == 0]
        unknown = [layer.name for layer in self.layers if layer.calls and layer.dense_flops is None]
        lines = [f"Not called as a layer with such an input: {', '.join(unreached)}."] if unreached else []
        return lines + ([f"Not counted, of a kind unknown here: {', '.join(unknown)}."] if unknown else [])

    def _outside_lines(self) -> list[str]:
        if self.outside is None:
            return ["Held by other modules: not known, as the model does not run in training mode."]
        if not self.outside:
            return ["Held by other modules: nothing."]
        total = sum(held.nbytes for held in self.outside.values())
        width = max(map(len, self.outside))
        return [f"Held by other modules, {human_bytes(total)}:"] + [
            f"  {kind:<{width}}  {human_bytes(held.nbytes)} in {_where(held)}" for kind, held in self.outside.items()
        ]

    def _parameters_line(self) -> str:
        weights, gradients = human_bytes(self.parameter_bytes), human_bytes(self.gradient_bytes)
        return f"Dense as ever: parameters {weights}, their gradients {gradients}, momentum as much again."


# Of the modules that call a function.
_MOST_NAMES = 3
_NO_SIZE = "Give input_size for FLOPs and bytes."
_SPEED = "speed: as measured when the kernels were chosen, against PyTorch's dense layer on an input of like size."
_NOTES = (
    "weight, input: share of zeros in the weight and in the input kept for the weight gradient.",
    "FLOPs: forward + input gradient + weight gradient, 2 a multiplication.",
    "held: kept by these layers from forward to backward, bits of the weights too, by their budget: exact zeros take",
    "less, an ageing threshold up to 1.25 times. An input that several layers read counts once in the totals.",
    "Other modules: what they keep for the backward pass, each tensor once, by the shapes of a training step.",
)


def report(model: nn.Module, input_size: Sequence[int] | None = None, *, dtype: torch.dtype | None = None) -> Report:
    """What each layer of ``model`` saves, what it runs on and why, and which layers are not sparse.

    Args:
        model: a module, sparse or not. It is not changed: a copy runs, on shapes alone where the model can.
        input_size: shape of the one tensor that ``model`` takes, batch included. None leaves out FLOPs and bytes.
        dtype: dtype of that tensor; None means that of the parameters.

    Returns:
        :class:`Report`, to print or to take apart.

    Raises:
        TypeError, ValueError: an argument that does not fit, named.
        RuntimeError: ``model`` did not run on such an input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    size = None if input_size is None else _check_size(input_size)
    calls = None if size is None else trace_calls(model, size, dtype)
    surveyed = list(survey(model))
    rows = [_row(layer, None if calls is None else calls.get(layer.name, [])) for layer in surveyed]
    left = tuple(layer.left_dense(row.reason) for layer, row in zip(surveyed, rows, strict=True) if not row.sparse)
    parameters = list(model.parameters())
    return Report(
        type(model).__name__,
        size,
        tuple(rows),
        left,
        *_totals(surveyed, rows, calls),
        None if size is None else _outside(model, size, dtype),
        sum(parameter.nbytes for parameter in parameters),
        sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
    )


def _outside(model: nn.Module, size: tuple[int, ...], dtype: torch.dtype | None) -> dict[str, HeldByKind] | None:
    layers = tuple({type(layer.module) for layer in survey(model)})
    return held_by_kind(model, size, dtype, lambda module: isinstance(module, layers))


def _check_size(input_size: object) -> tuple[int, ...]:
    if not isinstance(input_size, Sequence) or isinstance(input_size, str):
        raise TypeError(f"input_size: expected a sequence of integers, batch included, got {input_size!r}")
    for item in input_size:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"input_size: expected a sequence of integers, batch included, got {input_size!r}")
        if item < 1:
            raise ValueError(f"input_size: expected integers of at least 1, got {input_size!r}")
    return tuple(input_size)


def _row(layer: Surveyed, calls: list[Call] | None) -> LayerReport:
    module = layer.module
    sparse = module if isinstance(module, SWATLayer) else None
    if sparse is not None:
        sparsity, activation_sparsity = sparse.sparsity, sparse.activation_sparsity
        (backend, reason), speedup = sparse.chosen_backend, None
        numel, itemsize = sparse.weight.numel(), sparse.weight.element_size()
        weight_bytes = 8 * mask_words(numel) if retakes(sparse.weight) else packed_bytes(numel, sparsity, itemsize)
    else:
        sparsity = activation_sparsity = 0.0
        backend, speedup = "dense", None
        reason = layer.obstacle or layer.chosen or "sparsify_ was not called on it"
        weight_bytes = 0

    dense_flops = swat_flops = dense_bytes = activation_bytes = None
    if calls is not None and isinstance(module, COUNTED):
        macs = sum(layer_macs(module, call.input_size, call.output_size) for call in calls)
        dense_flops = training_flops(macs)
        swat_flops = training_flops(macs, sparsity, activation_sparsity)
        saved = [(math.prod(saved_input_size(module, call.input_size)), call.itemsize) for call in calls]
        dense_bytes = sum(numel * itemsize for numel, itemsize in saved) if _saves_input(module) else 0
        activation_bytes = dense_bytes
        if sparse is not None:
            frozen = not sparse.weight.requires_grad
            sizes = [packed_bytes(numel, activation_sparsity, itemsize) for numel, itemsize in saved]
            activation_bytes = 0 if frozen else sum(sizes)
            weight_bytes *= len(calls)
    return LayerReport(
        name=layer.name,
        kind=_kind(module),
        sparse=sparse is not None,
        sparsity=sparsity,
        activation_sparsity=activation_sparsity,
        backend=backend,
        reason=reason,
        speedup=speedup,
        calls=None if calls is None else len(calls),
        input_size=tuple(calls[0].input_size) if calls else None,
        output_size=tuple(calls[0].output_size) if calls else None,
        dense_flops=dense_flops,
        swat_flops=swat_flops,
        dense_bytes=dense_bytes,
        activation_bytes=activation_bytes,
        weight_bytes=weight_bytes,
    )


def _totals(
    surveyed: list[Surveyed], rows: list[LayerReport], calls: dict[str, list[Call]] | None
) -> tuple[float | None, float | None, int | None, int | None]:
    if calls is None:
        return None, None, None, None
    dense: dict[object, int] = {}
    still_dense: dict[object, int] = {}
    for layer, row in zip(surveyed, rows, strict=True):
        if not (isinstance(layer.module, COUNTED) and _saves_input(layer.module)):
            continue
        for call in calls.get(layer.name, []):
            saved = saved_input_size(layer.module, call.input_size)
            # A padded input is a tensor of its own; any other is the one that was passed, which others may hold too.
            key = (call.memory if saved == list(call.input_size) else object(),)
            dense[key] = max(dense.get(key, 0), math.prod(saved) * call.itemsize)
            if not row.sparse:
                still_dense[key] = dense[key]
    return (
        sum(row.dense_flops or 0 for row in rows),
        sum(row.swat_flops or 0 for row in rows),
        sum(dense.values()),
        sum(still_dense.values())
        + sum(row.saved_bytes or 0 for row in rows if row.sparse)
        - _shared_bytes(surveyed, rows, calls),
    )


def _shared_bytes(surveyed: list[Surveyed], rows: list[LayerReport], calls: dict[str, list[Call]]) -> int:
    """Bytes of packed inputs that the rows count again: layers that pack one tensor alike share the copy."""
    given = {call.tensor for call in calls.get("", ())}  # to the model, not made by it: never shared
    seen: set[object] = set()
    again = 0
    for layer, row in zip(surveyed, rows, strict=True):
        module = layer.module
        if not isinstance(module, SWATLayer) or not row.activation_bytes:
            continue
        for call in calls.get(layer.name, []):
            key = (call.tensor, module.packed_form, row.activation_sparsity, module.topk_period)
            if key in seen:
                size = saved_input_size(module, call.input_size)
                again += packed_bytes(math.prod(size), row.activation_sparsity, call.itemsize)
            if call.tensor not in given:
                seen.add(key)
    return again


def _saves_input(module: nn.Module) -> bool:
    """Whether PyTorch's layer keeps its input for backward: a convolution does even if its weight is frozen."""
    return not isinstance(module, nn.Linear) or module.weight.requires_grad


def _kind(module: nn.Module) -> str:
    name = type(module).__name__.removeprefix("SWAT").removeprefix("Parametrized")
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features}->{module.out_features}"
    if not isinstance(module, nn.modules.conv._ConvNd):
        return name
    parts = [f"{name} {'x'.join(map(str, module.kernel_size))} {module.in_channels}->{module.out_channels}"]
    for label, value, usual in (("stride", module.stride, 1), ("dilation", module.dilation, 1)):
        if any(item != usual for item in value):
            parts.append(f"{label} {'x'.join(map(str, value)) if len(set(value)) > 1 else value[0]}")
    if module.groups != 1:
        parts.append("depthwise" if module.groups == module.in_channels else f"{module.groups} groups")
    return ", ".join(parts)


def _where(held: HeldByKind) -> str:
    """How many modules, or how many calls of a function and by which modules."""
    if not held.modules:
        return str(held.number)
    names = [name or "the model" for name in held.modules[:_MOST_NAMES]]
    more = len(held.modules) - len(names)
    return f"{held.number} call{'s' * (held.number != 1)}, by {', '.join(names)}" + (
        f" and {more} more" if more else ""
    )


def _start(layer: LayerReport) -> tuple[str, str, str, str]:
    times = f" (called {layer.calls} times)" if layer.calls is not None and layer.calls > 1 else ""
    weight, activation = (layer.sparsity, layer.activation_sparsity) if layer.sparse else (None, None)
    return layer.name or "(model)", layer.kind + times, human_share(weight), human_share(activation)


def _speed(layer: LayerReport) -> str:
    return "-" if layer.speedup is None else f"{layer.speedup:.2g}x"


def _kernels(layer: LayerReport) -> str:
    return f"{layer.backend}: {layer.reason}" if layer.sparse else "PyTorch's (see below)"


def _change(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return "-"
    return f"{100 * (after - before) / before:+.1f}%"


def _shape(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
