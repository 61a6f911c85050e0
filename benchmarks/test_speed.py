"""Times of every function on every array by every peer, beside a copy or a read of the array."""

import pytest

from cases import OPS, REGIMES, SHARED, Regime
from peers import PEERS, SHARED_ONLY
from problem import problem
from rounds import describe, in_turn, timed

pytestmark = timed

ROWS = [
    pytest.param(regime, dtype, op, peer, id=f"{regime.id}-{dtype}-{op}-{peer.replace(' ', '_')}")
    for regime in REGIMES
    for dtype in regime.dtypes
    for op in OPS
    for peer in PEERS
    if regime in SHARED or peer not in SHARED_ONLY
]


@pytest.mark.parametrize(("regime", "dtype", "op", "peer"), ROWS)
def test_speed(
    regime: Regime, dtype: str, op: str, peer: str, benchmark, call_of, pytestconfig
) -> None:
    """A call's time; its result is compared first."""
    this = problem(regime if benchmark.enabled else regime.small(), dtype)
    made = call_of(peer, this, op)
    describe(benchmark, this, op, peer, f"{op}, {dtype}, {regime}")
    in_turn(benchmark, pytestconfig, made, this.yardstick(op))
