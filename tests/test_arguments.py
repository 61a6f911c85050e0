"""The arguments: out, where, b, keepdims, axis; what they do, and what a wrong one says."""

import inspect
import re
import warnings

import numpy as np
import pytest

import nbsoftmax

from . import cases, oracle
from .cases import EMPTY_SHAPES, INF, NAN, OPS, VALUES, case_id

SAME_SHAPE = ("softmax", "log_softmax")


def result_shape(op, shape, axis, keepdims=False):
    """The result's shape, by NumPy's own rule."""
    if op != "logsumexp":
        return tuple(shape)
    return np.zeros(shape).any(axis=axis, keepdims=keepdims).shape


# ----------------------------------------------------------------------------- signatures


def test_signatures_are_the_contracts():
    softmax = "(x, axis=None, *, where=None, out=None, dtype=None, stream=None)"
    logsumexp = (
        "(a, axis=None, b=None, keepdims=False, return_sign=False, "
        "*, where=None, out=None, dtype=None, stream=None)"
    )
    expected = {"softmax": softmax, "log_softmax": softmax, "logsumexp": logsumexp}
    for op, text in expected.items():
        signature = inspect.signature(getattr(nbsoftmax, op))
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == text


@pytest.mark.parametrize("op", OPS)
def test_functions_are_documented(op):
    doc = inspect.getdoc(getattr(nbsoftmax, op))
    for section in ("Parameters", "Returns", "Examples"):
        assert section in doc


def test_first_argument_goes_by_its_name():
    assert nbsoftmax.softmax(x=[1.0, 1.0])[0] == 0.5
    assert nbsoftmax.logsumexp(a=[2.0]) == 2.0


def test_positional_arguments_come_in_scipys_order(backend):
    a = np.array([[1.0, 2.0], [3.0, 4.0]])
    log, sign = backend("logsumexp", a, 1, np.array([1.0, -1.0]), True, True)
    assert log.shape == sign.shape == (2, 1)
    assert (sign == -1).all()
    with pytest.raises(TypeError):
        backend("softmax", a, 1, None)


# ------------------------------------------------------------------------------ axis


BAD_AXES = [
    ((3, 4), 2, np.exceptions.AxisError),
    ((3, 4), -3, np.exceptions.AxisError),
    ((3, 4), (0, 2), np.exceptions.AxisError),
    ((3, 4), (0, -5), np.exceptions.AxisError),
    ((3, 4), 10**12, np.exceptions.AxisError),
    ((), 1, np.exceptions.AxisError),
    ((0, 3), 2, np.exceptions.AxisError),
    ((3, 4), (0, 0), ValueError),
    ((3, 4), (1, -1), ValueError),
    ((0, 3), (0, -2), ValueError),
    ((3, 4), 1.0, TypeError),
    ((3, 4), "0", TypeError),
    ((3, 4), (0, 1.0), TypeError),
    ((3, 4), (None,), TypeError),
    ((3, 4), np.array([0.5]), TypeError),
    ((3, 4), 1j, TypeError),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "axis", "error"), BAD_AXES, ids=str)
def test_wrong_axis_is_named(shape, axis, error, op, backend):
    with pytest.raises(error, match=r"\baxis\b") as caught:
        backend(op, np.zeros(shape), axis)
    if error is ValueError:
        assert not isinstance(caught.value, np.exceptions.AxisError)


def test_axis_error_knows_axis_and_ndim(backend):
    with pytest.raises(np.exceptions.AxisError, match="5") as caught:
        backend("softmax", np.zeros((3, 4)), 5)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, IndexError)


# ------------------------------------------------------------------------------ keepdims


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "float16"])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (2, 1), (), (0, 1, 2)])
def test_keepdims_keeps_the_axes_as_ones(axis, dtype, backend):
    x = cases.draw((3, 4, 5), dtype, spread=3, offset=5)
    got = backend("logsumexp", x, axis, keepdims=True)
    assert got.shape == result_shape("logsumexp", x.shape, axis, True)
    oracle.assert_right("logsumexp", got, x, axis, keepdims=True)
    np.testing.assert_array_equal(
        np.reshape(got, result_shape("logsumexp", x.shape, axis)), backend("logsumexp", x, axis)
    )


# ------------------------------------------------------------------------------ empty input


