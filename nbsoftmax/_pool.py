"""Threads of our own, which share one call's work and can do no harm to the process.

Neither of Numba's layers will do: one aborts when two Python threads enter it, another dies in a
forked child.  Here the calling thread works too and never waits for a helper that has not started,
so nothing can hang; a forked child starts with no helpers and hires its own.

A helper waits in two ways: for some microseconds it listens for kernel calls (`_handover`), then it
sleeps until something is put into the queue: mostly that it shall listen again, and what for lies
in its box.  Calls that are shorter than waking takes only ask those that listen; where such calls
follow each other closely, one wakes helpers, who listen for the next.

Before helpers are woken, each is sent to cores of its own.  In a virtual machine a core that sleeps
looks taken, and the system would have them wake where the caller runs: the two would take turns on
one core, call after call, for no helper runs long enough to be moved.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from numba import config, get_num_threads

from . import _cores, _handover

Work = Callable[[], object]

# Short calls of one thread with no more nanoseconds between them follow each other closely: about
# as long as a helper listens.
CLOSELY_NS = 70_000
# Such calls wake helpers no more often than this, and half as often each time that none listened
# afterwards: where all cores are busy, waking them costs more than they help.
WAKE_AGAIN_NS = 1_000_000
# Short calls run alone for so long after a helper that seemed to listen had no core, and after one
# that began had to be waited for.
ALONE_NS = {_handover.UNHEARD: 1_000_000, _handover.LATE: 100_000_000}

_jobs: "queue.SimpleQueue[list[Work] | None]" = queue.SimpleQueue()  # None: come and listen
_helpers: list[threading.Thread] = []
_hiring = threading.Lock()
_boxes: Any = None  # one for each helper
_last_short = (0, 0)  # the last short call's thread, and when it ended
_woken, _wake_again = 0, WAKE_AGAIN_NS  # when they last woke helpers, and when they may again
_alone_until = 0


class Job:
    """What threads share: they take parts of it until none is left."""

    # What a listening helper needs to run it without the interpreter: a kernel's address, its
    # arguments, the last of which is the ticket. Nothing if it needs the interpreter.
    loan: tuple[Any, ...] = ()
    # Whether it is for helpers that sleep, too.
    wakes = True

    def work(self) -> None:
        """Take parts until none is left."""
        raise NotImplementedError

    def finished(self) -> bool:
        """Whether all parts are done."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Leave no part to take."""
        raise NotImplementedError


def _forget() -> None:
    global _jobs, _hiring, _boxes
    _jobs, _hiring, _boxes = queue.SimpleQueue(), threading.Lock(), None
    _helpers.clear()
    _cores.forget()


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
    # Numba's own function takes a lock first, which takes longer than all else: 0.6 us.
    return int(getattr(layer, "_get_num_threads", get_num_threads)())


def with_cores(threads: int) -> int:
    """So many threads, or as many as have a core that nobody else uses."""
    return _cores.for_threads(threads, lambda: _listening(_boxes))


def _help(jobs: "queue.SimpleQueue[list[Work] | None]", box: Any) -> None:
    listen = _handover.listen()
    while True:
        offer, looks = jobs.get(), _handover.LOOKS
        if offer is None:
            looks = _handover.LOOKS_WHEN_WOKEN
        else:
            with contextlib.suppress(IndexError):  # done without us
                offer.pop()()
        del offer  # while waiting, no array is kept alive
        listen(box, looks)


def _hire(count: int) -> None:
    global _boxes
    # Never wait here: a signal handler may call us while its own thread is hiring.
    if not _hiring.acquire(blocking=False):
        return
    try:
        if _boxes is None:
            _handover.prepare()
            _boxes = _handover.boxes(most_threads())
        while len(_helpers) < count:
            name, box = f"nbsoftmax-{len(_helpers) + 1}", _boxes[len(_helpers)]
            helper = threading.Thread(target=_help, args=(_jobs, box), name=name, daemon=True)
            helper.start()
            _helpers.append(helper)
    except RuntimeError:  # the system or a closing interpreter gives no more threads
        pass
    finally:
        _hiring.release()


