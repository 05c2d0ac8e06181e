"""What a model holds for the backward pass, layer by layer, and the peak of memory, as measured."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from swat_ext.inspect.peak import Peak, device_of
from swat_ext.inspect.record import OUTSIDE, Recorder
from swat_ext.inspect.shapes import arguments, copy_model, tensors_in
from swat_ext.inspect.table import human_bytes, human_change, render
from swat_ext.modules import SWATLayer
from swat_ext.modules.around import is_around_form
from swat_ext.sparsify import dense_shapes

__all__ = ["LayerMemory", "MemoryProfile", "profile_memory"]

_HOOKS_INSIDE = (
    "without what was saved within other saved_tensors_hooks (such as save_on_cpu or another profile), "
    "which torch asks in place of these"
)
_NOTES = """\
held: whole storages that autograd keeps, once each, under the module that saved them first.
Parameters, buffers and the input are not counted, nor are gradients and the optimizer's state."""


@dataclass(frozen=True)
class LayerMemory:
    """What one module holds for the backward pass at the moment when the whole model holds the most.

    Attributes:
        name: its first name; "" for the model itself, "(outside the model)" for what no module of it saved.
        kind: its class, or the function that saved the tensors where a container's own forward called one, such as
            ``relu (functional)``.
        calls: forwards of the module inside the block, recomputation for the backward pass included.
        held_bytes: distinct storages that it saved before any other module did, whole storages.
        dense_bytes: the same in the dense network; None where not known.
    """

    name: str
    kind: str
    calls: int
    held_bytes: int
    dense_bytes: int | None