EMPTY = [
    (shape, axis)
    for shape in EMPTY_SHAPES
    for axis in (None, (), *range(-len(shape), len(shape)), tuple(range(len(shape))))
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "axis"), EMPTY, ids=map(case_id, EMPTY))
def test_empty_input(shape, axis, op, backend):
    for dtype in ("float32", "float64", "float16"):
        x = np.zeros(shape, dtype)
        got = backend(op, x, axis)
        assert got.shape == result_shape(op, shape, axis)
        assert got.dtype == dtype
        assert np.all(got == -INF)
        if op == "logsumexp":
            kept = backend(op, x, axis, keepdims=True)
            assert kept.shape == result_shape(op, shape, axis, True)
            assert np.all(kept == -INF)


def test_empty_input_of_other_kinds(backend):
    assert backend("logsumexp", []) == -INF
    assert type(backend("logsumexp", [])) is np.float64
    assert backend("logsumexp", np.zeros((2, 0), int), 1).dtype == np.float64
    assert backend("softmax", [[], []]).shape == (2, 0)
    assert backend("softmax", np.zeros((0, 4), bool)).dtype == np.float64


def test_empty_sum_fills_out_and_takes_weights(backend):
    out = np.zeros(2)
    assert backend("logsumexp", np.zeros((2, 0)), 1, out=out) is out
    assert (out == -INF).all()
    log = backend("logsumexp", np.zeros((2, 0)), 1, b=np.zeros((2, 0)))
    np.testing.assert_array_equal(log, [-INF, -INF])
    np.testing.assert_array_equal(
        backend("logsumexp", np.zeros((2, 0)), 1, where=np.ones((2, 1), bool)), [-INF, -INF]
    )


# ------------------------------------------------------------------------------ out


OUT_SHAPES = cases.SOME_SHAPES


@pytest.mark.parametrize("layout", ["c", "fortran", "strided", "reversed", "row_pitched",
                                    "unaligned", "byte_swapped", "rotated"])  # fmt: skip
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), OUT_SHAPES, ids=map(case_id, OUT_SHAPES))
def test_out_of_any_layout_is_filled_and_returned(shape, axis, dtype, layout, backend, regime):
    x = cases.draw(shape, dtype)
    exact = oracle.Lanes.of(x, axis)
    for op in OPS:
        blank = np.full(result_shape(op, shape, axis), NAN, dtype)
        out = cases.LAYOUTS[layout](blank)
        base = out if out.base is None else out.base
        strides = out.strides
        assert backend(op, x, axis, out=out) is out
        assert out.strides == strides
        assert base is out or out.base is not None
        plain = np.asarray(out).astype(dtype)
        oracle.assert_close(op, plain, exact.answer(op), exact.scale(op))


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_what_lies_between_the_elements_of_out_is_left_alone(dtype, backend, regime):
    for op in SAME_SHAPE:
        for axis in (0, 1):
            base = np.full((20, 50), 7.0, dtype)
            x = cases.draw((9, 33), dtype)
            backend(op, x, axis, out=base[2:11, 5:38])
            oracle.assert_right(op, base[2:11, 5:38], x, axis)
            base[2:11, 5:38] = 7
            assert (base == 7).all()
    base = np.full((20, 50), 7.0, dtype)
    backend("logsumexp", cases.draw((9, 33), dtype), 0, out=base[3, 4:37])
    base[3, 4:37] = 7
    assert (base == 7).all()


def test_out_of_a_full_reduction_is_an_array_without_axes(backend):
    out = np.zeros((), np.float32)
    assert backend("logsumexp", np.zeros((2, 2), np.float32), out=out) is out
    assert out == np.float32(np.log(4))
    out = np.zeros((1, 1))
    assert backend("logsumexp", np.zeros((2, 2)), keepdims=True, out=out) is out
    assert out[0, 0] == np.log(4)
    out = np.zeros(())
    assert backend("softmax", 3.0, out=out) is out
    assert out == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "axis"), [((3, 4), 1), ((3, 4), None), ((3, 4), 0), ((5,), 0)])
def test_out_of_another_shape_is_refused(shape, axis, op, backend):
    right = result_shape(op, shape, axis)
    wrong = {(*right, 1), (1, *right), right[1:], right[::-1], tuple(n + 1 for n in right), (0,)}
    for wrong_shape in wrong - {right}:
        out = np.full(wrong_shape, 5.0)
        with pytest.raises(ValueError, match=r"\bout\b") as caught:
            backend(op, np.zeros(shape), axis, out=out)
        assert str(right) in str(caught.value)
        assert str(wrong_shape) in str(caught.value)
        assert (out == 5).all()


