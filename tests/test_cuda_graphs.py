"""CUDA graphs: calls with ``out=`` that are captured, in every way through the backend.

As in `test_cuda_host`, a stand-in takes the driver's place. It records what is captured, forbids
what a capture forbids, and does what was captured again at every launch of the graph.
"""

import functools
import itertools
import threading

import numpy as np

from . import fake_driver
from .fake_driver import (
    Array,
    ForeignStream,
    clear,
    current,
    in_child,
    launches,
    make_current,
    raises,
    records,
)

pytestmark = fake_driver.MARKS
MODES = "global", "thread_local", "relaxed"


def new_stream(device=0):
    """A stream, and a thread with the current device that it needs to be captured."""
    from cuda.core import Device

    place = Device(device)
    place.set_current()
    return place.create_stream()


def capture(stream, *calls, mode="global"):
    """The graph of calls, each of which takes the stream."""
    builder = stream.create_graph_builder().begin_building(mode)
    try:
        for call in calls:
            call(stream=builder)
    finally:
        builder.end_building()
    return builder.complete()


def calls_with_out(device=0):
    """Calls that go different ways through the backend, each with a result to fill."""
    from nbsoftmax import log_softmax, logsumexp, softmax

    new = functools.partial(Array, device=device)
    x, long, long_out = new((30, 1000)), new((2, 300_000)), new((2, 300_000))
    out, lanes, mask, weights = new((30, 1000)), new((30,)), new((30, 1000), "?"), new((30, 1000))
    calls = {
        "rows": (softmax, x, {"axis": -1, "out": out}),
        "in place": (softmax, x, {"axis": -1, "out": x}),
        "columns": (log_softmax, x, {"axis": 0, "out": out}),
        "all axes": (logsumexp, x, {"out": new(())}),
        "long lanes": (softmax, long, {"axis": -1, "out": long_out}),
        "long lanes in place": (softmax, long, {"axis": -1, "out": long}),
        "long lanes reduced": (logsumexp, long, {"axis": -1, "out": new((2,))}),
        "masked": (softmax, x, {"axis": -1, "out": out, "where": mask}),
        "masked by a number": (softmax, x, {"axis": -1, "out": out, "where": True}),
        "weighted": (logsumexp, x, {"axis": -1, "out": lanes, "b": weights}),
        "integers": (softmax, new((30, 1000), "i4"), {"axis": -1, "out": new((30, 1000), "f8")}),
        "swapped": (softmax, new((30, 1000), ">f4"), {"axis": -1, "out": out}),
        "other dtype": (softmax, x, {"axis": -1, "out": new((30, 1000), "f8")}),
        "empty lanes": (logsumexp, new((3, 0)), {"axis": -1, "out": new((3,))}),
    }
    return {name: functools.partial(f, x, **rest) for name, (f, x, rest) in calls.items()}


def work(seen, scratch):
    """The kernels that ran, with numbers instead of the addresses of scratch memory."""
    numbers = {block.address: ("scratch", i) for i, block in enumerate(scratch)}
    return [
        (
            *(launch.kernel, launch.grid, launch.block, launch.cluster, launch.device),
            [numbers.get(argument, argument) for argument in launch.arguments],
        )
        for launch in seen.launches
    ]


def forget_first_calls():
    """As in a process that has made no call yet."""
    from nbsoftmax.cuda import _device, _run

    for cached in (_device._loaded, _device._load, _device._device, _run._call):
        cached.cache_clear()


@in_child()
def test_a_graph_does_what_its_calls_do_at_every_launch():
    stream, other = new_stream(), new_stream()
    for mode, (name, call) in itertools.product(MODES, calls_with_out().items()):
        clear()
        call(stream=stream)
        seen = records()
        expected = work(seen, [block for block in seen.blocks if not block.graph])
        earlier = {block.address for block in seen.blocks}
        assert expected, name
        clear()
        graph = capture(stream, call, mode=mode)
        assert not launches(), f"{name}: captured, and not run"
        for on in (stream, other, stream):
            clear()
            graph.launch(on)
            seen = records()
            scratch = [block for block in seen.blocks if block.address not in earlier]
            assert work(seen, scratch) == expected, name
            assert {launch.stream for launch in seen.launches} == {int(on.handle)}
            assert all(block.graph for block in scratch), name
            assert not seen.live, f"{name}: scratch memory is gone when the graph is done"
            assert not seen.faults, name


@in_child()
def test_scratch_memory_of_a_graph_is_nobody_elses():
    stream = new_stream()
    call = calls_with_out()["long lanes"]
    graphs = [capture(stream, call, call), capture(stream, call)]
    places = []
    for graph in graphs:
        clear()
        graph.launch(stream)
        seen = records()
        places.append({b.address for b in seen.blocks if b.address in _arguments(seen)})
        call(stream=stream)
        graph.launch(stream)
        assert not records().faults
    assert [len(place) for place in places] == [2, 1]
    assert not places[0] & places[1]


def _arguments(seen):
    return {argument for launch in seen.launches for argument in launch.arguments}


@in_child()
def test_the_stream_of_a_capture_is_given_in_every_way():
    stream = new_stream()
    handle = int(stream.handle)
    call = calls_with_out()["long lanes"]
    for given in (handle, np.int64(handle), stream, ForeignStream(handle)):
        clear()
        graph = capture(stream, lambda stream, given=given: call(stream=given))
        assert not launches()
        graph.launch(stream)
        assert len(launches()) == 2


