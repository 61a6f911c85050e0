"""The error budget, from one number to ten million, for inputs chosen to break sums and shifts."""

import functools

import numpy as np
import pytest

from . import cases, oracle
from .cases import DISTRIBUTIONS, OPS

LENGTHS = (1, 2, 3, 5, 8, 13, 16, 21, 34, 55, 64, 89, 144, 233, 377, 610, 987, 1597, 4181, 10946)
LONG = (100_003, 1_000_000)
LONGEST = 10_000_000
LANE_BYTES = 1 << 20


@functools.lru_cache(maxsize=1)
def long_lane(kind, n, dtype):
    x = DISTRIBUTIONS[kind](np.random.default_rng([n, 7]), n).astype(dtype)
    x.flags.writeable = False
    return x, oracle.Lanes.of(x)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("n", LENGTHS)
def test_rows_and_columns_keep_the_budget(n, kind, dtype, backend, regime):
    lanes = max(3, min(40, 4000 // n))
    rng = np.random.default_rng(n)
    x = np.stack([DISTRIBUTIONS[kind](rng, n) for _ in range(lanes)]).astype(dtype)
    for axis, y in ((1, x), (0, np.ascontiguousarray(x.T))):
        exact = oracle.Lanes.of(y, axis)
        for op in OPS:
            oracle.assert_right(op, backend(op, y, axis), y, axis, lanes=exact)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_lanes_of_a_few_that_cancel_keep_the_budget(n, dtype, backend):
    """Near 0 the maximum and the logarithm cancel: every rounded term shows, if lanes are many."""
    x = np.random.default_rng(n).standard_normal((20_000, n)).astype(dtype)
    for axis, y in ((1, x), (0, np.ascontiguousarray(x.T))):
        exact = oracle.Lanes.of(y, axis)
        for op in OPS:
            oracle.assert_right(op, backend(op, y, axis), y, axis, lanes=exact)


@pytest.mark.parametrize("n", LONG)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("op", OPS)
def test_long_lane_keeps_the_budget(kind, n, dtype, op, backend):
    x, exact = long_lane(kind, n, dtype)
    oracle.assert_right(op, backend(op, x), x, lanes=exact)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_many_long_lanes_keep_the_budget(kind, dtype, backend):
    """As long as lanes are that are not cut into blocks. The first ones have no neighbours."""
    x, exact = long_lane(kind, LANE_BYTES // np.dtype(dtype).itemsize, dtype)
    lanes = np.stack([x] * 16)
    for op in OPS:
        got = backend(op, lanes, 1)
        for i in range(1, 16):
            np.testing.assert_array_equal(got[i], got[0])
        oracle.assert_right(op, got[0], x, lanes=exact)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("kind", ["normal_10", "nearly_equal", "descending"])
@pytest.mark.parametrize("op", OPS)
def test_longest_lane_keeps_the_budget(kind, dtype, op, backend):
    x, exact = long_lane(kind, LONGEST, dtype)
    oracle.assert_right(op, backend(op, x), x, lanes=exact)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "inner"), [(20_011, 3), (5003, 40), (1000, 257)])
def test_long_columns_keep_the_budget(n, inner, kind, dtype, backend):
    x = DISTRIBUTIONS[kind](np.random.default_rng(inner), n * inner).astype(dtype)
    x = x.reshape(n, inner)
    exact = oracle.Lanes.of(x, 0)
    for op in OPS:
        oracle.assert_right(op, backend(op, x, 0), x, 0, lanes=exact)


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_every_binade_keeps_the_budget(dtype, backend, regime):
    """Pairs (0, v) and (v, v') with v of either sign through every exponent of the format."""
    _, emin, emax = oracle.format_of(dtype)
    rng = np.random.default_rng(3)
    exponents = np.arange(emin - 3, emax)
    v = np.ldexp(rng.uniform(0.5, 1.0, exponents.size), exponents).astype(dtype)
    signs = rng.choice([-1, 1], v.size).astype(dtype)
    for x in (
        np.stack([np.zeros_like(v), v * signs], 1),
        np.stack([v * signs, np.nextafter(v, 0) * signs], 1),
        np.stack([v, -v, v / 2, v * signs, -v / 3], 1),
    ):
        exact = oracle.Lanes.of(x, 1)
        for op in OPS:
            oracle.assert_right(op, backend(op, x, 1), x, 1, lanes=exact)


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_every_exponent_of_the_result_keeps_the_budget(dtype, backend, regime):
    """softmax of (0, -t), t through the range of exp: each binade of the result, to 0."""
    _, emin, _ = oracle.format_of(dtype)
    end = -(emin - 60) * np.log(2)
    t = np.linspace(0, end, 20_011).astype(dtype)
    x = np.stack([np.zeros_like(t), -t], 1)
    exact = oracle.Lanes.of(x, 1)
    for op in OPS:
        oracle.assert_right(op, backend(op, x, 1), x, 1, lanes=exact)


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_arguments_close_to_a_half_of_log_2_keep_the_budget(dtype, backend):
    """Where exp's reduction changes from one multiple of log 2 to the next."""
    k = np.arange(-140, 20)[:, None]
    middle = ((k + 0.5) * np.log(2)).astype(dtype)
    steps = np.arange(-8, 9) * np.spacing(np.abs(middle))
    x = np.concatenate([np.zeros((k.size, 1), dtype), (middle + steps).astype(dtype)], 1)
    exact = oracle.Lanes.of(x, 1)
    for op in OPS:
        oracle.assert_right(op, backend(op, x, 1), x, 1, lanes=exact)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 50, 300, 3000])
def test_an_element_that_outweighs_all_others_is_exactly_1(n, dtype, backend, regime):
    rng = np.random.default_rng(n)
    lanes = max(2, 600 // n)
    x = rng.standard_normal((lanes, n)).astype(dtype)
    place = np.arange(lanes), rng.integers(n, size=lanes)
    x[place] += 50 + 1000 * rng.random(lanes).astype(dtype)
    for axis, y in ((1, x), (0, np.ascontiguousarray(x.T))):
        result = backend("softmax", y, axis)
        assert np.all((result if axis else result.T)[place] == 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 250, 5000, 70_000])
def test_half_precision_is_rounded_once(n, kind, dtype, backend):
    """Half an ulp of the result, and float32's budget: nothing is lost in the format itself."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    with np.errstate(over="ignore"):
        x = DISTRIBUTIONS[kind](np.random.default_rng(n), n).clip(-6e4, 6e4).astype(dtype)
    x = np.stack([x, x[::-1]])
    for axis, y in ((1, x), (0, np.ascontiguousarray(x.T))):
        exact = oracle.Lanes.of(y, axis)
        for op in OPS:
            oracle.assert_right(op, backend(op, y, axis), y, axis, lanes=exact)
