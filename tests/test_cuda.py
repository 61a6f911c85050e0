"""What only arrays on a device can do, and every trap in every regime there."""

import re

import numpy as np
import pytest

import nbsoftmax

from . import cases, cuda_arrays, oracle
from .conftest import Backend

pytestmark = pytest.mark.skipif(bool(cuda_arrays.MISSING), reason=cuda_arrays.MISSING)
CUDA = Backend.CUDA


def traps(dtype, longest):
    """All traps as rows of one array; what is left of a row weighs nothing."""
    lanes = [trap.lane(dtype) for trap in cases.VALUES.values()]
    lanes = [lane for lane in lanes if lane.size <= longest]
    x = np.full((len(lanes), max(lane.size for lane in lanes)), -np.inf, dtype)
    for row, lane in zip(x, lanes, strict=True):
        row[: lane.size] = lane
    return x


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", cuda_arrays.REGIMES)
def test_traps_in_every_regime(name, dtype, op, axis):
    x = traps(dtype, 16)
    x = np.ascontiguousarray(x if axis else x.T)
    with cuda_arrays.using(name):
        oracle.assert_right(op, CUDA(op, x, axis), x, axis)


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16", "bool"])
def test_every_dtype(dtype, op):
    x = cases.draw((5, 9, 4), spread=3, offset=10).astype(dtype)
    with cuda_arrays.using("default"):
        for axis in (0, 1, 2, (0, 2), None):
            oracle.assert_right(op, CUDA(op, x, axis), x, axis)


@pytest.mark.parametrize("op", cases.OPS)
def test_bfloat16(op):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = cases.draw((7, 19), spread=3, offset=10).astype(ml_dtypes.bfloat16)
    with cuda_arrays.using("default"):
        for axis in (0, 1):
            oracle.assert_right(op, CUDA(op, x, axis), x, axis)


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("name", cuda_arrays.REGIMES)
def test_the_bits_do_not_depend_on_where_x_lies(name, op):
    x = cases.draw((6, 40), "float32")
    with cuda_arrays.using(name):
        expected = CUDA(op, cases.aligned_at(x.shape, x.dtype, 0).__class__.copy(x), 1)
        for offset in (4, 8, 12):
            y = cases.aligned_at(x.shape, x.dtype, offset)
            y[...] = x
            np.testing.assert_array_equal(CUDA(op, y, 1), expected)


def test_results_are_of_the_callers_kind():
    x = cuda_arrays.put(np.ones((3, 4), np.float32))
    with cuda_arrays.using("default"):
        for op in cases.OPS:
            assert type(getattr(nbsoftmax, op)(x, axis=1)) is type(x)
        logs, signs = nbsoftmax.logsumexp(x, axis=1, return_sign=True)
        assert type(logs) is type(signs) is type(x)


def test_a_full_reduction_stays_on_the_device():
    with cuda_arrays.using("default"):
        result = nbsoftmax.logsumexp(cuda_arrays.put(np.zeros((2, 2))))
    assert not isinstance(result, np.generic)
    assert result.shape == ()


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3,), (3, 4, 1), ()])
@pytest.mark.parametrize("op", cases.OPS)
def test_out_of_another_shape_is_refused(op, shape):
    out = np.zeros(shape)
    if op == "logsumexp" and shape == (3,):
        out = np.zeros((1, 3))
    with pytest.raises(ValueError, match=f"out has shape {re.escape(str(out.shape))}"):
        CUDA(op, np.zeros((3, 4)), 1, out=out)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_numbers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"x of dtype {dtype}"):
        nbsoftmax.softmax(cuda_arrays.put(np.ones(3, dtype)))


@pytest.mark.parametrize("name", ["where", "out"])
def test_arrays_of_the_host_are_refused_beside_the_devices(name):
    other = np.ones(3, bool if name == "where" else float)
    with pytest.raises(TypeError, match=f"{name} must be an array on a CUDA device"):
        nbsoftmax.softmax(cuda_arrays.put(np.ones(3)), **{name: other})


@pytest.mark.parametrize("name", ["where", "out", "b"])
def test_arrays_of_the_device_are_refused_beside_the_hosts(name):
    other = cuda_arrays.put(np.ones(3, bool if name == "where" else float))
    with pytest.raises(TypeError, match=name):
        nbsoftmax.logsumexp(np.ones(3), **{name: other})


def test_the_main_job_checks_and_times_a_device():
    from nbsoftmax import _check, _gpu

    assert not _gpu.missing()
    lanes = cases.draw((3, 40), "float32")
    with cuda_arrays.using("default"), pytest.MonkeyPatch.context() as patch:
        rows = list(_check.compare("drawn", lanes, _check.widest(), _gpu.libraries()))
        assert [row.function for row in rows] == list(cases.OPS)
        assert all(row.kept for row in rows)
        patch.setattr(_gpu, "_ROUNDS", 2)
        patch.setattr(_gpu, "_CALLS", 1)
        speed = list(_gpu.measure(lanes, 1))
    assert [(row.function, row.bytes) for row in speed] == list(
        zip(cases.OPS, (960, 960, 492), strict=True)
    )


@pytest.mark.skipif(cuda_arrays.SIMULATED, reason="there is no GPU to launch a CUDA graph")
@pytest.mark.parametrize("name", cuda_arrays.REGIMES)
def test_a_graph_computes_again_what_its_calls_do(name):
    from cuda.core import Device
    from numba import cuda

    drawn = [cases.draw((6, 5000), "float32", seed) for seed in range(3)]
    mask = drawn[0] > 0
    x, where, masked = (
        cuda_arrays.put(array) for array in (drawn[0], mask, np.zeros_like(drawn[0]))
    )
    outs = {
        op: cuda_arrays.put(np.zeros_like(oracle.exact(op, drawn[0], 1), "f4")) for op in cases.OPS
    }
    device = Device(0)
    device.set_current()
    stream = device.create_stream()
    with cuda_arrays.using(name):
        builder = stream.create_graph_builder().begin_building("global")
        for op, out in outs.items():
            getattr(nbsoftmax, op)(x, axis=1, out=out, stream=builder)
        nbsoftmax.softmax(x, axis=1, where=where, out=masked, stream=builder)
        graph = builder.end_building().complete()
    for values in drawn:
        x.memory.copy_to_device(values.view(np.uint8).ravel())
        cuda.synchronize()  # the graph's stream waits for no other
        graph.launch(stream)
        stream.sync()
        for op, out in outs.items():
            oracle.assert_right(op, cuda_arrays.get(out), values, 1)
        oracle.assert_right("softmax", cuda_arrays.get(masked), values, 1, where=mask)


def test_a_stream_is_for_device_arrays_only():
    with pytest.raises(TypeError, match="stream"):
        nbsoftmax.softmax(np.ones(3), stream=7)


def test_numbers_off_their_own_multiples_are_refused():
    from nbsoftmax.cuda import _arrays

    x = np.frombuffer(bytearray(13), np.float32, 3, 1)
    view = _arrays.View(x.ctypes.data, (3,), (4,), "float32", 4, 0, None)
    kind = _arrays.Kind(lambda array, name, stream: view, _arrays._other_new, id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_arrays, "kind_of", lambda array: kind)
        with pytest.raises(ValueError, match="multiples of its 4 bytes"):
            _arrays.view(x, "x")
