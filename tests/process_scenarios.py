"""The scenarios of test_process_safety.py, each a function run in a process of its own.

A scenario passes by returning: it fails by an exception, by another exit status, or by a hang.
"""

import atexit
import concurrent.futures
import ctypes
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import numba
import numpy as np
from process_child import (
    FEWER,
    FUNCTIONS,
    LARGE,
    call,
    check,
    check_case,
    check_one,
    load,
    reference,
)

# ---- the user's own parallel code


@numba.njit(parallel=True, nogil=True, cache=True)
def users_sum(n):
    total = 0
    for i in numba.prange(n):
        total += i % 7
    return total


def users_loop():
    for _ in range(50):
        assert users_sum(70_000) == 210_000
        time.sleep(0.001)


def launch_the_layer():
    users_loop()
    wanted = os.environ.get("NUMBA_THREADING_LAYER")
    assert wanted in (None, numba.threading_layer()), numba.threading_layer()


# ---- threads


def in_threads(*jobs):
    """Run the jobs at once, each in a thread; the first exception is raised here."""
    start = threading.Barrier(len(jobs))
    failures = []

    def run(job):
        start.wait()
        try:
            job()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def caller(i):
    """The calls of one thread among many: every thread has its own order."""

    def calls():
        check_case(LARGE[i % 3])
        for case in random.Random(i).choices(FEWER, k=3):
            check_case(case)

    return calls


def many_threads():
    sys.setswitchinterval(1e-5)
    launch_the_layer()
    in_threads(users_loop, *(caller(i) for i in range(16)))
    launch_the_layer()
    check()


def first_calls_from_many_threads():
    """All kernels come from the disk at once, each asked for by several threads."""
    sys.setswitchinterval(1e-5)
    jobs = [(function, case) for function in FUNCTIONS for case in FEWER]
    in_threads(*[lambda job=job: check_one(*job) for job in jobs * 2])


def first_compilation_from_many_threads():
    in_threads(*[lambda: check_one("logsumexp", "fewer_rows")] * 8)


def inside_users_prange():
    failures = []

    def body(i):
        try:
            case = (LARGE + FEWER)[i % 6]
            check_one(FUNCTIONS[i % 3], case)
        except BaseException:
            failures.append(traceback.format_exc())

    @numba.njit(parallel=True, nogil=True)
    def loop(n):
        visited = np.zeros(n, np.int64)
        for i in numba.prange(n):
            with numba.objmode():
                body(i)
            visited[i] = 1
        return visited.sum()

    with warnings.catch_warnings():
        # What Numba says of every `objmode` under `nogil`.
        warnings.filterwarnings("ignore", "Code running in object mode", numba.NumbaWarning)
        assert loop(24) == 24
    assert not failures, failures[0]
    launch_the_layer()
    check(("rows",))


def threads_of_this_process():
    return set(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else set()


def set_num_threads():
    """One thread: no worker is started; more threads: the same bits."""
    numba.set_num_threads(1)
    before = threads_of_this_process(), threading.active_count()
    check()
    assert (threads_of_this_process(), threading.active_count()) == before
    for n in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(n)
        check()
    numba.set_num_threads(1)
    before = worker_time()
    check()
    assert worker_time() - before < 1e-3, "a worker took part"


def worker_time():
    """CPU seconds of every thread but this one; nothing where the system does not tell."""
    time.sleep(0.1)  # workers may spin a little before they sleep
    me = str(threading.get_native_id())
    stats = [Path(f"/proc/self/task/{t}/schedstat") for t in threads_of_this_process() - {me}]
    return sum(int(stat.read_text().split()[0]) for stat in stats if stat.exists()) * 1e-9


def one_thread():
    before = threading.active_count()
    check()
    assert threading.active_count() == before


def no_thread_can_start():
    def refuse(*args, **kwargs):
        raise RuntimeError("can't start new thread")

    import _thread

    for name in ("start_new_thread", "start_joinable_thread"):
        for module, attribute in ((_thread, name), (threading, f"_{name}")):
            if hasattr(module, attribute):
                setattr(module, attribute, refuse)
    check()
    check()


def plain():
    check()


def called_in_signal_handlers():
    """A handler runs between any two bytecodes of a call, and makes a call of its own."""
    runs = []
    start_thread = threading.Thread.start

    def handler(signum, frame):
        runs.append(signum)
        check_one(FUNCTIONS[len(runs) % 3], "fewer_rows")

    def start_thread_and_be_interrupted(self):
        signal.raise_signal(signal.SIGALRM)
        start_thread(self)

    signal.signal(signal.SIGALRM, handler)
    threading.Thread.start = start_thread_and_be_interrupted
    check_case("fewer_columns")
    threading.Thread.start = start_thread
    end = time.monotonic() + 1
    while time.monotonic() < end:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
        check_case("fewer_columns")
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(runs) > 10, len(runs)
    check()


def interrupted():
    """After KeyboardInterrupt no thread writes to the user's array; the next call is right."""
    import nbsoftmax

    check()
    x = load("rows")
    out = np.empty_like(x)
    interrupts = 0
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    seconds = []
    for _ in range(20):  # the first ones find helpers asleep, and take several times as long
        start = time.perf_counter()
        nbsoftmax.softmax(x, axis=-1, out=out)
        seconds.append(time.perf_counter() - start)
    usual = min(seconds)
    for _ in range(200):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1.2 * usual))
            nbsoftmax.softmax(x, axis=-1, out=out)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupts += 1
            out.fill(-1)
            check_one("logsumexp", "fewer_rows")
            assert (out == -1).all(), "a thread went on writing after the call had ended"
    assert interrupts > 10, interrupts
    check()


