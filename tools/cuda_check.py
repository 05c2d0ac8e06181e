"""Compiles every CUDA kernel for sm_80 and sm_90, and the operators over them against whatever torch is installed.

Needs nvcc and no GPU. Fails if a kernel does not compile, or if one spills registers or uses local memory: its
accumulators would then live in DRAM. Run by ``make cuda-check``.
"""

import concurrent.futures
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90")


def spilling_kernels(report: str) -> list[str]:
    """Kernels that ``ptxas -v`` says have a stack frame or spill, with what it says."""
    found = []
    for name, text in re.findall(r"Compiling entry function '(\S+)'.*?\n(.*?)ptxas info\s+: Used", report, re.DOTALL):
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        if numbers is None:
            found.append(f"{name}: no report understood")
        elif any(int(number) for number in numbers.groups()):
            found.append(f"{name}: {numbers[0]}")
    return found


def run(command: list[str]) -> tuple[int, str]:
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return process.returncode, process.stdout


def check_kernel(nvcc: str, flags: list[str], source: Path, architecture: str) -> list[str]:
    """What is wrong with one source on one architecture, in lines."""
    command = [nvcc, *flags, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", str(source), "-o", os.devnull]
    status, output = run(command)
    where = f"{source.relative_to(ROOT)} for {architecture}"
    if status != 0:
        return [f"{where} does not compile:", output]
    kernels = output.count("Compiling entry function")
    if kernels == 0:
        return [f"{where}: ptxas reported no kernel:", output]
    found = [f"{where}: {line}" for line in spilling_kernels(output)]
    if not found:
        print(f"{where}: {kernels} kernels, no spills", flush=True)
    return found


def check_operators(home: str, sources: dict[str, list[str]]) -> list[str]:
    """What is wrong with the operators, against the headers of the torch at hand."""
    target = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert target is not None
    found = []
    for name in sources["CUDA_OPS"]:
        command = [
            *shlex.split(os.environ.get("CXX", "c++")),
            *sources["CXX_FLAGS"],
            f"-DTORCH_TARGET_VERSION={target[1]}",
        ]
        command += [
            "-DSWAT_CUDA",
            f"-I{ROOT / 'csrc'}",
            f"-I{home}/include",
            *(f"-I{path}" for path in include_paths()),
        ]
        status, output = run([*command, "-fsyntax-only", str(ROOT / "csrc" / name)])
        if status != 0:
            found += [f"csrc/{name} does not compile:", output]
        else:
            print(f"csrc/{name}: compiles", flush=True)
    return found


def main() -> int:
    home = runpy.run_path(str(ROOT / "tools" / "cuda_home.py"))["find_cuda_home"]()
    if home is None:
        print("cuda-check: skipped, as there is no CUDA toolkit (nvcc on the PATH, or CUDA_HOME)")
        return 0
    sources = runpy.run_path(str(ROOT / "csrc" / "sources.py"))
    nvcc = str(Path(home) / "bin" / "nvcc")
    jobs = [(ROOT / "csrc" / name, architecture) for name in sources["CUDA_KERNELS"] for architecture in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "1"))) as pool:
        checks = list(pool.map(lambda job: check_kernel(nvcc, sources["NVCC_FLAGS"], *job), jobs))
    wrong = [line for lines in checks for line in lines] + check_operators(home, sources)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
