"""The check and the timing on a CUDA device, through Numba's arrays."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nbsoftmax import _check
from nbsoftmax._check import Array
from nbsoftmax._timing import Axis, Throughput

_ROUNDS = 15
_CALLS = 10  # of each round, queued behind each other


def missing() -> str:
    """Say what a device lacks here to be used, or nothing."""
    try:
        importlib.import_module("nbsoftmax.cuda._run")
    except ImportError as error:
        return f"{error}: pip install 'nbsoftmax[cu13]', or cu12 for drivers of CUDA 12"
    return ""


def libraries() -> dict[str, dict[str, _check.Function]]:
    """Return the three functions on the device, for NumPy arrays that go there and come back."""
    functions = _check.libraries()["nbsoftmax"]
    return {"nbsoftmax": {name: partial(_there_and_back, f) for name, f in functions.items()}}


def _there_and_back(function: _check.Function, x: Array, axis: int) -> Any:
    from numba import cuda

    return function(cuda.to_device(x), axis=axis).copy_to_host()


@dataclass(frozen=True)
class Speed(Throughput):
    """How long one function takes on one array, and a copy of the array, both on the device."""

    shape: tuple[int, ...]
    axis: Axis
    dtype: str
    function: str
    out_s: float
    copy_s: float
    bytes: int  # x read once and the result written once
    copy_bytes: int


def measure(x: Array, axis: Axis) -> Iterator[Speed]:
    """Time the three functions on x, and its copy, in turn."""
    from numba import cuda

    there = cuda.to_device(np.ascontiguousarray(x))
    other = cuda.device_array(x.shape, x.dtype)
    for name, function in _check.libraries()["nbsoftmax"].items():
        out = function(there, axis=axis)
        candidates: tuple[Callable[[], object], ...] = (
            partial(function, there, axis=axis, out=out),
            partial(other.copy_to_device, there),
        )
        rounds = [[_seconds(call) for call in candidates] for _ in range(_ROUNDS)]
        ours, copy = map(statistics.median, zip(*rounds, strict=True))
        written = out.size * out.dtype.itemsize
        yield Speed(x.shape, axis, str(x.dtype), name, ours, copy, x.nbytes + written, 2 * x.nbytes)


def _seconds(call: Callable[[], object]) -> float:
    """Time of a call on the device, that of the host aside as far as it runs ahead."""
    from numba import cuda

    start, stop = cuda.event(), cuda.event()
    start.record()
    for _ in range(_CALLS):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / _CALLS
