"""What only a fresh process can tell: the time of an import or a first call, and peak memory.

The suite runs it: a request as JSON in the first argument, the answer as JSON on stdout.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any


def import_time(module: str) -> dict[str, float]:
    """Import a module into a process that has loaded next to nothing."""
    start = time.perf_counter()
    importlib.import_module(module)
    return {"seconds": time.perf_counter() - start}


def _made(peer: str, op: str, shape: list[int], axis: Any, dtype: str) -> tuple[Any, Any]:
    import numpy as np

    from peers import PEERS

    x = np.random.default_rng(7).standard_normal(shape, np.float32).astype(dtype)
    return x, PEERS[peer](op, x, tuple(axis) if isinstance(axis, list) else axis)


def first_call(**what: Any) -> dict[str, float]:
    """Time the process's first call, its library imported and its array made."""
    _, made = _made(**what)
    return {"seconds": made.seconds(1)}


def _status(field: str) -> int:
    """Read a number of bytes that Linux keeps of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def peak_memory(**what: Any) -> dict[str, float]:
    """Measure how far memory rises during a call, less what it returns."""
    x, made = _made(**what)
    made.call()  # compiles, loads, starts threads; what it returns is freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = _status("VmRSS")
    start = time.perf_counter()
    result = made.call()
    seconds = time.perf_counter() - start
    rise = _status("VmHWM") - before
    returned = 0 if what["peer"].endswith("out=") else made.to_numpy(result).nbytes
    return {"seconds": seconds, "peak_bytes": max(0, rise - returned), "x_bytes": x.nbytes}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    functions = {f.__name__: f for f in (import_time, first_call, peak_memory)}
    print(json.dumps(functions[request.pop("what")](**request)))
