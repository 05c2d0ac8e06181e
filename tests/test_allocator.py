"""keep_freed_memory, and results that no memory is there for."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swat_ext
from swat_ext import functional

_GLIBC = platform.libc_ver()[0] == "glibc"

# Fewest page faults of a large block that is made and freed a few times: before and after. Fewest, for a freed block
# does not fit the next time if something small has come to lie in it. Not a tensor: aligned blocks may never fit.
_FAULTS = """
import resource
import swat_ext
def faults(mebibytes):
    counts = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(mebibytes << 20)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20
print(faults(128))
print(swat_ext.keep_freed_memory(), faults(128), resident())
print(swat_ext.keep_freed_memory(False), resident())
"""


@pytest.mark.skipif(not _GLIBC or sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_kept_until_it_is_undone() -> None:
    paths = [str(Path(swat_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    before, kept, undone = (line.split() for line in done.stdout.splitlines())
    # A page is cleared by a fault each, or 512 of them at once where the system uses large pages by itself.
    least = 128 * 2**20 // 2**21 - 1
    assert int(before[0]) >= least
    assert kept[0] == undone[0] == "True"
    assert int(kept[1]) < least
    assert int(undone[1]) <= int(kept[2]) - 120


@pytest.mark.parametrize("channels_last", [False, True])
def test_large_results_are_aligned_and_strided_as_by_torch(channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for size in ((8, 32, 64, 64), (1, 1, 512, 1024), (2048, 1024, 1, 1), (600, 1, 1, 600)):
        result = functional.decompress(functional.compress(torch.ones(size), 0.0), channels_last=channels_last)
        assert result.stride() == torch.empty(size, memory_format=memory_format).stride()
        assert result.data_ptr() % 64 == 0
        assert torch.equal(result, torch.ones(size))


@pytest.mark.parametrize("keep", [0, 1, None, "yes"])
def test_anything_but_a_bool_is_an_error(keep: object) -> None:
    with pytest.raises(TypeError, match=r"^keep: expected True or False, got "):
        swat_ext.keep_freed_memory(keep)  # type: ignore[arg-type]


def test_other_systems_have_no_such_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert swat_ext.keep_freed_memory() is False
    assert swat_ext.keep_freed_memory(False) is False


@pytest.mark.parametrize("padding", [2**24, 2**26])  # 4 PiB and 64 PiB
def test_memory_that_is_not_there(padding: int) -> None:
    one = torch.ones(1, 1, 1, 1)
    side = 1 + 2 * padding
    with pytest.raises(RuntimeError, match=rf"cannot allocate memory for a result of size \[1, 1, {side}, {side}\]"):
        functional.conv2d(one, one, padding=padding, weight_threshold=0.0, activation_threshold=0.0)
