"""Freed memory that stays with the process: what a step on the CPU frees, the next step needs again."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
LARGEST_bytes = 32 << 20  # that may be kept: glibc takes no larger threshold
OTHERS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # another allocator, or settings of the user's own


def keep_freed_memory() -> bool:
    """From now on memory that this process frees stays with it; whether that could be done.

    glibc gives the upper end of its heap back to the system and asks for it anew at every step, zeroed page by page:
    about 4 % of a UNet's train step on the CPU. Blocks of more than LARGEST_bytes go back as before, so that what is
    kept stays near the process's own peak. Only glibc is told (mallopt(3)), and not where the environment (OTHERS)
    decides otherwise.
    """
    if sys.platform != "linux" or any(name.startswith(OTHERS) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, LARGEST_bytes) and mallopt(TRIM_THRESHOLD, -1))
