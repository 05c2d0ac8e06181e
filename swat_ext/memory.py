"""What a model holds for the backward pass, layer by layer, and the peak of memory, as measured."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from swat_ext.modules import SWATLayer
from swat_ext.modules.around import become_plain, is_around_form
from swat_ext.peak import Peak, device_of
from swat_ext.saved import OUTSIDE, SavedRecorder, Saver, tensors_in
from swat_ext.shapes import copy_model, on_meta
from swat_ext.sparsify import to_dense
from swat_ext.table import human_bytes, render

__all__ = ["LayerMemory", "MemoryProfile", "held_by_kind", "profile_memory"]


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
    dense_bytes: int | None
    dense_note: str
    peak_bytes: int | None
    start_bytes: int | None
    device: str

    def __init__(self, model: nn.Module, *, dense: bool = True) -> None:
        self._model: nn.Module | None = model
        self._dense = dense
        self._calls: list[_ModelCall] = []
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
        self._recorder = SavedRecorder(self._model, on_call=self._note_call, on_progress=self._peak.sample)
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
        rows = _rows(model, recorder)
        held = {row: found.nbytes for row, found in rows.items()}
        dense, self.dense_note = None, "not asked for"
        if self._dense:
            dense, self.dense_note = _dense_rows(model, [calls[number] for number in recorder.held_calls], held)
        self.model, self.device = type(model).__name__, peak.device.type
        self.layers = tuple(
            LayerMemory(row[0], found.kind, found.calls, found.nbytes, None if dense is None else dense.get(row, 0))
            for row, found in _with_dense(model, recorder, rows, dense or {}).items()
            if found.nbytes or (dense or {}).get(row)
        )
        self.held_bytes = sum(held.values())
        self.dense_bytes = None if dense is None else sum(dense.values())
        self.peak_bytes, self.start_bytes = peak.most, peak.first

    def _note_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        self._calls.append(_ModelCall(_shapes_alone(args), _shapes_alone(kwargs), torch.is_grad_enabled(), autocast))

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
        dense: also find what the dense network would hold: :func:`swat_ext.to_dense` of the model with plain ReLUs, run
            on shapes alone, so that it needs no memory. False leaves every ``dense_bytes`` None.

    Returns:
        :class:`MemoryProfile`. Nothing is held without gradients: under ``torch.no_grad()`` its rows are empty.

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


def held_by_kind(
    model: nn.Module, input_size: Sequence[int], dtype: torch.dtype, ignore: Callable[[nn.Module], bool]
) -> dict[str, tuple[int, int]] | None:
    """What modules other than the ignored ones hold in a training step, found on shapes alone.

    Args:
        model: it is not changed.
        input_size, dtype: of the one tensor that it takes.
        ignore: whether to pass a module of the copy that runs over.

    Returns:
        For each kind of row, most bytes first: rows, bytes. None if the model does not run on shapes alone.
    """
    try:
        twin = copy_model(model, on_meta).train()
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), SavedRecorder(twin, ignore=ignore) as recorder:
            result = twin(torch.empty(list(input_size), dtype=dtype, device="meta"))
    except Exception:  # on shapes alone a model may fail in any way
        return None
    del result
    kinds: dict[str, tuple[int, int]] = {}
    for found in _rows(twin, recorder).values():
        count, total = kinds.get(found.kind, (0, 0))
        kinds[found.kind] = (count + 1, total + found.nbytes)
    return dict(sorted(kinds.items(), key=lambda item: -item[1][1]))


# --- Rows

# The name of a module, and the function called in its own forward if it is a container.
_Row = tuple[str, str]


class _Found(NamedTuple):
    kind: str
    calls: int
    nbytes: int


@dataclass(frozen=True)
class _ModelCall:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    autocast: bool


def _rows(model: nn.Module, recorder: SavedRecorder) -> dict[_Row, _Found]:
    """What was found of each row, in the order of the modules' first forwards."""
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    order: dict[nn.Module | None, int] = {module: place for place, module in enumerate(recorder.calls)}
    rows: dict[_Row, _Found] = {}
    for saver, nbytes in sorted(recorder.held.items(), key=lambda item: order.get(item[0].module, len(order))):
        module = saver.module
        if module is None:
            rows[OUTSIDE, saver.function] = _Found(_kind(saver), 0, nbytes)
        else:
            rows[names.get(module, "?"), saver.function] = _Found(_kind(saver), recorder.calls.get(module, 0), nbytes)
    return rows


def _with_dense(
    model: nn.Module, recorder: SavedRecorder, rows: dict[_Row, _Found], dense: dict[_Row, int]
) -> dict[_Row, _Found]:
    """``rows``, and those that only the dense network has, in the order of the modules' first forwards."""
    modules = dict(model.named_modules())
    order = {module: place for place, module in enumerate(recorder.calls)}
    for row in dense:
        if row not in rows and row[0] in modules:
            module = modules[row[0]]
            rows[row] = _Found(_kind(Saver(module, row[1])), recorder.calls.get(module, 0), 0)
    places = {name: order.get(module, len(order)) for name, module in modules.items()}
    return dict(sorted(rows.items(), key=lambda item: places.get(item[0][0], len(order))))


def _kind(saver: Saver) -> str:
    module, function = saver
    if module is None or any(True for _ in module.children()):
        return f"{function} (functional)" if function else "(functional)"
    return type(module).__name__


def _dense_rows(model: nn.Module, calls: list[_ModelCall], held: dict[_Row, int]) -> tuple[dict[_Row, int] | None, str]:
    """What each row would hold if the network were dense, or None, and how that was found."""
    sparse = any(isinstance(module, SWATLayer) for module in model.modules())
    if not sparse and not any(is_around_form(module) for module in model.modules()):
        return dict(held), "the model is dense"
    if any(call.autocast for call in calls):
        return None, "not known under autocast"
    outside = {row: nbytes for row, nbytes in held.items() if row[0] == OUTSIDE}
    try:
        twin = to_dense(model) if sparse else copy.copy(model)
        twin = copy_model(twin, on_meta)
        for module in twin.modules():
            become_plain(module)
        with torch.random.fork_rng(devices=[]), SavedRecorder(twin) as recorder:
            results = []
            for call in calls:
                with torch.set_grad_enabled(call.grad):
                    results.append(twin(*call.args, **call.kwargs))
    except Exception as error:  # on shapes alone a model may fail in any way
        return None, f"not known, as the dense model does not run on shapes alone ({type(error).__name__}: {error})"
    rows = {row: found.nbytes for row, found in _rows(twin, recorder).items()}
    return rows | outside, "the same model with plain torch.nn layers, run on shapes alone"


def _shapes_alone(value: Any) -> Any:
    """``value`` with every tensor replaced by one without values."""
    if isinstance(value, Tensor):
        return on_meta(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _shapes_alone(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_shapes_alone(item) for item in value)
    return value


def _change(before: int, after: int) -> str:
    return f" ({100 * (after - before) / before:+.1f}%)" if before else ""
