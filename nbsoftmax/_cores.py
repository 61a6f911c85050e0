"""The cores of the machine: which of them others use, and sending threads to those left.

Where the system says neither, every core counts as free, and threads run where they are put.
"""

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence

COUNT = os.cpu_count() or 1
# How long it is believed how many cores others are using.
LOOK_NS = 10_000_000

_looked, _others = 0, 0  # when the cores were looked at, and how many others were using
_sent: dict[int, tuple[int, ...]] = {}  # by a thread's number in the system


def _find_current() -> Callable[[], int] | None:
    """What says on which core this thread runs, if threads can be sent to cores here."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


_current = _find_current()


def for_threads(threads: int, awake: Callable[[], int]) -> int:
    """So many threads, or as many as there are cores that no other thread uses.

    ``awake`` says how many of the caller's own helpers are running.  Where processes or threads
    share the cores, each by itself does more than all of them together with their helpers, which
    take the cores from one another: a tenth more.
    """
    global _looked, _others
    now = time.perf_counter_ns()
    if now - _looked > LOOK_NS:
        # What the system itself has to do now and then is over before one has looked twice.
        _looked, _others = now, _used_by_others(awake) and _used_by_others(awake)
    return max(1, min(threads, COUNT - _others)) if _others else threads


def _used_by_others(awake: Callable[[], int]) -> int:
    """How many threads of all processes run or wait for a core, but for this one and its helpers.

    0 where the system does not say, and where this thread may not use all cores: what runs on the
    others is nothing to it.
    """
    if _current is None:
        return 0
    try:
        running = int(_load().split()[3].partition(b"/")[0])
    except (OSError, ValueError, IndexError):
        return 0
    others = max(0, running - 1 - awake())
    return others if others and len(os.sched_getaffinity(0)) == COUNT else 0


def _load() -> bytes:
    """What the system says of its load: 40 us after a pause, and twice as long with opening it."""
    return os.pread(_load_file(), 100, 0)


@functools.cache
def _load_file() -> int:
    """The file that says it, open for as long as the process lives."""
    return os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)


def send(helpers: Sequence[threading.Thread]) -> None:
    """Send helpers to cores of their own, of those that this thread may use but is not on.

    The cores are dealt out to the threads. Helpers keep theirs for as long as it is not the
    caller's; only one has to move when the caller did.
    """
    if _current is None:
        return
    cores = sorted(os.sched_getaffinity(0))
    threads = len(helpers) + 1
    here = _current()
    own = cores.index(here) % threads if here in cores else 0
    for number, helper in enumerate(helpers, 1):
        share = 0 if number == own else number
        to = tuple(cores[share::threads] or cores)
        thread = helper.native_id
        if thread is not None and _sent.get(thread) != to:
            with contextlib.suppress(OSError):  # not allowed, or the thread is gone
                os.sched_setaffinity(thread, to)
            _sent[thread] = to


def forget() -> None:
    """No thread has been sent anywhere: in a forked child, whose numbers are other threads'."""
    _sent.clear()
