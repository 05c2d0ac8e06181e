"""The compiled module: what it says of its build, and the choice of an instruction set."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from swat_ext import _C

ALL_ISAS = ["portable", "avx2", "avx512", "avx512vl"]
UNSUPPORTED = [isa for isa in ALL_ISAS if isa not in _C.supported_isas()]


@pytest.fixture(autouse=True)
def keep_isa() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


def run_python(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter with SWAT_CPU_ISA set to ``isa``, or unset."""
    environment = {name: value for name, value in os.environ.items() if name != "SWAT_CPU_ISA"}
    if isa is not None:
        environment["SWAT_CPU_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_build_info() -> None:
    info = _C.build_info()
    assert info.keys() == {"version", "compiler", "flags", "cuda", "torch"}
    assert info["version"].count(".") == 2
    assert info["compiler"].startswith("gcc ")
    assert "-O3" in info["flags"].split()
    assert "-march=native" not in info["flags"]
    assert info["cuda"] == torch._C._dispatch_has_kernel_for_dispatch_key("swat_ext::conv2d", "CUDA")
    assert tuple(int(part) for part in info["torch"].split(".")[:2]) >= (2, 11)


def test_supported_isas_are_known() -> None:
    supported = _C.supported_isas()
    assert supported[0] == "portable"
    assert sorted(supported) == sorted(isa for isa in ALL_ISAS if isa in supported)
    assert ("avx512" in supported) == ("avx512vl" in supported)


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_each_supported_isa_can_be_forced_and_runs(isa: str) -> None:
    _C.set_isa(isa)
    assert _C.isa() == isa
    input = torch.arange(-500, 500, dtype=torch.float32)
    assert torch.ops.swat_ext.kth_magnitude(input, 10).item() == 495  # -500, then 499 and -499, and so on


def test_auto_is_the_fastest() -> None:
    _C.set_isa("portable")
    _C.set_isa("auto")
    assert _C.isa() == _C.supported_isas()[-1]


@pytest.mark.parametrize("isa", ["sse9", "", "AVX2", "avx2 "])
def test_unknown_isa_is_refused(isa: str) -> None:
    before = _C.isa()
    with pytest.raises(ValueError, match=rf"^isa: expected one of auto, portable.*, got '{isa}'"):
        _C.set_isa(isa)
    assert _C.isa() == before


@pytest.mark.skipif(not UNSUPPORTED, reason="this processor supports every instruction set")
def test_unsupported_isa_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"^isa: .*'{UNSUPPORTED[0]}', which this processor does not support"):
        _C.set_isa(UNSUPPORTED[0])


def test_isa_must_be_a_string() -> None:
    with pytest.raises(TypeError):
        _C.set_isa(2)  # type: ignore[arg-type]


@pytest.mark.parametrize("isa", [_C.supported_isas()[0], "auto", "", None])
def test_environment_chooses_the_isa(isa: str | None) -> None:
    process = run_python("import swat_ext; from swat_ext import _C; print(_C.isa())", isa)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == (isa if isa in ALL_ISAS else _C.supported_isas()[-1])


@pytest.mark.parametrize("isa", ["sse9", *UNSUPPORTED])
def test_environment_that_cannot_be_met_is_an_import_error(isa: str) -> None:
    process = run_python("import swat_ext", isa)
    assert process.returncode == 1, "expected an exception, neither a crash nor an import"
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: SWAT_CPU_ISA: expected one of auto, portable")
    assert f"got '{isa}'" in last


def test_a_refused_import_can_be_tried_again() -> None:
    code = """
import os
try:
    import swat_ext
except ImportError as error:
    print("refused")
os.environ["SWAT_CPU_ISA"] = "portable"
import swat_ext
from swat_ext import _C
print(_C.isa())
"""
    process = run_python(code, "sse9")
    assert process.stdout.split() == ["refused", "portable"], process.stderr