class MemoryProfile:
    """What :func:`profile_memory` found; ``print`` it, take :meth:`to_dict` or :meth:`plot` it.

    Attributes (once the block is left without an exception; before that reading them raises RuntimeError):
        model: name of the model's class.
        layers: a row for each module that holds something, or would if it were dense, in the order of their forwards.
        held_bytes: the sum of the rows.
        held_note: "" unless something that is held may be missing, and then why.
        dense_bytes: what the dense network would hold; None where not known, see ``dense_note``.
        dense_note: how ``dense_bytes`` was found, or why it is None.
        peak_bytes: the most memory inside the block: resident memory of this process (sampled), or on CUDA what
            torch's allocator had given out; None where the system does not say.
        start_bytes: the same when the block began.
        device: "cpu" or "cuda".
    """

    model: str
    layers: tuple[LayerMemory, ...]
    held_bytes: int
    held_note: str
    dense_bytes: int | None
    dense_note: str
    peak_bytes: int | None
    start_bytes: int | None
    device: str

    def __init__(self, model: nn.Module, *, dense: bool = True) -> None:
        self._dense, self._entered = dense, False
        self._recorder: Recorder | None = Recorder(model)
        self._peak = Peak(device_of(model))

    def __getattr__(self, name: str) -> Any:
        if name in MemoryProfile.__annotations__:
            raise RuntimeError(f"{name}: the profile has no results: its with block was not run to its end")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # --- The block

    def __enter__(self) -> Self:
        if self._entered or self._recorder is None:
            raise RuntimeError("profile_memory: a profile is of one block; call profile_memory again for another")
        self._entered = True
        self._recorder.__enter__()
        self._peak.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        recorder, self._recorder = self._recorder, None  # a profile that is kept keeps no model
        assert recorder is not None
        self._peak.stop()
        recorder.__exit__()
        if kind is not None:
            return
        if not recorder.forwards:
            raise RuntimeError("profile_memory: no forward of model or of a part of it ran in the with block")
        held = recorder.held_by_row()
        dense, self.dense_note = _dense_rows(recorder) if self._dense else (None, "not asked for")
        places = {name: place for place, name in enumerate(recorder.forwards)}
        layers = []
        for row in sorted(held | (dense or {}), key=lambda row: places.get(row[0], len(places))):
            sizes = held.get(row, 0), None if dense is None else dense.get(row, 0)
            layers.append(LayerMemory(row[0], recorder.kind(*row), recorder.forwards.get(row[0], 0), *sizes))
        self.layers = tuple(layers)
        self.model, self.device = type(recorder.model).__name__, self._peak.device.type
        self.held_bytes = sum(held.values())
        self.held_note = _HOOKS_INSIDE if recorder.hooks_inside else ""
        self.dense_bytes = None if dense is None else sum(dense.values())
        self.peak_bytes, self.start_bytes = self._peak.most, self._peak.first

    # --- What it says

    def by_kind(self) -> dict[str, tuple[int, int, int | None]]:
        """For each kind of layer, most bytes first: rows, bytes held, bytes if dense (None where not known)."""
        kinds: dict[str, tuple[int, int, int | None]] = {}
        for layer in self.layers:
            count, held, dense = kinds.get(layer.kind, (0, 0, 0))
            total = None if dense is None or layer.dense_bytes is None else dense + layer.dense_bytes
            kinds[layer.kind] = (count + 1, held + layer.held_bytes, total)
        return dict(sorted(kinds.items(), key=lambda item: -item[1][1]))

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries and lists of plain values, ready for JSON; sizes in bytes."""
        plain = {name: getattr(self, name) for name in MemoryProfile.__annotations__ if name != "layers"}
        return plain | {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        title = f"{self.model}: {human_bytes(self.held_bytes)} held for the backward pass"
        if self.dense_bytes is not None:
            change = human_change(self.dense_bytes, self.held_bytes)
            title += f", {human_bytes(self.dense_bytes)} if it were dense ({change})"
        rows = []
        for layer in self.layers:
            times = f" (called {layer.calls} times)" if layer.calls > 1 else ""
            sizes = human_bytes(layer.held_bytes), human_bytes(layer.dense_bytes)
            rows.append((layer.name or "(model)", layer.kind + times, *sizes))
        total = ("total", "", human_bytes(self.held_bytes), human_bytes(self.dense_bytes))
        kinds = [(kind, str(row[0]), *map(human_bytes, row[1:])) for kind, row in self.by_kind().items()]
        peak = "The system does not say how much memory was used."
        if self.peak_bytes is not None and self.start_bytes is not None:
            what = "allocated by torch on the GPU" if self.device == "cuda" else "resident, of the whole process"
            more = human_bytes(self.peak_bytes - self.start_bytes)
            peak = f"Peak {human_bytes(self.peak_bytes)} ({what}), {more} more than at the start."
        lines = [title, "", render(("layer", "kind", "held", "dense"), rows, "<<>>", total), ""]
        lines += [render(("kind", "layers", "held", "dense"), kinds, "<>>>"), "", peak, f"dense: {self.dense_note}."]
        lines += [f"held: {self.held_note}."] if self.held_note else []
        return "\n".join([*lines, _NOTES])

    def plot(self, path: str | os.PathLike[str], *, most: int = 40) -> None:
        """Draw the rows, held and dense, into an image; needs matplotlib.

        Args:
            path: file to write; its ending chooses the format.
            most: rows to show at most; the largest are taken.

        Raises:
            ModuleNotFoundError: matplotlib is not installed. ValueError: ``most`` is not positive.
        """
        from swat_ext.data.extras import require

        if most < 1:
            raise ValueError(f"most: expected at least 1, got {most}")
        require("matplotlib", "matplotlib", "plot")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        largest = sorted(self.layers, key=lambda layer: -max(layer.held_bytes, layer.dense_bytes or 0))[:most]
        layers = [layer for layer in self.layers if layer in largest]
        figure = Figure(figsize=(8, 1.5 + 0.24 * len(layers)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        places, mib = range(len(layers)), 2**20
        if self.dense_bytes is not None:
            dense = [(layer.dense_bytes or 0) / mib for layer in layers]
            axes.barh(places, dense, 0.8, color="0.8", label=f"dense, {human_bytes(self.dense_bytes)} in all")
        held = [layer.held_bytes / mib for layer in layers]
        axes.barh(places, held, 0.45, color="C0", label=f"held, {human_bytes(self.held_bytes)} in all")
        axes.set_yticks(places, [f"{layer.name or '(model)'}  {layer.kind}" for layer in layers], fontsize=7)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xlabel("held for the backward pass, MiB")
        axes.set_title(f"{self.model}, the {len(layers)} largest of {len(self.layers)} rows", fontsize=10)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=130)


def profile_memory(
    model: nn.Module, input: Tensor | Sequence[Any] | Mapping[str, Any] | None = None, *, dense: bool = True
) -> MemoryProfile:
    """What each layer of ``model`` holds for the backward pass, what it would hold if dense, and the peak of memory.

    As a context manager it watches what runs in its block::

        with swat_ext.profile_memory(model) as profile:
            loss = model(x).sum()
            loss.backward()
        print(profile)

    Given ``input`` it runs a forward and a backward pass itself, on a copy of the model without its hooks; the model,
    its gradients, its buffers and the random state stay as they were.

    Args:
        model: any module, sparse or not, in the mode (training or evaluation) in which it is to be measured.
        input: the tensor that ``model`` takes, or a tuple or dict of arguments; None to use the context manager.
        dense: also find what the dense network would hold: a copy with plain ``torch.nn`` layers and without values,
            run on shapes alone, so that it needs no memory. False leaves every ``dense_bytes`` None, and so does what
            ``dense_note`` names, such as a part of the model that was called on its own.

    Returns:
        :class:`MemoryProfile`. Nothing is held without gradients: under ``torch.no_grad()`` its rows are empty. What is
        saved within a block of ``torch.autograd.graph.saved_tensors_hooks`` inside, such as ``save_on_cpu`` or another
        profile, goes to its hooks alone and is not counted; ``held_note`` then says so.

    Raises:
        TypeError: an argument of the wrong type, or a compiled model. ValueError: sparse layers on the meta device.
        RuntimeError: no forward ran in the block, a profile was used twice, or one is read too early.
        Whatever the model raises goes through, and its hooks are removed in every case.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, SWATLayer) and module.weight.is_meta for module in model.modules()):
        raise ValueError("model: expected sparse layers with values, got some on the meta device")
    if not isinstance(dense, bool):
        raise TypeError(f"dense: expected True or False, got {dense!r}")
    if input is None:
        return MemoryProfile(model, dense=dense)
    args, kwargs = arguments("input", input)
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        model = copy_model(model)
        with MemoryProfile(model, dense=dense) as profile:
            results = [tensor.sum() for tensor in tensors_in(model(*args, **kwargs)) if tensor.requires_grad]
            if results:
                torch.stack(results).sum().backward()
    return profile


