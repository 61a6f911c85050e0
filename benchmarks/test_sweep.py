"""Time against the length of a lane, from 1 to 10^7, at a constant number of elements."""

import pytest

from cases import SWEEP_LENGTHS, SWEEP_OPS, SWEEP_PEERS, sweep
from nbsoftmax._timing import DTYPES
from problem import problem
from rounds import describe, in_turn, timed

pytestmark = timed


@pytest.mark.parametrize("peer", SWEEP_PEERS)
@pytest.mark.parametrize("op", SWEEP_OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("n", SWEEP_LENGTHS)
def test_time_against_n(
    n: int, axis: int, dtype: str, op: str, peer: str, benchmark, call_of, pytestconfig
) -> None:
    """A call's time on lanes of `n` elements."""
    regime = sweep(n, axis)
    this = problem(regime if benchmark.enabled else regime.small(), dtype)
    made = call_of(peer, this, op)
    describe(benchmark, this, op, peer, f"time against n: {op}, {dtype}, axis {axis}, n = {n:>8}")
    benchmark.extra_info["n"] = n
    in_turn(benchmark, pytestconfig, made, this.yardstick(op))
