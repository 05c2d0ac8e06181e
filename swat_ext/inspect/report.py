"""A table of what a model's sparse layers save, and of which layers are not sparse and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swat_ext.inspect.flops import (
    COUNTED,
    describe,
    kept_bytes,
    layer_macs,
    saved_input_size,
    training_flops,
    weight_bytes,
)
from swat_ext.inspect.record import Call, Recorder, Saved
from swat_ext.inspect.shapes import arguments, copy_model, map_tensors, on_meta, tensors_in
from swat_ext.inspect.table import human_bytes, human_change, human_count, human_share, human_shares, render
from swat_ext.modules import SWATLayer
from swat_ext.sparsify import LeftDense, Surveyed, survey

__all__ = ["HeldByKind", "LayerReport", "Report", "report"]

# Of the modules that call a function.
_MOST_NAMES = 3
_NOT_RUN = "Give input_size or example_inputs for FLOPs and bytes."
_KEPT = "kept: weights that the budget keeps, and their share of all kept weights."
_SHARES = """\
sparsity: zeros asked for in the weight / in the input kept for the weight gradient; realised: what the last training
forward had; age: optimizer steps since the last selection."""
_RUN = """\
FLOPs: forward + input gradient + weight gradient, 2 a multiplication. Kinds: /2 is a stride of 2.
held: kept by these layers from forward to backward, bits of the weights too, by their budget: exact zeros take less,
an ageing threshold up to 1.25 times. An input that several layers read counts once in the totals.
Other modules: what they keep for the backward pass, each tensor once, by the shapes of a training step."""


class HeldByKind(NamedTuple):
    """What the modules of one kind hold, or the calls of one function.

    Attributes:
        number: modules that hold something; of a function, its calls that do.
        nbytes: bytes that they hold.
        modules: of a function, the modules in whose forward it was called; "" is the model itself.
    """

    number: int
    nbytes: int
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """One layer that multiplies by weights, over all its calls in one training step.

    Attributes:
        name, kind: its first name, and what it is in a few words ("/2" is a stride of 2).
        sparse: whether it trains sparse; if not, its two sparsities are 0 and ``reason`` says why.
        weights, kept_weights: elements of its weight, and how many of them its budget keeps.
        sparsity, activation_sparsity: fractions of zeros, in [0, 1).
        realised_sparsity: those that the last training forward had, of weight and activation; None where not known.
        steps_since_selection: optimizer steps since either was last selected; None where not known.
        backend, reason: "sparse" or "dense" kernels, and why those.
        calls: times that one forward of the model calls it; None where the model did not run.
        input_size, output_size: of the first call, batch included; None where there was none.
        dense_flops, swat_flops: FLOPs of forward, input gradient and weight gradient; None where not known.
        dense_bytes: what PyTorch's layer keeps of its inputs for the backward pass; None where not known.
        activation_bytes, weight_bytes: what this layer keeps by its budget: packed inputs, and of the weight a bit an
            element (on CUDA, or where the weight is no parameter, its kept elements too), each time that it is called;
            for a dense layer its inputs.
    """

    name: str
    kind: str
    sparse: bool
    weights: int
    kept_weights: int
    sparsity: float
    activation_sparsity: float
    realised_sparsity: tuple[float | None, float | None]
    steps_since_selection: tuple[int | None, int | None]
    backend: str
    reason: str
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
        input_size: shape of the first tensor that the model ran on; None if it did not run.
        layers: one row a layer that multiplies by weights, in the order of registration.
        weights, kept_weights: elements of all their weights, and of those the kept ones; shared weights count once.
        left_dense: those of them that are not sparse, by choice or because they cannot be.
        dense_flops, swat_flops: training FLOPs of the layers that can be counted, for one batch.
        dense_bytes: bytes that PyTorch's layers would hold for the backward pass; an input that several layers read
            counts once.
        saved_bytes: bytes that the layers hold now; a packed input that several of them share counts once.
        outside: what holds tensors beside these layers in a training step: for each kind of module how many and how
            many bytes; for a function called by containers its calls, the bytes, and the names of those containers. A
            tensor that a layer which is not sparse keeps too is in both. None if the model does not run in training
            mode.
        If the model did not run these five are None.
        parameter_bytes: bytes of all parameters, which stay dense.
        gradient_bytes: bytes of the gradients of those that have one; momentum takes as much again.
    """

    model: str
    input_size: tuple[int, ...] | None
    layers: tuple[LayerReport, ...]
    weights: int
    kept_weights: int
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
        weights, gradients = human_bytes(self.parameter_bytes), human_bytes(self.gradient_bytes)
        dense = f"Dense as ever: parameters {weights}, their gradients {gradients}, momentum as much again."
        kept = [_KEPT] * self._differs()
        if self.input_size is None:
            return "\n".join([title, "", self._table(), "", *self._kernels(), dense, *kept, _SHARES, _NOT_RUN])
        title += f"; one training step on input {'x'.join(map(str, self.input_size))}"
        flops = human_change(self.dense_flops, self.swat_flops)
        change = f"In all {flops} FLOPs, {human_change(self.dense_bytes, self.saved_bytes)} held."
        unreached = ", ".join(layer.name for layer in self.layers if layer.calls == 0)
        unknown = ", ".join(layer.name for layer in self.layers if layer.calls and layer.dense_flops is None)
        notes = [f"Not called as a layer with such an input: {unreached}."] if unreached else []
        notes += [f"Not counted, of a kind unknown here: {unknown}."] if unknown else []
        notes += [*self._held_outside(), dense, *kept, _SHARES, _RUN]
        return "\n".join([title, "", self._table(), "", change, *self._kernels(), *notes])

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all weights of these layers together, those of dense layers included."""
        return 1 - self.kept_weights / self.weights if self.weights else 0.0

    def _differs(self) -> bool:
        """Whether the budget is shared unevenly: what each layer keeps does not follow from its size then."""
        return len({row.sparsity for row in self.layers if row.sparse}) > 1

    def _kept(self, row: LayerReport) -> str:
        return f"{human_count(row.kept_weights)} ({human_share(row.kept_weights / max(1, self.kept_weights))})"

    def _table(self) -> str:
        rows = self.layers
        shares = [(row.sparsity, row.activation_sparsity) if row.sparse else (None, None) for row in rows]
        # Header, side, cells, and the cell of the total.
        columns: list[tuple[str, str, list[str], str]] = [
            ("layer", "<", [row.name or "(model)" for row in rows], "total"),
            ("kind", "<", [row.kind + (f" ({row.calls} calls)" if (row.calls or 0) > 1 else "") for row in rows], ""),
            ("sparsity", ">", [human_shares(pair) for pair in shares], human_share(self.sparsity)),
        ]
        if self._differs():
            columns.append(("kept", ">", [self._kept(row) for row in rows], human_count(self.kept_weights)))
        if any(row.realised_sparsity != (None, None) for row in rows):
            columns.append(("realised", ">", [human_shares(row.realised_sparsity) for row in rows], ""))
        if any(row.steps_since_selection != (None, None) for row in rows):
            ages = ["/".join("-" if age is None else str(age) for age in row.steps_since_selection) for row in rows]
            columns.append(("age", ">", ages, ""))
        if self.input_size is not None:
            fields = ("dense_flops", "swat_flops", "dense_bytes", "saved_bytes")
            for header, field in zip(("FLOPs", "SWAT", "held", "SWAT"), fields, strict=True):
                form = human_bytes if field.endswith("bytes") else human_count
                columns.append((header, ">", [form(getattr(row, field)) for row in rows], form(getattr(self, field))))
        columns.append(("kernels", "<", [row.backend if row.sparse else "PyTorch" for row in rows], ""))
        headers, sides, cells, totals = zip(*columns, strict=True)
        footer = totals if self.input_size is not None else ()
        return render(headers, list(zip(*cells, strict=True)), "".join(sides), footer)

    def _kernels(self) -> list[str]:
        chosen: dict[tuple[bool, str], list[str]] = {}
        for layer in self.layers:
            why = f"{layer.backend}: {layer.reason}" if layer.sparse else layer.reason
            chosen.setdefault((layer.sparse, why), []).append(layer.name or "(model)")
        lines = []
        for (sparse, why), names in chosen.items():
            lines.append(f"  {why}: {f'{len(names)} layers' if sparse and len(names) > 1 else ', '.join(names)}")
        return ["Kernels, or why a layer is not sparse:", *lines] if lines else []

    def _held_outside(self) -> list[str]:
        if self.outside is None:
            return ["Held by other modules: not known, as the model does not run in training mode."]
        if not self.outside:
            return ["Held by other modules: nothing."]
        total = sum(held.nbytes for held in self.outside.values())
        lines = [f"Held by other modules, {human_bytes(total)}:"]
        for kind, held in self.outside.items():
            calls = f" call{'s' * (held.number != 1)}, by {_names(held.modules)}" if held.modules else ""
            lines.append(f"  {kind}: {human_bytes(held.nbytes)} in {held.number}{calls}")
        return lines


def report(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Report:
    """What each layer of ``model`` saves, what it runs on and why, and which layers are not sparse.

    Args:
        model: a module, sparse or not. It is not changed: a copy runs one forward, on shapes alone where it can, else
            on values.
        input_size: shape of the one tensor that ``model`` takes, batch included.
        example_inputs: instead, a tensor, a tuple of arguments or a dict of keyword arguments, such as tokens and a
            mask; they stay as they are. Neither of the two leaves out FLOPs and bytes.
        dtype: dtype of the tensor of ``input_size``; None means that of the parameters.

    Returns:
        :class:`Report`, to print or to take apart.

    Raises:
        TypeError, ValueError: an argument that does not fit, named.
        RuntimeError: ``model`` did not run on such an input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    surveyed = list(survey(model))
    recorder = size = None
    if example_inputs is not None:
        if input_size is not None or dtype is not None:
            raise ValueError("example_inputs: expected neither input_size nor dtype beside it")
        given = arguments("example_inputs", example_inputs)
        size = next((tuple(tensor.shape) for tensor in tensors_in(given)), None)
        if size is None:
            raise ValueError("example_inputs: expected at least one tensor, got none")
        recorder = _walk(model, surveyed, given, "example_inputs: the model did not run on them")
    elif input_size is not None:
        size = _check_size(input_size)
        floating = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
        tensor = torch.empty(size, dtype=dtype or floating or torch.float32, device="meta")
        what = f"input_size: the model did not run on one {tensor.dtype} tensor of shape {size}"
        recorder = _walk(model, surveyed, ((tensor,), {}), what)
    calls = {} if recorder is None else recorder.layer_calls
    rows = [_row(layer, calls.get(layer.name)) for layer in surveyed]
    # By the weight: several layers may share one.
    once = {id(getattr(layer.module, "weight", layer)): row for layer, row in zip(surveyed, rows, strict=True)}.values()
    left = [layer.left_dense(row.reason) for layer, row in zip(surveyed, rows, strict=True) if not row.sparse]
    totals: dict[str, Any] = dict.fromkeys(("dense_flops", "swat_flops", "dense_bytes", "saved_bytes", "outside"))
    if recorder is not None:
        totals = _totals(surveyed, rows, calls) | {"outside": _outside(recorder) if recorder.model.training else None}
    return Report(
        model=type(model).__name__,
        input_size=size,
        layers=tuple(rows),
        weights=sum(row.weights for row in once),
        kept_weights=sum(row.kept_weights for row in once),
        left_dense=tuple(left),
        **totals,
        parameter_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        gradient_bytes=sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
    )


