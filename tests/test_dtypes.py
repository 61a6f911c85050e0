"""What each dtype becomes, and which are refused."""

import datetime
import re

import numpy as np
import pytest
import scipy.special

import nbsoftmax

from . import cases, oracle
from .cases import OPS, VALUES

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
HALVES = ("float16", "bfloat16")


def half(name):
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_converted_before_anything_is_subtracted(dtype, op, backend):
    info = np.iinfo(dtype)
    rows = [[1, 2, 3], [info.min, 0, info.max], [info.max] * 3, [info.max, info.max - 1, info.min]]
    x = np.array(rows, dtype)
    for axis in (1, 0, None):
        oracle.assert_right(op, backend(op, x, axis), x, axis)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_long_integer_lanes(dtype, op, backend):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 100, (3, 5000)).astype(dtype)
    for axis in (1, 0):
        oracle.assert_right(op, backend(op, x, axis), x, axis)


@pytest.mark.parametrize("op", OPS)
def test_bool_counts_as_0_and_1(op, backend):
    x = np.array([[True, False, True], [False, False, False]])
    for axis in (0, 1, None):
        oracle.assert_right(op, backend(op, x, axis), x, axis)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", ["int16", "uint64", "bool", "float16", "bfloat16"])
def test_layout_does_not_matter_to_converted_dtypes(layout, dtype, backend):
    if dtype == "bfloat16" and layout == "byte_swapped":
        pytest.skip("bfloat16 has no byte order")
    dtype = half(dtype) if dtype in HALVES else np.dtype(dtype)
    x = np.abs(cases.draw((5, 6, 7), offset=0)).astype(dtype)
    x = cases.LAYOUTS[layout](x)
    for axis in (0, 1, 2, (0, 1), (0, 2), (1, 2)):
        for op in OPS:
            oracle.assert_right(op, backend(op, x, axis), x, axis)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("trap", VALUES)
def test_trap_in_half_precision(trap, dtype, op, backend):
    lane = VALUES[trap].lane(half(dtype))
    x = np.stack([lane, lane])
    oracle.assert_right(op, backend(op, x, 1), x, 1)
    oracle.assert_right(op, backend(op, lane), lane)


@pytest.mark.parametrize("dtype", HALVES)
def test_seventy_thousand_zeros_do_not_overflow_a_half(dtype, backend):
    x = np.zeros(70_000, half(dtype))
    for op in OPS:
        got = backend(op, x)
        oracle.assert_right(op, got, x)
        assert np.isfinite(got.astype(np.float32)).all()


def test_half_that_overflows_its_own_range_does_so_silently(backend):
    x = np.array([60_000.0, -60_000.0], np.float16)
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(backend("log_softmax", x), [0, -np.inf])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["complex64", "complex128", "longdouble", "clongdouble"])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_complex_and_longdouble_are_scipys(axis, dtype, op):
    rng = np.random.default_rng(5)
    x = rng.normal(0, 3, (4, 5)).astype(dtype)
    if x.dtype.kind == "c":
        x += 1j * rng.normal(0, 3, x.shape).astype(dtype)
    ours = getattr(nbsoftmax, op)(x, axis)
    theirs = getattr(scipy.special, op)(x, axis)
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["complex128", "longdouble"])
def test_weights_reach_scipys_own_function(dtype):
    a = np.arange(6, dtype=dtype).reshape(2, 3)
    b = np.array([1.0, -2.0, 0.5])
    ours = nbsoftmax.logsumexp(a, 1, b, True, True)
    theirs = scipy.special.logsumexp(a, 1, b, True, True)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_complex_weights_make_a_complex_result():
    a, b = np.array([0.5, 1.5]), np.array([1 + 1j, 2 - 1j])
    ours, theirs = nbsoftmax.logsumexp(a, b=b), scipy.special.logsumexp(a, b=b)
    assert ours == theirs
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda x: [tuple(row) for row in x],
        lambda x: [np.array(row) for row in x],
        memoryview,
        lambda x: x.astype(int).tolist(),
    ],
    ids=["list", "tuple", "list_of_tuples", "list_of_arrays", "memoryview", "nested_ints"],
)
def test_array_like_is_as_its_array(make, op, backend):
    x = make(np.array([[1.0, 1000.0, 3.0], [0.0, -5.0, 2.0]]))
    for axis in (None, 0, 1):
        oracle.assert_right(op, backend(op, x, axis), np.asarray(x), axis)


