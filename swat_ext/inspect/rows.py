"""What a recorder of saved tensors found, as rows: of the model, of its dense form, and of kinds of modules."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swat_ext.inspect.saved import OUTSIDE, SavedRecorder, Saver
from swat_ext.inspect.shapes import on_meta, run_a_copy
from swat_ext.modules import SWATLayer
from swat_ext.modules.around import is_around_form
from swat_ext.sparsify import dense_shapes

__all__ = ["Found", "HeldByKind", "ModelCall", "Row", "dense_rows", "held_by_kind", "held_rows", "with_dense"]

#: The name of a module, and the function called in its own forward if it is a container.
Row = tuple[str, str]


class Found(NamedTuple):
    """One row: its kind in words, forwards of the module, calls of the function that held something, bytes held."""

    kind: str
    calls: int
    function_calls: int
    nbytes: int


class ModelCall(NamedTuple):
    """A call of the model: its arguments without values, and whether gradients and autocast were on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    autocast: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "ModelCall":
        """A call that begins now."""
        autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        return cls(_shapes_alone(args), _shapes_alone(kwargs), torch.is_grad_enabled(), autocast)


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


def held_rows(model: nn.Module, recorder: SavedRecorder) -> dict[Row, Found]:
    """What was found of each row, in the order of the modules' first forwards."""
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    order: dict[nn.Module | None, int] = {module: place for place, module in enumerate(recorder.calls)}
    rows: dict[Row, Found] = {}
    for saver, nbytes in sorted(recorder.held.items(), key=lambda item: order.get(item[0].module, len(order))):
        module = saver.module
        name = OUTSIDE if module is None else names.get(module, "?")
        calls = 0 if module is None else recorder.calls.get(module, 0)
        rows[name, saver.function] = Found(_kind(saver), calls, recorder.held_functions.get(saver, 0), nbytes)
    return rows


def with_dense(
    model: nn.Module, recorder: SavedRecorder, rows: dict[Row, Found], dense: dict[Row, int]
) -> dict[Row, Found]:
    """``rows``, and those that only the dense network has, in the order of the modules' first forwards."""
    modules = dict(model.named_modules())
    order = {module: place for place, module in enumerate(recorder.calls)}
    rows = dict(rows)
    for row in dense:
        if row not in rows and row[0] in modules:
            module = modules[row[0]]
            rows[row] = Found(_kind(Saver(module, row[1])), recorder.calls.get(module, 0), 0, 0)
    places = {name: order.get(module, len(order)) for name, module in modules.items()}
    return dict(sorted(rows.items(), key=lambda item: places.get(item[0][0], len(order))))


def dense_rows(
    model: nn.Module, recorder: SavedRecorder, calls: Sequence[ModelCall], rows: dict[Row, Found]
) -> tuple[dict[Row, int] | None, str]:
    """What each row would hold if the network were dense, or None, and how that was found.

    Args:
        model: what was recorded; it is not changed.
        recorder: its record, closed.
        calls: those of ``model`` itself, in their order.
        rows: the :func:`held_rows` of it.
    """
    if not any(isinstance(module, SWATLayer) or is_around_form(module) for module in model.modules()):
        return {row: found.nbytes for row, found in rows.items()}, "the model is dense"
    if recorder.held_parts:
        return None, "not known, as a part of the model was called on its own"
    if not calls:
        return None, "not known, as the model itself was not called"
    held_calls = [calls[number] for number in sorted(recorder.held_calls)]
    if any(call.autocast for call in held_calls):
        return None, "not known under autocast"
    try:
        twin = dense_shapes(model)
        with torch.random.fork_rng(devices=[]), SavedRecorder(twin, meta=True) as found:
            results = []  # held, as the graphs were
            for call in held_calls:
                with torch.set_grad_enabled(call.grad):
                    results.append(twin(*call.args, **call.kwargs))
    except Exception as error:  # on shapes alone a model may fail in any way
        return None, f"not known, as the dense model does not run on shapes alone ({type(error).__name__}: {error})"
    dense = {row: row_found.nbytes for row, row_found in held_rows(twin, found).items()}
    dense |= {row: row_found.nbytes for row, row_found in rows.items() if row[0] == OUTSIDE}
    return dense, "the same model with plain torch.nn layers, run on shapes alone"


def held_by_kind(
    model: nn.Module, input_size: Sequence[int], dtype: torch.dtype | None, ignore: Callable[[nn.Module], bool]
) -> dict[str, HeldByKind] | None:
    """What modules other than the ignored ones hold in a training step, found on shapes alone where that works.

    Args:
        model: it is not changed; a copy runs.
        input_size, dtype: of the one tensor that it takes; dtype None means that of the parameters.
        ignore: whether to pass a module of the copy over.

    Returns:
        For each kind of row, most bytes first, what it holds. None if the model does not run in training mode.
    """

    def run(twin: nn.Module, input: Tensor) -> dict[Row, Found]:
        for module in twin.modules():
            if isinstance(module, SWATLayer):
                module.backend = "sparse"  # what the layer itself holds is passed over: nothing to time kernels for
        with torch.enable_grad(), SavedRecorder(twin.train(), meta=input.is_meta, ignore=ignore) as recorder:
            result = twin(input)
        del result
        return held_rows(twin, recorder)

    try:
        rows = run_a_copy(model, input_size, dtype, run)
    except RuntimeError:
        return None
    kinds: dict[str, HeldByKind] = {}
    for (name, _), found in rows.items():
        number, total, modules = kinds.get(found.kind, HeldByKind(0, 0))
        modules += (name,) if found.function_calls else ()
        kinds[found.kind] = HeldByKind(number + (found.function_calls or 1), total + found.nbytes, modules)
    return dict(sorted(kinds.items(), key=lambda item: -item[1].nbytes))


def _kind(saver: Saver) -> str:
    module, function = saver
    if module is None or any(True for _ in module.children()):
        return f"{function} (functional)" if function else "(functional)"
    return type(module).__name__


def _shapes_alone(value: Any) -> Any:
    """``value`` with every tensor replaced by one without values."""
    if isinstance(value, Tensor):
        return on_meta(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _shapes_alone(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_shapes_alone(item) for item in value)
    return value
