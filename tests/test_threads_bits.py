"""The same input gives the same bits: for any number of threads, any address, in every run."""

import itertools

import numba
import numpy as np
import pytest

from nbsoftmax import _plan

from . import cases
from .cases import OPS, aligned_at, case_id

SHAPES = (
    *cases.SOME_SHAPES,
    ((1001,), 0),
    ((3, 20_011), 1),
    ((300, 65), 1),
    ((3000, 12), 1),
    ((1200, 70), 0),
    ((5000, 3), 0),
)
# A pitch between rows does not send them another way: they need not be packed.
ALIKE = [(shape, axis) for shape, axis in SHAPES if len(shape) < 3 or axis in (-1, len(shape) - 1)]
# Large enough that the default thresholds use several threads, and long stores where there are any.
LARGE = (
    ((4_000_000,), 0),
    ((2000, 2001), 1),
    ((2001, 2000), 0),
    ((300_000, 10), 1),
    ((40, 300, 301), 1),
)


@pytest.fixture
def threads():
    """Set the number of threads; afterwards it is what it was."""
    before = numba.get_num_threads()
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one thread is all there is")
    yield numba.set_num_threads
    numba.set_num_threads(before)


def bits(results):
    return {op: np.asarray(value).tobytes() for op, value in results.items()}


def all_ops(x, axis, backend):
    return {op: backend(op, x, axis) for op in OPS}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=map(case_id, SHAPES))
def test_number_of_threads_does_not_matter(shape, axis, dtype, threads, backend, regime):
    x = cases.draw(shape, dtype, offset=50)
    seen = set()
    for count in (1, 2, numba.config.NUMBA_NUM_THREADS, 1):
        threads(count)
        seen.add(tuple(bits(all_ops(x, axis, backend)).values()))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), LARGE, ids=map(case_id, LARGE))
def test_number_of_threads_does_not_matter_to_large_arrays(shape, axis, dtype, threads, backend):
    x = cases.draw(shape, dtype)
    for op in OPS:
        threads(1)
        one = np.asarray(backend(op, x, axis)).tobytes()
        threads(numba.config.NUMBA_NUM_THREADS)
        assert np.asarray(backend(op, x, axis)).tobytes() == one


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=map(case_id, SHAPES))
def test_address_does_not_matter(shape, axis, dtype, backend, regime):
    """Input and output from every place in a cache line, and across the end of a page."""
    x = cases.draw(shape, dtype, offset=50)
    itemsize = x.itemsize
    expected = all_ops(x, axis, backend)
    places = [*range(0, 64 + itemsize, max(itemsize, 64 // 9 // itemsize * itemsize)), 1, 63, 4093]
    for i, at in enumerate(places):
        y = aligned_at(shape, dtype, at)
        y[...] = x
        for op in OPS:
            out = aligned_at(np.shape(expected[op]), dtype, places[-i])
            got = backend(op, y, axis, out=out)
            assert got is out
            assert got.tobytes() == expected[op].tobytes(), (op, at, places[-i])


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), LARGE, ids=map(case_id, LARGE))
def test_address_does_not_matter_to_large_arrays(shape, axis, dtype, backend):
    x = cases.draw(shape, dtype)
    for op in OPS:
        expected = backend(op, x, axis)
        for at, to in (
            (0, 0),
            (0, x.itemsize),
            (x.itemsize, 32),
            (60 // x.itemsize * x.itemsize, 8),
        ):
            y = aligned_at(shape, dtype, at)
            y[...] = x
            out = aligned_at(np.shape(expected), dtype, to)
            backend(op, y, axis, out=out)
            assert out.tobytes() == np.asarray(expected).tobytes(), (op, at, to)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=map(case_id, SHAPES))
def test_repeated_runs_agree(shape, axis, dtype, backend, regime):
    """Whatever fills the scratch memory between them."""
    x = cases.draw(shape, dtype, offset=50)
    first = bits(all_ops(x, axis, backend))
    for seed in range(5):
        all_ops(cases.draw(shape, dtype, seed=seed + 1) * np.nan, axis, backend)
        assert bits(all_ops(x, axis, backend)) == first


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=map(case_id, SHAPES))
def test_out_gives_the_bits_of_a_new_array(shape, axis, dtype, backend, regime):
    x = cases.draw(shape, dtype, offset=50)
    for op in OPS:
        expected = backend(op, x, axis)
        out = np.empty(np.shape(expected), dtype)
        assert backend(op, x, axis, out=out).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("layout", ["row_pitched", "row_pitched_shifted", "read_only", "unaligned"])
@pytest.mark.parametrize(("shape", "axis"), ALIKE, ids=map(case_id, ALIKE))
def test_the_space_between_lanes_does_not_matter(shape, axis, layout, dtype, backend, regime):
    """Arrays that are walked alike have the same bits, whatever lies between their rows."""
    x = cases.draw(shape, dtype, offset=50)
    y = cases.LAYOUTS[layout](x)
    assert bits(all_ops(y, axis, backend)) == bits(all_ops(x, axis, backend))


# Short rows; lanes side by side, fewer than a vector has, some vectors and a rest, and whole, of
# more than a segment, too; and few whose elements take turns.
LEAVE_IN_LINES = [
    *((8, 1), (33, 2), (9, 3), (40, 4), (17, 5), (100, 5)),
    *((16, 16), (100, 37), (1000, 7), (77, 112)),
    *((40, 3, 5), (2, 70, 17), (5, 7, 33), (3, 9, 65), (6, 20, 32), (4, 5, 64), (1, 6, 200)),
    *((2, 300, 32), (3, 129, 16), (1, 1500, 64), (2, 2, 3, 32)),
    *((3, 40, 4), (2, 33, 8), (1, 100, 2), (5, 70, 3), (2, 65, 6)),
]


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [("float16", 40), *itertools.product(cases.FLOATS, [0, 8, 16, 40, 56])],
)
@pytest.mark.parametrize("shape", LEAVE_IN_LINES, ids=str)
def test_shared_lines_are_filled_and_nothing_else(shape, dtype, offset, backend):
    """What leaves in whole cache lines: the first and last line are partly someone else's."""
    axis, x = 1, cases.draw(shape, dtype)
    lanes = np.moveaxis(x, axis, -1)
    if dtype != "float16":  # of a maximum that needs a shift
        lanes[(0,) * (x.ndim - 1)] += 1e14
    lanes[(-1,) * (x.ndim - 1)][0] = np.nan
    size = x.nbytes
    around = aligned_at((offset + size + 128,), np.uint8, 0)
    out = around[offset : offset + size].view(dtype).reshape(x.shape)
    for op in ("softmax", "log_softmax"):
        for changes in (
            {},
            {"wrapped_vectors": 0},
            {"slab_bytes": 0},
            {"panel_bytes": 0, "few_panels_bytes": 0, "slab_bytes": 3000, "slab_rows": 1},
            {
                "wrapped_vectors": 0,
                "serial_bytes": 0,
                "wake_bytes": 0,
                "chunk_bytes": 1,
                "chunk_items": 1,
            },
        ):
            around[...] = 7
            with _plan.using(**changes):
                expected = backend(op, x, axis)
            with _plan.using(past_cache_bytes=0, **changes):
                backend(op, x, axis, out=out)
                assert out.tobytes() == expected.tobytes()
                out[...] = x
                backend(op, out, axis, out=out)
            assert out.tobytes() == expected.tobytes()
            assert (around[:offset] == 7).all()
            assert (around[offset + size :] == 7).all()
