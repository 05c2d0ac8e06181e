"""Build of the compiled extension ``swat_ext._C``; everything else about the package is in pyproject.toml.

Environment: ``CXX`` names the C++ compiler, ``MAX_JOBS`` is the number of compilations at once, and ``SWAT_CUDA``
(``auto``, ``0`` or ``1``) says whether CUDA kernels are built: ``auto`` builds them where torch has CUDA and there is
an nvcc, ``1`` fails where that is not so. ``CUDA_HOME`` names the toolkit, ``TORCH_CUDA_ARCH_LIST`` the architectures.
"""

import os
import runpy
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
# The release whose stable ABI the operators use, as torch's headers spell it: 0xMMmmpp then zeros.
TORCH_TARGET_VERSION = "0x020b000000000000"
# Without TORCH_CUDA_ARCH_LIST: what the kernels are checked for, and machine code that later GPUs translate.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
# Commands that neither compile nor lead to a compilation.
NO_BUILD = {"sdist", "egg_info", "clean", "check", None}

PROBE = """
#if defined(__clang__) || !defined(__GNUC__) || __GNUC__ < 12
#error not GCC 12 or newer
#endif
#include <bit>
#include <Python.h>
"""


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"swat_ext cannot be built: {sentence}")


def check_torch() -> str:
    """Version of the installed torch, or exit saying what to install."""
    minimum = ".".join(map(str, MINIMUM_TORCH))
    how = f'install "torch>={minimum}" there and run "pip install --no-build-isolation ." again'
    try:
        import torch
    except ImportError as error:
        fail(f"torch cannot be imported by {sys.executable} ({error}); {how}.")
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        fail(f"it needs torch {minimum} or newer, and {sys.executable} has {version}; {how}.")
    return version


def wants_cuda() -> bool:
    """Whether to build CUDA kernels: by SWAT_CUDA, torch and the toolkit, never by whether a GPU is there.

    Exits where SWAT_CUDA makes no sense, or is 1 and cannot be met. Sets CUDA_HOME, which torch's build reads.
    """
    wanted = os.environ.get("SWAT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"SWAT_CUDA: expected auto, 0 or 1, got '{wanted}'.")
    if wanted == "0":
        return False
    version = check_torch()
    import torch

    home = runpy.run_path(str(ROOT / "tools" / "cuda_home.py"))["find_cuda_home"]()
    missing = []
    if getattr(getattr(torch, "version", None), "cuda", None) is None:
        missing.append(f"torch {version} has no CUDA (install a CUDA build of torch)")
    if home is None:
        missing.append("there is no nvcc (install the CUDA toolkit, and put nvcc on the PATH or set CUDA_HOME)")
    if missing:
        if wanted == "1":
            fail(f"SWAT_CUDA=1 asks for CUDA kernels, but {', and '.join(missing)}; or set SWAT_CUDA to auto or 0.")
        return False
    os.environ["CUDA_HOME"] = home
    # Otherwise torch would build for the GPUs that this machine happens to have.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    return True


def check_compiler(flags: list[str]) -> None:
    """Exit unless the C++ compiler that the build will call is there and can compile for this Python."""
    compiler = os.environ.get("CXX", "c++")
    source = "CXX" if "CXX" in os.environ else "the default, as CXX is not set"
    how = 'install g++ 12 or newer (on Debian or Ubuntu "apt-get install g++") or set CXX to it'
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        fail(f"Python.h is missing for {sys.executable}; install Python's headers (on Debian or Ubuntu python3-dev).")
    command = [*shlex.split(compiler), *flags, f"-I{sysconfig.get_path('include')}", "-x", "c++", "-fsyntax-only", "-"]
    try:
        probe = subprocess.run(command, input=PROBE, text=True, capture_output=True, check=False)
    except OSError as error:
        fail(f"the C++ compiler '{compiler}' ({source}) does not start ({error.strerror}); {how}.")
    if probe.returncode != 0:
        errors = [line.strip() for line in probe.stderr.splitlines() if "error" in line]
        reason = errors[0] if errors else f"exit status {probe.returncode}"
        fail(f"the C++ compiler '{compiler}' ({source}) is not GCC 12 or newer, or cannot work ({reason}); {how}.")


def extension(sources: dict[str, Any], torch_version: str, cuda: bool) -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    def define(name: str, text: str) -> str:
        return f'-D{name}="{text}"'

    with open(ROOT / "pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    flags: list[str] = [*sources["CXX_FLAGS"], "-g0"]
    names = sources["CPU_KERNELS"] + sources["OPS"] + sources["RUNTIME"]
    # Not torch's own extension classes: they also link c10 and torch_python, whose C++ ABI changes with each release.
    libraries = ["torch", "torch_cpu"]
    device = "cuda" if cuda else "cpu"
    if cuda:
        names = names + sources["CUDA_KERNELS"] + sources["CUDA_OPS"]
        # The runtime linked in cannot be another version than the kernels were compiled for.
        libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    csrc = ROOT / "csrc"
    common = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        define("SWAT_VERSION", version),
        define("SWAT_FLAGS", " ".join(flags)),
        define("SWAT_TORCH_VERSION", torch_version),
        *(["-DSWAT_CUDA"] if cuda else []),
        # Messages of failed checks name the source file: not by where it lay on the machine that built it.
        *(f"-fmacro-prefix-map={folder}/=" for folder in (ROOT, *include_paths(device))),
    ]
    return Extension(
        "swat_ext._C",
        sources=[f"csrc/{name}" for name in names],
        depends=[str(path) for suffix in ("h", "inl", "cuh") for path in sorted(csrc.rglob(f"*.{suffix}"))],
        include_dirs=[str(csrc), *include_paths(device)],
        library_dirs=library_paths(device),
        libraries=libraries,
        language="c++",
        extra_compile_args={"cxx": [*flags, *common], "nvcc": sources["NVCC_FLAGS"]},
    )


def build_command(flags: list[str]) -> type[build_ext]:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            # An editable install would compile in a temporary folder, and so everything anew each time.
            if self.build_temp is None:
                platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = str(ROOT / "build" / f"temp.{platform}")
            super().finalize_options()

        def build_extensions(self) -> None:
            check_compiler(flags)
            super().build_extensions()

    return Build


def main() -> None:
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if command in NO_BUILD:
        setup()
        return
    sources = runpy.run_path(str(ROOT / "csrc" / "sources.py"))
    cuda = wants_cuda()
    torch_version = check_torch()
    setup(
        ext_modules=[extension(sources, torch_version, cuda)],
        cmdclass={"build_ext": build_command(sources["CXX_FLAGS"])},
    )


main()
