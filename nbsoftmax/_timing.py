"""Speed: the case table, and interleaved timings against SciPy and a copy of the same array."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from nbsoftmax import _check, _cpu

Array = np.ndarray[Any, Any]
Axis = int | tuple[int, ...] | None


class Case(NamedTuple):
    """The shape of an array and the axis to reduce."""

    shape: tuple[int, ...]
    axis: Axis

    @property
    def items(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


CASES = (
    Case((4096, 4096), -1),
    Case((4096, 4096), 0),
    Case((1024, 64, 256), 1),
    Case((1, 2**24), -1),
    Case((2**20, 16), -1),
    Case((100_000, 10), -1),
    Case((128, 1000), -1),
    Case((1000, 1000), 0),
    Case((8, 8), -1),
)
DTYPES = ("float32", "float64")
QUICK_ITEMS = 2**21

_SECONDS = 0.25  # for one case, dtype and function
_MIN_ROUNDS, _MAX_ROUNDS = 3, 25
_SAMPLE_SECONDS = 1e-3  # calls shorter than this are repeated within one sample


class Throughput:
    """What follows from the bytes and the seconds of a call and of a copy."""

    bytes: int
    out_s: float
    copy_bytes: int
    copy_s: float
    derived: ClassVar[tuple[str, ...]] = ("gb_per_s", "percent_of_copy")

    @property
    def gb_per_s(self) -> float:
        """Bytes read and written per second with out=, in 10^9."""
        return self.bytes / self.out_s / 1e9

    @property
    def percent_of_copy(self) -> float:
        """Throughput with out=, in percent of the copy's."""
        return 100 * self.bytes / self.out_s / (self.copy_bytes / self.copy_s)

    def as_dict(self) -> dict[str, Any]:
        """Return the measured and the derived figures."""
        figures: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return figures | {name: getattr(self, name) for name in self.derived}


@dataclass(frozen=True)
class Speed(Throughput):
    """Median seconds of one call, for one case, dtype and function."""

    shape: tuple[int, ...]
    axis: Axis
    dtype: str
    function: str
    first_s: float  # first call in this process: compiles, or loads what was compiled before
    scipy_s: float
    nbsoftmax_s: float
    out_s: float  # with out=, so that no memory has to be fetched from the system
    copy_s: float  # of x, into an array in use
    bytes: int  # x read once and the result written once
    copy_bytes: int
    rounds: int

    derived: ClassVar[tuple[str, ...]] = ("speed_up", *Throughput.derived)

    @property
    def speed_up(self) -> float:
        """SciPy's time over nbsoftmax's, both returning a new array."""
        return self.scipy_s / self.nbsoftmax_s


class Copy:
    """The yardstick: x copied to out, by whatever does it fastest."""

    name = "np.copyto, or vector stores past the cache on all cores; the faster"

    def __call__(self, x: Array, out: Array) -> Callable[[], object]:
        """Return the call that copies x to out, both contiguous."""
        return _fastest(partial(np.copyto, out, x), _cpu.yardstick(x, out))


class Read(Copy):
    """The yardstick for one number a lane: x read, and nothing written."""

    name = "the maximum of x, on all cores"

    def __call__(self, x: Array, out: Array) -> Callable[[], object]:
        """Return the call that reads the contiguous x."""
        return _fastest(partial(np.max, x), _cpu.yardstick(x, None))


def _fastest(*calls: Callable[[], object]) -> Callable[[], object]:
    return min(calls, key=lambda call: min(_seconds(call, 1) for _ in range(5)))


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(x: Array, axis: Axis, copy: Copy) -> Iterator[Speed]:
    """Time the three functions on `x`, in rounds that go through all candidates in turn."""
    flat = np.ascontiguousarray(x).ravel()
    copied = copy(flat, np.zeros_like(flat))
    for function in _check.FUNCTIONS:
        ours, scipys = (functions[function] for functions in _check.libraries().values())
        start = time.perf_counter()
        result = ours(x, axis=axis)
        first_s = time.perf_counter() - start
        out = np.array(result)  # full reductions return a scalar
        candidates: tuple[Callable[[], object], ...] = (
            partial(scipys, x, axis=axis),
            partial(ours, x, axis=axis),
            partial(ours, x, axis=axis, out=out),
            copied,
        )
        calls = [1 + int(_SAMPLE_SECONDS / _seconds(call, 1)) for call in candidates]
        rounds: list[list[float]] = []
        stop = time.perf_counter() + _SECONDS
        while len(rounds) < _MAX_ROUNDS:
            rounds.append([_seconds(*pair) for pair in zip(candidates, calls, strict=True)])
            if len(rounds) >= _MIN_ROUNDS and time.perf_counter() > stop:
                break
        scipy_s, nbsoftmax_s, out_s, copy_s = map(statistics.median, zip(*rounds, strict=True))
        yield Speed(
            shape=x.shape,
            axis=axis,
            dtype=str(x.dtype),
            function=function,
            first_s=first_s,
            scipy_s=scipy_s,
            nbsoftmax_s=nbsoftmax_s,
            out_s=out_s,
            copy_s=copy_s,
            bytes=x.nbytes + out.nbytes,
            copy_bytes=2 * x.nbytes,
            rounds=len(rounds),
        )


def arrays(quick: bool) -> Iterator[tuple[Array, Axis]]:
    """Yield an array and an axis for each case and dtype; they share their memory."""
    cases = [case for case in CASES if not quick or case.items <= QUICK_ITEMS]
    rng = np.random.default_rng(7)
    values = 10 * rng.standard_normal(max(case.items for case in cases), np.float32)
    for dtype in DTYPES:
        x = values.astype(dtype)
        for case in cases:
            yield x[: case.items].reshape(case.shape), case.axis
