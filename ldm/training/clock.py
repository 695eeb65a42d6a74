"""The clock that training is timed by."""

import time

import torch


def now_s() -> float:
    """Seconds on the clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