@pytest.mark.parametrize("keepdims", [False, True])
def test_out_must_have_or_lack_the_kept_axes(keepdims, backend):
    out = np.zeros(result_shape("logsumexp", (3, 4), 1, not keepdims))
    with pytest.raises(ValueError, match=r"\bout\b"):
        backend("logsumexp", np.zeros((3, 4)), 1, keepdims=keepdims, out=out)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["int64", "int8", "bool", "U8", object, "datetime64[s]"])
def test_out_of_a_dtype_that_does_not_fit_is_refused(dtype, op, backend):
    out = np.zeros(result_shape(op, (3, 4), 1), dtype)
    kept = out.copy()
    if np.can_cast(np.float64, dtype, "same_kind"):
        backend(op, np.zeros((3, 4)), 1, out=out)
        return
    with pytest.raises(TypeError, match=r"\bout\b") as caught:
        backend(op, np.zeros((3, 4)), 1, out=out)
    assert str(out.dtype) in str(caught.value)
    np.testing.assert_array_equal(out, kept)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("out_dtype", ["float16", "float32", "float64", "longdouble", "complex64"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16"])
def test_out_of_another_float_dtype_takes_the_rounded_result(dtype, out_dtype, op, backend):
    """The computation is that of the input's dtype; only the last step differs."""
    x = cases.draw((7, 9), dtype, spread=2, offset=4)
    for axis in (0, 1):
        out = np.zeros(result_shape(op, x.shape, axis), out_dtype)
        assert backend(op, x, axis, out=out) is out
        oracle.assert_close(op, backend(op, x, axis), oracle.exact(op, x, axis),
                            oracle.Lanes.of(x, axis).scale(op))  # fmt: skip
        np.testing.assert_array_equal(out, backend(op, x, axis).astype(out_dtype))


@pytest.mark.parametrize("op", OPS)
def test_read_only_out_is_refused(op, backend):
    out = np.zeros(result_shape(op, (3, 4), 1))
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"\bout\b.*(read-only|writ)"):
        backend(op, np.zeros((3, 4)), 1, out=out)
    assert (out == 0).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("out", [[0.0, 0.0], 3.0, "out", (np.zeros(2), np.zeros(2))], ids=repr)
def test_out_that_is_no_array_is_refused(out, op, backend):
    with pytest.raises(TypeError, match=r"\bout\b"):
        backend(op, np.zeros(2), out=out)


def test_out_is_refused_before_anything_is_written(backend):
    out = np.full((3, 4), 5.0)
    with pytest.raises(np.exceptions.AxisError):
        backend("softmax", np.zeros((3, 4)), 7, out=out)
    with pytest.raises(ValueError, match="where"):
        backend("softmax", np.zeros((3, 4)), 1, out=out, where=np.ones(3, bool))
    assert (out == 5).all()


# ------------------------------------------------------------------------------ overlap


def _in_place(buffer, shape):
    x = buffer[: np.prod(shape)].reshape(shape)
    return x, x


def _shifted(by):
    def views(buffer, shape):
        size = np.prod(shape)
        step = max(1 - size, min(by, size - 1))
        first, second = max(0, -step), max(0, step)
        x = buffer[first : first + size].reshape(shape)
        return x, buffer[second : second + size].reshape(shape)

    return views


def _flipped(*dims):
    def views(buffer, shape):
        x = buffer[: np.prod(shape)].reshape(shape)
        return x, np.flip(x, [d for d in dims if d < len(shape)])

    return views


def _stretched(buffer, shape):
    """out over every other element of the input, and beyond."""
    size = np.prod(shape)
    out = buffer[: 2 * size].reshape(*shape[:-1], -1)[..., ::2]
    return buffer[:size].reshape(shape), out


def _squeezed(buffer, shape):
    """The input is every other element of what holds out."""
    out, x = _stretched(buffer, shape)
    return x, out


def _transposed(buffer, shape):
    x = buffer[: np.prod(shape)].reshape(shape)
    return x, buffer[: np.prod(shape)].reshape(shape[::-1]).T


def _pitched(buffer, shape):
    pad = min(3, shape[-1] - 1)
    wide = buffer[: np.prod(shape) + pad * np.prod(shape[:-1], dtype=int)]
    wide = wide.reshape(*shape[:-1], -1)
    return wide[..., :-pad], wide[..., pad:]


OVERLAPS = {
    "in_place": _in_place,
    "one_behind": _shifted(1),
    "one_ahead": _shifted(-1),
    "eight_behind": _shifted(8),
    "eight_ahead": _shifted(-8),
    "seventy_behind": _shifted(70),
    "seventy_ahead": _shifted(-70),
    "reversed": _flipped(0, 1, 2),
    "reversed_rows": _flipped(0),
    "reversed_lanes": _flipped(1),
    "transposed": _transposed,
    "stretched": _stretched,
    "squeezed": _squeezed,
    "pitched": _pitched,
}


OVERLAP_SHAPES = [(30,), (5, 7), (12, 12), (3, 200), (300, 3), (40, 16), (6, 5, 4)]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", OVERLAP_SHAPES, ids=str)
def test_overlapping_out_has_the_result_of_no_overlap(shape, dtype, overlap, backend, regime):
    size = int(np.prod(shape))
    for axis in (None, *range(len(shape))):
        for op in SAME_SHAPE:
            buffer = cases.draw(2 * size + 200, dtype, spread=4, offset=9)
            x, out = OVERLAPS[overlap](buffer, shape)
            assert np.shares_memory(x, out)
            copy = x.copy()
            outside = _bytes_outside(buffer, out)
            apart = OVERLAPS[overlap](buffer.copy(), shape)[1]
            expected = backend(op, copy, axis, out=apart)
            assert backend(op, x, axis, out=out) is out
            np.testing.assert_array_equal(out, expected)
            oracle.assert_right(op, out, copy, axis)
            assert _bytes_outside(buffer, out) == outside


def _bytes_outside(buffer, view):
    """The elements of buffer that view does not cover."""
    mark = np.zeros(buffer.shape, bool)
    start = (view.__array_interface__["data"][0] - buffer.ctypes.data) // buffer.itemsize
    strides = [s // buffer.itemsize for s in view.strides]
    index = start + sum(
        (np.arange(n) * s).reshape([-1 if d == dim else 1 for d in range(view.ndim)])
        for dim, (n, s) in enumerate(zip(view.shape, strides, strict=True))
    )
    mark[index] = True
    return buffer[~mark].tobytes()


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("n", [5, 40, 300])
def test_logsumexp_may_write_into_its_input(n, dtype, backend, regime):
    for axis in (0, 1):
        for where in (0, n // 2, n - 1):
            for step in (1, -1):
                x = cases.draw((n, n), dtype)
                copy = x.copy()
                for out in (x[where, ::step], x[::step, where], np.diagonal(x)):
                    x[...] = copy
                    out = out.view()
                    out.flags.writeable = True
                    got = backend("logsumexp", x, axis, out=out)
                    assert got is out
                    oracle.assert_close("logsumexp", got, oracle.exact("logsumexp", copy, axis),
                                        oracle.Lanes.of(copy, axis).scale("logsumexp"))  # fmt: skip


@pytest.mark.parametrize(("dtype", "narrow"), [("float64", "float32"), ("float32", "float16")])
@pytest.mark.parametrize("half", [0, 1])
def test_out_may_be_the_same_memory_as_another_dtype(half, dtype, narrow, backend, regime):
    for op in SAME_SHAPE:
        for shape, axis in (((6, 50), 1), ((50, 6), 0), ((300,), 0)):
            x = cases.draw(shape, dtype)
            expected = backend(op, x.copy(), axis).astype(narrow)
            size = x.size
            out = x.reshape(-1).view(narrow)[half * size : (half + 1) * size].reshape(shape)
            backend(op, x, axis, out=out)
            np.testing.assert_array_equal(out, expected)


def test_out_may_overlap_weights_and_mask(backend, regime):
    a = cases.draw((30, 30), spread=2, offset=3)
    b = np.random.default_rng(0).uniform(0.5, 2, (30, 30))
    expected = backend("logsumexp", a, 1, b=b)
    for out in (b[:, 3], b[-1], b[::-1, 0]):
        weights = b.copy()
        offset = out.__array_interface__["data"][0] - b.__array_interface__["data"][0]
        view = np.ndarray(30, b.dtype, weights.data, offset, out.strides)
        backend("logsumexp", a, 1, b=weights, out=view)
        np.testing.assert_array_equal(view, expected)
    raw = np.zeros(30 * 30)
    mask = raw.view(bool)[100 : 100 + 900].reshape(30, 30)
    mask[...] = a > 0
    expected = backend("softmax", a, 1, where=mask.copy())
    backend("softmax", a, 1, where=mask, out=raw.reshape(30, 30))
    np.testing.assert_array_equal(raw.reshape(30, 30), expected)


# ------------------------------------------------------------------------------ where


WHERE_SHAPES = [
    ((13, 29), (13, 29)),
    ((13, 29), (29,)),
    ((13, 29), (13, 1)),
    ((13, 29), (1, 29)),
    ((13, 29), ()),
    ((13, 29), (1, 1)),
    ((4, 5, 35), (5, 1)),
    ((4, 5, 35), (4, 1, 35)),
    ((4, 5, 35), (35,)),
    ((3, 700), (3, 700)),
    ((700, 3), (700, 1)),
    ((60, 10), (60, 10)),
    ((41,), (41,)),
    ((41,), (1,)),
]


@pytest.mark.parametrize("hide", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "mask"), WHERE_SHAPES, ids=str)
def test_where_hides_whatever_it_covers(shape, mask, dtype, hide, backend, regime):
    """Hidden numbers are NaN and infinities half of the time: they are never looked at."""
    rng = np.random.default_rng([len(shape), int(100 * hide)])
    where = rng.random(mask) >= hide
    x = cases.draw(shape, dtype)
    everywhere = np.broadcast_to(where, shape)
    poison = rng.choice([NAN, INF, -INF, 1e30, 1.0], shape).astype(dtype)
    x = np.where(everywhere | (rng.random(shape) < 0.5), x, poison).astype(dtype)
    for axis in (None, *range(-1, len(shape)), tuple(range(len(shape)))):
        exact = oracle.Lanes.of(x, axis, where)
        for op in OPS:
            got = backend(op, x, axis, where=where)
            oracle.assert_right(op, got, x, axis, where, lanes=exact)


@pytest.mark.parametrize("trap", VALUES)
def test_hidden_trap_changes_nothing_and_a_visible_one_does(trap, backend, regime):
    lane = VALUES[trap].lane("float64")
    x = np.concatenate([lane, [0.5, -1.5], lane])[None, :]
    middle = np.zeros(x.shape, bool)
    middle[:, lane.size : lane.size + 2] = True
    for where in (middle, ~middle, np.zeros_like(middle), np.ones_like(middle)):
        for op in OPS:
            for y, mask, axis in ((x, where, 1), (x.T, where.T, 0)):
                oracle.assert_right(op, backend(op, y, axis, where=mask), y, axis, mask)


def test_fully_masked_lane_has_its_own_answer(backend):
    x = np.array([[1.0, NAN], [INF, 2.0], [3.0, 4.0]])
    where = np.array([[False, False], [False, False], [True, False]])
    np.testing.assert_array_equal(backend("softmax", x, 1, where=where), [[0, 0], [0, 0], [1, 0]])
    np.testing.assert_array_equal(
        backend("log_softmax", x, 1, where=where), [[-INF, -INF], [-INF, -INF], [0, -INF]]
    )
    np.testing.assert_array_equal(backend("logsumexp", x, 1, where=where), [-INF, -INF, 3])


def test_hidden_elements_of_a_spoiled_lane_are_spoiled_too(backend):
    """Beside a visible NaN or +inf they are NaN, not 0: a hidden element acts like -inf."""
    for spoiler in (NAN, INF, -INF):
        x, where = np.array([spoiler, 7.0, NAN]), np.array([True, False, False])
        assert np.isnan(backend("softmax", x, where=where)).all()
        assert np.isnan(backend("log_softmax", x, where=where)).all()


def test_where_that_hides_nothing_changes_no_bit(backend, regime):
    for shape, axis in cases.SOME_SHAPES:
        x = cases.draw(shape, "float32")
        for op in OPS:
            plain = backend(op, x, axis)
            for where in (True, np.True_, np.ones(shape, bool), None):
                got = backend(op, x, axis, where=where)
                exact = oracle.Lanes.of(x, axis)
                oracle.assert_right(op, got, x, axis, lanes=exact)
                assert got.dtype == plain.dtype


@pytest.mark.parametrize("op", OPS)
def test_where_may_be_a_list_or_a_python_bool(op, backend):
    x = np.array([1.0, 2.0, 3.0])
    mask = [True, False, True]
    oracle.assert_right(op, backend(op, x, where=mask), x, where=np.array(mask))
    oracle.assert_right(op, backend(op, x, where=False), x, where=np.array(False))


@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "broadcast_last_axis",
                                    "row_pitched", "read_only"])  # fmt: skip
