"""Identities of the three functions, on inputs that hypothesis chooses."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from . import cases, oracle
from .cases import BUDGET_ULP, OPS

settings.register_profile(
    "nbsoftmax",
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("nbsoftmax")

pytestmark = pytest.mark.parametrize("dtype", cases.FLOATS)


def finite(dtype, bound=None):
    width = 8 * np.dtype(dtype).itemsize
    largest = None if bound is None else bound
    smallest = None if bound is None else -bound
    return st.floats(
        smallest, largest, allow_nan=False, allow_infinity=False, width=width, allow_subnormal=True
    )


def lanes(dtype, bound=1000.0, max_side=80):
    """2-D arrays of finite numbers, from ties and small steps to far apart."""
    shape = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=max_side)
    return hnp.arrays(dtype, shape, elements=finite(dtype, bound), fill=finite(dtype, bound))


def anything(dtype):
    """Arrays of any rank, of any numbers at all, NaN and infinities among them."""
    shape = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=9)
    width = 8 * np.dtype(dtype).itemsize
    return hnp.arrays(dtype, shape, elements=st.floats(width=width, allow_subnormal=True))


def axes(ndim):
    """None, an int, or a tuple of any of the axes in any order."""
    some = st.lists(st.integers(0, ndim - 1), unique=True, max_size=ndim).map(tuple)
    return st.one_of(st.none(), st.integers(-ndim, ndim - 1), some)


@given(data=st.data())
def test_any_input_with_any_axis_keeps_the_contract(dtype, data, backend):
    x = data.draw(anything(dtype))
    axis = data.draw(axes(x.ndim))
    exact = oracle.Lanes.of(x, axis)
    with np.errstate(all="raise"):
        got = {op: backend(op, x, axis) for op in OPS}
    for op in OPS:
        oracle.assert_right(op, got[op], x, axis, lanes=exact)


@given(data=st.data())
def test_any_mask_keeps_the_contract(dtype, data, backend):
    x = data.draw(anything(dtype))
    axis = data.draw(axes(x.ndim))
    shape = [n if data.draw(st.booleans()) else 1 for n in x.shape]
    where = data.draw(hnp.arrays(bool, shape[data.draw(st.integers(0, x.ndim)) :]))
    exact = oracle.Lanes.of(x, axis, where)
    for op in OPS:
        got = backend(op, x, axis, where=where)
        oracle.assert_right(op, got, x, axis, where, lanes=exact)


@given(data=st.data())
def test_softmax_sums_to_one(dtype, data, backend):
    x = data.draw(lanes(dtype))
    eps = float(np.finfo(dtype).eps)
    for row in backend("softmax", x, 1):
        assert abs(math.fsum(row.tolist()) - 1) <= BUDGET_ULP["softmax"] * eps
        assert (row >= 0).all()


@given(data=st.data())
def test_shift_does_not_matter(dtype, data, backend):
    """Numbers with few bits, so that the shifted ones are exact."""
    quarters = st.integers(-4000, 4000)
    x = data.draw(hnp.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 70)),
                             elements=quarters)) / 4  # fmt: skip
    shift = data.draw(st.integers(-100_000, 100_000)) / 4
    x, moved = x.astype(dtype), (x + shift).astype(dtype)
    assert np.all(moved.astype(float) == x.astype(float) + shift)
    for op in ("softmax", "log_softmax"):
        expected = backend(op, x, 1)
        error = oracle.ulp_error(backend(op, moved, 1), expected, dtype)
        assert error.max() <= 2 * BUDGET_ULP[op] + 1
    before, after = backend("logsumexp", x, 1), backend("logsumexp", moved, 1)
    # The subtraction is exact; each side is right to its own largest number.
    scale = max(np.abs(a).max() for a in (x, moved, before, after))
    assert oracle.ulp_error(after - before, shift, dtype, scale).max() <= 5


@given(data=st.data())
def test_log_softmax_is_x_minus_logsumexp(dtype, data, backend):
    x = data.draw(lanes(dtype))
    got = backend("log_softmax", x, 1)
    total = backend("logsumexp", x, 1, keepdims=True)
    wide = x.astype(np.longdouble) - total
    scale = np.maximum(np.abs(x).max(1, keepdims=True), np.abs(total))
    assert oracle.ulp_error(got, wide, dtype, scale).max() <= BUDGET_ULP["logsumexp"] + 6


@given(data=st.data())
def test_softmax_is_exp_of_log_softmax(dtype, data, backend):
    x = data.draw(lanes(dtype))
    got = backend("softmax", x, 1)
    logs = backend("log_softmax", x, 1).astype(np.longdouble)
    allowed = BUDGET_ULP["softmax"] + 1 + BUDGET_ULP["log_softmax"] * np.abs(logs)
    assert np.all(oracle.ulp_error(got, np.exp(logs), dtype) <= 2 * allowed)


@given(data=st.data())
def test_order_does_not_matter(dtype, data, backend):
    x = data.draw(lanes(dtype))
    order = np.array(data.draw(st.permutations(range(x.shape[1]))), dtype=np.intp)
    for op in OPS:
        expected = backend(op, x, 1)
        expected = expected if op == "logsumexp" else expected[:, order]
        scale = np.abs(x).max(1) if op == "logsumexp" else None
        error = oracle.ulp_error(backend(op, x[:, order], 1), expected, dtype, scale)
        assert error.max() <= 2 * BUDGET_ULP[op] + 1


@given(data=st.data())
def test_logsumexp_of_parts_is_logsumexp_of_the_whole(dtype, data, backend):
    x = data.draw(lanes(dtype))
    cuts = data.draw(st.lists(st.integers(1, x.shape[1]), max_size=5))
    parts = [p for p in np.split(x, sorted(cuts), axis=1) if p.shape[1]]
    logs = np.stack([backend("logsumexp", p, 1) for p in parts], axis=1)
    whole = backend("logsumexp", x, 1)
    scale = np.maximum(np.abs(x).max(1), np.abs(logs).max(1))
    error = oracle.ulp_error(backend("logsumexp", logs, 1), whole, dtype, scale)
    assert error.max() <= 3 * BUDGET_ULP["logsumexp"] + 1


@given(data=st.data())
def test_lanes_are_independent(dtype, data, backend):
    """Each lane by itself gives what it gives in company."""
    x = data.draw(anything(dtype))
    axis = data.draw(st.integers(0, x.ndim - 1))
    for op in OPS:
        together = backend(op, x, axis)
        rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        alone = [backend(op, row) for row in rows]
        shape = np.moveaxis(x, axis, -1).shape
        alone = np.reshape(alone, shape[:-1] if op == "logsumexp" else shape)
        alone = alone if op == "logsumexp" else np.moveaxis(alone, -1, axis)
        lanes_ = oracle.Lanes.of(x, axis)
        error = oracle.ulp_error(together, alone, dtype, lanes_.scale(op))
        assert error.max() <= 2 * BUDGET_ULP[op] + 1


@given(data=st.data())
def test_weight_one_changes_nothing_and_weight_two_adds_log_two(dtype, data, backend):
    x = data.draw(lanes(dtype))
    plain = backend("logsumexp", x, 1)
    scale = np.maximum(np.abs(x).max(1), 1)
    ones = backend("logsumexp", x, 1, b=np.ones_like(x))
    assert oracle.ulp_error(ones, plain, dtype, scale).max() <= 6
    twos = backend("logsumexp", x, 1, b=np.full_like(x, 2))
    expected = plain.astype(np.longdouble) + np.log(np.longdouble(2))
    assert oracle.ulp_error(twos, expected, dtype, scale).max() <= 6
