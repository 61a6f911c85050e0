"""The oracle is held to account before it judges: against mpmath, and against answers by hand."""

import math

import numpy as np
import pytest
from mpmath import mp

from . import cases, oracle
from .cases import INF, NAN, OPS, VALUES


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("trap", VALUES)
def test_fast_oracle_agrees_with_mpmath(trap, dtype, op):
    lane = VALUES[trap].lane(dtype)
    fast = oracle.exact(op, lane)
    slow = oracle.to_longdouble(oracle.exact_digits(op, lane))
    scale = oracle.Lanes.of(lane).scale(op)
    assert np.max(oracle.ulp_error(fast, slow, dtype, scale)) < 2.0**-6


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("kind", cases.DISTRIBUTIONS)
def test_fast_oracle_keeps_its_digits_in_long_sums(kind, dtype):
    n = 3000
    lane = cases.DISTRIBUTIONS[kind](np.random.default_rng(1), n).astype(dtype)
    lanes = oracle.Lanes.of(lane)
    for op in OPS:
        slow = oracle.to_longdouble(oracle.exact_digits(op, lane))
        error = oracle.ulp_error(lanes.answer(op), slow, dtype, lanes.scale(op))
        assert np.max(error) < 2.0**-6


@pytest.mark.parametrize("trap", VALUES)
def test_answers_by_hand_are_the_oracles(trap):
    """Where cases.py writes an answer down, exact arithmetic gives that answer."""
    for dtype in cases.FLOATS:
        lane = VALUES[trap].lane(dtype)
        for op in OPS:
            by_hand = VALUES[trap].answer(op)
            if by_hand is None or by_hand is np.float64:
                continue
            slow = oracle.to_longdouble(oracle.exact_digits(op, lane)).astype(dtype)
            expected = np.broadcast_to(np.asarray(by_hand, dtype), slow.shape)
            np.testing.assert_array_equal(slow, expected)


# The contract's table of lanes, and its two examples, written out.
BY_HAND = [
    ([1.0, NAN, 2.0], [NAN] * 3, [NAN] * 3, NAN),
    ([1.0, INF, 2.0], [NAN] * 3, [NAN] * 3, INF),
    ([-INF, -INF], [NAN] * 2, [NAN] * 2, -INF),
    ([0.0, -INF], [1.0, 0.0], [0.0, -INF], 0.0),
    ([0.0, 0.0], [0.5, 0.5], [-math.log(2)] * 2, math.log(2)),
    ([0.0, math.log(3)], [0.25, 0.75], [-math.log(4), math.log(0.75)], math.log(4)),
    ([0.0, -40.0], None, [-4.248354255291589e-18, -40.0], 4.248354255291589e-18),
]


@pytest.mark.parametrize(("row", "softmax", "log_softmax", "logsumexp"), BY_HAND)
def test_oracles_agree_with_hand(row, softmax, log_softmax, logsumexp):
    answers = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}
    for op, answer in answers.items():
        if answer is not None:
            fast = oracle.exact(op, np.array(row)).astype(float)
            slow = oracle.to_longdouble(oracle.exact_digits(op, row)).astype(float)
            np.testing.assert_allclose(fast, answer, rtol=4e-16, atol=0)
            np.testing.assert_allclose(slow, answer, rtol=4e-16, atol=0)


def test_where_hides_and_a_hidden_lane_has_its_own_answer():
    x = np.array([[NAN, 0.0, 0.0], [NAN, INF, 1.0], [-INF, 0.0, 5.0]])
    where = np.array([[False, True, True], [False, False, False], [True, False, False]])
    softmax = [[0, 0.5, 0.5], [0, 0, 0], [NAN] * 3]
    np.testing.assert_array_equal(oracle.exact("softmax", x, 1, where).astype(float), softmax)
    log = oracle.exact("log_softmax", x, 1, where).astype(float)
    half = -math.log(2)
    np.testing.assert_allclose(log, [[-INF, half, half], [-INF] * 3, [NAN] * 3], rtol=3e-16)
    total = oracle.exact("logsumexp", x, 1, where).astype(float)
    np.testing.assert_allclose(total, [math.log(2), -INF, -INF], rtol=3e-16)


