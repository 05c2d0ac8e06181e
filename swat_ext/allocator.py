"""What the C library does with freed memory: one setting of this process, dense PyTorch's tensors included."""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# No block is a mapping of its own, which would go back to the system when freed, and the heap is never trimmed.
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
# glibc raises both thresholds up to these by itself as large blocks are freed, until mallopt is first called.
_DEFAULT = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory that it frees, for what it allocates next.

    A training step allocates the same sizes each time. By default the C library gives large freed blocks back to the
    system, and each page of a fresh one costs a fault and is cleared: steps are faster without, sparse and dense ones
    alike. In return the process stays as large as it ever was, and gaps in its heap may make its peak larger. Call it
    once, before training; nothing in this library calls it by itself.

    It sets ``M_MMAP_MAX`` and ``M_TRIM_THRESHOLD`` by ``mallopt``, for everything in this process that uses ``malloc``.
    Blocks of 64 MiB or more of a thread other than the main one still go back: glibc gives such threads heaps of that
    size. Processes that are forked later inherit the setting, those that are started do not: for them there are the
    environment variables ``MALLOC_MMAP_MAX_=0`` and ``MALLOC_TRIM_THRESHOLD_=10000000000``. Another allocator that is
    loaded in place of glibc's, such as jemalloc, looks at none of this.

    Args:
        keep: False undoes it, and gives what is free back to the system. glibc's thresholds, which adjust themselves
            until they are first set, then stay where they adjust to at most: blocks of up to 32 MiB come from the heap,
            and up to 64 MiB at its end are kept.

    Returns:
        Whether this system has such a setting: True with glibc, False elsewhere, where nothing happens.

    Raises:
        TypeError: ``keep`` is not a bool.
    """
    if not isinstance(keep, bool):
        raise TypeError(f"keep: expected True or False, got {keep!r}")
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    done = all(libc.mallopt(parameter, value) for parameter, value in (_KEEP if keep else _DEFAULT).items())
    if not keep:
        libc.malloc_trim(0)
    return done
