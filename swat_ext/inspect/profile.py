"""What a model holds for the backward pass, layer by layer, and the peak of memory, as measured."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from swat_ext.inspect.peak import Peak, device_of
from swat_ext.inspect.rows import ModelCall, dense_rows, held_rows, with_dense
from swat_ext.inspect.saved import SavedRecorder, tensors_in
from swat_ext.inspect.shapes import copy_model
from swat_ext.inspect.table import human_bytes, render

__all__ = ["LayerMemory", "MemoryProfile", "profile_memory"]


@dataclass(frozen=True)
class LayerMemory:
    """What one module holds for the backward pass at the moment when the whole model holds the most.

    Attributes:
        name: its first name; "" for the model itself, "(outside the model)" for what no module of it saved.
        kind: its class, or the function that saved the tensors where a container's own forward called one, such as
            ``relu (functional)``.
        calls: forwards of the module inside the block.
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
        self._model: nn.Module | None = model
        self._dense = dense
        self._calls: list[ModelCall] = []
        self._peak: Peak | None = None
        self._recorder: SavedRecorder | None = None
        self._state = "was not entered: use it in a with statement"

    def __getattr__(self, name: str) -> Any:
        if name in MemoryProfile.__annotations__:
            raise RuntimeError(f"{name}: the profile {self.__dict__.get('_state', 'is not complete')}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # --- The block

    def __enter__(self) -> Self:
        if self._model is None or self._recorder is not None:
            raise RuntimeError("profile_memory: a profile is of one block; call profile_memory again for another")
        self._state = "is not complete before its with block is left"
        self._peak = Peak(device_of(self._model))
        self._recorder = SavedRecorder(
            self._model,
            meta=any(parameter.is_meta for parameter in self._model.parameters()),
            on_call=lambda args, kwargs: self._calls.append(ModelCall.of(args, kwargs)),
            on_progress=self._peak.sample,
        )
        self._peak.start()
        try:
            self._recorder.__enter__()
        except BaseException:
            self._peak.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        model, recorder, peak, calls = self._model, self._recorder, self._peak, self._calls
        assert model is not None
        assert recorder is not None
        assert peak is not None
        recorder.__exit__(kind, error, trace)
        peak.stop()
        self._model, self._recorder, self._calls = None, None, []  # a profile that is kept keeps no model
        if kind is not None:
            self._state = f"has no results: its with block raised {kind.__name__}"
            return
        if not recorder.calls:
            self._state = "has no results: no forward ran in its with block"
            raise RuntimeError("profile_memory: no forward of model or of a part of it ran in the with block")
        rows = held_rows(model, recorder)
        dense, self.dense_note = dense_rows(model, recorder, calls, rows) if self._dense else (None, "not asked for")
        self.model, self.device = type(model).__name__, peak.device.type
        self.layers = tuple(
            LayerMemory(row[0], found.kind, found.calls, found.nbytes, None if dense is None else dense.get(row, 0))
            for row, found in with_dense(model, recorder, rows, dense or {}).items()
            if found.nbytes or (dense or {}).get(row)
        )
        self.held_bytes = sum(found.nbytes for found in rows.values())
        self.held_note = _HOOKS_INSIDE if recorder.hooks_inside else ""
        self.dense_bytes = None if dense is None else sum(dense.values())
        self.peak_bytes, self.start_bytes = peak.most, peak.first

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
            title += f", {human_bytes(self.dense_bytes)} if it were dense{_change(self.dense_bytes, self.held_bytes)}"
        total = (human_bytes(self.held_bytes), human_bytes(self.dense_bytes))
        rows = [
            (
                layer.name or "(model)",
                layer.kind + (f" (called {layer.calls} times)" if layer.calls > 1 else ""),
                human_bytes(layer.held_bytes),
                human_bytes(layer.dense_bytes),
            )
            for layer in self.layers
        ]
        kinds = [
            (kind, str(count), human_bytes(held), human_bytes(dense))
            for kind, (count, held, dense) in self.by_kind().items()
        ]
        peak = "The system does not say how much memory was used."
        if self.peak_bytes is not None and self.start_bytes is not None:
            what = "allocated by torch on the GPU" if self.device == "cuda" else "resident, of the whole process"
            more = human_bytes(self.peak_bytes - self.start_bytes)
            peak = f"Peak {human_bytes(self.peak_bytes)} ({what}), {more} more than at the start."
        return "\n".join(
            [
                title,
                "",
                render(("layer", "kind", "held", "dense"), rows, "<<>>", ("total", "", *total)),
                "",
                render(("kind", "layers", "held", "dense"), kinds, "<>>>"),
                "",
                peak,
                f"dense: {self.dense_note}.",
                *([f"held: {self.held_note}."] if self.held_note else []),
                "held: whole storages that autograd keeps, once each, under the module that saved them first.",
                "Parameters, buffers and the input are not counted, nor are gradients and the optimizer's state.",
            ]
        )

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
        places = range(len(layers))
        mib = 2**20
        if self.dense_bytes is not None:
            dense = [(layer.dense_bytes or 0) / mib for layer in layers]
            axes.barh(places, dense, 0.8, color="0.8", label=f"dense, {human_bytes(self.dense_bytes)} in all")
        held = [layer.held_bytes / mib for layer in layers]
        axes.barh(places, held, 0.45, color="C0", label=f"held, {human_bytes(self.held_bytes)} in all")
        axes.set_yticks(places, [f"{layer.name or '(model)'}  {layer.kind}" for layer in layers], fontsize=7)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xlabel("held for the backward pass, MiB")
        some = "" if len(layers) == len(self.layers) else f", the {len(layers)} largest of {len(self.layers)} rows"
        axes.set_title(f"{self.model}{some}", fontsize=10)
        if layers:
            axes.legend(fontsize=8)
        figure.savefig(path, dpi=130)


def profile_memory(
    model: nn.Module, input: Tensor | Sequence[Any] | None = None, *, dense: bool = True
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
        input: the tensor that ``model`` takes, or the sequence of its arguments; None to use the context manager.
        dense: also find what the dense network would hold: a copy with plain ``torch.nn`` layers and without values,
            run on shapes alone, so that it needs no memory. False leaves every ``dense_bytes`` None. So does a part of
            the model that is called on its own in the block: the dense network is run by calls of the whole.

    Returns:
        :class:`MemoryProfile`. Nothing is held without gradients: under ``torch.no_grad()`` its rows are empty. What is
        saved within a block of ``torch.autograd.graph.saved_tensors_hooks`` inside, such as ``save_on_cpu``, goes to
        its hooks alone and is not counted; ``held_note`` then says so.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: no forward ran in the block, a profile was used twice, or one is read too early.
        Whatever the model raises goes through, and its hooks are removed in every case.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # A compiled model runs no hooks of its layers, and tracing ours would fail.
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise TypeError(
            "model: expected one that is not compiled, whose layers can be seen; give it before torch.compile"
        )
    if not isinstance(dense, bool):
        raise TypeError(f"dense: expected True or False, got {dense!r}")
    if input is None:
        return MemoryProfile(model, dense=dense)
    if not isinstance(input, (Tensor, tuple, list)):
        raise TypeError(f"input: expected a Tensor, or a tuple or list of arguments, got {type(input).__name__}")
    args = (input,) if isinstance(input, Tensor) else tuple(input)
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        model = copy_model(model)
        with MemoryProfile(model, dense=dense) as profile:
            results = [tensor.sum() for tensor in tensors_in(model(*args)) if tensor.requires_grad]
            if results:
                torch.stack(results).sum().backward()
    return profile


_HOOKS_INSIDE = (
    "without what was saved within other saved_tensors_hooks (such as save_on_cpu), which torch asks in place of these"
)


def _change(before: int, after: int) -> str:
    return f" ({100 * (after - before) / before:+.1f}%)" if before else ""
