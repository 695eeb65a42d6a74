"""Runs a script with float64 wherever it asks for float32: python tests/end_to_end/float64.py train.py ARGUMENTS.

Losses in float32 depend on the processor: vector registers of other widths add numbers in another order, and Adam's
first steps are the signs of gradients, some of which are zero but for rounding. In float64 they agree to far better
than 1e-6. `trainer.precision=64-true` alone is not enough: the second stage casts to float32 in between.
"""

import runpy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

READS_BYTES = {torch.frombuffer, torch.Tensor.view}  # here a dtype says what the bytes are


class Float64(TorchFunctionMode):
    """Functions of torch that are called with float32 as the dtype to return are called with float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func not in READS_BYTES:
            args = tuple(map(_wider, args))
            kwargs = {name: _wider(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def main() -> None:
    """Runs the script named by the first argument, with the arguments behind it."""
    del sys.argv[0]
    torch.set_default_dtype(torch.float64)
    with Float64():
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
