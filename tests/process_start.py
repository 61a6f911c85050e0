"""The first call of a process, and what it costs: printed as JSON.

Arguments: a function, a dtype.  What the call compiles and imports beyond `import numba` is its
cause; the times are for the reader, no test depends on them.
"""

import json
import sys
import time

started = time.perf_counter()
import numba  # noqa: E402
from numba.core import event  # noqa: E402

numba_imported = time.perf_counter()
modules = set(sys.modules)

with (
    event.install_recorder("numba:compile") as compilations,
    event.install_recorder("numba:run_pass") as passes,
):
    import numpy as np

    import nbsoftmax

    # However long it takes, the second call follows closely on the first, and wakes helpers.
    nbsoftmax._pool.CLOSELY_NS = 1 << 62
    imported = time.perf_counter()
    x = np.linspace(-80, 80, 400_000).astype(sys.argv[2]).reshape(400, 1000)[:, ::-1].copy()
    made = time.perf_counter()
    result = getattr(nbsoftmax, sys.argv[1])(x, axis=-1)
    called = time.perf_counter()
    modules = set(sys.modules) - modules
    getattr(nbsoftmax, sys.argv[1])(x, axis=-1)

report = {
    "compiled": [
        event_.data["dispatcher"].py_func.__name__
        for _, event_ in compilations.buffer
        if event_.is_start
    ],
    "passes": len(passes.buffer) // 2,
    "modules": sorted(modules),
    "result": result.ravel()[:: result.size // 50].tolist(),
    "import numba, s": numba_imported - started,
    "import nbsoftmax, s": imported - numba_imported,
    "first call, s": called - made,
    "numba": numba.__version__,
}
print(json.dumps(report))