def _wake(count: int, threads: int, offer: list[Work] | None) -> None:
    """Wake so many of the ``threads - 1`` helpers, each on a core of its own."""
    if count == 0:
        return
    if len(_helpers) < threads - 1:
        _hire(threads - 1)
    _cores.send(_helpers)
    for _ in range(count):
        _jobs.put(offer)


def share(job: Job, threads: int) -> None:
    """Run the job here and in up to ``threads - 1`` helpers, until it is finished.

    If it is interrupted here (Ctrl-C), no part is left to take, and the helpers that took one are
    waited for: nothing is written any more when the caller sees the exception.
    """
    if job.loan:
        _share_loan(job, threads)
    else:
        _share_work(job, threads)


def _share_loan(job: Job, threads: int) -> None:
    """With helpers that listen, and if it ``wakes`` them, those that come in time."""
    global _alone_until
    if job.wakes:
        _wake(threads - 1 - _listening(_hired(threads)), threads, None)
    boxes, loan = _hired(threads), job.loan
    if boxes is None:  # nobody could be hired
        job.work()
        return
    try:
        said = _handover.lend()(boxes, len(boxes), *loan, int(job.wakes))
        if said in ALONE_NS:
            _alone_until = time.perf_counter_ns() + ALONE_NS[said]
        while said == _handover.LATE and (not job.finished() or _lent(boxes, loan)):
            time.sleep(0)
    except BaseException:
        job.cancel()
        while _lent(boxes, loan):
            time.sleep(0)
        raise


def _share_work(job: Job, threads: int) -> None:
    """With helpers that need the interpreter for it."""
    ended: list[None] = []
    offer: list[Work] = []

    def helping() -> None:
        try:
            job.work()
        finally:
            ended.append(None)

    try:
        offer += [helping] * (threads - 1)
        _wake(threads - 1, threads, offer)
        job.work()
        while not job.finished():
            time.sleep(0)
    except BaseException:
        job.cancel()
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


def sharers(threads: int, wakes: bool) -> int:
    """How many threads are to share a job: this one, and of those that ``wakes`` helpers, all.

    It is not worth waking anybody for a short job: those that listen share it. If nobody does, and
    such jobs follow each other closely, all helpers are woken to hear the next. This one does not
    wait for them, who take as long to come as it takes, and nobody asks for cores before they have.
    """
    global _woken, _wake_again
    if wakes:
        return with_cores(threads)
    now = time.perf_counter_ns()
    if now < _alone_until:
        return 1
    if _listening(_hired(threads)):
        threads = with_cores(threads)
        if threads > 1:
            _wake_again = WAKE_AGAIN_NS
        return threads
    thread, ended = _last_short
    closely = thread == threading.get_ident() and now - ended < CLOSELY_NS
    if closely and now - _woken > _wake_again:
        _woken, _wake_again = now, min(2 * _wake_again, ALONE_NS[_handover.LATE])
        _wake(threads - 1, threads, None)
    return 1


def short_ended() -> None:
    """Remember when this thread last ended a short job, whoever ran it."""
    global _last_short
    _last_short = (threading.get_ident(), time.perf_counter_ns())


def _hired(threads: int) -> Any:
    """The boxes of up to ``threads - 1`` helpers, None if there are none."""
    return None if _boxes is None else _boxes[: min(len(_helpers), threads - 1)]


def _listening(boxes: Any) -> int:
    """How many helpers listen at these boxes."""
    if boxes is None:
        return 0
    return int(boxes[:, _handover.STATE].tolist().count(_handover.LISTENING))


def _lent(boxes: Any, loan: tuple[Any, ...]) -> bool:
    """Whether a box is still at work on the loan, whose arrays have to stay until then."""
    began = loan[-1][_handover.BEGAN :].tolist()
    return any(before == box[_handover.DONE] for box, before in zip(boxes, began, strict=False))
