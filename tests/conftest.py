"""Fixtures that every test may use."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before torch starts its threads, and for the processes that tests start. One thread each: the tests themselves run
# side by side (pytest -n), and those about threads ask for theirs. Spinning while they wait makes short calls ten times
# slower beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from swat_ext import _C

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import build as emulator

# Machines that GPUs are lent on may not have it; the tests of the CUDA kernels do without.
with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("dev", deadline=None, max_examples=100)
    hypothesis.settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, database=None)
    hypothesis.settings.register_profile("quick", deadline=None, max_examples=20, derandomize=True, database=None)
    hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that an earlier test compiled, counted or left behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def generator() -> torch.Generator:
    """The same random numbers in every run."""
    return torch.Generator().manual_seed(20200101)


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set that this machine has."""
    previous = _C.isa()
    _C.set_isa(request.param)
    try:
        yield request.param
    finally:
        _C.set_isa(previous)


def _cuda_skip_reason() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("swat_ext::conv2d", "CUDA"):
        return "swat_ext was built without CUDA kernels"
    return ""


# Marks what needs a GPU, and kernels for it.
needs_cuda = pytest.mark.cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _cuda_skip_reason()
    for item in items:
        if reason and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Runs the test once on every kind of device that has kernels here."""
    return torch.device(request.param)


class Kernels(NamedTuple):
    """The CUDA operators, and the device of their tensors."""

    ops: Any
    device: torch.device


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=needs_cuda)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Runs the test once on the emulator, which stands in for a GPU, and once on a GPU."""
    if request.param == "cuda":
        return Kernels(torch.ops.swat_ext, torch.device("cuda"))
    emulator.load()
    return Kernels(torch.ops.swat_ext_emulated, torch.device("cpu"))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Lets a test call ``torch.set_num_threads``."""
    previous = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(previous)
