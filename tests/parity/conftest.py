"""What the tests of parity share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def float64() -> Iterator[None]:
    """A test's modules and tensors are in float64 unless it says otherwise.

    In float32 the last digits are those of a processor's order of sums; in float64 a difference of more than
    `TOLERANCE` is one of the mathematics.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
