"""Freed memory stays with a process that asked for it, and with no other."""

import os
import subprocess
import sys

import pytest

BLOCK = 16 * 2**20
FAULTS = f"""
import ctypes, resource, sys
from ldm.networks.cpu import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc({BLOCK}) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, {BLOCK})
    for block in blocks:
        libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(ask: str, **environment: str) -> tuple[bool, int]:
    """Whether it was kept, and the page faults of taking 128 MB when as much was freed before, several times."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, ask], env=clean | environment, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_was_freed_is_used_again() -> None:
    (kept, with_it), (_, without) = faults("keep"), faults("leave")
    assert kept and with_it < without / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_the_environment_decides() -> None:
    kept, _ = faults("keep", MALLOC_ARENA_MAX="4")
    assert not kept