def _dense_rows(recorder: Recorder) -> tuple[dict[tuple[str, str], int] | None, str]:
    """What each row would hold if the network were dense, or None, and how that was found."""
    model, held = recorder.model, recorder.held_by_row()
    if recorder.hooks_inside:
        return None, "not known, as what is held is not"
    if not any(isinstance(module, SWATLayer) or is_around_form(module) for module in model.modules()):
        return held, "the model is dense"
    if any(saved.model_call is None and saved.name != OUTSIDE for saved in recorder.held):
        return None, "not known, as a part of the model was called on its own"
    if not recorder.model_calls:
        return None, "not known, as the model itself was not called"
    numbers = {saved.model_call for saved in recorder.held if saved.model_call is not None}
    calls = [recorder.model_calls[number] for number in sorted(numbers)]
    if any(call.autocast for call in calls):
        return None, "not known under autocast"
    try:
        with torch.random.fork_rng(devices=[]), Recorder(dense_shapes(model)) as twin:
            results = []  # held, as the graphs were
            for call in calls:
                with torch.set_grad_enabled(call.grad):
                    results.append(twin.model(*call.args, **call.kwargs))
    except Exception as error:  # on shapes alone a model may fail in any way
        return None, f"not known, as the dense model does not run on shapes alone ({type(error).__name__}: {error})"
    outside = {row: nbytes for row, nbytes in held.items() if row[0] == OUTSIDE}
    return twin.held_by_row() | outside, "the same model with plain torch.nn layers, run on shapes alone"
