"""Builds the CUDA operators with kernels that run on the CPU, thread by thread, as ``torch.ops.swat_ext_emulated``.

The sources are those of ``csrc/kernels/cuda`` and ``csrc/ops/cuda*.cpp`` themselves; ``cuda_emulator.h`` stands in
for CUDA. What this cannot show: memory order between blocks that run at the same time, and speed.
"""

import concurrent.futures
import fcntl
import os
import runpy
import shlex
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

_HERE = Path(__file__).resolve().parent
_CSRC = _HERE.parent.parent / "csrc"
_BUILD = _HERE.parent.parent / "build" / "emulator"
_TARGET = "0x020b000000000000"


def load() -> None:
    """Build what changed and register the operators; raises RuntimeError with the compiler's words if that fails.

    Processes that call it at the same time wait for the one that builds.
    """
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = _build()
    torch.ops.load_library(str(library))


def _build() -> Path:
    sources = runpy.run_path(str(_CSRC / "sources.py"))
    files = [_CSRC / name for name in (*sources["CUDA_KERNELS"], *sources["CUDA_OPS"], "ops/schemas.cpp")]
    files += [_HERE / "cuda_emulator.cpp", _HERE / "probes.cpp"]
    headers = [path for folder in (_CSRC, _HERE) for path in folder.rglob("*.*h")]
    newest = max(path.stat().st_mtime for path in (*headers, Path(__file__)))
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-Wno-unknown-pragmas",
        "-DSWAT_EMULATE_CUDA",
        "-DSWAT_LIBRARY_NAME=swat_ext_emulated",
    ]
    flags += [
        f"-DTORCH_TARGET_VERSION={_TARGET}",
        f"-I{_HERE}",
        f"-I{_CSRC}",
        *(f"-I{path}" for path in include_paths()),
    ]

    def run(command: list[str]) -> None:
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if process.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}:\n{process.stdout}")

    def compile_one(source: Path) -> Path:
        target = _BUILD / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            run([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    library = _BUILD / f"swat_ext_emulated-{torch.__version__}.so"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, files))
    if not library.exists() or any(library.stat().st_mtime < path.stat().st_mtime for path in objects):
        paths = [f"-L{path}" for path in library_paths()]
        run([*compiler, "-shared", *map(str, objects), *paths, "-ltorch", "-ltorch_cpu", "-o", str(library)])
    return library
