"""What the exact answer is, and how far a result lies from it.

`exact` works in extended precision (float64 for 32-bit input, longdouble for float64),
`exact_digits` in mpmath with 60 digits. Both state the contract's rules for NaN and infinities;
neither shares a line with the package. `test_oracle.py` holds the fast one against the slow one,
and both against a table of answers written by hand.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import mpmath
import numpy as np
import pytest

from .cases import BEFORE_ROUNDING_ULP, BUDGET_ULP, ROUNDING_ULP

DIGITS = 60

# The fast oracle needs more bits than float64 has. Where longdouble has none (MSVC, macOS on ARM)
# the tests that ask it about float64 are skipped.
LONGDOUBLE_IS_WIDER = np.finfo(np.longdouble).nmant >= 63


class Format(NamedTuple):
    """A binary floating-point format; exponents in the convention of frexp."""

    digits: int  # significant bits
    emin: int  # the smallest normal number is 2**(emin - 1)
    emax: int  # every finite number is below 2**emax


@functools.cache
def format_of(dtype) -> Format:
    dtype = np.dtype(dtype)
    if dtype.name == "bfloat16":
        return Format(8, -125, 128)
    info = np.finfo(dtype)
    return Format(info.nmant + 1, int(info.minexp) + 1, int(info.maxexp))


def wide(x: np.ndarray) -> np.ndarray:
    """x in a format with at least 10 bits more than its own; no value changes."""
    if x.dtype.name in ("float16", "bfloat16", "float32"):
        return x.astype(np.float64)
    return x.astype(np.longdouble)


def ulp(value, dtype) -> np.ndarray:
    """The spacing of `dtype` at |value|: the smallest subnormal from 0 up to the normal numbers."""
    digits, emin, _ = format_of(dtype)
    value = np.abs(np.asarray(value, dtype=np.longdouble))
    _, exponent = np.frexp(np.where(np.isfinite(value), value, 1))
    exponent = np.where(value == 0, emin, np.maximum(exponent, emin))
    return np.ldexp(np.longdouble(1), exponent - digits)


def ulp_error(got, exact, dtype, scale=None) -> np.ndarray:
    """|got - exact| in ulp of `dtype` at max(|exact|, |scale|); infinite where a NaN or an infinity
    is on one side only.

    An infinity counts as the number after the largest finite one, so that a result beyond the range
    may, and must, round to it.
    """
    _, _, emax = format_of(dtype)
    top = np.ldexp(np.longdouble(1), emax)
    got = np.asarray(got).astype(np.longdouble)
    exact = np.asarray(exact, dtype=np.longdouble)
    with np.errstate(all="ignore"):
        reference = np.clip(exact, -top, top)
        value = np.clip(got, -top, top)
        size = np.minimum(np.abs(reference), top * 0.5)
        if scale is not None:
            size = np.maximum(size, np.abs(np.asarray(scale, dtype=np.longdouble)))
        error = np.abs(value - reference) / ulp(size, dtype)
    error = np.where(np.isnan(reference) & np.isnan(got), 0, error)
    error = np.where(np.isinf(exact), np.where(got == exact, 0, np.inf), error)
    return np.where(np.isnan(error), np.inf, error)


# ------------------------------------------------------------------------- the fast oracle


def _difference(a, b):
    """a - b as an unevaluated sum of two numbers (Knuth's TwoDiff); exact unless it overflows."""
    high = a - b
    back = high - a
    low = (a - (high - back)) - (b + back)
    return high, np.where(np.isfinite(low), low, 0)


def exact(op, x, axis=None, where=None, keepdims=False):
    """The exact answer to about 2**-60 (2**-40 for 32-bit and 16-bit input).

    The rules of the contract: a NaN or +inf spoils its lane, so does a lane of nothing but -inf;
    hidden elements count as -inf; a lane that is wholly hidden gives 0, -inf, -inf.
    """
    return Lanes.of(x, axis, where).answer(op, keepdims)


class Lanes(NamedTuple):
    """What the three answers have in common, so that long arrays are gone through once."""

    high: np.ndarray  # x - max, two parts
    low: np.ndarray
    top: np.ndarray  # max, keepdims
    total: np.ndarray  # sum of exp(x - max)
    log_total: np.ndarray
    hidden_lane: np.ndarray | None
    axis: tuple[int, ...]

    @classmethod
    def of(cls, x, axis=None, where=None) -> Lanes:
        x = wide(np.asarray(x))
        if x.dtype == np.longdouble and not LONGDOUBLE_IS_WIDER:
            pytest.skip("longdouble is no wider than float64 here")
        axis = _axes(axis, x.ndim)
        hidden_lane = None
        if where is not None:
            where = np.broadcast_to(where, x.shape)
            x = np.where(where, x, -np.inf)
            hidden_lane = ~where.any(axis=axis, keepdims=True)
        with np.errstate(all="ignore"):
            top = x.max(axis=axis, keepdims=True)
            high, low = _difference(x, top)
            e = np.exp(high)
            ties = np.count_nonzero(high == 0, axis=axis, keepdims=True)
            small = _sum(np.where(high == 0, 0, e + e * low), axis)
            log_total = np.log1p((ties - 1) + small)
        return cls(high, low, top, ties + small, log_total, hidden_lane, axis)

    def answer(self, op, keepdims=False):
        with np.errstate(all="ignore"):
            if op == "softmax":
                e = np.exp(self.high)
                result, hidden = (e + e * self.low) / self.total, 0.0
            elif op == "log_softmax":
                result, hidden = (self.high - self.log_total) + self.low, -np.inf
            else:
                infinite = np.isinf(self.top)
                result = np.where(infinite, self.top, self.top + self.log_total)
                hidden = -np.inf
        if self.hidden_lane is not None:
            result = np.where(self.hidden_lane, hidden, result)
        if op == "logsumexp" and not keepdims:
            result = np.squeeze(result, axis=self.axis)
        return result

    def scale(self, op, keepdims=False):
        """What the budget of `op` is measured in besides the result: max a, for logsumexp."""
        if op != "logsumexp":
            return None
        top = np.where(np.isfinite(self.top), self.top, 0)
        return top if keepdims else np.squeeze(top, axis=self.axis)


def _sum(x, axis):
    """The sum over the axes, kept as ones; along a contiguous axis NumPy sums pairwise."""
    last = np.moveaxis(x, axis, range(x.ndim - len(axis), x.ndim))
    kept = last.shape[: x.ndim - len(axis)]
    n = math.prod(last.shape[x.ndim - len(axis) :])
    return (
        np.ascontiguousarray(last)
        .reshape(*kept, n)
        .sum(-1)
        .reshape([1 if dim in axis else size for dim, size in enumerate(x.shape)])
    )


def _axes(axis, ndim):
    if axis is None:
        return tuple(range(ndim))
    if isinstance(axis, int):
        axis = (axis,)
    return tuple(a % ndim for a in axis)


# ------------------------------------------------------------------------- the verdict


def result_dtype(dtype) -> np.dtype:
    """The dtype of the result: the input's in native byte order; float64 for integers and bool."""
    dtype = np.dtype(dtype)
    return dtype.newbyteorder("=") if dtype.kind in "fV" else np.dtype(np.float64)


def assert_right(op, got, x, axis=None, where=None, keepdims=False, lanes=None, budget=None):
    """`got` has the right type, dtype and shape, and no element is off by more than the budget."""
    dtype = result_dtype(np.asarray(x).dtype)
    lanes = Lanes.of(np.asarray(x).astype(dtype), axis, where) if lanes is None else lanes
    expected = lanes.answer(op, keepdims)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert isinstance(got, np.generic if got.ndim == 0 else np.ndarray)
    assert_close(op, got, expected, lanes.scale(op, keepdims), budget=budget)


def assert_close(op, got, expected, scale=None, budget=None):
    """No element of `got` is off by more than the budget of its dtype."""
    got, expected = np.asarray(got), np.asarray(expected)
    budget = BUDGET_ULP[op] if budget is None else budget
    doubtful = ~_rounded_well(got, expected, budget)
    if not doubtful.any():
        return
    if doubtful.ndim:
        places = np.argwhere(doubtful)
        scale = None if scale is None else np.broadcast_to(scale, got.shape)[doubtful]
        got, expected = got[doubtful], expected[doubtful]
    else:
        places = np.zeros((1, 0), int)
        got, expected = got.reshape(1), expected.reshape(1)
    if got.dtype.itemsize == 2:  # computed in float32, then rounded
        error = ulp_error(got, expected, got.dtype)
        with np.errstate(all="ignore"):
            size = expected if scale is None else np.maximum(np.abs(expected), np.abs(scale))
            size = np.minimum(np.abs(size), np.finfo(np.float32).max)
            from_float32 = BEFORE_ROUNDING_ULP * ulp(size, np.float32) / ulp(expected, got.dtype)
        budget = ROUNDING_ULP + np.where(np.isfinite(from_float32), from_float32, 0)
    else:
        error = ulp_error(got, expected, got.dtype, scale)
    if np.any(error > budget):
        worst = np.argmax(error / budget)
        raise AssertionError(
            f"{op}: {np.count_nonzero(error > budget)} of {doubtful.size} elements are too far off;"
            f" at {tuple(map(int, places[worst]))} {got[worst]!r} for {expected[worst]!r}: "
            f"{float(error[worst]):.4g} ulp"
        )


def _rounded_well(got, expected, budget):
    """Where `got` is so close to the exact answer, correctly rounded, that nobody need measure.

    Half an ulp off if it is that; at most 1.5 if it is a neighbour of it. (But one of a power of
    two may be twice as far away as an ulp.)
    """
    with np.errstate(all="ignore"):
        rounded = expected.astype(got.dtype)
        well = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        if np.min(budget) >= 1.5 and got.dtype.itemsize > 2:
            an_ulp_apart = np.isfinite(rounded) & (np.abs(np.frexp(rounded)[0]) != 0.5)
            for end in (-np.inf, np.inf):
                well |= an_ulp_apart & (got == np.nextafter(rounded, end, dtype=got.dtype))
    return well


# ------------------------------------------------------------------------- the slow oracle


def exact_digits(op, row):
    """The exact answer of one lane, as mpmath numbers: written for clarity, not for speed."""
    with mpmath.workdps(DIGITS):
        row = [mpmath.mpf(float(v)) for v in np.asarray(row).astype(np.float64)]
        nan, inf = mpmath.mpf("nan"), mpmath.inf
        top = nan if any(mpmath.isnan(v) for v in row) else max(row)
        if op == "logsumexp":
            if not mpmath.isfinite(top):
                return top
            terms = [mpmath.exp(v - top) for v in row]
            terms.remove(1)  # the maximum's own, so that the rest keeps its digits
            return top + _log1p(mpmath.fsum(terms))
        if not mpmath.isfinite(top):
            return [nan] * len(row)
        terms = [mpmath.exp(v - top) for v in row]
        if op == "softmax":
            total = mpmath.fsum(terms)
            return [t / total for t in terms]
        terms.remove(1)
        log_total = _log1p(mpmath.fsum(terms))
        return [-inf if v == -inf else v - top - log_total for v in row]


def _log1p(x):
    """log(1 + x) with all digits however small x is (mpmath's own rounds 1 + x first)."""
    if x == 0:
        return mpmath.mpf(0)
    if x < mpmath.mpf(10) ** -20:
        return x - x * x / 2 + x**3 / 3
    return mpmath.log(1 + x)


def to_longdouble(values):
    """mpmath numbers as longdouble, rounded; 0 for what is far below float64's numbers."""
    with mpmath.workdps(DIGITS):
        scalar = isinstance(values, mpmath.mpf)
        flat = [values] if scalar else values
        flat = [v * 0 if abs(v) < mpmath.mpf(2) ** -1100 else v for v in flat]
        out = np.array([np.longdouble(mpmath.nstr(v, 40)) for v in flat], dtype=np.longdouble)
    return out[0] if scalar else out


class Weighted(NamedTuple):
    log: np.longdouble
    sign: float
    scale: float  # what an error of 1 ulp is measured against: |result|, |max a|, cancellation


def exact_weighted(a, b) -> Weighted:
    """log|sum b exp(a)|, its sign, and the scale of its rounding errors, for one lane.

    `b == 0` hides whatever `a` holds. Cancellation enlarges the scale: a relative error of 1 ulp in
    each term is sum|b exp(a)| / |sum b exp(a)| ulp of 1 in the result.
    """
    pairs = [(float(v), float(w)) for v, w in zip(a, b, strict=True) if w != 0]
    if any(math.isnan(v) or math.isnan(w) for v, w in pairs):
        return Weighted(np.longdouble("nan"), math.nan, 1.0)
    infinite = {math.copysign(1, w) for v, w in pairs if v == math.inf}
    if infinite:
        one_sign = len(infinite) == 1
        log = math.inf if one_sign else math.nan
        return Weighted(np.longdouble(log), infinite.pop() if one_sign else math.nan, 1.0)
    with mpmath.workdps(DIGITS * 3):
        terms = [mpmath.mpf(w) * mpmath.exp(mpmath.mpf(v)) for v, w in pairs if v != -math.inf]
        total = mpmath.fsum(terms)
        if total == 0:
            return Weighted(np.longdouble("-inf"), 0.0, 1.0)
        log = mpmath.log(abs(total))
        cancellation = mpmath.fsum([abs(t) for t in terms]) / abs(total)
        top = max(abs(v) for v, _ in pairs if v != -math.inf)
        scale = max(abs(log), top, cancellation, 1 if len(terms) > 1 else 0)
        return Weighted(to_longdouble(log), float(mpmath.sign(total)), float(scale))