class Wrapped:
    """Something that is not an array, but gives one."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


def test_anything_with_array_is_taken(backend):
    x = np.array([1.0, 400.0], np.float32)
    for op in OPS:
        oracle.assert_right(op, backend(op, Wrapped(x)), x)


SCALARS = (
    3.5,
    -7,
    True,
    np.float32(2.25),
    np.float64(1e300),
    np.int8(-3),
    np.float16(9.5),
    np.array(4.25),
    np.array(4.25, np.float32),
    np.nan,
    np.inf,
    -np.inf,
)


@pytest.mark.parametrize("x", SCALARS, ids=repr)
@pytest.mark.parametrize("op", OPS)
def test_scalar_gives_a_numpy_scalar(x, op, backend):
    for axis in (None, ()):
        oracle.assert_right(op, backend(op, x, axis), np.asarray(x), axis)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_full_reduction_is_a_numpy_scalar_of_the_dtype(dtype, op, backend):
    x = np.zeros((2, 3), dtype)
    got = backend("logsumexp", x)
    assert type(got) is np.dtype(dtype).type


REFUSED = {
    "object": np.array([1.0, None], dtype=object),
    "object_numbers": np.array([1, 2], dtype=object),
    "str": np.array(["1", "2"]),
    "bytes": np.array([b"1", b"2"]),
    "datetime64": np.array(["2020-01-01"], "datetime64[D]"),
    "timedelta64": np.array([1, 2], "timedelta64[s]"),
    "structured": np.zeros(3, [("a", float), ("b", int)]),
    "void": np.zeros(3, "V4"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("op", OPS)
def test_refused_dtype_is_named(kind, op, backend):
    x = REFUSED[kind]
    for value in (x, x[:0], x.reshape(-1, 1)):
        with pytest.raises(TypeError, match=re.escape(str(x.dtype))):
            backend(op, value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "x", [None, "text", {}, datetime.date(2020, 1, 1), object()], ids=lambda v: type(v).__name__
)
def test_what_is_no_number_is_a_type_error(x, op, backend):
    with pytest.raises(TypeError):
        backend(op, x)


def test_refused_weights_name_argument_and_dtype(backend):
    with pytest.raises(TypeError, match=r"\bb\b.*object"):
        backend("logsumexp", np.zeros(2), b=np.array([1, None], dtype=object))


# --------------------------------------------------------------------------------- dtype=


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("source", ["float16", "float32", "float64", "int32", "bool"])
def test_dtype_is_computed_in_and_returned(source, dtype, op, backend):
    """Values that every format holds, so that it does not matter when they are converted."""
    x = np.array([[1, 0, 1, 1], [0, 0, 1, 0]]) * (1 if source == "bool" else 6)
    x = x.astype(source)
    for form in (dtype, np.dtype(dtype), getattr(np, dtype)):
        got = backend(op, x, 1, dtype=form)
        assert got.dtype == np.dtype(dtype)
        oracle.assert_right(op, got, x.astype(dtype), 1)


def test_dtype_widens_the_computation_not_only_the_result(backend):
    x = np.array([0.0, -40.0, 1.25], np.float32)
    for op in OPS:
        got = backend(op, x, dtype="float64")
        oracle.assert_right(op, got, x.astype(np.float64))


def test_dtype_none_is_the_default(backend):
    for op in OPS:
        x = np.array([1.0, 2.0], np.float32)
        np.testing.assert_array_equal(backend(op, x, dtype=None), backend(op, x))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex128", "U4", object, "datetime64[s]"])
@pytest.mark.parametrize("op", OPS)
def test_dtype_that_is_not_offered_is_refused(dtype, op, backend):
    with pytest.raises(TypeError, match=r"\bdtype\b"):
        backend(op, np.zeros(3), dtype=dtype)


def test_narrowing_by_dtype_overflows_silently(backend):
    with np.errstate(all="raise"):
        for op in OPS:
            backend(op, np.array([1e300, -1e300, 1e-300]), dtype=np.float32)
            backend(op, np.array([1e30, -1e30, 1e-30], np.float32), dtype=np.float16)
