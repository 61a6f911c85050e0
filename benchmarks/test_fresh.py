"""What a fresh process sees: import time, cold and warm first calls, peak memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cases import MEMORY_OPS, MEMORY_REGIMES, Regime
from problem import problem
from rounds import run, timed

pytestmark = timed

CHILD = Path(__file__).with_name("child.py")
ROUNDS = 3
IMPORTED = ("nbsoftmax", "numba", "scipy.special", "torch", "jax", "onnxruntime")
# One array for each kind of kernel, small enough that compiling is what takes time.
FIRST = (
    ("softmax", (1000, 1000), -1, "float32"),
    ("softmax", (1000, 1000), 0, "float32"),
    ("softmax", (1000, 10), -1, "float32"),
    ("logsumexp", (1000, 1000), -1, "float64"),
)
MEMORY_PEERS = ("nbsoftmax", "nbsoftmax out=", "SciPy", "torch", "torch out=")


def ask(cache: Path | None = None, **request: Any) -> dict[str, float]:
    """Ask a fresh process, whose compiled kernels are kept in `cache`."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if cache is not None:
        env["NUMBA_CACHE_DIR"] = str(cache)
    command = [sys.executable, CHILD, json.dumps(request)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", IMPORTED)
def test_import(module: str, benchmark) -> None:
    """Time an import, files in the system's cache."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed: pip install '.[bench]'")
    benchmark.group, benchmark.name = "import time", f"import {module}"
    benchmark.extra_info |= {"peer": module}

    def sample() -> float:
        return ask(what="import_time", module=module)["seconds"]

    run(benchmark, sample, ROUNDS)


@pytest.mark.parametrize(
    ("op", "shape", "axis", "dtype"), FIRST, ids=lambda value: str(value).replace(" ", "")
)
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_first_call(
    cache: str, op: str, shape: tuple[int, ...], axis: int, dtype: str, benchmark, tmp_path
) -> None:
    """Time the first call: it compiles, or it loads what an earlier process compiled."""
    call = {"peer": "nbsoftmax", "op": op, "shape": shape, "axis": axis, "dtype": dtype}
    benchmark.group = f"first call, {cache} cache"
    benchmark.name = f"{op}, {dtype}, {shape}, axis {axis}"
    benchmark.extra_info |= call | {"cache": cache}
    folders = (tmp_path / str(i) for i in range(ROUNDS + 1))
    warm = tmp_path / "warm"
    if cache == "warm":
        ask(warm, what="first_call", **call)

    def sample() -> float:
        return ask(warm if cache == "warm" else next(folders), what="first_call", **call)["seconds"]

    run(benchmark, sample, ROUNDS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("peer", MEMORY_PEERS)
@pytest.mark.parametrize("op", MEMORY_OPS)
@pytest.mark.parametrize("regime", MEMORY_REGIMES, ids=lambda regime: regime.id)
def test_peak_memory(regime: Regime, op: str, peer: str, benchmark, call_of) -> None:
    """Measure how far memory rises during a call, beyond the input and the result."""
    small = regime.small()
    call_of(peer, problem(small, "float32"), op)  # skips what the peer lacks
    shape = (regime if benchmark.enabled else small).shape
    call = {"peer": peer, "op": op, "shape": shape, "axis": regime.axis, "dtype": "float32"}
    benchmark.group, benchmark.name = f"peak memory: {op}, float32, {regime}", peer
    benchmark.extra_info |= call
    benchmark.extra_info |= {"out": peer.endswith("out="), "peer": peer.removesuffix(" out=")}

    def sample() -> float:
        answer = ask(what="peak_memory", **call)
        benchmark.extra_info["peak_bytes"] = answer["peak_bytes"]
        benchmark.extra_info["percent_of_x"] = 100 * answer["peak_bytes"] / answer["x_bytes"]
        return answer["seconds"]

    run(benchmark, sample, rounds=1)
