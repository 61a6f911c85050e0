"""Cores: helpers are sent to their own, and woken only for those that nobody else uses."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

import nbsoftmax
from nbsoftmax import _cores, _handover, _plan, _pool

pytestmark = pytest.mark.skipif(
    _cores._current is None, reason="threads cannot be sent to cores here"
)


@pytest.fixture
def cores(monkeypatch):
    """Say how many cores and helpers there are; returns a call from a core, and what it sends."""
    sent = {}

    def of(cores, helpers):
        fakes = [SimpleNamespace(native_id=100 + i) for i in range(helpers)]
        monkeypatch.setattr(_cores, "_sent", {})
        monkeypatch.setattr(_cores.os, "sched_getaffinity", lambda thread: set(cores))
        monkeypatch.setattr(_cores.os, "sched_setaffinity", sent.__setitem__)

        def call_from(core):
            before = dict(sent)
            monkeypatch.setattr(_cores, "_current", lambda: core)
            _cores.send(fakes)
            return {thread for thread in sent if sent[thread] != before.get(thread)}

        return call_from, sent

    return of


@pytest.mark.parametrize(("count", "helpers"), [(2, 1), (8, 7), (8, 3), (7, 2), (64, 63)])
def test_helpers_are_sent_to_cores_of_their_own(cores, count, helpers):
    allowed = range(10, 10 + count)
    call_from, sent = cores(allowed, helpers)
    for here in (*allowed, *reversed(allowed)):
        moved = call_from(here)
        assert len(sent) == helpers
        taken = [core for where in sent.values() for core in where]
        assert len(taken) == len(set(taken))
        assert {*taken} < {*allowed}
        assert here not in taken
        assert len(moved) == helpers or len(moved) <= 2


def test_more_threads_than_cores_share_them(cores):
    call_from, sent = cores((3,), 4)
    call_from(3)
    assert set(sent.values()) == {(3,)}
    call_from(5)  # the thread was moved meanwhile
    assert set(sent.values()) == {(3,)}


def test_only_helpers_are_sent_anywhere():
    if _pool.thread_count() < 2:
        pytest.skip("one core: no helpers")
    before = os.sched_getaffinity(0)
    x = np.zeros((2, _plan.LIMITS.wake_bytes // 4), np.float32)
    nbsoftmax.softmax(x, 1)
    assert os.sched_getaffinity(0) == before
    assert _pool._helpers
    for helper in _pool._helpers:
        assert os.sched_getaffinity(helper.native_id) == {*_cores._sent[helper.native_id]} <= before


@pytest.fixture
def load(monkeypatch):
    """Say what `/proc/loadavg` and the clock would, and how many cores there are."""

    def of(cores, allowed, *lines):
        said = iter(lines)
        monkeypatch.setattr(_cores, "COUNT", cores)
        monkeypatch.setattr(_cores, "LOOK_NS", 1000)
        monkeypatch.setattr(_cores, "_looked", -2000)
        monkeypatch.setattr(_pool, "_boxes", None)
        monkeypatch.setattr(_cores.os, "sched_getaffinity", lambda thread: set(range(allowed)))
        monkeypatch.setattr(_cores, "_load", lambda: next(said).encode())
        monkeypatch.setattr(_cores, "time", SimpleNamespace(perf_counter_ns=lambda: 0))

    return of


@pytest.mark.parametrize(
    ("running", "threads"), [((1,), 8), ((3, 3), 6), ((9, 5), 4), ((40, 8), 1), ((8, 99), 1)]
)
def test_helpers_are_woken_for_cores_that_nobody_uses(load, running, threads):
    load(8, 8, *(f"0.5 0.2 0.1 {count}/345 678\n" for count in running))
    assert _pool.with_cores(8) == threads
    assert _pool.with_cores(8) == threads  # without another look
    assert _pool.with_cores(2) == min(2, threads)


def test_what_runs_on_cores_of_others_does_not_matter(load):
    load(8, 3, "0.5 0.2 0.1 40/345 678\n")
    assert _pool.with_cores(3) == 3


@pytest.mark.parametrize("line", ["", "0.00 0.00 0.00", "0.00 0.00 0.00 0/0 0\n", "a b c d/e f"])
def test_a_system_that_does_not_say_how_busy_it_is(load, line):
    load(4, 4, line, line)
    assert _pool.with_cores(4) == 4


def test_own_helpers_that_listen_are_not_others(load):
    load(2, 2, "0.5 0.2 0.1 2/345 678\n")
    _pool._boxes = _handover.boxes(1)
    _pool._boxes[0, _handover.STATE] = _handover.LISTENING
    assert _pool.with_cores(2) == 2