def test_layout_of_where_does_not_matter(layout, backend, regime):
    x = cases.draw((13, 29), "float32")
    where = np.random.default_rng(3).random(x.shape) < 0.6
    where = cases.LAYOUTS[layout](where)
    for axis in (0, 1, None):
        for op in OPS:
            oracle.assert_right(op, backend(op, x, axis, where=where), x, axis, where)


@pytest.mark.parametrize("dtype", ["float16", "int64", "bool", "bfloat16"])
def test_where_with_converted_dtypes(dtype, backend):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = np.arange(40).reshape(4, 10).astype(dtype)
    where = np.random.default_rng(3).random(x.shape) < 0.5
    for axis in (0, 1):
        for op in OPS:
            oracle.assert_right(op, backend(op, x, axis, where=where), x, axis, where)


def test_where_with_out_in_place(backend, regime):
    for op in SAME_SHAPE:
        x = cases.draw((20, 37), "float32")
        x[::3, ::4] = NAN
        where = ~np.isnan(x)
        copy = x.copy()
        assert backend(op, x, 1, where=where, out=x) is x
        oracle.assert_right(op, x, copy, 1, where)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 3, 4), (3, 5)])
def test_where_that_does_not_broadcast_is_refused(shape, op, backend):
    with pytest.raises(ValueError, match=r"\bwhere\b") as caught:
        backend(op, np.zeros((3, 4)), 1, where=np.ones(shape, bool))
    assert str(shape) in str(caught.value)
    assert "(3, 4)" in str(caught.value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("where", [np.array([1, 0, 1]), np.ones(3), ["yes"] * 3, 1], ids=repr)
def test_where_that_is_not_boolean_is_refused(where, op, backend):
    with pytest.raises(TypeError, match=r"\bwhere\b"):
        backend(op, np.zeros(3), where=where)


# ------------------------------------------------------------------------------ b


def assert_weighted(got, a, b, dtype, sign=None):
    """One lane's log (and sign) against mpmath."""
    exact = oracle.exact_weighted(a, b)
    if sign is None:
        log = np.nan if exact.sign < 0 or np.isnan(exact.sign) else exact.log
    else:
        log = exact.log
        np.testing.assert_array_equal(sign, exact.sign)
    error = oracle.ulp_error(got, log, dtype, exact.scale)
    assert error <= cases.WEIGHTED_BUDGET_ULP, (got, log, float(error))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 70, 400])
