"""The memory of CPU results: freed blocks are kept and used again, as PyTorch does on CUDA.

A training step allocates the same sizes each time. PyTorch gives large CPU blocks back to the C library, which gives
them back to the system, and every page of a fresh block costs a fault and is cleared, which can take longer than the
sparse convolution that fills it. So results of 1 MiB or more lie in blocks of this library's own, and freed blocks are
kept. Blocks in use and kept together never take more than those in use took at their peak. Large blocks, of 32 MiB or
more that are more than a 32nd of that peak, decide the peak of a process: they stay only while the process as a whole,
tensors of PyTorch's own included, is as far below the most that it ever needed as they are large (Linux; elsewhere
they go back at once). Smaller ones stay until :func:`empty_cache`, even where tensors of PyTorch's own then need as
much again, so that a process may be larger with the cache than without it, by at most that peak.

The environment variable ``SWAT_CPU_CACHE=0`` turns it off; it is read on import, which fails where it is neither ``0``,
``1`` nor unset.
"""

from typing import NamedTuple

from swat_ext import _C

__all__ = ["CacheUsage", "cache_usage", "empty_cache"]


class CacheUsage(NamedTuple):
    """Bytes of large CPU results.

    Attributes:
        used: in blocks that tensors live in.
        cached: in blocks that were freed and are kept for the next results.
        peak: the most that ``used`` ever was, or ``used`` itself since the last :func:`empty_cache`.
    """

    used: int
    cached: int
    peak: int


def cache_usage() -> CacheUsage:
    """What the cache holds now, over all threads."""
    return CacheUsage(**_C.cache_usage())


def empty_cache() -> int:
    """Give the freed blocks of CPU results back to the system, as :func:`torch.cuda.empty_cache` does on CUDA.

    Of use when something else needs the memory, such as after training; living tensors keep theirs.

    Returns:
        Bytes given back.
    """
    return _C.empty_cache()
