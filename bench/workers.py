"""Objects in processes of their own, which take their turns.

What allocates much leaves its mark on the memory of its process: a dense network timed beside sparse ones pays for, or
gains from, the blocks that they freed. A process each is what users have.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch


def _serve(connection: Connection, threads: int, make: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(threads)
        target = make(*arguments)
        connection.send((None, None))
        while True:
            name, values = connection.recv()
            connection.send((getattr(target, name)(*values), None))
    except EOFError:
        pass
    except Exception:  # whatever it was, it is raised again over there
        connection.send((None, traceback.format_exc()))


class Worker:
    """``make(*arguments)`` in a fresh process; :meth:`call` calls its methods there. A context manager.

    Args:
        make: a function or class that the new process can import.
    """

    def __init__(self, make: Callable[..., object], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        serve = (theirs, torch.get_num_threads(), make, arguments)
        self._process = context.Process(target=_serve, args=serve, daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """The method's result.

        Raises:
            RuntimeError: it raised, or the process ended.
        """
        self._connection.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            result, error = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of a bench ended with exit code {self._process.exitcode}") from None
        if error is not None:
            raise RuntimeError(f"in the process of a bench:\n{error}")
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()
