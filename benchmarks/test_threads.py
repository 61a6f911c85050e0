"""How times fall with the number of threads."""

import contextlib
from collections.abc import Iterator
from functools import partial

import numba
import pytest

from cases import OPS, THREAD_REGIMES, Regime
from nbsoftmax import _machine
from nbsoftmax._timing import DTYPES
from problem import problem
from rounds import describe, in_turn, timed

pytestmark = timed

CORES = min(_machine.cores(), numba.config.NUMBA_NUM_THREADS)
COUNTS = sorted({2**k for k in range(CORES.bit_length())} | {CORES})


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("threads", COUNTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", THREAD_REGIMES, ids=lambda regime: regime.id)
def test_threads(
    regime: Regime, dtype: str, op: str, threads: int, benchmark, call_of, pytestconfig
) -> None:
    """The time with `numba.set_num_threads(threads)`; the yardstick runs on all cores."""
    this = problem(regime if benchmark.enabled else regime.small(), dtype)
    made = call_of("nbsoftmax out=", this, op)
    describe(benchmark, this, op, "nbsoftmax out=", f"threads: {op}, {dtype}, {regime}")
    benchmark.name = f"{threads} thread{'s' if threads > 1 else ''}"
    benchmark.extra_info["threads"] = threads
    in_turn(benchmark, pytestconfig, made, this.yardstick(op), partial(_threads, threads))
