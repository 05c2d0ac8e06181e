"""The peak of memory while something runs."""

import os
import threading
from pathlib import Path

import torch
from torch import nn

__all__ = ["Peak", "device_of"]

_SAMPLE_S = 1e-3
_STATM = Path("/proc/self/statm")


def device_of(model: nn.Module) -> torch.device:
    """The first CUDA device that ``model`` has a parameter or a buffer on, else the CPU."""
    devices = (tensor.device for tensor in (*model.parameters(), *model.buffers()))
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


class Peak:
    """The most memory between start and stop.

    Attributes:
        first, most: bytes at the start and at the peak: on the CPU resident memory of the whole process, sampled every
            millisecond; on CUDA what torch's allocator gave out, exactly. None where the system does not say.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: int | None = None
        self.most: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.first = torch.cuda.memory_allocated(self.device)
        elif _STATM.exists():
            self.first = self.most = _resident_bytes()
            self._thread.start()

    def stop(self) -> None:
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self.device)
        elif self.most is not None:
            self._ended.set()
            self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(_SAMPLE_S)
            self.most = max(self.most or 0, _resident_bytes())


def _resident_bytes() -> int:
    return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
