"""Every shape, every form of axis, every memory layout: the same exact answer, in budget."""

import numpy as np
import pytest

from . import cases, oracle
from .cases import LAYOUTS, OPS, SHAPES, SOME_SHAPES, case_id


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=map(case_id, SHAPES))
def test_shape(shape, axis, dtype, op, backend):
    x = cases.draw(shape, dtype)
    oracle.assert_right(op, backend(op, x, axis), x, axis)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), SOME_SHAPES, ids=map(case_id, SOME_SHAPES))
def test_shape_in_every_regime(shape, axis, dtype, regime, backend):
    x = cases.draw(shape, dtype)
    lanes = oracle.Lanes.of(x, axis)
    for op in OPS:
        oracle.assert_right(op, backend(op, x, axis), x, axis, lanes=lanes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), SOME_SHAPES, ids=map(case_id, SOME_SHAPES))
def test_layout_does_not_matter(shape, axis, dtype, layout, regime, backend):
    x = LAYOUTS[layout](cases.draw(shape, dtype))
    lanes = oracle.Lanes.of(x, axis)
    for op in OPS:
        oracle.assert_right(op, backend(op, x, axis), x, axis, lanes=lanes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 16, 17, 31, 64, 129])
def test_layout_does_not_matter_for_short_rows(n, layout, backend):
    for dtype in cases.FLOATS:
        x = LAYOUTS[layout](cases.draw((61, n), dtype))
        lanes = oracle.Lanes.of(x, -1)
        for op in OPS:
            oracle.assert_right(op, backend(op, x, -1), x, -1, lanes=lanes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (2, 0), (2, 1, 0), ()])
def test_result_has_scipys_shape_and_type(axis, op, backend):
    scipy_special = pytest.importorskip("scipy.special")
    x = cases.draw((3, 4, 5))
    for dtype in cases.FLOATS:
        ours = backend(op, x.astype(dtype), axis)
        theirs = getattr(scipy_special, op)(x.astype(dtype), axis)
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("axis", [0, np.int64(0), np.uint8(0), np.array(0)])
def test_axis_may_be_any_integer(axis, backend):
    x = cases.draw((3, 4))
    for op in OPS:
        oracle.assert_right(op, backend(op, x, axis), x, 0)
        oracle.assert_right(op, backend(op, x, (axis,)), x, 0)


@pytest.mark.parametrize("axis", [-1, 0, 2])
def test_result_is_a_new_array_that_owns_its_elements(axis, backend):
    x = cases.draw((6, 7, 8))
    for op in OPS:
        first = backend(op, x, axis)
        kept = first.copy()
        assert first.flags.writeable
        assert not np.shares_memory(first, x)
        backend(op, x + 1, axis)
        np.testing.assert_array_equal(first, kept)
        first[...] = 0
        oracle.assert_right(op, backend(op, x, axis), x, axis)
