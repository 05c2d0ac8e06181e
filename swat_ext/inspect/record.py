"""The one walk over a model: which of its modules run, with what, and what autograd holds for the backward pass."""

import threading
import weakref
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swat_ext.inspect.shapes import map_tensors, on_meta, tensors_in
from swat_ext.ops.torch_private import hooks_on_top, is_compiled

__all__ = ["OUTSIDE", "Call", "ModelCall", "Recorder", "Saved"]

#: The name of what is saved while no module of the model runs, such as by the loss.
OUTSIDE = "(outside the model)"


class Saved(NamedTuple):
    """A storage that is held, under who saved it first.

    Attributes:
        name: the module whose forward was running.
        function: what it called in ``torch`` if it has children, or if there was none; "" where not known.
        function_call: the number of that call.
        nbytes: of the whole storage.
        model_call: the number of the call of the model; None outside of one.
    """

    name: str
    function: str
    function_call: int
    nbytes: int
    model_call: int | None


class ModelCall(NamedTuple):
    """A call of the model: its arguments without values, and whether gradients and autocast were on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    autocast: bool


class Call(NamedTuple):
    """A call of a layer: the first tensor that it was given and its version, and the shape of the result."""

    input: Tensor
    version: int
    output_size: torch.Size


class Recorder:
    """Watches ``model`` in a ``with`` block: the calls of its modules, and what is saved for backward by whom.

    A storage counts from the first time that it is saved until the graph lets the last use of it go. Kept is the moment
    at which the most bytes were held. Parameters and buffers of ``model`` and the tensors that it is called with do not
    count; neither does what is saved within another block of ``torch.autograd.graph.saved_tensors_hooks``
    (``save_on_cpu`` is one), which torch asks in place of this one.

    Args:
        model: its modules are told apart. They get hooks, removed at the end of the block.
        layers: names of modules whose calls are kept, inputs too, and whose own saves are passed over.

    Attributes:
        held: what was held at the moment of the most.
        forwards: how often each module ran, recomputation for the backward pass included, in the order of first starts.
        model_calls: the calls of ``model`` itself.
        layer_calls: those of ``layers``.
        hooks_inside: whether other hooks took what was saved in a part of the block. Those of
            ``torch.utils.checkpoint`` do not count: they hold nothing.

    Raises:
        TypeError: ``model`` is compiled: it runs no hooks of its layers.
    """

    def __init__(self, model: nn.Module, layers: Collection[str] = ()) -> None:
        if any(is_compiled(module) for module in model.modules()):
            raise TypeError("model: expected one whose layers can be seen; give it before torch.compile")
        self.held: list[Saved] = []
        self.forwards: dict[str, int] = {}
        self.model_calls: list[ModelCall] = []
        self.layer_calls: dict[str, list[Call]] = {name: [] for name in layers}
        self.hooks_inside = False
        self.model = model
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._running: list[nn.Module] = []
        self._function, self._function_calls = "", 0
        # PyTorch keeps the object of a storage as long as the storage.
        self._excluded: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._lock = threading.RLock()  # backward frees on a thread of its own where the device is not the CPU
        self._live: dict[int, Saved] = {}  # by the id of the storage, which its handles hold
        self._uses: dict[int, int] = {}
        self._now = self._most = 0
        self._block = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as block:
            self._exclude((*self.model.parameters(), *self.model.buffers()))
            block.callback(self._keep_if_most)
            for module in self._names:
                block.callback(module.register_forward_pre_hook(self._start, with_kwargs=True).remove)
                block.callback(module.register_forward_hook(self._stop, with_kwargs=True, always_call=True).remove)
            block.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda handle: handle.tensor))
            block.enter_context(_Functions(self))
            self._block = block.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._block.close()

    def held_by_row(self) -> dict[tuple[str, str], int]:
        """Bytes held by module name and function."""
        rows: dict[tuple[str, str], int] = {}
        for saved in self.held:
            rows[saved.name, saved.function] = rows.get((saved.name, saved.function), 0) + saved.nbytes
        return rows

    def kind(self, name: str, function: str) -> str:
        """A row in words: the class of a leaf, else the function, as in ``relu (functional)``."""
        module = self._modules.get(name)
        return f"{function} (functional)".lstrip() if _is_container(module) else type(module).__name__

    # --- Modules and functions

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._names[module]
        if module is self.model and module not in self._running:
            self._exclude(tensors_in((args, kwargs)))
            autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
            shapes = map_tensors(on_meta, args), map_tensors(on_meta, kwargs)
            self.model_calls.append(ModelCall(*shapes, torch.is_grad_enabled(), autocast))
        self._running.append(module)
        self.forwards[name] = self.forwards.get(name, 0) + 1

    def _stop(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in self._running:  # not if a hook of the user's raised before it started
            while self._running.pop() is not module:
                pass
        calls = self.layer_calls.get(self._names[module])
        given, made = next(tensors_in((args, kwargs)), None), next(tensors_in(output), None)
        if calls is not None and given is not None and made is not None:
            calls.append(Call(given, given._version, made.shape))
        self._look_for_other_hooks(output)

    def _look_for_other_hooks(self, output: Any) -> None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(output)):
            pack = hooks_on_top()
            if pack != self._pack and getattr(pack, "__module__", "") != "torch.utils.checkpoint":
                self.hooks_inside = True

    def _exclude(self, tensors: Any) -> None:
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is not None:
                self._excluded.add(storage)

    # --- Storages

    def _pack(self, tensor: Tensor) -> "_Handle":
        storage = _storage(tensor)
        module = self._running[-1] if self._running else None
        name = OUTSIDE if module is None else self._names[module]
        if storage is None or storage in self._excluded or name in self.layer_calls:
            return _Handle(tensor, None, None)
        key, nbytes = id(storage), storage.nbytes()
        with self._lock:
            # Counted before anything is made: collecting garbage may let go of tensors at any other point.
            self._uses[key] = self._uses.get(key, 0) + 1
            if key not in self._live:
                # A leaf is called what it is; in a container it matters what saved the tensor.
                function = self._function if _is_container(module) else ""
                model_call = len(self.model_calls) - 1 if self.model in self._running else None
                self._live[key] = Saved(name, function, self._function_calls, nbytes, model_call)
                self._now += nbytes
        return _Handle(tensor, self, storage)

    def _release(self, key: int) -> None:
        with self._lock:
            self._uses[key] -= 1
            if not self._uses[key]:
                self._keep_if_most()
                self._now -= self._live.pop(key).nbytes
                del self._uses[key]

    def _keep_if_most(self) -> None:
        with self._lock:
            if self._now > self._most:
                self._most, self.held = self._now, list(self._live.values())


class _Handle:
    """Stands for a saved tensor in the graph; the graph drops it when it needs the tensor no more."""

    __slots__ = ("recorder", "storage", "tensor")

    def __init__(self, tensor: Tensor, recorder: Recorder | None, storage: torch.UntypedStorage | None) -> None:
        self.tensor, self.recorder, self.storage = tensor, recorder, storage

    def __del__(self) -> None:
        if self.recorder is not None:
            self.recorder._release(id(self.storage))


class _Functions(TorchFunctionMode):
    """Notes which function of ``torch`` runs, by the name that it was called by."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder = self.recorder
        before, recorder._function = recorder._function, getattr(func, "__name__", "")
        recorder._function_calls += 1
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            recorder._function = before
        if isinstance(result, Tensor):
            recorder._look_for_other_hooks(result)
        return result


def _is_container(module: nn.Module | None) -> bool:
    return module is None or any(True for _ in module.children())


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage of their own
        return None
