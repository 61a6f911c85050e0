"""What the CUDA backend asks of the driver: launches, memory, streams, devices; without a GPU.

Each test's body runs in a process of its own, in which `fake_driver.c` takes the driver's place and
records what is asked of it. Kernels are compiled, loaded and launched, but not run.
"""

import collections
import contextlib
import ctypes
import functools
import itertools
import os
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from . import fake_driver
from .fake_driver import (
    LEGACY,
    PER_THREAD,
    Array,
    ForeignStream,
    at_once,
    clear,
    current,
    device_of,
    fail,
    fake,
    in_child,
    interface,
    launches,
    make_current,
    make_stream,
    raises,
    records,
    strides_of,
    variety,
)

pytestmark = fake_driver.MARKS
SYNCHRONOUS = {  # of the driver's functions: those that make the host wait
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize", "cuMemAlloc_v2"),
    *("cuMemFree_v2", "cuMemcpy", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2", "cuMemcpyDtoD_v2"),
}
OUT_OF_MEMORY, NO_DEVICE, LAUNCH_FAILED = 2, 100, 719


# -- results --------------------------------------------------------------------------------------


@in_child(compiled=True)
def test_a_plain_interface_gets_one_back():
    import nbsoftmax

    x = Array((6, 1000))
    clear()
    y = nbsoftmax.softmax(x, axis=-1)
    (launch,) = launches()
    seen = interface(y)
    assert (seen.shape, seen.typestr, seen.version) == ((6, 1000), "<f4", 3)
    assert seen.strides in (None, (4000, 4))
    assert seen.data[0] != x.address
    assert not seen.data[1]
    assert device_of(seen.data[0]) == launch.device == 0
    assert launch.arguments[:2] == [x.address, seen.data[0]]
    assert launch.stream == LEGACY
    assert y.shape == (6, 1000)
    assert y.dtype == np.float32


@in_child()
def test_results_have_the_contracts_shape_and_dtype():
    from nbsoftmax import log_softmax, logsumexp, softmax

    x = Array((3, 4, 50))
    for got, shape, dtype in (
        (softmax(x), (3, 4, 50), "f4"),
        (log_softmax(Array((3, 50), "f2"), axis=1), (3, 50), "f2"),
        (softmax(Array((3, 50), "i8"), axis=1), (3, 50), "f8"),
        (softmax(Array((3, 50), "?"), axis=1), (3, 50), "f8"),
        (softmax(x, axis=1, dtype="float64"), (3, 4, 50), "f8"),
        (logsumexp(x), (), "f4"),
        (logsumexp(x, axis=(0, 1)), (50,), "f4"),
        (logsumexp(x, axis=1, keepdims=True), (3, 1, 50), "f4"),
        (logsumexp(x, axis=-1, b=Array((50,), "f8")), (3, 4), "f8"),
    ):
        seen = interface(got)
        assert (seen.shape, seen.typestr) == (shape, np.dtype(dtype).str)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert any(block.address == seen.data[0] and block.size >= size for block in records().live)
    assert not records().faults


@in_child()
def test_arrays_without_elements_are_served():
    from nbsoftmax import logsumexp, softmax

    for shape in ((0, 3), (3, 0), (0,)):
        got = softmax(Array(shape), axis=-1)
        assert interface(got).shape == shape
    assert not launches()
    assert interface(logsumexp(Array((3, 0)), axis=-1)).shape == (3,)
    assert len(launches()) == 1


@in_child()
def test_results_have_no_gaps_and_turned_arrays_get_turned_ones():
    import nbsoftmax

    sizes = {80000: 3, 80: 1000, 4: 20}  # of the axis with such a stride
    for strides, axis in itertools.product(itertools.permutations(sizes), range(3)):
        x = Array([sizes[step] for step in strides], strides=strides)
        got = interface(nbsoftmax.softmax(x, axis=axis))
        steps = tuple(got.strides or strides_of(got.shape, 4))
        if strides in ((80000, 80, 4), (4, 80, 80000)):
            assert steps == strides
        order = sorted(range(3), key=lambda i: -steps[i])
        dense = strides_of([got.shape[i] for i in order], 4)
        assert tuple(steps[i] for i in order) == dense


@in_child()
def test_out_is_written_to_and_returned():
    import nbsoftmax

    x, out, same = Array((6, 1000)), Array((6, 1000)), Array((6, 1000))
    clear()
    assert nbsoftmax.softmax(x, axis=-1, out=out) is out
    assert nbsoftmax.softmax(same, axis=-1, out=same) is same
    seen = records()
    assert [launch.arguments[:2] for launch in seen.launches] == [
        [x.address, out.address],
        [same.address, same.address],
    ]
    assert not seen.blocks


@in_child()
def test_a_strided_out_gets_its_own_strides():
    import nbsoftmax

    out = Array((6, 1000), strides=(8000, 4), address=Array((6, 2000)).address)
    x = Array((6, 1000))
    clear()
    assert nbsoftmax.softmax(x, axis=-1, out=out) is out
    (launch,) = launches()
    assert launch.arguments[1] == out.address
    assert 8000 in launch.arguments


# -- streams --------------------------------------------------------------------------------------


@in_child()
def test_work_is_queued_on_the_stream_that_is_given():
    from cuda.core import Stream

    import nbsoftmax

    own, made = make_stream(), make_stream()
    x, with_stream = Array((6, 1000)), Array((6, 1000), stream=own)
    for given, expected in (
        (made, made),
        (np.int64(made), made),
        (ForeignStream(made), made),
        (types.SimpleNamespace(cuda_stream=made), made),
        (types.SimpleNamespace(ptr=made), made),
        (Stream.from_handle(made), made),
        (0, LEGACY),
        (ForeignStream(0), LEGACY),
        (LEGACY, LEGACY),
        (PER_THREAD, PER_THREAD),
    ):
        for array in (x, with_stream):
            clear()
            y = nbsoftmax.softmax(array, axis=-1, stream=given)
            seen = records()
            assert [launch.stream for launch in seen.launches] == [expected]
            assert [block.stream for block in seen.live] == [expected]
            assert interface(y).stream == expected


@in_child()
def test_work_is_queued_on_the_stream_that_the_array_carries():
    import nbsoftmax

    streams = [make_stream(), make_stream(), LEGACY, PER_THREAD]
    first = Array((6, 1000))
    same = [Array((6, 1000), stream=s, address=first.address) for s in streams]
    for array, stream in itertools.chain(*[zip(same, streams, strict=True)] * 2):
        clear()
        y = nbsoftmax.softmax(array, axis=-1)
        assert [launch.stream for launch in launches()] == [stream]
        assert interface(y).stream == stream


@in_child()
def test_what_is_no_stream_is_refused():
    import nbsoftmax

    for wrong in ("1", 1.5, True, object()):
        with raises(TypeError, "stream"):
            nbsoftmax.softmax(Array((6, 1000)), axis=-1, stream=wrong)
    assert not launches()


@in_child()
def test_every_kernel_and_all_memory_of_a_call_is_on_its_stream():
    stream = make_stream()
    for name, (call, _) in variety().items():
        clear()
        call(stream=stream)
        seen = records()
        assert {launch.stream for launch in seen.launches} == {stream}, name
        assert {block.stream for block in seen.blocks} <= {stream}, name
        assert {block.freed_on for block in seen.blocks} <= {stream}, name


@in_child()
def test_a_result_that_others_take_over_is_waited_for_on_their_stream():
    import nbsoftmax

    stream, other = make_stream(), make_stream()
    y = nbsoftmax.softmax(Array((6, 1000)), axis=-1, stream=stream)
    assert tuple(y.__dlpack_device__()) == (2, 0)
    for taker, waits in ((stream, 0), (-1, 0), (other, 1)):
        clear()
        y.__dlpack__(stream=taker)
        calls = records().calls
        assert not SYNCHRONOUS & set(calls)
        assert calls["cuStreamWaitEvent"] == waits, f"taken over on {taker}"


# -- what a call costs the device -----------------------------------------------------------------


@in_child()
def test_nothing_synchronises_and_nothing_leaks():
    for name, (call, results) in variety().items():
        clear()
        kept = call()
        seen = records()
        assert not SYNCHRONOUS & set(seen.calls), name
        assert not seen.faults, name
        assert len(seen.live) == results, name
        assert seen.launches, name
        del kept
        seen = records()
        assert not seen.live, name
        assert not SYNCHRONOUS & set(seen.calls), name


@in_child()
def test_an_ordinary_call_is_one_kernel_and_its_result_is_all_it_allocates():
    from nbsoftmax import log_softmax, logsumexp, softmax

    x, cube, deep = Array((500, 1000)), Array((20, 30, 1000)), Array((7, 30_000))
    for call in (
        lambda: softmax(x, axis=-1),
        lambda: softmax(x, axis=0),
        lambda: softmax(cube, axis=1),
        lambda: softmax(cube, axis=(1, 2)),
        lambda: log_softmax(deep, axis=-1),
        lambda: logsumexp(x, axis=-1),
        lambda: logsumexp(x, axis=0),
    ):
        clear()
        kept = call()
        seen = records()
        assert len(seen.launches) == len(seen.blocks) == 1
        del kept, seen


@in_child()
def test_a_repeated_call_asks_the_driver_for_what_it_needs_and_no_more():
    import nbsoftmax

    x = Array((600, 1000))
    nbsoftmax.softmax(x, axis=-1)
    clear()
    nbsoftmax.softmax(x, axis=-1)
    calls = records().calls
    assert calls["cuLaunchKernelEx"] + calls["cuLaunchKernel"] == 1
    assert calls["cuMemAllocFromPoolAsync"] == calls["cuMemFreeAsync"] == 1
    assert not any(name.startswith(("cuLibrary", "cuModule", "cuInit")) for name in calls)


@in_child()
def test_freed_memory_waits_for_the_kernels_of_its_stream():
    import nbsoftmax

    stream = make_stream()
    clear()
    nbsoftmax.softmax(Array((6, 1000)), axis=-1, stream=stream)
    (block,) = records().blocks
    assert block.freed_on == stream


# -- failures -------------------------------------------------------------------------------------


@in_child()
def test_out_of_memory_is_one_clear_error_and_the_next_call_works():
    calls = variety()
    for call, _ in calls.values():
        call()
    for name, (call, results) in calls.items():
        clear()
        kept = call()
        needed = records().calls["cuMemAllocFromPoolAsync"]
        del kept
        for n in range(1, needed + 1):
            clear()
            fail("cuMemAllocFromPoolAsync", n, OUT_OF_MEMORY)
            with raises(Exception, "memory"):
                call()
            seen = records()
            assert not seen.live, f"{name}: allocation {n} failed, others stay"
            assert not seen.faults, name
            clear()
            kept = call()
            assert len(records().live) == results, name
            del kept


@in_child()
def test_a_failed_launch_is_one_clear_error_and_leaves_nothing():
    for name, (call, results) in variety().items():
        clear()
        kept = call()
        needed = len(launches())
        del kept
        for n in range(1, needed + 1):
            clear()
            fail("cuLaunchKernelEx", n, LAUNCH_FAILED)
            with raises(Exception, "launch"):
                call()
            assert not records().live, f"{name}: launch {n} failed, memory stays"
            kept = call()
            assert len(records().live) == results, name
            del kept


@in_child(compiled=True, FAKE_CUDA_FAIL=f"cuInit:0:{NO_DEVICE}")
def test_without_a_device_there_is_one_clear_error():
    import nbsoftmax

    for _ in range(2):
        with raises((RuntimeError, ValueError), "device"):
            nbsoftmax.softmax(Array((6, 1000), address=4096), axis=-1)
    x = np.zeros(3)
    assert nbsoftmax.softmax(x).sum() == 1


@in_child(compiled=True, driver="none")
def test_without_a_driver_there_is_one_clear_error():
    import nbsoftmax

    if _has_a_driver():
        return
    for _ in range(2):
        with raises((RuntimeError, ImportError, ValueError), "cuda"):
            nbsoftmax.softmax(Array((6, 1000), address=4096), axis=-1)
    x = np.zeros(3)
    assert nbsoftmax.softmax(x).sum() == 1


def _has_a_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@in_child()
def test_an_address_on_the_host_is_refused_by_the_arguments_name():
    import nbsoftmax

    host = np.zeros((6, 1000), np.float32)
    wrong, right = Array((6, 1000), address=host.ctypes.data), Array((6, 1000))
    mask = Array((6, 1000), "?", address=host.ctypes.data)
    with raises(ValueError, "x"):
        nbsoftmax.softmax(wrong, axis=-1)
    with raises(ValueError, "out"):
        nbsoftmax.softmax(right, axis=-1, out=wrong)
    with raises(ValueError, "where"):
        nbsoftmax.softmax(right, axis=-1, where=mask)
    with raises(ValueError, "b "):
        nbsoftmax.logsumexp(right, axis=-1, b=wrong)
    assert not launches()


@in_child()
def test_arrays_of_the_host_do_not_mix_with_those_of_a_device():
    import nbsoftmax

    x, host = Array((6, 1000)), np.zeros((6, 1000), np.float32)
    with raises(TypeError, "out"):
        nbsoftmax.softmax(x, axis=-1, out=host)
    with raises(TypeError, "where"):
        nbsoftmax.softmax(x, axis=-1, where=host > 0)
    with raises(TypeError, "b "):
        nbsoftmax.logsumexp(x, axis=-1, b=host)
    assert not launches()


@in_child()
def test_what_the_contract_refuses_is_refused_before_anything_is_queued():
    import nbsoftmax

    x = Array((6, 1000))
    readonly = Array((6, 1000))
    readonly.__cuda_array_interface__["data"] = (readonly.address, True)
    clear()
    for kind, call in (
        (np.exceptions.AxisError, lambda: nbsoftmax.softmax(x, axis=2)),
        (ValueError, lambda: nbsoftmax.softmax(x, axis=(0, 0))),
        (TypeError, lambda: nbsoftmax.softmax(x, axis=0.5)),
        (ValueError, lambda: nbsoftmax.softmax(x, axis=-1, out=Array((6, 999)))),
        (ValueError, lambda: nbsoftmax.softmax(x, axis=-1, out=readonly)),
        (TypeError, lambda: nbsoftmax.softmax(x, axis=-1, out=Array((6, 1000), "i4"))),
        (TypeError, lambda: nbsoftmax.softmax(x, axis=-1, where=Array((6, 1000)))),
        (ValueError, lambda: nbsoftmax.softmax(x, axis=-1, where=Array((7, 1000), "?"))),
        (TypeError, lambda: nbsoftmax.softmax(Array((6, 10), "c8"), axis=-1)),
    ):
        with pytest.raises(kind):
            call()
    seen = records()
    assert not seen.launches
    assert not seen.blocks


# -- devices --------------------------------------------------------------------------------------


@in_child()
def test_arrays_on_different_devices_are_refused_by_the_arguments_name():
    import nbsoftmax

    x, there = Array((6, 1000)), Array((6, 1000), device=1)
    mask = Array((6, 1000), "?", device=1)
    with raises(ValueError, "out", "device 1", "device 0"):
        nbsoftmax.softmax(x, axis=-1, out=there)
    with raises(ValueError, "where", "device 1", "device 0"):
        nbsoftmax.softmax(x, axis=-1, where=mask)
    with raises(ValueError, "b ", "device 1", "device 0"):
        nbsoftmax.logsumexp(x, axis=-1, b=there)
    assert not launches()


@in_child()
def test_work_goes_to_the_arrays_device_whichever_is_current():
    import nbsoftmax

    arrays = [Array((6, 40_000), device=d) for d in (0, 1)]
    for now, (device, x) in itertools.product((0, 1, 0), enumerate(arrays)):
        make_current(now)
        for stream in (None, PER_THREAD, make_stream(device)):
            clear()
            y = nbsoftmax.softmax(x, axis=-1, stream=stream)
            seen = records()
            assert {launch.device for launch in seen.launches} == {device}
            assert device_of(interface(y).data[0]) == device
            assert not seen.faults
            assert current() == now


@in_child()
def test_the_callers_device_stays_current():
    import nbsoftmax

    arrays = [Array((30, 1000), device=d) for d in (0, 1)]
    for now, x in itertools.product((0, 1), arrays):
        make_current(now)
        nbsoftmax.softmax(x, axis=-1)
        assert current() == now
        nbsoftmax.logsumexp(x, axis=0, b=x)
        assert current() == now
        with pytest.raises(TypeError):
            nbsoftmax.softmax(x, axis=0.5)
        assert current() == now
        fail("cuLaunchKernelEx", 1, LAUNCH_FAILED)
        with pytest.raises(Exception, match=r"(?i)launch"):
            nbsoftmax.softmax(x, axis=-1)
        assert current() == now


@in_child()
def test_a_thread_without_a_current_device_is_served_and_left_without():
    import nbsoftmax

    arrays = [Array((30, 1000), device=d) for d in (0, 1)]
    seen = []

    def work():
        for x in arrays:
            nbsoftmax.softmax(x, axis=-1)
            nbsoftmax.logsumexp(x, axis=-1, b=x)
            seen.append(current())

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [None] * 4
    assert not records().faults


@in_child()
def test_results_may_be_dropped_where_another_device_or_none_is_current():
    import nbsoftmax

    make_current(0)
    kept = [nbsoftmax.softmax(Array((30, 1000), device=d), axis=-1) for d in (0, 1, 1)]
    kept.pop()
    assert len(records().live) == 2
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    seen = records()
    assert not seen.live
    assert not seen.faults


@in_child()
def test_clusters_are_for_devices_that_have_them():
    import nbsoftmax

    for device, clusters in ((0, True), (1, False)):
        clear()
        nbsoftmax.softmax(Array((6, 60_000), device=device), axis=-1)
        seen = launches()
        assert seen
        assert any(launch.cluster > 1 for launch in seen) == clusters
        for launch in seen:
            assert launch.grid[0] % launch.cluster == 0


# -- sizes ----------------------------------------------------------------------------------------


@in_child()
def test_sizes_beyond_32_bits_do_not_overflow():
    from nbsoftmax import logsumexp, softmax

    size = 3 * 2**31
    flat = Array((size,))
    shapes = ((size,), (1, size), (size // 1024, 1024), (1024, size // 1024), (size, 1))
    for shape in shapes:
        x = Array(shape, address=flat.address)
        for axis, call in itertools.product(range(len(shape)), (softmax, logsumexp)):
            clear()
            kept = call(x, axis=axis)
            seen = records()
            assert not seen.faults
            for launch in seen.launches:
                assert 1 <= launch.grid[0] < 2**31
                assert launch.grid[1:] == [1, 1]
                assert all(argument >= 0 for argument in launch.arguments)
            outer, n, inner = _folded(shape, axis)
            for launch in seen.launches:
                covered = [a for a in launch.arguments if a < 2**40]
                assert outer in covered
                assert n in covered
                assert inner in covered
            if call is softmax:
                assert seen.live[0].size >= 4 * size
            del kept


def _folded(shape, axis):
    outer, inner = (int(np.prod(part, dtype=object)) for part in (shape[:axis], shape[axis + 1 :]))
    return outer, shape[axis], inner


@in_child()
def test_a_converted_array_beyond_32_bits_is_covered_by_its_blocks():
    import nbsoftmax

    size = 3 * 2**31
    clear()
    nbsoftmax.softmax(Array((size // 1024, 1024), "i1"), axis=-1)
    copies = [launch for launch in launches() if "elements" in launch.kernel]
    assert copies
    for launch in copies:
        assert size in launch.arguments
        assert launch.grid[0] * launch.block[0] >= size
        assert launch.grid[1:] == [1, 1]


@in_child()
def test_more_blocks_than_65535_stay_in_one_dimension():
    import nbsoftmax

    for shape, axis in (((300_000, 4096), -1), ((300_000, 64, 32), 1)):
        clear()
        nbsoftmax.softmax(Array(shape), axis=axis)
        (launch,) = launches()
        assert launch.grid[0] > 65_535
        assert launch.grid[1:] == [1, 1]


# -- kernels --------------------------------------------------------------------------------------


def refuse_to_compile():
    from nbsoftmax.cuda import _compile

    def compile_(*arguments, **keywords):
        raise AssertionError(f"compiles {arguments}")

    _compile.compile_ = compile_


@in_child()
def test_a_second_call_of_the_same_geometry_compiles_nothing():
    import nbsoftmax

    for x in (Array((6, 1000)), Array((2, 300_000)), Array((6, 1000), "i4")):
        nbsoftmax.softmax(x, axis=-1)
    refuse_to_compile()
    clear()
    for x in (Array((6, 1000)), Array((2, 300_000)), Array((6, 1000), "i4")):
        nbsoftmax.softmax(x, axis=-1)
    assert not records().calls["cuLibraryLoadData"]


def forget_kernels():
    """As a new process, which has them on the disk at best."""
    from nbsoftmax.cuda import _device

    _device._loaded.cache_clear()
    _device._load.cache_clear()


def compiles():
    import nbsoftmax

    nbsoftmax.softmax(Array((6, 1000)), axis=-1)


@in_child(compiles, compiled=True, cache="fresh")
def test_a_second_process_takes_its_kernels_from_the_disk():
    refuse_to_compile()
    compiles()
    assert len(launches()) == 1


@in_child(compiles, compiled=True, cache="damaged")
def test_a_damaged_kernel_on_the_disk_is_compiled_again():
    files = [path for path in Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*") if path.is_file()]
    assert files
    for damaged in (lambda code: code[:1000], lambda code: b"none of it", lambda code: b""):
        for file in files:
            file.write_bytes(damaged(file.read_bytes()))
        forget_kernels()
        clear()
        compiles()
        assert len(launches()) == 1


@in_child(compiled=True)
def test_a_cache_that_cannot_be_written_is_no_error():
    with tempfile.NamedTemporaryFile() as file:
        os.environ["NUMBA_CACHE_DIR"] = file.name  # a file where a folder should be
        compiles()
    assert len(launches()) == 1


# -- threads --------------------------------------------------------------------------------------


@in_child(compiled=True, cache="threads")
def test_many_threads_make_their_first_calls_at_once():
    import nbsoftmax

    arrays = [Array((6, 1000), device=i % 2) for i in range(8)]
    results = {}

    def call(i):
        results[i] = nbsoftmax.softmax(arrays[i], axis=-1)

    at_once([functools.partial(call, i) for i in range(8)])
    seen = records()
    assert not seen.faults
    assert {launch.arguments[0]: launch.arguments[1] for launch in seen.launches} == {
        x.address: interface(results[i]).data[0] for i, x in enumerate(arrays)
    }
    assert len(seen.live) == len(seen.launches) == 8


@in_child()
def test_many_threads_with_streams_of_their_own_do_not_mix():
    import nbsoftmax

    arrays = [Array((6, 1000), device=i % 2, stream=make_stream(i % 2)) for i in range(8)]
    long = [Array((2, 300_000), device=i % 2) for i in range(8)]

    def call(i):
        for _ in range(50):
            nbsoftmax.softmax(arrays[i], axis=-1)
            nbsoftmax.softmax(long[i], axis=-1, stream=interface(arrays[i]).stream)

    at_once([functools.partial(call, i) for i in range(8)])
    seen = records()
    assert not seen.live
    assert not seen.faults
    owner = {interface(x).stream: i for i, x in enumerate(arrays)}
    for launch in seen.launches:
        i = owner[launch.stream]
        assert launch.arguments[0] in (arrays[i].address, long[i].address)
        assert launch.device == i % 2
    assert len(seen.launches) >= 8 * 50 * 3
    assert all(block.stream == block.freed_on for block in seen.blocks)


@in_child()
def test_calls_of_one_thread_on_many_streams_and_devices_do_not_mix():
    import nbsoftmax

    places = [(make_stream(device), device) for device in (0, 1, 0, 1)]
    places += [(stream, device) for stream in (LEGACY, PER_THREAD) for device in (0, 1)]
    long = [Array((2, 300_000), device=device) for _, device in places]
    masks = [Array((2, 300_000), "?", device=device) for _, device in places]
    make_current(0)
    for (stream, device), x, mask in [*zip(places, long, masks, strict=True)] * 2:
        clear()
        kept = nbsoftmax.softmax(x, axis=-1, where=mask, stream=stream)
        seen = records()
        assert {(launch.stream, launch.device) for launch in seen.launches} == {(stream, device)}
        assert {(block.stream, block.device) for block in seen.blocks} == {(stream, device)}
        assert {block.freed_on for block in seen.blocks} == {stream, None}
        assert not seen.faults
        assert current() == 0
        del kept


@in_child(cache="once")
def test_many_threads_at_once_compile_and_load_each_kernel_once():
    from nbsoftmax.cuda import _compile, _device

    compiled, compile_ = collections.Counter(), _compile.compile_

    def counted(job, architecture, report=False):
        compiled[job, architecture] += 1
        time.sleep(0.01)  # for others to come upon it
        return compile_(job, architecture, report)

    _compile.compile_ = counted
    calls = [call for call, _ in variety().values()]
    clear()
    at_once(calls * 3)
    assert len(compiled) > len(calls)
    assert set(compiled.values()) == {1}
    kernels = _device._load.cache_info().currsize  # some of which share their code
    assert records().calls["cuLibraryLoadData"] == kernels >= len(compiled)


@in_child()
def test_every_thread_keeps_its_current_device():
    import nbsoftmax

    arrays = [Array((30, 1000), device=device) for device in (0, 1)]
    long = [Array((2, 300_000), device=device) for device in (0, 1)]

    def work(now):
        if now is not None:
            make_current(now)
        for x in [*arrays, *long] * 20:
            nbsoftmax.softmax(x, axis=-1)
            assert current() == now
            nbsoftmax.logsumexp(x, axis=-1, b=x)
            assert current() == now

    at_once([functools.partial(work, now) for now in (0, 1, None) * 3])
    seen = records()
    assert not seen.live
    assert not seen.faults


@in_child()
def test_other_threads_compile_for_their_own_device_meanwhile():
    from numba.cuda import dispatcher

    from nbsoftmax.cuda import _compile

    def compute_capability():
        return tuple(dispatcher.get_current_device().compute_capability)

    seen = []
    make_current(0)
    with _compile._without_a_device((7, 5)):
        assert compute_capability() == (7, 5)
        thread = threading.Thread(target=lambda: seen.append(compute_capability()))
        thread.start()
        thread.join()
    assert seen == [(9, 0)]
    assert compute_capability() == (9, 0)


# -- other libraries' arrays: stand-ins -----------------------------------------------------------


class FakeDtype(str):
    """PyTorch's dtypes are no NumPy dtypes, and print as ``torch.float32``."""

    __slots__ = ()
    itemsize = property(lambda self: {"bfloat16": 2, "float16": 2, "float32": 4}[self[6:]])


class FakeTensor:
    """What the backend may use of a CUDA tensor."""

    is_cuda, requires_grad = True, False

    def __init__(self, shape, dtype, device=0, steps=None, address=None):
        self.shape, self.dtype = tuple(shape), dtype
        self.steps = steps or strides_of(self.shape, 1)
        size = dtype.itemsize * int(np.prod(self.shape))
        self.address = address or fake().fake_memory(device, size)
        self.device = types.SimpleNamespace(type="cuda", index=device)

    @property
    def __cuda_array_interface__(self):
        if not self.is_cuda:
            raise AttributeError("not on a CUDA device")
        if self.requires_grad:
            raise RuntimeError("not where a gradient is required")
        size = self.dtype.itemsize
        return {
            "shape": self.shape,
            "strides": tuple(step * size for step in self.steps),
            "typestr": "<V2" if self.dtype == "torch.bfloat16" else f"<f{size}",
            "data": (self.address, False),
            "version": 2,
        }

    def data_ptr(self):
        return self.address

    def stride(self):
        return self.steps

    def permute(self, *order):
        order = order[0] if len(order) == 1 else order
        shape, steps = ([part[i] for i in order] for part in (self.shape, self.steps))
        return type(self)(shape, self.dtype, self.device.index, tuple(steps), self.address)


FakeTensor.__module__ = "torch"


def fake_torch(streams):
    """A module of that name, with a current stream for each device."""
    torch = types.ModuleType("torch")
    for name in ("float32", "float16", "bfloat16"):
        setattr(torch, name, FakeDtype(f"torch.{name}"))
    torch.is_grad_enabled = lambda: True
    torch.Tensor = FakeTensor
    made = []

    def number(device):
        return device if isinstance(device, int) else device.index

    def empty(*shape, dtype, device):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        made.append(FakeTensor(shape, dtype, number(device)))
        return made[-1]

    def current_stream(device):
        return types.SimpleNamespace(cuda_stream=streams[number(device)])

    torch.empty, torch.made = empty, made
    torch.cuda = types.SimpleNamespace(current_stream=current_stream)
    sys.modules["torch"] = torch
    return torch


@in_child()
def test_tensors_get_tensors_back_on_their_device_and_current_stream():
    import nbsoftmax

    streams = {0: make_stream(0), 1: 0}
    torch = fake_torch(streams)
    for device, dtype in itertools.product((0, 1), (torch.float32, torch.float16, torch.bfloat16)):
        clear()
        x = FakeTensor((6, 1000), dtype, device)
        y = nbsoftmax.softmax(x, axis=-1)
        seen = records()
        (launch,) = seen.launches
        assert isinstance(y, FakeTensor)
        assert (y.shape, y.dtype, y.device.index) == (x.shape, dtype, device)
        assert y.stride() == (1000, 1)
        assert launch.arguments[:2] == [x.data_ptr(), y.data_ptr()]
        assert launch.stream == (streams[device] or LEGACY)
        assert launch.device == device
        assert y.data_ptr() in [made.data_ptr() for made in torch.made]
        assert not seen.blocks, "the memory of tensors is PyTorch's"
        assert not seen.faults
        assert not SYNCHRONOUS & set(seen.calls)


@in_child()
def test_a_turned_tensor_gets_a_result_turned_alike():
    import nbsoftmax

    torch = fake_torch({0: 0})
    x = FakeTensor((20, 1000, 3), torch.float32).permute(2, 0, 1)
    y = nbsoftmax.softmax(x, axis=1)
    assert (x.shape, x.stride()) == ((3, 20, 1000), (1, 3000, 3))
    assert (y.shape, y.stride()) == (x.shape, x.stride())
    assert len(launches()) == 1


@in_child()
def test_the_current_stream_of_tensors_is_asked_for_at_every_call():
    import nbsoftmax

    streams = {0: 0}
    torch = fake_torch(streams)
    x = FakeTensor((6, 1000), torch.float32)
    for stream in (0, make_stream(), make_stream(), 0):
        streams[0] = stream
        clear()
        nbsoftmax.softmax(x, axis=-1)
        assert [launch.stream for launch in launches()] == [stream or LEGACY]


@in_child()
def test_tensors_that_require_a_gradient_or_lie_on_the_host_are_refused():
    import nbsoftmax

    torch = fake_torch({0: 0})
    x, learnt, host = (FakeTensor((6, 1000), torch.float32) for _ in range(3))
    learnt.requires_grad = True
    host.is_cuda, host.device = False, "cpu"
    with raises(TypeError, "x", "gradient"):
        nbsoftmax.softmax(learnt, axis=-1)
    with raises(TypeError, "out"):
        nbsoftmax.softmax(x, axis=-1, out=host)
    assert not launches()


class FakeCupyArray(Array):
    """What the backend may use of a CuPy array."""

    def __init__(self, shape, dtype="f4", device=0, stream=LEGACY, strides=None, address=None):
        super().__init__(shape, dtype, device, stream, strides, address)
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.device = types.SimpleNamespace(id=device)
        self.stream = stream

    def transpose(self, *axes):
        axes = axes[0] if len(axes) == 1 else axes
        strides = strides_of(self.shape, self.dtype.itemsize)
        shape, strides = (tuple(part[i] for i in axes) for part in (self.shape, strides))
        place = self.device.id, self.stream, strides, self.address
        return type(self)(shape, self.dtype, *place)


FakeCupyArray.__module__ = "cupy"


def fake_cupy(stream):
    """A module of that name. Its arrays carry its current stream."""
    cupy = types.ModuleType("cupy")
    chosen = [0]

    @contextlib.contextmanager
    def device(number):
        chosen.append(number)
        yield
        chosen.pop()

    def empty(shape, dtype=float, order="C"):
        return FakeCupyArray(shape, dtype, chosen[-1], stream)

    cupy.empty, cupy.ndarray = empty, FakeCupyArray
    current = types.SimpleNamespace(ptr=stream)
    cupy.cuda = types.SimpleNamespace(Device=device, get_current_stream=lambda: current)
    sys.modules["cupy"] = cupy
    return cupy


@in_child()
def test_cupys_arrays_get_cupys_back_on_their_device_and_stream():
    import nbsoftmax

    for device in (0, 1):
        stream = make_stream(device)
        cupy = fake_cupy(stream)
        x = FakeCupyArray((6, 1000), "f8", device, stream)
        clear()
        y = nbsoftmax.softmax(x, axis=-1)
        seen = records()
        (launch,) = seen.launches
        assert isinstance(y, cupy.ndarray)
        assert (y.shape, y.dtype, y.device.id) == (x.shape, x.dtype, device)
        assert launch.arguments[:2] == [x.address, y.address]
        assert (launch.stream, launch.device) == (stream, device)
        assert not seen.blocks, "the memory of its arrays is CuPy's"
        assert not seen.faults
        turned = FakeCupyArray((20, 1000, 3), "f4", device, stream).transpose(2, 0, 1)
        y = nbsoftmax.softmax(turned, axis=1)
        assert interface(y).strides == interface(turned).strides


class FakeJaxArray:
    """What the backend may use of a JAX array: DLPack. It notes the streams it is asked for."""

    def __init__(self, held):
        self.held, self.streams = held, []
        self.shape, self.dtype = held.shape, held.dtype

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return self.held.__dlpack__(stream=-1, **options)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()


FakeJaxArray.__module__ = "jaxlib._jax"


def fake_jax():
    jax = types.ModuleType("jax")
    jax.dlpack = types.SimpleNamespace(from_dlpack=FakeJaxArray)
    sys.modules["jax"] = jax
    return jax


@in_child()
def test_jaxs_arrays_get_jaxs_back_and_are_waited_for():
    import nbsoftmax

    fake_jax()
    stream = make_stream()
    made = nbsoftmax.softmax(Array((6, 1000)), axis=-1)
    for given in (None, stream):
        x = FakeJaxArray(made)
        clear()
        y = nbsoftmax.softmax(x, axis=-1, stream=given)
        seen = records()
        (launch,) = seen.launches
        assert isinstance(y, FakeJaxArray)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert launch.arguments[:2] == [interface(a.held).data[0] for a in (x, y)]
        assert launch.stream == (given or LEGACY)
        # Whoever makes x sees to it that this stream waits for x; -1 would mean: for nothing.
        assert launch.stream in x.streams
        assert not SYNCHRONOUS & set(seen.calls)
