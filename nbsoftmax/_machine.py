"""What stands beside every figure: date, versions, cores, SIMD, threads, CUDA devices."""

from __future__ import annotations

import ctypes
import datetime
import importlib
import os
import platform
import sys
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np
import scipy

import nbsoftmax
from nbsoftmax import _pool

# Widest first: (name, LLVM features that make it up, bits).
_SIMD = (
    ("AVX-512", ("avx512f", "avx512dq", "avx512vl"), 512),
    ("AVX2 and FMA", ("avx2", "fma"), 256),
    ("SVE", ("sve",), 128),  # LLVM's fixed-length code uses its guaranteed 128 bits
    ("NEON", ("neon",), 128),
    ("SSE2", ("sse2",), 128),
)


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def simd() -> str:
    """Name the widest vector instructions that LLVM sees on this machine."""
    features = llvmlite.binding.get_host_cpu_features()
    for name, needed, bits in _SIMD:
        if all(features.get(feature) for feature in needed):
            return f"{name} ({bits} bits)"
    return "none known"


def threading_layers() -> list[str]:
    """List Numba's threading layers that load here."""
    found = []
    for layer, module in (("tbb", "tbbpool"), ("omp", "omppool"), ("workqueue", "workqueue")):
        try:
            importlib.import_module(f"numba.np.ufunc.{module}")
        except ImportError:
            continue
        found.append(layer)
    return found


def cuda_devices() -> list[str]:
    """Name the CUDA devices that the driver reports; none where there is no driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for ordinal in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        if not driver.cuDeviceGet(ctypes.byref(device), ordinal):
            driver.cuDeviceGetName(name, len(name), device)
            names.append(name.value.decode(errors="replace"))
    return names


def machine() -> dict[str, Any]:
    """Describe this machine and what runs on it."""
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {
            "nbsoftmax": nbsoftmax.__version__,
            "Python": platform.python_version(),
            "NumPy": np.__version__,
            "SciPy": scipy.__version__,
            "Numba": numba.__version__,
            "llvmlite": llvmlite.__version__,
        },
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": llvmlite.binding.get_host_cpu_name(),
        "cores": cores(),
        "simd": simd(),
        "threads": _pool.thread_count(),
        "numba_threading_layers": threading_layers(),
        "cuda_devices": cuda_devices(),
    }
