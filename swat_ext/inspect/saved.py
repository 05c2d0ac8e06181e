"""What autograd holds for the backward pass, seen as it is saved and as it is let go, and which module saved it."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["OUTSIDE", "SavedRecorder", "Saver", "tensors_in"]

#: The name of what is saved while no module of the model runs, such as by the loss.
OUTSIDE = "(outside the model)"


class Saver(NamedTuple):
    """Who saved a tensor.

    Attributes:
        module: the module whose forward was running; None if none was.
        function: what it called in ``torch`` if the module is a container or None; "" where not known or not asked.
    """

    module: nn.Module | None
    function: str


class _Live(NamedTuple):
    """A storage that is held: who saved it, its bytes, and in which call of the model and of a function.

    ``call`` is -1 before the first call of the model, ``part`` is true where a module of it ran on its own.
    """

    saver: Saver
    nbytes: int
    call: int
    part: bool
    function_call: int


class _Handle:
    """Stands for a saved tensor in the graph; the graph drops it when it needs the tensor no more."""

    __slots__ = ("keys", "tensor")

    def __init__(self, tensor: Tensor, keys: list[tuple["SavedRecorder", int]]) -> None:
        self.tensor, self.keys = tensor, keys

    def __del__(self) -> None:
        for recorder, key in self.keys:
            recorder._release(key)


class _State(threading.local):
    """The recorders at work in this thread: torch asks the innermost hooks alone, which then tell the others."""

    def __init__(self) -> None:
        self.recorders: list[SavedRecorder] = []


_state = _State()


class _Functions(TorchFunctionMode):
    """Notes which function of ``torch`` runs, by the name that it was called by."""

    def __init__(self, recorder: "SavedRecorder") -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder = self.recorder
        before, recorder._function = recorder._function, getattr(func, "__name__", "")
        recorder._function_calls += 1
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            recorder._function = before
        if isinstance(result, Tensor) and result.requires_grad:
            recorder._look_for_other_hooks()
        return result


class SavedRecorder:
    """Watches ``model`` in a ``with`` block: distinct storages that are saved for backward, and who saved each first.

    A storage counts from the first time that it is saved until the graph lets the last use of it go. Kept is the moment
    at which the most bytes were held. Parameters and buffers of ``model`` and the tensors that it is called with do not
    count; neither does what is saved while a backward pass runs, nor what is saved within another block of
    ``torch.autograd.graph.saved_tensors_hooks`` (``save_on_cpu`` is one), which torch asks in place of this one.

    Args:
        model: its modules are told apart. They get hooks, removed at the end of the block.
        meta: count tensors without values, on the meta device, and not those with values as is usual.
        ignore: saves made in the forward of a module for which this is true are passed over, as if they were not made.
        on_call: called with the arguments of each call of ``model`` itself, before it.
        on_progress: called after every forward of a module, for measurements of its own.

    Attributes:
        held: bytes of each saver, at the moment of the most.
        calls: forwards of each module that ran, in the order of their first start.
        held_functions: for a function that a container called, how many calls of it held something at that moment.
        held_calls: the calls of ``model`` itself, counted from 0, that held something at the moment of the most.
        held_parts: whether something was then held that a module of ``model`` saved outside any call of ``model``.
        hooks_inside: whether other hooks took what was saved in a part of the block. Those of
            ``torch.utils.checkpoint`` do not count: they hold nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        meta: bool = False,
        ignore: Callable[[nn.Module], bool] | None = None,
        on_call: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.held: dict[Saver, int] = {}
        self.calls: dict[nn.Module, int] = {}
        self.held_functions: dict[Saver, int] = {}
        self.held_calls: set[int] = set()
        self.held_parts = False
        self.hooks_inside = False
        self._meta = meta
        self._ignore, self._on_call, self._on_progress = ignore, on_call, on_progress
        self._lock = threading.RLock()  # backward frees on a thread of its own where the device is not the CPU
        self._running: list[nn.Module] = []
        self._function = ""
        self._function_calls = 0
        self._excluded: set[int] = set()
        self._inputs: list[Any] = []  # held, so that no other storage gets the address of one
        self._live: dict[int, _Live] = {}  # by storage
        self._uses: dict[int, int] = {}
        self._now = self._most = 0
        self._call = -1
        self._closed = True
        self._exits: list[Callable[[], None]] = []

    # --- The block

    def __enter__(self) -> Self:
        self._closed = False
        try:
            self._exclude((*self.model.parameters(), *self.model.buffers()))
            for module in self.model.modules():
                self._exits.append(module.register_forward_pre_hook(self._start, with_kwargs=True).remove)
                self._exits.append(module.register_forward_hook(self._stop, always_call=True).remove)
            hooks = torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)
            functions = _Functions(self)
            hooks.__enter__()
            self._exits.append(lambda: hooks.__exit__())
            _state.recorders.append(self)
            self._exits.append(lambda: _state.recorders.remove(self))
            functions.__enter__()
            self._exits.append(lambda: functions.__exit__(None, None, None))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        while self._exits:
            self._exits.pop()()
        with self._lock:
            self._keep_if_most()
            self._closed = True
            self._live.clear()
            self._uses.clear()
        self._inputs.clear()
        self._running.clear()

    # --- Modules

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.model and module not in self._running:
            self._running.clear()  # whatever an exception may have left there
            if not _in_backward():
                # Anew for each call, so that a loop does not keep the inputs of all its steps.
                self._excluded.clear()
                self._inputs.clear()
                self._exclude((*self.model.parameters(), *self.model.buffers(), *tensors_in((args, kwargs))))
                self._call += 1
                if self._on_call is not None:
                    self._on_call(args, kwargs)
        self._running.append(module)
        if not _in_backward():
            self.calls[module] = self.calls.get(module, 0) + 1

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._running:
            while self._running.pop() is not module:
                pass
        if any(tensor.requires_grad for tensor in tensors_in(output)):
            self._look_for_other_hooks()
        if self._on_progress is not None:
            self._on_progress()

    def _look_for_other_hooks(self) -> None:
        if self.hooks_inside or self._closed or not torch.is_grad_enabled() or _in_backward():
            return
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack = hooks[0] if hooks else _pack
        self.hooks_inside = pack is not _pack and getattr(pack, "__module__", "") != "torch.utils.checkpoint"

    def _exclude(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is not None and storage._cdata not in self._excluded:
                self._excluded.add(storage._cdata)
                self._inputs.append(storage)

    # --- Storages

    def _record(self, tensor: Tensor) -> int | None:
        """Count a use of the tensor's storage; its key, or None if it does not count."""
        storage = _storage(tensor)
        module = self._running[-1] if self._running else None
        if storage is None or storage._cdata in self._excluded or tensor.is_meta != self._meta:
            return None
        if module is not None and self._ignore is not None and self._ignore(module):
            return None
        key = storage._cdata
        with self._lock:
            if self._closed:
                return None
            # Counted before anything is made: a collection of garbage may let go of tensors at any other point.
            self._uses[key] = self._uses.get(key, 0) + 1
            if key not in self._live:
                # A leaf is called what it is; in a container it matters what saved the tensor.
                container = module is None or any(True for _ in module.children())
                self._live[key] = _Live(
                    Saver(module, self._function if container else ""),
                    storage.nbytes(),
                    self._call,
                    module is not None and self.model not in self._running,
                    self._function_calls,
                )
                self._now += storage.nbytes()
        return key

    def _release(self, key: int) -> None:
        with self._lock:
            if self._closed or key not in self._uses:
                return
            self._uses[key] -= 1
            if not self._uses[key]:
                self._keep_if_most()
                self._now -= self._live.pop(key).nbytes
                del self._uses[key]

    def _keep_if_most(self) -> None:
        if self._now > self._most:
            self._most = self._now
            live = list(self._live.values())
            self.held = {}
            self.held_calls = {found.call for found in live if found.call >= 0 and not found.part}
            self.held_parts = any(found.part for found in live)
            for found in live:
                self.held[found.saver] = self.held.get(found.saver, 0) + found.nbytes
            calls = {(found.saver, found.function_call) for found in live if found.saver.function}
            self.held_functions = dict(Counter(saver for saver, _ in calls))


def _pack(tensor: Tensor) -> _Handle:
    keys: list[tuple[SavedRecorder, int]] = []
    if not _in_backward():
        for recorder in _state.recorders:
            key = recorder._record(tensor)
            if key is not None:
                keys.append((recorder, key))
    return _Handle(tensor, keys)


def _unpack(handle: _Handle) -> Tensor:
    return handle.tensor


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage of their own
        return None


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