def test_weights_multiply_the_exponentials(n, dtype, signed, backend, regime):
    rng = np.random.default_rng(n)
    a = cases.draw((6, n), dtype, spread=3)
    b = rng.uniform(0, 3, (6, n)).astype(dtype)
    if signed:
        b *= rng.choice([-1, 1], b.shape).astype(dtype)
    b[2, :] = -np.abs(b[2, :])
    b[3, ::2] = 0
    b[4, :] = 0
    for axis, x, w in ((1, a, b), (0, np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))):
        plain = backend("logsumexp", x, axis, b=w)
        log, sign = backend("logsumexp", x, axis, b=w, return_sign=True)
        assert plain.dtype == log.dtype == sign.dtype == dtype
        assert plain.shape == log.shape == sign.shape == (6,)
        for i in range(6):
            lane = np.take(x, i, 1 - axis), np.take(w, i, 1 - axis)
            assert_weighted(log[i], *lane, dtype, sign[i])
            assert_weighted(plain[i], *lane, dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("weight", [3.0, -0.25, 0.0, NAN])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lanes_of_one_number_have_weights_too(dtype, weight, backend):
    a = np.array([[700.0], [-3e4], [0.0]], dtype)
    b = np.full_like(a, weight)
    logs, signs = backend("logsumexp", a, 1, b=b, return_sign=True)
    for lane in zip(logs, a, b, [dtype] * len(a), signs, strict=True):
        assert_weighted(*lane)


WEIGHTED = {
    "zero_hides_plus_inf": ([INF, 1.0], [0, 1]),
    "zero_hides_nan": ([NAN, 1.0, 2.0], [0, 1, 1]),
    "zero_hides_minus_inf": ([-INF, 1.0], [0, 1]),
    "minus_zero_hides_too": ([INF, NAN, 1.0], [-0.0, -0.0, 2]),
    "zero_hides_the_maximum": ([10_000.0, 1.0, 0.5], [0, 1, 2]),
    "zero_hides_all": ([INF, NAN, 5.0], [0, 0, 0]),
    "negative_of_plus_inf": ([INF, 1.0], [-1, 5]),
    "infinities_of_both_signs": ([INF, INF], [-1, 1]),
    "infinities_of_one_sign": ([INF, INF, 0], [-1, -2, 1]),
    "negative_of_minus_inf": ([-INF, 1.0], [-3, 2]),
    "only_minus_inf": ([-INF, -INF], [1, -1]),
    "total_is_zero": ([700.0, 700.0], [1, -1]),
    "total_is_negative": ([1.0, 1.0, 1.0], [1, -1, -1]),
    "negative_maximum_positive_total": ([3.06409428, 0.37251854, 3.87471931],
                                        [1.88190708, 2.84174795, -0.85016884]),
    "nan_in_a": ([NAN, 1.0], [1, 1]),
    "nan_in_b": ([0.0, 1.0], [NAN, 1]),
    "nan_in_b_beside_inf": ([INF, 1.0], [1, NAN]),
    "overflows_without_a_shift": ([1000.0, 999.0, -2000.0], [0.5, -0.25, 1e30]),
    "underflows_without_a_shift": ([-1000.0, -1001.0], [3.0, 2.0]),
    "huge_weight_of_a_small_one": ([0.0, -80.0], [1e-30, 1e30]),
    "tiny_weights": ([0.0, 1.0], [1e-35, 2e-36]),
    "large_weights": ([5.0, 1.0], [1e35, -2e36]),
    "one_dominates": ([0.0, -40.0], [1.0, -1.0]),
    "offset_1e6": ([1e6, 1e6 - 1.5], [1.5, 0.25]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("trap", WEIGHTED)
def test_trap_with_weights(trap, dtype, backend, regime):
    a, b = (np.array(v, dtype) for v in WEIGHTED[trap])
    for pad in (0, 5, 30):  # -inf adds nothing, wherever it stands
        x = np.concatenate([a, np.full(pad, -INF, dtype)])
        w = np.concatenate([b, np.ones(pad, dtype)])
        with np.errstate(all="raise"):
            assert_weighted(backend("logsumexp", x, b=w), x, w, dtype)
            log, sign = backend("logsumexp", x, b=w, return_sign=True)
        assert_weighted(log, x, w, dtype, sign)
        rows = np.stack([x, np.zeros_like(x), x])
        logs, signs = backend("logsumexp", rows, 1, b=w, return_sign=True)
        assert_weighted(logs[2], x, w, dtype, signs[2])


@pytest.mark.parametrize("trap", VALUES)
def test_return_sign_without_weights(trap, backend):
    lane = VALUES[trap].lane("float64")
    log, sign = backend("logsumexp", lane, return_sign=True)
    np.testing.assert_array_equal(log, backend("logsumexp", lane))
    expected = NAN if np.isnan(log) else 0 if log == -INF else 1
    np.testing.assert_array_equal(sign, expected)
    assert type(sign) is np.float64


BROADCASTS = [
    ((4, 6), (6,)),
    ((4, 6), (4, 1)),
    ((4, 6), ()),
    ((6,), (4, 6)),
    ((4, 1), (1, 6)),
    ((4, 1, 2, 1), (3, 1, 5)),
    ((), (3,)),
    ((1,), (3,)),
    ((1, 1), (2, 3, 4)),
]


@pytest.mark.parametrize(("a_shape", "b_shape"), BROADCASTS, ids=str)
def test_a_and_b_broadcast_both_ways(a_shape, b_shape, backend):
    a = cases.draw(a_shape, spread=2, offset=3)
    b = np.random.default_rng(0).uniform(0.5, 2, b_shape)
    whole_a, whole_b = (v.copy() for v in np.broadcast_arrays(a, b))
    for axis in (None, 0, -1, tuple(range(whole_a.ndim))):
        for keepdims in (False, True):
            got = backend("logsumexp", a, axis, b=b, keepdims=keepdims)
            kept = whole_a.any(axis=axis, keepdims=keepdims).shape
            assert got.shape == kept
            expected = backend("logsumexp", whole_a, axis, b=whole_b, keepdims=keepdims)
            np.testing.assert_array_equal(got, expected)
    assert_weighted(backend("logsumexp", a, b=b), whole_a.ravel(), whole_b.ravel(), "float64")


@pytest.mark.parametrize("b", [2.0, 3, np.float32(0.5), [1, 2, 3], np.array([1, 0, 2]), True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "float16"])
def test_dtype_with_weights_is_scipys(dtype, b, backend):
    special = pytest.importorskip("scipy.special")
    a = np.array([1, 2, 0], dtype)
    got = backend("logsumexp", a, b=b)
    theirs = special.logsumexp(a, b=b)
    assert got.dtype == theirs.dtype
    np.testing.assert_allclose(got, theirs, rtol=4 * np.finfo(theirs.dtype).eps)


def test_integer_weights_are_not_rounded_to_float32(backend):
    """2**24 + 1 needs float64; NumPy's promotion gives it."""
    a, b = np.zeros(1, np.float32), np.array([2**24 + 1])
    assert backend("logsumexp", a, b=b) == pytest.approx(np.log(2.0**24 + 1), rel=1e-15)


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_where_and_weights_work_together(dtype, backend, regime):
    a = np.array([[INF, 1.0, 2.0, NAN], [0.0, 1.0, 2.0, 3.0], [NAN, NAN, 1.0, INF]], dtype)
    b = np.array([[1.0, -2.0, 3.0, 1.0], [1.0, -1.0, 0.0, NAN], [1.0, 1.0, 0.0, -1.0]], dtype)
    where = np.array([[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    log, sign = backend("logsumexp", a, 1, b=b, where=where, return_sign=True)
    for i in range(3):
        seen = where[i]
        assert_weighted(log[i], a[i][seen], b[i][seen], dtype, sign[i])


def test_weights_with_out_and_keepdims(backend):
    a, b = cases.draw((4, 6), spread=2, offset=3), np.random.default_rng(1).uniform(1, 2, (4, 6))
    expected = backend("logsumexp", a, 1, b=b)
    out = np.zeros((4, 1))
    assert backend("logsumexp", a, 1, b=b, keepdims=True, out=out) is out
    np.testing.assert_array_equal(out[:, 0], expected)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layout_of_weights_does_not_matter(layout, backend, regime):
    a = cases.draw((5, 8), spread=2, offset=3)
    b = np.random.default_rng(1).uniform(0.5, 2, (5, 8))
    a, b = cases.LAYOUTS[layout](a), cases.LAYOUTS[layout](b)
    for axis in (0, 1):
        got = backend("logsumexp", a, axis, b=b)
        for i, value in enumerate(got):
            assert_weighted(value, np.take(a, i, 1 - axis), np.take(b, i, 1 - axis), "float64")


def test_weights_that_do_not_broadcast_are_refused(backend):
    with pytest.raises(ValueError, match=r"\bb\b") as caught:
        backend("logsumexp", np.zeros((3, 4)), b=np.zeros(3))
    assert "(3, 4)" in str(caught.value)
    assert "(3,)" in str(caught.value)


# -------------------------------------------------------------------- floating-point state


@pytest.mark.parametrize("state", ["raise", "warn", "ignore"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
@pytest.mark.parametrize("op", OPS)
def test_no_warning_and_no_change_of_the_error_state(op, dtype, state, backend, regime):
    with np.errstate(all="ignore"):
        lanes = [trap.lane("float64") for trap in VALUES.values()]
        if dtype == "int64":
            lanes = [lane[np.isfinite(lane)].clip(-9e18, 9e18) for lane in lanes]
        lanes = [lane.astype(dtype) for lane in lanes]
    with np.errstate(divide=state, over=state, under="print", invalid=state):
        before = np.geterr()
        with np.errstate(under=state), warnings.catch_warnings():
            warnings.simplefilter("error")
            for length in {lane.size for lane in lanes}:
                rows = np.stack([lane for lane in lanes if lane.size == length])
                for x, axis in ((rows[0], 0), (rows, 1), (np.ascontiguousarray(rows.T), 0)):
                    backend(op, x)
                    backend(op, x, axis)
                    backend(op, x, axis, where=x != 0)
                    backend(op, x, axis, out=np.zeros(result_shape(op, x.shape, axis)))
        assert np.geterr() == before


def test_a_floating_point_trap_set_by_the_caller_is_not_called(backend, regime):
    calls = []
    lane = np.array([NAN, INF, -INF, 1e300, -1e300, 1e-310])
    with np.errstate(all="call", call=lambda *args: calls.append(args)):
        for op in OPS:
            backend(op, lane)
            backend(op, lane[3:])
    assert calls == []


def test_messages_say_argument_value_and_expectation(backend):
    """One of each: the argument's name, what it was, what was wanted."""
    x = np.zeros((3, 4))
    wrong = [
        ({"axis": 7}, "axis", "7", "2"),
        ({"axis": (1, 1)}, "axis", "1"),
        ({"axis": 1.5}, "axis", "1.5|float", "int"),
        ({"axis": 1, "out": np.zeros(3)}, "out", "(3,)", "(3, 4)"),
        ({"axis": 1, "out": np.zeros((3, 4), int)}, "out", "int64", "float64"),
        ({"where": np.zeros(9, bool)}, "where", "(9,)", "(3, 4)"),
        ({"where": np.zeros((3, 4))}, "where", "float64", "bool"),
        ({"dtype": "int32"}, "dtype", "int32", "float64"),
    ]
    for keywords, *words in wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            backend("softmax", x, **keywords)
        for word in words:
            pattern = "|".join(map(re.escape, word.split("|")))
            assert re.search(pattern, str(caught.value)), (word, str(caught.value))