@in_child()
def test_an_array_may_carry_the_stream_of_a_capture():
    import nbsoftmax

    stream = new_stream()
    x = Array((6, 1000), stream=int(stream.handle))
    clear()
    graph = capture(stream, lambda stream: nbsoftmax.softmax(x, axis=-1, out=x))
    assert not launches()
    graph.launch(stream)
    assert len(launches()) == 1


@in_child(compiled=True, cache="graphs")
def test_a_first_call_is_captured_kernels_compiled_and_loaded_meanwhile():
    stream = new_stream()
    calls = calls_with_out()
    graph = capture(stream, calls["long lanes"], calls["masked"])
    calls_made = records().calls
    assert calls_made["cuLibraryLoadData"] >= 5
    graph.launch(stream)
    seen = records()
    assert len(seen.launches) >= 6
    assert not seen.faults


@in_child()
def test_first_calls_of_every_kind_are_captured_in_every_mode():
    stream = new_stream()
    for mode, (name, call) in itertools.product(MODES, calls_with_out().items()):
        forget_first_calls()
        clear()
        graph = capture(stream, call, mode=mode)
        seen = records()
        assert seen.calls["cuLibraryLoadData"], name
        assert not seen.launches, name
        graph.launch(stream)
        seen = records()
        assert seen.launches, name
        assert not seen.faults, name


@in_child()
def test_first_calls_of_other_threads_do_not_end_a_capture():
    import nbsoftmax

    stream = new_stream()
    x = Array((6, 1000), device=1)
    call = calls_with_out()["long lanes"]
    made = []

    def elsewhere(stream):
        thread = threading.Thread(target=lambda: made.append(nbsoftmax.softmax(x, axis=-1)))
        thread.start()
        thread.join()

    clear()
    graph = capture(stream, call, elsewhere, call)
    assert len(made) == 1
    assert [launch.device for launch in launches()] == [1]
    clear()
    graph.launch(stream)
    assert [launch.device for launch in launches()] == [0] * 4


@in_child()
def test_the_threads_own_mode_is_left_as_it_was():
    from cuda.bindings import driver

    call = calls_with_out()["long lanes"]
    modes = driver.CUstreamCaptureMode
    for mode in (modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, modes.CU_STREAM_CAPTURE_MODE_GLOBAL):
        driver.cuThreadExchangeStreamCaptureMode(mode)
        forget_first_calls()
        call()
        assert driver.cuThreadExchangeStreamCaptureMode(mode)[1] == mode


@in_child()
def test_a_new_result_is_refused_and_the_capture_goes_on():
    import nbsoftmax

    stream = new_stream()
    x, out = Array((30, 1000)), Array((30, 1000))

    def refused(stream):
        with raises(RuntimeError, "graph", "out="):
            nbsoftmax.softmax(x, axis=-1, stream=stream)
        with raises(RuntimeError, "graph", "out="):
            nbsoftmax.logsumexp(x, axis=-1, b=x, return_sign=True, stream=stream)

    clear()
    graph = capture(stream, refused, functools.partial(nbsoftmax.softmax, x, axis=-1, out=out))
    graph.launch(stream)
    seen = records()
    assert [launch.arguments[:2] for launch in seen.launches] == [[x.address, out.address]]
    assert not seen.live


@in_child()
def test_calls_on_either_device_are_captured_whichever_is_current():
    for device, now in itertools.product((0, 1), (0, 1)):
        stream = new_stream(device)
        calls = calls_with_out(device)
        del calls["empty lanes"]  # what has no memory lies on the current device
        make_current(now)
        builder = stream.create_graph_builder().begin_building("global")
        clear()
        for call in calls.values():
            call(stream=builder)
            assert current() == now
        builder.end_building()
        builder.complete().launch(stream)
        seen = records()
        assert {launch.device for launch in seen.launches} == {device}
        assert not seen.faults


@in_child()
def test_a_graph_outlives_what_the_backend_remembers_of_its_kernels():
    stream = new_stream()
    graph = capture(stream, calls_with_out()["long lanes"])
    clear()
    forget_first_calls()
    graph.launch(stream)
    seen = records()
    assert len(seen.launches) == 2
    assert not seen.calls["cuLibraryUnload"]


@in_child()
def test_what_a_capture_forbids_is_refused_by_the_stand_in():
    """Or else the tests above would say nothing."""
    from cuda.bindings import driver

    stream, waiting = new_stream(), driver.cuStreamCreate(0)[1]
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    pool = driver.cuDeviceGetDefaultMemPool(0)[1]
    threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    before = driver.cuMemAllocAsync(512, stream.handle)[1]
    for forbidden in (
        lambda: driver.cuMemAlloc(512),
        lambda: driver.cuStreamSynchronize(stream.handle),
        lambda: driver.cuStreamQuery(stream.handle),
        lambda: driver.cuCtxSynchronize(),
        lambda: driver.cuMemPoolGetAttribute(pool, threshold),
        lambda: driver.cuMemFreeAsync(before, stream.handle),
    ):
        assert not driver.cuStreamBeginCapture(stream.handle, mode)[0]
        assert forbidden()[0]
        assert driver.cuStreamEndCapture(stream.handle)[0]
    assert not driver.cuStreamBeginCapture(waiting, mode)[0]
    assert driver.cuMemAllocAsync(512, driver.CUstream(1))[0], "the default stream would wait"
    assert driver.cuStreamEndCapture(waiting)[0]
