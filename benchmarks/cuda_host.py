"""Host time of a call on device arrays, in microseconds, without a GPU.

Usage: python benchmarks/cuda_host.py [--calls N]

Builds ``tests/fake_driver.c`` and runs itself again with that in the driver's place: kernels are
queued and do nothing, so that what is left is the time of Python, cuda.core and a quick driver.
Target: 3 us a call; 10 at most.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "fake_driver.c"
CHILD = "NBSOFTMAX_FAKE_DRIVER"
TARGET, LIMIT = 3.0, 10.0
Rows = list[tuple[str, float]]


def main() -> None:
    """Measure in a child process whose driver is the stand-in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000, help="calls of each timing")
    calls = parser.parse_args().calls
    if os.environ.get(CHILD):
        show(rows(calls))
        return
    with tempfile.TemporaryDirectory(prefix="nbsoftmax-") as folder:
        library = Path(folder) / "libcuda.so.1"
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        paths = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": str(ROOT)}
        env = {name: _before(path, name) for name, path in paths.items()} | {CHILD: "1"}
        env["NUMBA_ENABLE_CUDASIM"] = "0"
        command = [sys.executable, __file__, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, **env}).returncode)


def _before(path: str, name: str) -> str:
    return os.pathsep.join(filter(None, (path, os.environ.get(name))))


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call: the fastest of several timings, as noise only adds."""
    for _ in range(100):
        call()
    times = []
    for _ in range(20):
        times.append(timeit.timeit(call, number=calls))
        driver().fake_clear()
    return min(times) / calls * 1e6


def driver() -> ctypes.CDLL:
    """Load the stand-in."""
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_memory.restype = ctypes.c_uint64
    library.fake_memory.argtypes = ctypes.c_int, ctypes.c_size_t
    return library


class Array:
    """A device array of nobody's."""

    def __init__(self, shape: tuple[int, ...], size: int) -> None:
        place = driver().fake_memory(0, size), False
        self.interface = {"shape": shape, "typestr": "<f4", "data": place, "version": 3}

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface


def rows(calls: int) -> Rows:
    """Measure whole calls, then the parts of the first."""
    from cuda.core import Device

    from nbsoftmax import logsumexp, softmax

    driver().fake_record(0)
    Device(0).set_current()  # as in most programs
    x, out = (Array((64, 1024), 4 * 64 * 1024) for _ in range(2))
    mask = Array((64, 1024), 4 * 64 * 1024)
    mask.interface["typestr"] = "|b1"
    long = Array((2, 300_000), 4 * 2 * 300_000)
    whole: dict[str, Callable[[], Any]] = {
        "softmax(x, axis=-1)": lambda: softmax(x, axis=-1),
        "softmax(x, axis=-1, out=out)": lambda: softmax(x, axis=-1, out=out),
        "softmax(x, axis=-1, stream=1)": lambda: softmax(x, axis=-1, stream=1),
        "softmax(x, axis=0)": lambda: softmax(x, axis=0),
        "logsumexp(x, axis=-1)": lambda: logsumexp(x, axis=-1),
        "softmax(long, axis=-1), two kernels": lambda: softmax(long, axis=-1),
        "softmax(x, axis=-1, where=mask), packed": lambda: softmax(x, axis=-1, where=mask),
    }
    calls_of = {**whole, **shares(x, out)}
    return [(name, microseconds(call, calls)) for name, call in calls_of.items()]


def shares(x: Array, out: Array) -> dict[str, Callable[[], Any]]:
    """Take the first call apart."""
    from nbsoftmax._semantics import on_cuda
    from nbsoftmax.cuda import _arrays, _device, _run

    a = _arrays.view(x, "x")
    device = _device._device(0, _arrays.LEGACY)
    key = "softmax", a.shape, a.strides, a.format, -1, False, a.address % 16, None, 0
    call = _run._call(*key, device.clusters)
    assert call is not None
    places = x.interface["data"][0], out.interface["data"][0]
    call.run(device, *places)
    (step,) = call.steps
    config, kernel = device.prepared(step.job, step.units)
    numbers = places + step.numbers
    from cuda.core import launch

    return {
        "  finding the backend": lambda: on_cuda(x),
        "  parsing x": lambda: _arrays.view(x, "x"),
        "  its device, from its address": lambda: _device.number(a, "x"),
        "  that it is the current one": device.enter,
        "  looking the plan up": lambda: _run._call(*key, device.clusters),
        "  memory of the result (made and freed)": lambda: device.memory(a.size * 4),
        "  the result (memory and object)": lambda: _arrays.kind_of(x).new(
            x, call.shape, a.format, call.order, device
        ),
        "  launching": lambda: call.run(device, *places),
        "    of which cuda.core.launch": lambda: launch(device.stream, config, kernel, *numbers),
    }


def show(measured: Rows) -> None:
    """Print the table."""
    width = max(len(name) for name, _ in measured)
    print(f"host time of a call, us (target {TARGET:g}, at most {LIMIT:g})\n")
    for name, time in measured:
        above = "  above the limit" if time > LIMIT and not name.startswith(" ") else ""
        print(f"{name:{width}}  {time:7.2f}{above}")


if __name__ == "__main__":
    main()
