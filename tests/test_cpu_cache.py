"""The cache of CPU results: what users see of it, and that tensors in its blocks are tensors like any other."""

import copy
import gc
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import swat_ext
from swat_ext import functional

MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    gc.collect()
    swat_ext.empty_cache()
    yield
    swat_ext.empty_cache()


def large_result(seed: int = 0) -> torch.Tensor:
    """A result of 4 MiB."""
    values = torch.randn(8, 32, 64, 64, generator=torch.Generator().manual_seed(seed))
    return functional.decompress(functional.compress(values, 3.0))  # packed it is too small for the cache


def test_results_lie_in_the_cache() -> None:
    before = swat_ext.cache_usage()
    result = large_result()
    assert swat_ext.cache_usage().used == before.used + result.nbytes
    address = result.data_ptr()
    del result
    assert swat_ext.cache_usage().used == before.used
    assert swat_ext.cache_usage().cached >= 4 * MIB
    assert large_result().data_ptr() == address


def test_small_results_do_not() -> None:
    before = swat_ext.cache_usage()
    result = functional.decompress(functional.compress(torch.ones(100), 0.0))
    assert swat_ext.cache_usage() == before
    assert result.sum() == 100


def test_empty_cache_gives_back_what_is_free() -> None:
    kept, freed = large_result(0), large_result(1)
    expected = kept.clone()
    del freed
    cached = swat_ext.cache_usage().cached
    assert swat_ext.empty_cache() == cached > 0
    assert swat_ext.cache_usage().cached == 0
    assert swat_ext.empty_cache() == 0
    assert torch.equal(kept, expected)


def test_used_and_cached_stay_within_the_peak() -> None:
    layer = swat_ext.SWATConv2d(16, 32, 3, padding=1, sparsity=0.8)
    for batch in (4, 64, 16, 40, 64, 1):
        layer(torch.randn(batch, 16, 32, 32)).sum().backward()
        usage = swat_ext.cache_usage()
        assert usage.used + usage.cached <= usage.peak


@pytest.mark.parametrize("channels_last", [False, True])
def test_strides_are_those_of_torch(channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for size in ((8, 32, 64, 64), (1, 1, 512, 1024), (2048, 1024, 1, 1), (600, 1, 1, 600)):
        packed = functional.compress(torch.ones(size), 0.0)
        result = functional.decompress(packed, channels_last=channels_last)
        assert result.stride() == torch.empty(size, memory_format=memory_format).stride()
        assert result.is_contiguous(memory_format=memory_format)
        assert result.data_ptr() % 64 == 0


def test_tensors_in_blocks_are_like_any_other() -> None:
    result = large_result()
    expected = result.clone()
    saved = io.BytesIO()
    torch.save(result, saved)
    saved.seek(0)
    for other in (copy.deepcopy(result), torch.load(saved), torch.from_numpy(result.numpy()), result.view(-1)[:]):
        assert torch.equal(other.view_as(expected), expected)
    result.add_(1)
    assert torch.equal(result, expected + 1)
    result.share_memory_()
    assert result.is_shared()
    assert torch.equal(result, expected + 1)
    view = large_result()[3, 4]
    gc.collect()
    assert torch.equal(view, expected[3, 4])  # keeps the block


def test_threads_share_the_cache() -> None:
    expected = [large_result(seed).clone() for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(20):
            if not torch.equal(large_result(seed), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_MAKE = """
import os, torch, swat_ext
from swat_ext import functional
def make():
    return functional.decompress(functional.compress(torch.ones(2**20), 0.0))
"""


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_environment_turns_it_off(value: str) -> None:
    code = "kept = make(); print(swat_ext.cache_usage().used > 0, kept.sum().item(), swat_ext.empty_cache() >= 0)"
    assert _run(_MAKE + code, SWAT_CPU_CACHE=value) == f"{value != '0'} {2.0**20} True\n"


@pytest.mark.parametrize("value", ["off", "2", "false", "0 "])
def test_environment_that_says_neither_is_an_import_error(value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import swat_ext"],
        env=os.environ | {"SWAT_CPU_CACHE": value},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"ImportError: SWAT_CPU_CACHE: expected 0 or 1, got '{value}'"


def test_a_forked_child_has_a_cache_of_its_own() -> None:
    code = """
torch.set_num_threads(1)
kept = make()
del kept
if os.fork() == 0:
    assert all((make() == 1).all() for _ in range(3))
    os._exit(0 if swat_ext.cache_usage().cached > 0 else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]), make().sum().item())
"""
    assert _run(_MAKE + code, SWAT_CPU_CACHE="1") == f"0 {2.0**20}\n"


def test_memory_that_is_not_there() -> None:
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=rf"cannot allocate \d+ bytes for a result of size \[1, 1, {2**25 + 1}, "):
        functional.conv2d(one, one, padding=2**24, weight_threshold=0.0, activation_threshold=0.0)
