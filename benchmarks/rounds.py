"""One row of the suite: rounds in which a yardstick and a call take turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from nbsoftmax import _machine
from peers import Made
from problem import Problem, Yardstick

_SAMPLE_SECONDS = 1e-3  # calls shorter than this are repeated within one sample
_SHORT_SECONDS = 10e-3  # and those shorter than this run once untimed: caches, threads that slept
_SETTLE_SECONDS = 50e-3  # ONNX Runtime's threads spin for 45 ms after a call, torch's for 8
_MOST_ROUNDS = 15
_MACHINE = "{cpu}, {cores} cores, {simd}".format(**_machine.machine())


class Clock:
    """A timer that moves by what was measured, be it here or in another process.

    pytest-benchmark takes each round's seconds from it. So a round may hold a yardstick, calls that
    warm up, and calls that are repeated, and the statistics are still seconds of one call.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


CLOCK = Clock()
timed = pytest.mark.benchmark(timer=CLOCK)


def run(
    benchmark: Any,
    sample: Callable[[], float],
    rounds: int,
    setup: Callable[[], None] | None = None,
) -> list[float]:
    """Have pytest-benchmark record `sample()`, the seconds of one call, in each round."""
    seconds = []

    def measure() -> None:
        seconds.append(sample())
        CLOCK.now += seconds[-1]

    benchmark.pedantic(measure, setup=setup, rounds=rounds)
    return seconds


class _Pace(NamedTuple):
    """How a call is sampled: `calls` at a time, after an untimed one if it is short."""

    calls: int = 1
    seconds: float = 0.0
    warm_up: bool = False

    def sample(self, made: Made) -> float:
        """Return the seconds of one call."""
        if self.warm_up:
            made.call()
        return made.seconds(self.calls)


def _pace(made: Made) -> _Pace:
    """Find out how long a call takes, which was made before; short ones settle down slowly."""
    one = made.seconds(1)
    if one < _SHORT_SECONDS:
        one = min(made.seconds(1) for _ in range(3))
    calls = 1 + int(_SAMPLE_SECONDS / one)
    return _Pace(calls, calls * one, one < _SHORT_SECONDS)


def in_turn(
    benchmark: Any,
    config: pytest.Config,
    made: Made,
    yardstick: Yardstick,
    during: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Time a call and, next to it in each round, the yardstick."""
    pace = limit_pace = _Pace()
    rounds = 1
    if benchmark.enabled:
        limit_pace = _pace(yardstick.made)
        with during():
            pace = _pace(made)
        budget = float(config.getoption("benchmark_max_time"))
        fitting = int(budget / (pace.seconds + limit_pace.seconds + _SETTLE_SECONDS))
        rounds = max(config.getoption("benchmark_min_rounds"), min(fitting, _MOST_ROUNDS))
    limits = []

    def setup() -> None:
        time.sleep(_SETTLE_SECONDS)
        limits.append(limit_pace.sample(yardstick.made))

    def sample() -> float:
        with during():
            return pace.sample(made)

    seconds = run(benchmark, sample, rounds, setup)
    ratios = [limit / second for limit, second in zip(limits, seconds, strict=True)]
    benchmark.extra_info |= {
        "calls_per_round": pace.calls,
        "gb_per_s": benchmark.extra_info["bytes"] / statistics.median(seconds) / 1e9,
        "yardstick": yardstick.name,
        f"percent_of_{yardstick.name}": 100 * statistics.median(ratios),
    }


def describe(benchmark: Any, problem: Problem, op: str, peer: str, group: str) -> None:
    """Name the row for people, and say all that identifies it for programs."""
    benchmark.group, benchmark.name = group, peer
    axis = problem.regime.axis
    benchmark.extra_info |= {
        "op": op,
        "dtype": problem.dtype,
        "shape": list(problem.regime.shape),
        "axis": list(axis) if isinstance(axis, tuple) else axis,
        "pitch": problem.regime.pitch,
        "peer": peer.removesuffix(" out="),
        "out": peer.endswith("out="),
        "bytes": problem.x.nbytes + problem.result(op).nbytes,  # read once and written once
        "machine": _MACHINE,
    }
    if problem.deviation(peer):
        benchmark.extra_info["deviates"] = problem.deviation(peer)
