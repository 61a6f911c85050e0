"""Threads of our own, which share one call's work and can do no harm to the process.

Neither of Numba's layers will do: one aborts when two Python threads enter it, another dies in a
forked child.  Here the calling thread works too and never waits for a helper that has not started,
so nothing can hang; a forked child starts with no helpers and hires its own.

A helper waits in two ways: for some microseconds it listens for kernel calls (`_handover`), then it
sleeps until a job is put into the queue.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import config, get_num_threads

from . import _handover

Work = Callable[[], object]

_jobs: "queue.SimpleQueue[list[Work]]" = queue.SimpleQueue()
_helpers = 0
_hiring = threading.Lock()
_boxes: Any = None  # one for each helper


class Loan(NamedTuple):
    """A kernel call that a listening helper can run by itself."""

    kernel: Any
    arguments: tuple[Any, ...]
    ticket: Any


def _forget() -> None:
    global _jobs, _helpers, _hiring, _boxes
    _jobs, _helpers, _hiring, _boxes = queue.SimpleQueue(), 0, threading.Lock(), None


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


def _help(jobs: "queue.SimpleQueue[list[Work]]", box: Any) -> None:
    listen = _handover.listen()
    while True:
        offer = jobs.get()
        with contextlib.suppress(IndexError):  # done without us
            offer.pop()()
        del offer  # while waiting, no array is kept alive
        listen(box)


def _hire(count: int) -> None:
    global _helpers, _boxes
    # Never wait here: a signal handler may call us while its own thread is hiring.
    if not _hiring.acquire(blocking=False):
        return
    try:
        if _boxes is None:
            _handover.prepare()
            _boxes = _handover.boxes(most_threads())
        while _helpers < count:
            name, box = f"nbsoftmax-{_helpers + 1}", _boxes[_helpers]
            threading.Thread(target=_help, args=(_jobs, box), name=name, daemon=True).start()
            _helpers += 1
    except RuntimeError:  # the system or a closing interpreter gives no more threads
        pass
    finally:
        _hiring.release()


def share(
    work: Work,
    threads: int,
    finished: Callable[[], bool],
    cancel: Callable[[], object],
    loan: Loan | None = None,
) -> None:
    """Run ``work`` here and in up to ``threads - 1`` helpers, until ``finished()``.

    ``work`` takes parts of the job until none is left, and ``loan`` does for helpers that listen.
    If it is interrupted here (Ctrl-C), ``cancel`` leaves no part to take, and the helpers that took
    one are waited for: nothing is written any more when the caller sees the exception.
    """
    if _helpers < threads - 1:
        _hire(threads - 1)
    ended: list[None] = []

    def helping() -> None:
        try:
            work()
        finally:
            ended.append(None)

    boxes = None if loan is None or _boxes is None else _boxes[: min(_helpers, threads - 1)]
    asleep = threads - 1
    if boxes is not None:
        asleep -= boxes[:, _handover.STATE].tolist().count(_handover.LISTENING)
    offer: list[Work] = [helping] * asleep
    if loan is not None:
        loan.ticket[_handover.BEGAN :] = -1  # nobody has begun
    try:
        for _ in range(asleep):
            _jobs.put(offer)
        if loan is not None and boxes is not None and asleep < threads - 1:
            _handover.lend()(boxes, len(boxes), loan.kernel, *loan.arguments, loan.ticket)
        else:
            work()
        while not finished() or _lent(boxes, loan):
            time.sleep(0)
    except BaseException:
        cancel()
        taken = asleep
        with contextlib.suppress(IndexError):
            while True:
                offer.pop()
                taken -= 1
        while len(ended) < taken or _lent(boxes, loan):
            time.sleep(0)
        raise
    finally:
        offer.clear()


def _lent(boxes: Any, loan: Loan | None) -> bool:
    """Whether a box is still at work on the loan, whose arrays have to stay until then."""
    if boxes is None or loan is None:
        return False
    began = loan.ticket[_handover.BEGAN :].tolist()
    return any(before == box[_handover.DONE] for box, before in zip(boxes, began, strict=False))
