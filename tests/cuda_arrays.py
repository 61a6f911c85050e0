"""CUDA arrays for the tests: on a GPU where there is one, else in Numba's simulator.

Imported before Numba is (by the package of the tests), which asks once whether it shall simulate.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from typing import Any

import numpy as np
import pytest

from . import cases

LIBRARIES = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}


def _has_gpu() -> bool:
    try:
        driver = ctypes.CDLL(LIBRARIES.get(sys.platform, ""))
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 < count.value


def _missing() -> str:
    """Why CUDA arrays cannot be tested here, or nothing."""
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed: pip install 'nbsoftmax[cu13]'"
    return ""


MISSING = _missing()
SIMULATED = not MISSING and not _has_gpu()
if SIMULATED:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"


def share_arrays_for_good() -> None:
    """Mend the simulator's shared memory, where threads that come at once get an array each.

    It looks whether the block has the array of a line of code, and makes it then.
    """
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    def array(self: Any, shape: Any, dtype: Any) -> Any:
        line = sys._getframe(1)
        place = line.f_code.co_filename, line.f_lineno
        return self._allocations.setdefault(place, np.empty(shape, dtype))

    FakeCUDAShared.array = array


def report(share: int) -> str:
    """How CUDA arrays are tested, for the head of the test run."""
    if MISSING:
        return f"CUDA arrays: not tested, {MISSING}"
    if SIMULATED:
        return f"CUDA arrays: in Numba's simulator, there is no GPU; one of {share} cases"
    from cuda.core import Device

    return f"CUDA arrays: on {Device(0).name}"


# What the regimes of cases.REGIMES are here: tables of small tiles, for small inputs. The simulator
# pays for each thread, and little for the numbers it holds.
_FEW = {
    "block": 1,
    "across": 2,
    "rows": ((1, 1), (1, 8), (2, 8), (8, 8)),
    "columns": ((1, 8), (2, 8), (8, 8)),
    "clusters": (2,),
    "long_rows": (4, 8),
    "long_columns": (4, 8),
}
_CUT = {
    "rows": ((1, 1), (4, 1)),
    "columns": ((1, 1), (2, 2)),
    "clusters": (),
    "long_rows": (4, 2),
    "long_columns": (4, 2),
    "chunk_tiles": 1,
    "blocks": 16,
}
_SMALL = _FEW if SIMULATED else {}
REGIMES: dict[str, dict[str, Any]] = {
    "default": _SMALL,
    "whole_lanes": {**_SMALL, "columns": ((1, 2), (8, 8)), "rows": ((4, 1), (16, 8))},
    "blocks": {**_SMALL, **_CUT},
    "in_pieces": {**_SMALL, "rows": ((2, 1), (4, 4)), "clusters": (2, 4)},
    "past_cache": {**_SMALL, "across": 4, "rows": ((1, 2), (16, 8))},
    "beside_past_cache": {**_SMALL, "rows": ((2, 4), (8, 4))},
    "packed": {**_SMALL, "held_float32": 8, "held_float64": 8},
    "blocks_in_pieces_past_cache": {**_SMALL, **_CUT, "across": 4, "blocks": 3},
}
assert set(REGIMES) == set(cases.REGIMES)


@contextlib.contextmanager
def using(regime: str):
    """The tables of one regime."""
    if MISSING:
        yield
        return
    from nbsoftmax.cuda import _plan

    with _plan.using(**REGIMES[regime]):
        yield


class Lent:
    """Device memory with a NumPy array's values and strides, as any library might offer it."""

    def __init__(self, array: np.ndarray) -> None:
        from numba import cuda

        low, high = np.lib.array_utils.byte_bounds(array)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * max(high - low, 1)).from_address(low))
        self.memory = cuda.to_device(raw.copy())
        place = self.memory.__cuda_array_interface__["data"][0]
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": array.dtype.str,
            "data": (place + array.__array_interface__["data"][0] - low, not array.flags.writeable),
            "version": 3,
        }

    def fetch(self, array: np.ndarray) -> None:
        """Copy back to the NumPy array."""
        low, high = np.lib.array_utils.byte_bounds(array)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * max(high - low, 1)).from_address(low))
        raw[...] = self.memory.copy_to_host()


def put(value: Any, as_array: bool = True) -> Any:
    """Anything that NumPy takes as an array on the device; bytes that it shares stay shared."""
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, (bool, int, float)) and not as_array:
        return value
    array = np.asarray(value)
    if array.size and not array.flags.aligned:
        pytest.skip("a device knows no numbers off their own multiples")
    if SIMULATED:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        return FakeCUDAArray(array)
    return Lent(array)


def fetch(given: Any, out: np.ndarray) -> None:
    """Have what was written to ``given`` in ``out``."""
    if not SIMULATED:
        given.fetch(out)


def get(result: Any) -> Any:
    """A result as NumPy's; without axes, a scalar as NumPy would have it."""
    if isinstance(result, tuple):
        return tuple(get(part) for part in result)
    if isinstance(result, np.ndarray):
        return result
    if SIMULATED:
        array = result._ary
    else:
        from numba import cuda

        array = cuda.as_cuda_array(result).copy_to_host()
    return array if array.ndim else array[()]