def _check_size(size: Any) -> tuple[int, ...]:
    if not isinstance(size, Sequence) or any(isinstance(item, bool) or not isinstance(item, int) for item in size):
        raise TypeError(f"input_size: expected a sequence of integers, batch included, got {size!r}")
    if any(item < 1 for item in size):
        raise ValueError(f"input_size: expected integers of at least 1, got {size!r}")
    return tuple(size)


def _walk(
    model: nn.Module, layers: list[Surveyed], given: tuple[tuple[Any, ...], dict[str, Any]], what: str
) -> Recorder:
    """Record one forward of a copy of ``model``.

    On the meta device, or if the model cannot do that on values: zeros and random ones where ``given`` has none. If
    neither works in training mode (a BatchNorm refuses one value a channel) then in evaluation mode.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def with_values(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        values = torch.randn if tensor.is_floating_point() else torch.zeros
        return values(tensor.shape, dtype=tensor.dtype, device=device)

    failure: Exception | None = None
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with generators, torch.inference_mode(False), torch.enable_grad():
        for training in (True, False):
            for change in (on_meta, None):
                try:
                    twin = copy_model(model, change).train(training)
                    args, kwargs = map_tensors(change or with_values, given)
                    with Recorder(twin, [layer.name for layer in layers]) as recorder:
                        result = twin(*args, **kwargs)  # held until the block is left
                    del result
                except Exception as error:  # on shapes alone a model may fail in any way
                    failure = error
                else:
                    return recorder
    raise RuntimeError(f"{what}: {failure}") from failure


def _outside(recorder: Recorder) -> dict[str, HeldByKind]:
    """What others than the surveyed layers hold, by kind, most bytes first."""
    kinds: dict[str, list[Saved]] = {}
    for saved in recorder.held:
        kinds.setdefault(recorder.kind(saved.name, saved.function), []).append(saved)
    found = {}
    for kind, held in kinds.items():
        names = tuple(dict.fromkeys(saved.name for saved in held))
        calls = {saved.function_call for saved in held} if held[0].function else ()
        found[kind] = HeldByKind(len(calls or names), sum(saved.nbytes for saved in held), names if calls else ())
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))


def _row(layer: Surveyed, calls: list[Call] | None) -> LayerReport:
    module = layer.module
    sparse = module if isinstance(module, SWATLayer) else None
    sparsity = activation_sparsity = 0.0
    weights = _elements(module)
    backend, reason = "dense", layer.obstacle or layer.chosen or "sparsify_ was not called on it"
    weight = 0
    if sparse is not None:
        sparsity, activation_sparsity = sparse.sparsity, sparse.activation_sparsity
        backend, reason = sparse.chosen_backend.backend, sparse.chosen_backend.reason
        weight = weight_bytes(sparse) * (1 if calls is None else len(calls))
    dense_flops = swat_flops = dense_bytes = activation_bytes = None
    if calls is not None and isinstance(module, COUNTED):
        macs = sum(layer_macs(module, call.input.shape, call.output_size) for call in calls)
        dense_flops = training_flops(macs)
        swat_flops = training_flops(macs, sparsity, activation_sparsity)
        kept = [kept_bytes(module, call.input) for call in calls]
        dense_bytes, activation_bytes = sum(pair[0] for pair in kept), sum(pair[1] for pair in kept)
    return LayerReport(
        name=layer.name,
        kind=describe(module),
        sparse=sparse is not None,
        weights=weights,
        kept_weights=weights if sparse is None else sparse.kept_weights,
        sparsity=sparsity,
        activation_sparsity=activation_sparsity,
        realised_sparsity=(None, None) if sparse is None else sparse.realised_sparsity,
        steps_since_selection=(None, None) if sparse is None else sparse.steps_since_selection,
        backend=backend,
        reason=reason,
        calls=None if calls is None else len(calls),
        input_size=tuple(calls[0].input.shape) if calls else None,
        output_size=tuple(calls[0].output_size) if calls else None,
        dense_flops=dense_flops,
        swat_flops=swat_flops,
        dense_bytes=dense_bytes,
        activation_bytes=activation_bytes,
        weight_bytes=weight,
    )


def _elements(module: nn.Module) -> int:
    """Of the weight, or of whatever parameters a layer of another kind multiplies by."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.numel()
    sizes = [parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    return sum(sizes)


def _totals(surveyed: list[Surveyed], rows: list[LayerReport], calls: dict[str, list[Call]]) -> dict[str, float]:
    """FLOPs and bytes of all layers, dense and as they are; an input that several of them keep counts once."""
    dense: dict[object, int] = {}
    kept: dict[object, int] = {}
    for layer in surveyed:
        module = layer.module
        for call in calls[layer.name] if isinstance(module, COUNTED) else ():
            tensor = call.input
            # A padded input is a tensor of its own; any other is the one that was passed, which others may hold too.
            padded = saved_input_size(module, tensor.shape) != list(tensor.shape)
            storage = object() if padded else id(tensor.untyped_storage())
            before, now = kept_bytes(module, tensor)
            dense[storage] = max(dense.get(storage, 0), before)
            key: object = storage
            if isinstance(module, SWATLayer):
                # Layers share the packed form of what a graph made.
                form = (id(tensor), call.version, module.packed_form, module.activation_sparsity)
                key = form if tensor.grad_fn is not None else object()
            kept[key] = max(kept.get(key, 0), now)
    return {
        "dense_flops": sum(row.dense_flops or 0 for row in rows),
        "swat_flops": sum(row.swat_flops or 0 for row in rows),
        "dense_bytes": sum(dense.values()),
        "saved_bytes": sum(kept.values()) + sum(row.weight_bytes for row in rows),
    }


def _names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(name or "the model" for name in names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
