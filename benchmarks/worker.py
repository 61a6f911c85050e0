"""Calls SciPy in a Python of its own, at the suite's request: one JSON object a line, both ways.

Nothing but NumPy and SciPy is imported: the other Python has no more.
"""

from __future__ import annotations

import json
import sys
import timeit
import warnings
from functools import partial

import numpy as np
import scipy.special


def main() -> None:
    """Say which SciPy this is; then load arrays, time calls and save results as asked."""
    warnings.simplefilter("ignore")
    print(json.dumps({"SciPy": scipy.__version__, "NumPy": np.__version__}), flush=True)
    x = call = None
    for line in sys.stdin:
        request = json.loads(line)
        answer = {}
        if "load" in request:
            x = np.load(request["load"])
        if "op" in request:
            axis = request["axis"]
            axis = tuple(axis) if isinstance(axis, list) else axis
            call = partial(getattr(scipy.special, request["op"]), x, axis=axis)
        if "save" in request:
            np.save(request["save"], call())
        if "calls" in request:
            calls = request["calls"]
            answer["seconds"] = timeit.timeit(call, number=calls) / calls
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