@pytest.mark.parametrize(
    ("a", "b", "log", "sign"),
    [
        ([1.0, 1.0, 1.0], [1, -1, -1], 1.0, -1),
        ([1.0, 1.0], [1, -1], -INF, 0),
        ([INF, 1.0], [0, 1], 1.0, 1),
        ([NAN, 1.0], [0, 2], 1 + math.log(2), 1),
        ([INF, 1.0], [-2, 1], INF, -1),
        ([INF, INF], [-2, 1], NAN, NAN),
        ([-INF, 0.0], [-2, 1], 0, 1),
        ([0.0, 0.0], [0, 0], -INF, 0),
        ([NAN, 0.0], [1, 1], NAN, NAN),
    ],
)
def test_weighted_oracle_agrees_with_hand(a, b, log, sign):
    got = oracle.exact_weighted(a, b)
    np.testing.assert_allclose([float(got.log), got.sign], [log, sign], rtol=3e-16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_ulp_is_the_distance_to_the_next_number(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    digits, emin, emax = oracle.format_of(dtype)
    tiny, least = 2.0 ** (emin - 1), 2.0 ** (emin - digits)
    values = [0.0, least, tiny / 2, tiny, 1.0, 1.5, 2.0, 3.14159, 2.0 ** (emax - 1)]
    for value in np.array(values).astype(dtype):
        spacing = np.nextafter(value, value.dtype.type(np.inf)).astype(np.longdouble) - value
        if np.isfinite(spacing):
            assert oracle.ulp(value, dtype) == spacing


def test_ulp_error_of_zeros_nans_infinities_and_overflow():
    big = np.finfo(np.float64).max
    table = [
        (0.0, 0.0, 0.0),
        (-0.0, 0.0, 0.0),
        (5e-324, 0.0, 1.0),
        (1.0, 1.0 + 2**-52, 1.0),
        (NAN, NAN, 0.0),
        (NAN, 1.0, INF),
        (1.0, NAN, INF),
        (INF, INF, 0.0),
        (INF, -INF, INF),
        (-INF, 1.0, INF),
        (big, INF, INF),
        (INF, 1.0, INF),
        (-INF, np.longdouble(big) * 2, INF),
        (INF, np.longdouble(big) * 2, 0.0),
        (INF, big, 1.0),
        (big, np.longdouble(big) * 2, 1.0),
    ]
    for got, exact, error in table:
        found = oracle.ulp_error(np.float64(got), exact, np.float64)
        # An infinity far from the exact value counts as the number above the largest.
        assert found == error or (error == INF and found > 1e15), (got, exact, found)


def test_ulp_error_measures_against_the_larger_of_result_and_scale():
    assert oracle.ulp_error(np.float32(1e-7), 0.0, np.float32, scale=1.0) < 1
    assert oracle.ulp_error(np.float32(1e-7), 0.0, np.float32) > 1e30


def test_draw_needs_stability():
    """Otherwise half the suite would pass with exp(x) / sum(exp(x))."""
    for shape, axis in cases.SOME_SHAPES:
        x = cases.draw(shape, np.float32)
        with np.errstate(all="ignore"):
            naive = np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)
        right = oracle.exact("softmax", x, axis)
        assert np.max(oracle.ulp_error(naive, right, np.float32)) > 1000


def test_layouts_are_what_they_say():
    x = cases.draw((4, 6, 10))
    made = {name: layout(x) for name, layout in cases.LAYOUTS.items()}
    for name, y in made.items():
        assert y.shape == x.shape, name
        assert y.dtype.itemsize == x.dtype.itemsize, name
        if "broadcast" not in name and "windows" not in name:
            np.testing.assert_array_equal(y, x)
    assert made["fortran"].flags.f_contiguous
    assert not made["unaligned"].flags.aligned
    assert not made["byte_swapped"].dtype.isnative
    assert not made["read_only"].flags.writeable
    assert made["broadcast_first_axis"].strides[0] == 0
    assert made["broadcast_last_axis"].strides[-1] == 0
    assert all(s < 0 for s in made["reversed"].strides)
    for name in ("strided", "row_pitched", "row_pitched_shifted", "rotated", "pitched_fortran"):
        assert not made[name].flags.forc, name
    two = cases.LAYOUTS["overlapping_windows"](cases.draw((9, 5)))
    assert two.strides == (8, 8)


def test_mpmath_precision_is_left_alone():
    before = mp.dps
    oracle.exact_digits("softmax", [0.0, 1.0])
    assert mp.dps == before
