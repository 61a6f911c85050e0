"""One array, with all that the rows on it share: its yardsticks and the right answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

import nbsoftmax
from cases import Array, Regime, array
from nbsoftmax import _check, _timing
from peers import Made

# Results that differ by more are not of the same function. SciPy's and torch's lie up to some
# hundred units of the last place from the exact ones, and SciPy's sums of a million float64 numbers
# down an axis up to some thousand; half precision is rounded once.
_TOLERANCE_EPS = {2: 8, 4: 2000, 8: 10_000}
_EXACT_ITEMS = 2**16  # about as many are compared with extended precision
_EXACT_LENGTH = 2**21  # longer lanes would take it seconds
_PIECE_ITEMS = 2**16


class Deviation(NamedTuple):
    """Where a library's results differ by more, and why. It is timed all the same."""

    library: str
    where: Callable[[Problem], bool]
    why: str


DEVIATIONS = (
    Deviation(
        "SciPy", lambda p: p.x.dtype.kind == "u", "x - max in bytes: it wraps round below zero"
    ),
    Deviation("torch", lambda p: p.n >= 10**6, "a long sum loses digits"),
    Deviation("ONNX Runtime", lambda p: p.n >= 10**6, "a long sum loses digits"),
    Deviation("JAX", lambda p: p.dtype == "bfloat16", "computes in half precision"),
)


@dataclass(frozen=True)
class Yardstick:
    """What a call is compared with: copying x, or reading it."""

    name: str
    made: Made


class Problem:
    """An array of one regime and dtype."""

    def __init__(self, regime: Regime, dtype: str) -> None:
        self.regime, self.dtype = regime, dtype
        self.x = array(regime, dtype)
        axes = regime.axis if isinstance(regime.axis, tuple) else (regime.axis,)
        self._axes = tuple(i % self.x.ndim for i in axes)
        self.n = math.prod(self.x.shape[i] for i in self._axes)  # of one lane
        self._results: dict[str, Array] = {}

    @functools.cached_property
    def copy(self) -> Yardstick:
        """The limit of what writes as much as it reads."""
        flat = np.ascontiguousarray(self.x).ravel()
        return Yardstick("copy", Made(_timing.Copy()(flat, np.zeros_like(flat))))

    @functools.cached_property
    def read(self) -> Yardstick:
        """The limit of what writes one number a lane."""
        flat = np.ascontiguousarray(self.x).ravel()
        return Yardstick("read", Made(_timing.Read()(flat, flat)))

    def yardstick(self, op: str) -> Yardstick:
        """Choose by what the function writes."""
        return self.read if op == "logsumexp" else self.copy

    def result(self, op: str) -> Array:
        """Return nbsoftmax's result, some lanes of which were compared with the exact one."""
        if op not in self._results:
            result = np.asarray(getattr(nbsoftmax, op)(self.x, axis=self.regime.axis))
            self._results[op] = result
            if self.n <= _EXACT_LENGTH:
                self._compare_with_exact(op, result)
        return self._results[op]

    def _compare_with_exact(self, op: str, result: Array) -> None:
        kept = tuple(i for i in range(self.x.ndim) if i not in self._axes)
        shape = [self.x.shape[i] for i in kept]
        lanes = math.prod(shape)
        some = np.linspace(0, lanes - 1, min(lanes, max(1, _EXACT_ITEMS // self.n)), dtype=int)
        index = np.unravel_index(some, shape) if kept else ...
        x = self.x.transpose(kept + self._axes)[index].reshape(-1, self.n)
        want = getattr(_check.exact(x, _check.widest()), op)
        got = result if op == "logsumexp" else result.transpose(kept + self._axes)
        self._compare(op, got[index].reshape(want.shape), want.astype(np.float64))

    def deviation(self, peer: str) -> str:
        """Say why this peer's results may differ, or nothing."""
        found = [d.why for d in DEVIATIONS if peer.startswith(d.library) and d.where(self)]
        return "; ".join(found)

    def check(self, op: str, got: Array) -> None:
        """Fail unless a peer's result is nbsoftmax's, but for rounding."""
        self._compare(op, got, self.result(op))

    def _compare(self, op: str, got: Any, want: Array) -> None:
        info = _finfo(self.result(op).dtype)
        near = _TOLERANCE_EPS[self.result(op).dtype.itemsize] * float(info.eps)
        # Some libraries flush subnormal numbers; logarithms near 0 have no digits of their own.
        floor = 8 * float(info.smallest_normal) if op == "softmax" else near
        assert got.shape == want.shape
        # In pieces that fit the cache, which is several times faster.
        for start in range(0, got.size, _PIECE_ITEMS):
            piece = slice(start, start + _PIECE_ITEMS)
            a, b = (each.reshape(-1)[piece].astype(np.float64) for each in (got, want))
            np.testing.assert_allclose(a, b, rtol=near, atol=floor)


def _finfo(dtype: np.dtype[Any]) -> Any:
    if dtype.name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.finfo(dtype)
    return np.finfo(dtype)


@functools.lru_cache(maxsize=1)
def problem(regime: Regime, dtype: str) -> Problem:
    """Make a problem, or return it again: rows that follow each other share it."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return Problem(regime, dtype)
