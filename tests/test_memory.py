"""Memory of large results: used again when nobody can see it any more, and never before."""

import gc
import mmap
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

import nbsoftmax
from nbsoftmax import _memory, _plan

from .oracle import assert_right

LEAST, MOST = _memory.HUGE_PAGE_BYTES, 8 * _memory.HUGE_PAGE_BYTES
keeps = pytest.mark.skipif(not _memory.KEEPS, reason="this system cannot keep memory")


@pytest.fixture(autouse=True)
def nothing_kept():
    _memory._kept.clear()
    yield
    _memory._kept.clear()


def new(pages=2, most=MOST):
    return _memory.empty(
        (pages, _memory.HUGE_PAGE_BYTES // 4), np.dtype(np.float32), 64, (LEAST, most)
    )


def place(array):
    return array.__array_interface__["data"][0]


@keeps
def test_dropped_memory_serves_the_next_array_of_its_size():
    first = new()
    at = place(first)
    del first
    other = new(pages=3)
    assert place(other) != at
    assert place(new()) == at


@keeps
def test_memory_that_a_view_can_see_is_not_used_again():
    first = new()
    first[...] = 5
    view = first[1:, ::7].T
    del first
    second = new()
    second[...] = 6
    assert not np.may_share_memory(view, second)
    assert (view == 5).all()
    at = place(view.base)
    del view
    assert place(new()) == at


@keeps
def test_no_more_is_kept_than_allowed():
    arrays = [new() for _ in range(7)]
    del arrays
    assert sum(map(len, _memory._kept)) == MOST
    kept = list(_memory._kept)
    too_large, too_small = new(pages=9), new(pages=1)
    del too_large, too_small
    assert _memory._kept == kept


@keeps
@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="no /proc")
def test_kept_memory_is_the_systems_to_take():
    array = new()
    array[...] = 1
    at = f"{place(array):x}-"
    del array
    lines = pathlib.Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(at))
    lazy = next(line for line in lines[start:] if line.startswith("LazyFree:"))
    assert int(lazy.split()[1]) >= 2 * _memory.HUGE_PAGE_BYTES // 1024


class _Refuses(mmap.mmap):
    def madvise(self, *arguments):
        raise OSError(22, "Invalid argument")


@keeps
def test_a_system_that_refuses_keeps_nothing(monkeypatch):
    monkeypatch.setattr(mmap, "mmap", _Refuses)
    array = new()
    array[...] = 1
    del array
    assert not _memory._kept


@pytest.mark.parametrize("failing", ["KEEPS", "_mapped"])
def test_without_kept_memory_numpy_gives_some(failing, monkeypatch):
    def fails(size):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(_memory, failing, False if failing == "KEEPS" else fails)
    array = new()
    assert place(array) % 64 == 0
    assert array.shape == (2, _memory.HUGE_PAGE_BYTES // 4)
    with pytest.raises(MemoryError, match="Unable to allocate"):
        _memory.empty((2**20, 2**30), np.dtype(np.float64), 64, (0, 2**60))


def test_a_collection_while_the_list_changes_waits_for_nobody():
    """The garbage collector may drop an array in the thread that is changing the list."""
    array = new()
    with _memory._changing:
        del array
        assert not _memory._kept
        new()


@keeps
def test_results_in_kept_memory_are_right_in_many_threads():
    """Each thread drops a result and takes another's memory while the others compute."""
    arrays = [np.random.default_rng(i).normal(500, 100, (3, 1000)) for i in range(4)]
    wrong = []

    def work(i):
        for _ in range(10):
            got = nbsoftmax.softmax(arrays[i], axis=1)
            try:
                assert_right("softmax", got, arrays[i], 1)
            except AssertionError as error:
                wrong.append(error)

    with _plan.using(past_cache_bytes=0, kept_bytes=MOST):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        assert 0 < len(_memory._kept) <= MOST // _memory.HUGE_PAGE_BYTES
    assert not wrong


def test_a_result_that_outlives_the_interpreter_is_no_error():
    code = (
        "import numpy as np, nbsoftmax\n"
        "kept = nbsoftmax.softmax(np.zeros((2048, 2100), np.float32), axis=1)\n"
        "class Late:\n"
        "    result = nbsoftmax.softmax(np.zeros((2048, 2100), np.float32), axis=1)\n"
        "    def __del__(self): self.result = None\n"
        "late = Late(); late.self = late; np.late = kept\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
