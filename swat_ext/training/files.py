"""What a run leaves behind: checkpoints that a kill cannot break, and a log with one JSON object a line."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["CHECKPOINT", "LOG", "load_checkpoint", "save_checkpoint", "write_log"]

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"

_FORMAT = 1


def _write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Have ``write`` fill ``path``: whatever happens, the file is wholly the old one or wholly the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened to flush its entry
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, tuples and dicts of them) to ``path``, atomically."""
    _write_atomically(path, lambda file: torch.save({"format": _FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; nothing in the file is ever executed (``weights_only=True``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        # torch's own message goes on for paragraphs.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of swat_ext.train (format {_FORMAT})")
    return state


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_log(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write ``lines``, one JSON object each, to ``path``, atomically.

    The whole file is written every time: it is small, and so it always says exactly what the checkpoint beside it says.
    """
    text = "".join(json.dumps(_plain(line), allow_nan=False) + "\n" for line in lines)

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    _write_atomically(path, write)
