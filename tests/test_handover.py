"""Calls handed to listening helpers: who runs them, and what happens if nobody does."""

import ctypes
import queue
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from numba import config

from nbsoftmax import _cores, _cpu, _handover, _plan, _pool

from .conftest import Backend
from .oracle import assert_right

pytestmark = pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled to hand over")
STATE, DONE = _handover.STATE, _handover.DONE


@pytest.fixture
def call():
    """A kernel call with many chunks: its parts, and what makes the result."""
    with _plan.using(serial_bytes=0, wake_bytes=0, chunk_bytes=1, chunk_items=1):
        x = np.random.default_rng(0).standard_normal((3000, 500)).astype(np.float32)
        out = np.zeros_like(x)
        launch = _cpu._launch("softmax", x.shape, x.strides, x.dtype, 1, False, out.strides, 0)
        yield launch.calls[0], x, out


def lend(boxes, call, x, out, everyone=0):
    """One call that is over when this returns, as the pool makes it."""
    ticket = _handover.ticket(len(boxes))
    loan = (call.machine_code, x, out, None, call.parameters, ticket)
    answer = _handover.lend()(boxes, len(boxes), *loan, everyone)
    while _pool._lent(boxes, loan):
        time.sleep(0)
    return answer, ticket


def test_who_listens_in_vain_goes_away():
    (box,) = _handover.boxes(1)
    _handover.listen()(box, _handover.LOOKS)
    assert box.tolist() == [_handover.AWAY] + [0] * (box.size - 1)


def test_boxes_share_no_cache_line():
    boxes = _handover.boxes(5)
    assert boxes.ctypes.data % 64 == 0
    assert boxes.strides[0] % 128 == 0


@pytest.mark.parametrize("everyone", [0, 1])
@pytest.mark.parametrize("state", ["AWAY", "LISTENING", "TAKEN", "OFFERED", "WORKING"])
def test_the_caller_does_alone_what_nobody_begins(state, everyone, call):
    """Nobody looks at the box, whatever its state says: then only its own offer is withdrawn."""
    kernel, x, out = call
    boxes = _handover.boxes(2)
    boxes[1, STATE] = before = getattr(_handover, state)
    answer, ticket = lend(boxes, kernel, x, out, everyone)
    heard = state != "LISTENING"  # or expected to be away
    assert answer == (_handover.TOGETHER if heard else _handover.UNHEARD)
    assert boxes[:, STATE].tolist() == [_handover.AWAY, before if heard else _handover.AWAY]
    assert boxes[:, DONE].tolist() == [0, 0]
    assert ticket[_handover.BEGAN :].tolist() == [-1, -1]
    assert ticket[_handover.FINISHED] == kernel.items
    np.testing.assert_array_equal(out, Backend.NUMPY("softmax", x, 1))


def test_nobody_withdraws_the_offer_of_another_caller():
    """Made in the same box, after the first call was run: its caller would wait for ever."""
    boxes = _handover.boxes(1)
    boxes[0, STATE], boxes[0, DONE] = _handover.LISTENING, 6
    rival = _handover.OFFERED + _handover.COUNT * 7
    seen = []

    @ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 5)
    def while_the_first_caller_works(*arguments):
        seen.append(boxes[0, STATE])
        boxes[0, DONE], boxes[0, STATE] = 7, rival
        return 0

    address = ctypes.cast(while_the_first_caller_works, ctypes.c_void_p).value
    kernel, ticket = np.array([address]), _handover.ticket(1)
    _handover.lend()(boxes, 1, kernel, ticket, ticket, None, ticket, ticket, 0)
    assert seen == [_handover.OFFERED + _handover.COUNT * 6]
    assert boxes[0, STATE] == rival
    assert ticket[_handover.BEGAN] == -1


def test_a_listener_runs_what_it_is_offered(call):
    kernel, x, out = call
    boxes = _handover.boxes(1)
    stop = threading.Event()

    def listen():
        while not stop.is_set():
            _handover.listen()(boxes[0], _handover.LOOKS)

    helper = threading.Thread(target=listen, daemon=True)
    helper.start()
    calls = 0
    while boxes[0, DONE] < 20 and calls < 100_000:
        out[...] = 0
        _, ticket = lend(boxes, kernel, x, out)
        calls += 1
        assert ticket[_handover.FINISHED] == kernel.items
    stop.set()
    helper.join(10)
    assert not helper.is_alive()
    assert boxes[0, DONE] >= 20
    np.testing.assert_array_equal(out, Backend.NUMPY("softmax", x, 1))


def test_who_comes_late_runs_what_was_offered_meanwhile():
    """A long call is offered to boxes whose helpers are away, but on their way."""
    boxes = _handover.boxes(1)
    done = []

    @ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 5)
    def both(*arguments):
        helps = arguments[-1] & 1
        done.append(helps)
        if not helps:  # the caller waits until the helper has come
            helper = threading.Thread(target=_handover.listen(), args=(boxes[0], 1), daemon=True)
            helper.start()
            while len(done) < 2:
                time.sleep(0.001)
        return 0

    address = ctypes.cast(both, ctypes.c_void_p).value
    kernel, ticket = np.array([address]), _handover.ticket(1)
    _handover.lend()(boxes, 1, kernel, ticket, ticket, None, ticket, ticket, 1)
    assert done == [0, 1]
    assert boxes[0, DONE] == 1


