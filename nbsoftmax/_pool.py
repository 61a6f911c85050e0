"""Threads of our own, which share one call's work and can do no harm to the process.

Neither of Numba's layers will do: one aborts when two Python threads enter it, another dies in a
forked child.  Here the calling thread works too and never waits for a helper that has not started,
so nothing can hang; a forked child starts with no helpers and hires its own.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

from numba import config, get_num_threads

Work = Callable[[], object]

_jobs: "queue.SimpleQueue[list[Work]]" = queue.SimpleQueue()
_helpers = 0
_hiring = threading.Lock()


def _forget() -> None:
    global _jobs, _helpers, _hiring
    _jobs, _helpers, _hiring = queue.SimpleQueue(), 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def most_threads() -> int:
    """How many threads any call may ever use."""
    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def thread_count() -> int:
    """How many threads a call may use: what `numba.get_num_threads` says."""
    layer = sys.modules.get("numba.np.ufunc.parallel")
    if layer is None or not getattr(layer, "_is_initialized", True):
        # Nobody set a number yet, and asking would start Numba's own threads.
        return most_threads()
    return int(get_num_threads())


def _help(jobs: "queue.SimpleQueue[list[Work]]") -> None:
    while True:
        offer = jobs.get()
        try:
            work = offer.pop()
        except IndexError:  # done without us
            continue
        work()
        del work, offer  # while waiting, no array is kept alive


def _hire(count: int) -> None:
    global _helpers
    # Never wait here: a signal handler may call us while its own thread is hiring.
    if not _hiring.acquire(blocking=False):
        return
    try:
        while _helpers < count:
            name = f"nbsoftmax-{_helpers + 1}"
            threading.Thread(target=_help, args=(_jobs,), name=name, daemon=True).start()
            _helpers += 1
    except RuntimeError:  # the system or a closing interpreter gives no more threads
        pass
    finally:
        _hiring.release()


def share(
    work: Work, threads: int, finished: Callable[[], bool], cancel: Callable[[], object]
) -> None:
    """Run ``work`` here and in up to ``threads - 1`` helpers, until ``finished()``.

    ``work`` takes parts of the job until none is left. If it is interrupted here (Ctrl-C),
    ``cancel`` leaves no part to take, and the helpers that took one are waited for: nothing is
    written any more when the caller sees the exception.
    """
    if _helpers < threads - 1:
        _hire(threads - 1)
    ended: list[None] = []

    def helping() -> None:
        try:
            work()
        finally:
            ended.append(None)

    offer: list[Work] = [helping] * (threads - 1)
    try:
        for _ in range(threads - 1):
            _jobs.put(offer)
        work()
        while not finished():
            time.sleep(0)
    except BaseException:
        cancel()
        taken = threads - 1
        with contextlib.suppress(IndexError):
            while True:
                offer.pop()
                taken -= 1
        while len(ended) < taken:
            time.sleep(0)
        raise
    finally:
        offer.clear()