# ---- the end of the process


def ends_after_a_call():
    check()


def ends_during_calls():
    for i in range(4):
        threading.Thread(target=call_for_ever, args=(i,), daemon=True).start()
    time.sleep(random.uniform(0.2, 0.25))


def call_for_ever(i):
    while True:
        call(FUNCTIONS[i % 3], LARGE[i % 3])


def first_call_at_exit():
    atexit.register(check_or_die)


def check_or_die():
    """An exception in an exit function would be printed and forgotten."""
    try:
        check()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)


def thread_outlives_main():
    """Other threads may call while the interpreter waits for them at its end."""
    check(FEWER)
    threading.Thread(target=lambda: (time.sleep(0.1), check_or_die())).start()


# ---- fork


def forked(job, patience=30):
    """Run the job in a forked child, which must end with status 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, f"the forked child ended with wait status {status}"
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGABRT)  # faulthandler prints where it hangs
    os.waitpid(child, 0)
    raise AssertionError("the forked child hangs")


def fork_before_any_call():
    forked(check)
    check()


def fork_among_calls():
    """Fork while other threads call, and fork again in the child."""
    sys.setswitchinterval(1e-5)
    check(LARGE + FEWER)
    stop = threading.Event()
    failures = []

    def keep_calling(i):
        try:
            while not stop.is_set():
                check_case((LARGE + FEWER)[i % 6])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=keep_calling, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        for generation in range(5):
            forked(lambda: (check(FEWER), in_threads(*[lambda: check(("fewer_rows",))] * 4)))
            if generation % 4 == 0:
                forked(lambda: (forked(check), check()))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    check()


def fork_after_users_parallel_code():
    """GNU OpenMP ends a forked process that enters it: ours must not."""
    launch_the_layer()
    check()
    forked(lambda: (check(), forked(check)))
    launch_the_layer()


def forked_child_ends_normally():
    check()
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status == 0, status
    check()


# ---- pools


def places(result):
    """The processes that computed; the pool had work for at least one that is not this one."""
    assert set(result) - {os.getpid()}, "nothing ran in another process"


def multiprocessing_pool(method):
    check(FEWER)
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["nbsoftmax", "process_child"])
    with context.Pool(2) as pool:
        result = pool.map_async(check_case, LARGE + FEWER, 1)
        check(FEWER)
        places(result.get(60))


def multiprocessing_fork():
    multiprocessing_pool("fork")


def multiprocessing_forkserver():
    multiprocessing_pool("forkserver")


def multiprocessing_spawn():
    multiprocessing_pool("spawn")


def futures_of_processes():
    check(FEWER)
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        places(pool.map(check_case, LARGE + FEWER, timeout=60))
    check(FEWER)


def futures_of_threads():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(check_case, (LARGE + FEWER) * 3, timeout=60))


def joblib_workers(backend):
    import joblib

    check(FEWER)
    jobs = [joblib.delayed(check_case)(case) for case in LARGE + FEWER]
    result = joblib.Parallel(n_jobs=2, backend=backend, timeout=60)(jobs)
    if backend != "threading":
        places(result)
    check(FEWER)


def joblib_loky():
    joblib_workers("loky")


def joblib_multiprocessing():
    joblib_workers("multiprocessing")


def joblib_threading():
    joblib_workers("threading")


def dask_workers(scheduler):
    import dask

    check(FEWER)
    jobs = [dask.delayed(check_case)(case) for case in LARGE + FEWER]
    result = dask.compute(*jobs, scheduler=scheduler, num_workers=2)
    if scheduler == "processes":
        places(result)
    check(FEWER)


def dask_threads():
    dask_workers("threads")


def dask_processes():
    dask_workers("processes")


# ---- compiling and its cache


def full_disk():
    """No file grows beyond a page, as on a full disk: saving a compiled kernel fails half-way."""
    import nbsoftmax

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    two_kernels()
    assert nbsoftmax.softmax(1.0) == 1


def cache_folder_vanishes():
    import nbsoftmax

    check_one("log_softmax", "fewer_rows")
    shutil.rmtree(os.environ["NUMBA_CACHE_DIR"])
    two_kernels()
    assert nbsoftmax.softmax(1.0) == 1


def two_kernels():
    """For a process that has to compile them."""
    check_one("softmax", "fewer_rows")
    check_one("logsumexp", "fewer_columns")


def nowhere_to_write():
    """As a user who may read the package and write no folder that could hold a cache."""
    if os.geteuid() == 0:
        give_up_privileges()

    import nbsoftmax

    for folder in (os.environ["HOME"], os.path.dirname(nbsoftmax.__file__)):
        assert not os.access(folder, os.W_OK), folder
    two_kernels()


def give_up_privileges():
    """Root without capabilities is bound by permission bits like anybody else (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    none = (ctypes.c_uint32 * 6)()
    assert libc.capset(header, none) == 0, os.strerror(ctypes.get_errno())


def as_another_cpu():
    """Without AVX or FMA the results stay in the budgets."""
    for case in ("fewer_rows", "fewer_columns"):
        for function in FUNCTIONS:
            check_one(function, case, same_bits=False)


def without_jit():
    """Every function, axis, dtype, `where` and `b`, run by the interpreter."""
    import nbsoftmax

    rng = np.random.default_rng(0)
    values = 20 * rng.standard_normal((3, 4, 5)) + 100
    shown = rng.random((4, 5)) < 0.7
    b = rng.choice([1.0, -0.5, 2.0], values.shape)
    for dtype, result in (("f8", "f8"), ("f4", "f4"), ("f2", "f2"), ("i4", "f8"), (">f4", "f4")):
        x = values.astype(dtype)
        wide = x.astype("f4" if result != "f8" else "f8")
        for axis in (None, 0, 1, -1, (0, 2), (2, 1), ()):
            for where in (True, shown):
                want = reference(wide, axis, where=where)
                got = {
                    "softmax": nbsoftmax.softmax(x, axis, where=where),
                    "log_softmax": nbsoftmax.log_softmax(x, axis, where=where),
                    "logsumexp": nbsoftmax.logsumexp(x, axis, keepdims=True, where=where),
                }
                for function in FUNCTIONS:
                    agree(got[function], want[function], result, 4)
            want = reference(wide, axis, b)
            weights = b.astype(result)  # a wider b would widen the result, as in SciPy
            got, sign = nbsoftmax.logsumexp(x, axis, weights, keepdims=True, return_sign=True)
            agree(got, want["logsumexp"], result, 20)
            agree(sign, want["sign"], result, 0)
    for function in FUNCTIONS:
        check_one(function, "tiny", same_bits=False)


def agree(got, want, dtype, ulp):
    assert (got.dtype, got.shape) == (np.dtype(dtype), want.shape)
    unit = np.maximum(np.abs(want) * np.finfo(dtype).eps, np.finfo(dtype).smallest_subnormal)
    finite = np.isfinite(want)
    got = got.astype(want.dtype)
    assert (got[~finite] == want[~finite]).all(), (got, want)
    assert (np.abs(got[finite] - want[finite]) <= ulp * unit[finite]).all(), (got, want)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("passed")
