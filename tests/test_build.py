"""What setup.py says when the extension cannot be built: one sentence, and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

RUN_SETUP = """
import runpy, sys, types
version = sys.argv.pop(1)
if version == "none":
    sys.modules["torch"] = None  # importing it raises ImportError
elif version != "installed":
    sys.modules["torch"] = types.ModuleType("torch")
    sys.modules["torch"].__version__ = version
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


def run_setup(*arguments: str, torch_version: str = "installed", **environment: str) -> tuple[int, str]:
    """Exit status and everything printed by setup.py where torch is of this version, or ``"none"``."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("CXX", "SWAT_CUDA", "CUDA_HOME", "CUDA_PATH")
    }
    process = subprocess.run(
        [sys.executable, "-c", RUN_SETUP, torch_version, "-q", *arguments],
        cwd=ROOT,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return process.returncode, process.stdout


@pytest.fixture
def build(tmp_path: Path) -> list[str]:
    """Arguments of a build that leaves the source folder as it is."""
    return ["build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]


def refusal(status: int, output: str) -> str:
    """The one sentence in which setup.py gave up."""
    assert status == 1, output
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert last.startswith("swat_ext cannot be built: ")
    return last


def test_missing_torch_says_what_to_install(build: list[str]) -> None:
    said = refusal(*run_setup(*build, torch_version="none"))
    assert "torch cannot be imported" in said
    assert sys.executable in said
    assert 'install "torch>=2.11"' in said
    assert "--no-build-isolation" in said


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0a0+cpu"])
def test_old_torch_says_both_versions(build: list[str], version: str) -> None:
    said = refusal(*run_setup(*build, torch_version=version))
    assert "torch 2.11 or newer" in said
    assert version in said


def test_an_isolated_build_fails_before_pip_fetches_anything() -> None:
    assert "torch cannot be imported" in refusal(*run_setup("dist_info", torch_version="none"))


def test_a_source_distribution_needs_no_torch(tmp_path: Path) -> None:
    status, output = run_setup("egg_info", "--egg-base", str(tmp_path), torch_version="none")
    assert status == 0, output
    assert list(tmp_path.glob("*.egg-info/PKG-INFO"))


@pytest.mark.parametrize("value", ["banana", "", "2", "AUTO"])
def test_swat_cuda_is_validated(build: list[str], value: str) -> None:
    said = refusal(*run_setup(*build, SWAT_CUDA=value))
    assert f"SWAT_CUDA: expected auto, 0 or 1, got '{value}'" in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_swat_cuda_1_fails_where_torch_has_no_cuda(build: list[str]) -> None:
    said = refusal(*run_setup(*build, SWAT_CUDA="1"))
    assert "SWAT_CUDA=1" in said
    assert f"torch {torch.__version__} has no CUDA" in said
    assert "auto or 0" in said


def test_swat_cuda_1_fails_where_there_is_no_toolkit(build: list[str]) -> None:
    said = refusal(*run_setup(*build, SWAT_CUDA="1", CUDA_HOME="/nonexistent"))
    assert "there is no nvcc" in said
    assert "CUDA_HOME" in said


@pytest.mark.parametrize(
    ("compiler", "reason"), [("/nonexistent/g++", "does not start"), ("false", "is not GCC 12 or newer")]
)
def test_missing_compiler_says_what_to_install(build: list[str], compiler: str, reason: str) -> None:
    said = refusal(*run_setup(*build, CXX=compiler, SWAT_CUDA="0"))
    assert f"'{compiler}' (CXX) {reason}" in said
    assert "install g++ 12 or newer" in said