def test_helpers_of_the_pool_listen_after_work(call):
    """A loop of calls finds them awake: few of its calls go through the queue."""
    if _pool.thread_count() < 2:
        pytest.skip("one core: no helpers")
    kernel, x, out = call
    for _ in range(100_000):
        kernel(x, out, None, 2)
        if _pool._boxes[0, DONE] >= 20:
            return
    raise AssertionError("no helper ever listened")


@pytest.fixture
def pool(monkeypatch):
    """The pool with one box at which nobody listens yet, and a clock that is told the time."""
    boxes = _handover.boxes(1)
    clock = iter(())

    def at(*times):
        nonlocal clock
        clock = iter(times)

    for name, value in {
        "_boxes": boxes,
        "_helpers": [threading.current_thread()],
        "_last_short": (0, 0),
        "_woken": 0,
        "_wake_again": _pool.WAKE_AGAIN_NS,
        "_alone_until": 0,
        "_jobs": queue.SimpleQueue(),
    }.items():
        monkeypatch.setattr(_pool, name, value)
    monkeypatch.setattr(_cores, "send", lambda helpers: None)
    told = SimpleNamespace(perf_counter_ns=lambda: next(clock), sleep=time.sleep)
    monkeypatch.setattr(_pool, "time", told)  # the pool's alone
    return boxes, at


def test_short_calls_are_shared_with_listeners(pool):
    boxes, at = pool
    at(10**9, 2 * 10**9)
    assert _pool.sharers(2, wakes=False) == 1
    boxes[0, STATE] = _handover.LISTENING
    assert _pool.sharers(2, wakes=False) == 2


def test_short_calls_in_a_loop_wake_helpers_and_ever_more_rarely_in_vain(pool):
    _, at = pool
    step = _pool.CLOSELY_NS // 2
    at(*range(10**9, 10**9 + 2000 * step, step))
    wakings = []
    for i in range(1000):
        assert _pool.sharers(2, wakes=False) == 1
        _pool.short_ended()
        while not _pool._jobs.empty():
            assert _pool._jobs.get() is None  # no job that anybody would wait for
            wakings.append(i)
    assert wakings[0] == 1  # the second call follows closely
    assert len(wakings) > 3
    assert all(np.diff(np.diff(wakings)) > 0)


def test_short_calls_far_apart_or_of_other_threads_wake_nobody(pool):
    _, at = pool
    at(*range(10**9, 2 * 10**9, _pool.CLOSELY_NS))
    for _ in range(10):
        assert _pool.sharers(2, wakes=False) == 1
        _pool.short_ended()
    at(*range(3 * 10**9, 4 * 10**9, 1000))
    for _ in range(10):
        assert _pool.sharers(2, wakes=False) == 1
        other = threading.Thread(target=_pool.short_ended)
        other.start()
        other.join()
    assert _pool._jobs.empty()


def test_listeners_share_nothing_while_others_use_their_cores(pool, monkeypatch):
    boxes, at = pool
    at(10**9)
    boxes[0, STATE] = _handover.LISTENING
    monkeypatch.setattr(_pool, "_wake_again", 7 * _pool.WAKE_AGAIN_NS)
    monkeypatch.setattr(_pool, "with_cores", lambda threads: 1)
    assert _pool.sharers(2, wakes=False) == 1
    assert _pool._wake_again == 7 * _pool.WAKE_AGAIN_NS  # no sooner for one who listened in vain


def test_who_is_woken_to_listen_waits_as_long_as_told_but_once(call):
    """For its caller's next call, which may take long to come; after it as long as all."""
    kernel, x, out = call
    boxes = _handover.boxes(1)
    for_ever = (boxes[0], 1 << 60)
    helper = threading.Thread(target=_handover.listen(), args=for_ever, daemon=True)
    helper.start()
    while boxes[0, STATE] != _handover.LISTENING:
        time.sleep(0.001)
    time.sleep(0.05)
    assert boxes[0, STATE] == _handover.LISTENING
    while boxes[0, DONE] == 0:  # it has the core that it needs sooner or later
        lend(boxes, kernel, x, out)
    helper.join(60)
    assert not helper.is_alive()
    assert boxes[0, STATE] == _handover.AWAY


def test_short_calls_run_alone_after_a_helper_had_no_core(pool, call):
    """It seemed to listen, and did not take up what it was offered."""
    boxes, at = pool
    kernel, x, out = call
    boxes[0, STATE] = _handover.LISTENING
    at(10**9, 10**9 + 1, 10**9 + 2, 10**9 + 1 + _pool.ALONE_NS[_handover.UNHEARD])
    assert _pool.sharers(2, wakes=False) == 2
    kernel(x, out, None, 2)
    assert boxes[0, STATE] == _handover.AWAY
    boxes[0, STATE] = _handover.LISTENING  # as it says when it has its core again
    assert _pool.sharers(2, wakes=False) == 1
    assert _pool.sharers(2, wakes=False) == 2
    assert_right("softmax", out, x, 1)
