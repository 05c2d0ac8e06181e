"""The compiled module (``csrc/runtime.cpp``); importing it registers the operators ``torch.ops.swat_ext.*``.

Importing it raises ``ImportError`` if the environment variable ``SWAT_CPU_ISA`` names no set that can be used.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str  # of swat_ext
    compiler: str
    flags: str
    cuda: bool  # whether CUDA kernels were built
    torch: str  # the version built against

def build_info() -> BuildInfo: ...
def isa() -> str:
    """Name of the instruction set that the CPU kernels use: ``"portable"``, ``"avx2"`` or ``"avx512"``."""

def supported_isas() -> list[str]:
    """Names of the instruction sets that this processor runs, slowest first."""

def set_isa(isa: str) -> None:
    """Use the instruction set of this name, or ``"auto"`` for the fastest, in every later call.

    Raises ``ValueError`` if the name is unknown or the processor does not support the set.
    """
