"""Measure the worst errors of nbsoftmax, SciPy and torch on hard inputs of 1 to 10^7 elements.

python benchmarks/accuracy.py            # writes results/accuracy.json; some minutes
python benchmarks/tables.py              # puts it into docs/accuracy.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbsoftmax import _check, _machine

RESULT = Path(__file__).parent / "results" / "accuracy.json"

ITEMS = 1_000_000
# 2, 1000 and ITEMS are among the hard inputs.
LENGTHS = (1, 3, 7, 8, 9, 16, 17, 31, 64, 65, 10_000, 100_000, 10**7)


def _torch(name: str) -> Callable[..., Any]:
    function = getattr(torch, name)

    def call(x: _check.Array, axis: int) -> _check.Array:
        return function(torch.from_numpy(x), axis).numpy()

    return call


def inputs(dtype: str) -> Iterator[tuple[str, _check.Array]]:
    """Yield the main job's hard inputs, then lanes of every kind of length."""
    for name, x in _check.hard_inputs(dtype, ITEMS, ITEMS):
        yield name.replace("long", f"n = {ITEMS:,};"), x
    rng = np.random.default_rng(21)
    for n in LENGTHS:
        lanes = max(1, ITEMS // 4 // n)
        yield f"n = {n:,}; N(0, 1)", rng.standard_normal((lanes, n)).astype(dtype)
    yield f"n = {LENGTHS[-1]:,}; U(0, 0.01)", rng.uniform(0, 0.01, (1, LENGTHS[-1])).astype(dtype)


def main() -> None:
    """Measure, print as it goes, and write the result file."""
    wide = _check.widest()
    libraries = _check.libraries() | {"torch": {name: _torch(name) for name in _check.FUNCTIONS}}
    rows = []
    for dtype in ("float32", "float64"):
        for name, x in inputs(dtype):
            for row in _check.compare(name, x, wide, libraries):
                rows.append(row.as_dict())
                print(f"{name:24} {dtype} {row.function:12} {row.ulp}", flush=True)
    machine = _machine.machine() | {"reference": wide.name}
    machine["versions"]["torch"] = torch.__version__.partition("+")[0]
    text = json.dumps({"machine": machine, "accuracy": rows}, indent=1, allow_nan=False)
    RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
