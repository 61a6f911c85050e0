"""The mathematics run by NumPy: for merging a few pairs, and for a process without a compiler."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _scalars
from ._scalars import Real
from ._semantics import LOGSUMEXP, SOFTMAX

Array = np.ndarray[Any, Any]


class Operations:
    """What `_scalars` asks of a machine, on NumPy arrays of one float format."""

    def __init__(self, real: Real) -> None:
        self.real = real
        self.dtype = np.dtype(real.name)
        self.bits = np.dtype(f"i{real.itemsize}")

    def const(self, value: float) -> Any:
        return self.dtype.type(value)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return np.where(condition, a, b)

    def larger(self, a: Any, b: Any) -> Any:
        return np.where(a > b, a, b)

    def usually(
        self, condition: Any, usual: Callable[[], list[Any]], otherwise: Callable[[], list[Any]]
    ) -> list[Any]:
        """What ``usual`` gives where the condition holds, else what ``otherwise`` gives."""
        return [self.where(condition, a, b) for a, b in zip(usual(), otherwise(), strict=True)]

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c`` with the product exact, as the fused instruction has it."""
        if self.real.itemsize == 4:
            return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)
        product = a * b
        split = self.const(134217729.0)  # 2^27 + 1
        a_high = split * a - (split * a - a)
        b_high = split * b - (split * b - b)
        a_low, b_low = a - a_high, b - b_high
        rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
        total, lost = _scalars.two_sum(product, c)
        return total + (lost + rest)

    def power_of_two(self, t: Any) -> Any:
        return (t.view(self.bits) << self.real.mantissa).view(self.dtype)

    def exp2(self, t: Any) -> Any:
        return _scalars.exp2(self, t)

    def split_exponent(self, u: Any) -> tuple[Any, Any]:
        fraction, k = np.frexp(u)
        small = fraction < np.sqrt(0.5)
        return (k - small).astype(self.dtype), np.where(small, 2 * fraction, fraction)

    def times_power_of_two(self, a: Any, k: Any) -> Any:
        return np.ldexp(a, k.astype(np.int32))


@functools.cache
def operations(real: Real) -> Operations:
    return Operations(real)


def sum_pairs(s: Array, c: Array) -> tuple[Array, Array]:
    """Merge all pairs of one scale along axis 1, as a tree."""
    while s.shape[1] > 1:
        half = s.shape[1] // 2
        odd = s[:, 2 * half :], c[:, 2 * half :]
        s, c = _scalars.merge(
            s[:, :half], c[:, :half], s[:, half : 2 * half], c[:, half : 2 * half]
        )
        if odd[0].shape[1]:
            s, c = np.concatenate([s, odd[0]], 1), np.concatenate([c, odd[1]], 1)
    return s[:, 0], c[:, 0]


def pairs(o: Operations, x: Array, weights: Array | None = None) -> tuple[Array, Array, Array]:
    """M and the two parts of the sum of all terms but one largest, for every row.

    With weights, of all terms.
    """
    m = x.max(axis=1, initial=-np.inf, where=~np.isnan(x))
    by = _scalars.scale(o, m[:, None])
    one = np.ones_like(x) if weights is None else weights
    largest = x == m[:, None]
    near = _scalars.shifted(o, x, m[:, None], by)
    terms = _scalars.exp_two_parts(o, near, by, o.const(0.0), largest, one)
    s, c = sum_pairs(*terms)
    count = (largest * one).sum(axis=1)
    join = _scalars.with_equals if weights is None else _scalars.with_largest
    return m, *join(o, m, count, s, c)


def run(op: str, rows: Array) -> Array:
    """One op on rows, for a process without a compiler."""
    result = rows.dtype
    o = operations(_scalars.FLOAT64 if result == np.float64 else _scalars.FLOAT32)
    x = rows.astype(o.dtype)
    with np.errstate(all="ignore"):
        m, s, c = pairs(o, x)
        if op == LOGSUMEXP:
            value = _scalars.logsumexp(o, m, s, c)
        elif op == SOFTMAX:
            high, low = _scalars.reciprocal(o, m, *_scalars.whole(o, m, s, c))
            by = _scalars.scale(o, m[:, None])
            terms = _scalars.exp(o, _scalars.shifted(o, x, m[:, None], by), by)
            value = _scalars.softmax(o, terms, high[:, None], low[:, None])
        else:
            log, _ = _scalars.log_sum(o, m, s, c)
            value = _scalars.log_softmax(x, m[:, None], log[:, None])
        return np.asarray(value).astype(result)
