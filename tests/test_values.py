"""The contract's table of lanes: NaN, infinities, overflow, domination, wherever they stand."""

import numpy as np
import pytest

from . import cases, oracle
from .cases import OPS, SPECIALS, VALUES, WIDTHS


def alone(lane):
    """The lane by itself."""
    return lane[None, :], 1, 0


def among_rows(lane):
    """The lane as one row among mild ones, which it must not spoil."""
    x = np.tile(np.linspace(-2, 2, lane.size).astype(lane.dtype), (21, 1))
    x[13] = lane
    return x, 1, 13


def among_columns(lane):
    """The lane as one column among mild ones."""
    x, _, which = among_rows(lane)
    return np.ascontiguousarray(x.T), 0, which


ARRANGEMENTS = (alone, among_rows, among_columns)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("trap", VALUES)
def test_trap_gives_the_contracts_answer(trap, dtype, op, backend, regime):
    lane = VALUES[trap].lane(dtype)
    by_hand = VALUES[trap].answer(op)
    for arrange in ARRANGEMENTS:
        x, axis, which = arrange(lane)
        got = backend(op, x, axis)
        oracle.assert_right(op, got, x, axis)
        if by_hand is not None:
            found = got[which] if op == "logsumexp" else np.moveaxis(got, axis, 1)[which]
            expected = lane[0] if by_hand is np.float64 else np.asarray(by_hand, dtype)
            np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("special", SPECIALS)
def test_special_number_acts_the_same_at_every_position(special, n, dtype, backend, regime):
    """Lane i of n holds the special number at position i: every place in every vector."""
    x = cases.draw((n, n), dtype, spread=1.0, offset=2.0)
    np.fill_diagonal(x, SPECIALS[special])
    for axis in (0, 1):
        lanes = oracle.Lanes.of(x, axis)
        for op in OPS:
            oracle.assert_right(op, backend(op, x, axis), x, axis, lanes=lanes)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("runs", "length"), [(2, 3), (5, 4), (3, 17), (4, 16), (2, 33)])
@pytest.mark.parametrize("special", SPECIALS)
def test_special_number_acts_the_same_in_every_run(special, runs, length, dtype, backend, regime):
    """The same for lanes of axes that are apart: at the ends of runs, and where blocks begin."""
    n = runs * length
    x = cases.draw((2, n, n), dtype, spread=1.0, offset=2.0)
    np.fill_diagonal(x[1], SPECIALS[special])
    x = x.reshape(2, n, runs, length)
    for order, axis in (((2, 0, 1, 3), (0, 3)), ((0, 2, 1, 3), (1, 3)), ((2, 0, 3, 1), (0, 2))):
        y = np.ascontiguousarray(x.transpose(order))
        lanes = oracle.Lanes.of(y, axis)
        for op in OPS:
            oracle.assert_right(op, backend(op, y, axis), y, axis, lanes=lanes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("float32", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]),
        ("float64", [0x7FF8 << 48, 0xFFF8 << 48, (0x7FF << 52) + 1, 2**63 - 1, 2**64 - 1]),
    ],
)
def test_every_nan_is_nan(dtype, bits, op, backend, regime):
    """Quiet or signalling, of either sign: arithmetic on exponent bits makes no number of it."""
    nans = np.array(bits, dtype=f"u{np.dtype(dtype).itemsize}").view(dtype)
    assert np.isnan(nans).all()
    for n in (1, 5, 16, 70):
        x = np.zeros((nans.size, n), dtype)
        x[:, n // 2] = nans
        for axis, y in ((1, x), (0, np.ascontiguousarray(x.T))):
            assert np.isnan(backend(op, y, axis)).all()


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_zero_weight_is_plus_zero(dtype, backend, regime):
    x = np.array([[0.0, -np.inf, -5000.0, -np.inf] * 9], dtype)
    zeros = backend("softmax", x, 1)[0, 1::2]
    np.testing.assert_array_equal(zeros, np.zeros_like(zeros))
    assert not np.signbit(zeros).any()


def test_the_two_examples_of_the_contract(backend):
    assert backend("logsumexp", np.array([0.0, -40.0])) == 4.248354255291589e-18
    assert backend("log_softmax", np.array([40.0, 0.0]))[0] == -4.248354255291589e-18


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_a_lane_does_not_depend_on_its_neighbours(dtype, op, backend, regime):
    """A spoiled lane beside a sound one, in every order of four, for short and long lanes."""
    kinds = {"sound": 0.5, "nan": np.nan, "plus": np.inf, "minus": -np.inf}
    for n in (1, 3, 8, 16, 33, 200):
        for shift in range(4):
            x = cases.draw((20, n), dtype, spread=2.0)
            for i, value in enumerate(np.roll(list(kinds.values()), shift)):
                if np.isfinite(value):
                    continue
                x[i::4, :] = value if np.isneginf(value) else x[i::4, :]
                x[i::4, n // 3] = value
            for axis, y in ((1, x), (0, np.ascontiguousarray(x.T))):
                oracle.assert_right(op, backend(op, y, axis), y, axis)
