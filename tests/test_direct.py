"""Calls that machine code knows: the same results, for the arrays that they were made for only."""

import gc
import itertools
import sys
import threading

import numpy as np
import pytest

import nbsoftmax
from nbsoftmax import _cpu, _direct, _plan

from . import cases
from .cases import OPS
from .oracle import assert_right

pytestmark = pytest.mark.skipif(not _direct.WORKS, reason="machine code finds no call here")


@pytest.fixture(autouse=True)
def nothing_known():
    forget()
    yield
    forget()


def forget():
    for calls in itertools.chain(*_cpu._DIRECT.values()):
        calls.forget()


def found(op, x, axis=None, out=None, keepdims=False):
    """What machine code says to a call: its result, a slot, or None."""
    calls = _cpu._DIRECT[op][int(keepdims)]
    return calls.find(calls.table, x, out, axis)


def knows(*args, **kwargs):
    answer = found(*args, **kwargs)
    return type(answer) is not int and answer is not None


def make_known(op, x, axis=None, **kwargs):
    for _ in range(2):  # the first call of all prepares it
        getattr(nbsoftmax, op)(x, axis, **kwargs)


def out_for(op, x, axis):
    return np.empty_like(getattr(nbsoftmax, op)(x, axis))


LAYOUTS = {
    "rows": lambda x: x,
    "pitch": lambda x: np.repeat(x, 2, axis=1)[:, : x.shape[1]],
    "reversed": lambda x: x[::-1],
    "fortran": np.asfortranarray,
    "repeated": lambda x: np.broadcast_to(x[:1], x.shape),
    "cube": lambda x: x.reshape(3, -1, x.shape[1]),
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_known_calls_give_the_same_bits(op, layout, dtype):
    x = LAYOUTS[layout](cases.draw((9, 14), dtype))
    for axis, given in itertools.product([None, 0, 1, -1], [False, True]):
        first = getattr(nbsoftmax, op)(x, axis)
        expected = np.asarray(first)
        out = np.empty(expected.shape, expected.dtype) if given else None
        make_known(op, x, axis, out=out)
        again = cases.draw((9, 14), dtype, seed=1)
        for numbers in (again, cases.draw((9, 14), dtype)):
            y = LAYOUTS[layout](numbers)
            result = getattr(nbsoftmax, op)(y, axis, out=out)
            assert result is out if given else type(result) is type(first)
        assert np.asarray(result).tobytes() == expected.tobytes()


@pytest.mark.parametrize("op", OPS)
def test_what_is_known(op):
    x = cases.draw((5, 7))
    out = out_for(op, x, 1)
    forget()
    assert not knows(op, x, 1)
    make_known(op, x, 1)
    assert knows(op, x, 1)
    assert not knows(op, x, 1, out)
    make_known(op, x, 1, out=out)
    assert knows(op, x, 1, out)
    assert found(op, x, 1, out) is out
    assert_right(op, out, x, 1)


@pytest.mark.parametrize("op", OPS)
def test_other_arguments_are_other_calls(op):
    x = cases.draw((6, 6))
    out = out_for(op, x, 1)
    make_known(op, x, 1)
    make_known(op, x, 1, out=out)
    others = [
        (x, 0),
        (x, -1),
        (x, None),
        (x, True),
        (x, 1.0),
        (x, (1,)),
        (x.astype(np.float32), 1),
        (x.astype(x.dtype.newbyteorder()), 1),
        (x.view(np.int64), 1),
        (x.T, 1),
        (x[:5], 1),
        (x[:, ::-1], 1),
        (x[None], 1),
        (x.ravel(), 1),
        (x.view(np.recarray), 1),
        (x.tolist(), 1),
        (None, 1),
        (x[0, 0], 1),
        (nbsoftmax, 1),
        (x, 1, x.tolist()),
        (x, 1, out.astype(np.float32)),
        (x, 1, out[..., ::-1]),
        (x, 1, out[:3]),
        (x, 1, out[None]),
        (x, 1, out.view(np.recarray)),
    ]
    for arguments in others:
        assert not knows(op, *arguments), arguments


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_out_has_to_lie_apart_or_where_x_is(op):
    memory = cases.draw((13, 8))
    x, before = memory[:6], memory.copy()
    for start in range(8):
        out = memory[start : start + 6]
        make_known(op, before[:6], 1, out=before[7:])  # the same geometry
        assert knows(op, x, 1, out) == (start in (0, 6, 7))
        memory[...] = before = cases.draw((13, 8))
        assert getattr(nbsoftmax, op)(x, 1, out=out) is out
        assert_right(op, out, before[:6], 1)
        memory[...] = before


def test_overlapping_results_of_logsumexp():
    memory = cases.draw((12, 6))
    x, column = memory[:6], memory.ravel()[:6]
    make_known("logsumexp", x, 1, out=np.empty(6))
    assert knows("logsumexp", x, 1, memory.ravel()[36:42])
    assert not knows("logsumexp", x, 1, column)
    expected = x.copy()
    nbsoftmax.logsumexp(x, 1, out=column)
    assert_right("logsumexp", column, expected, 1)


@pytest.mark.parametrize("op", OPS)
def test_read_only_results_are_refused(op):
    x = cases.draw((5, 7))
    out = out_for(op, x, 1)
    make_known(op, x, 1, out=out)
    before = out.copy()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        getattr(nbsoftmax, op)(x, 1, out=out)
    assert (out == before).all()


def test_negative_strides_reach_below_an_array():
    memory = cases.draw((12, 5))
    x = memory[5::-1]  # begins at row 5
    make_known("softmax", x, 1, out=np.empty((6, 5)))
    assert not knows("softmax", x, 1, memory[:6])
    assert knows("softmax", x, 1, memory[6:])


def test_keepdims_is_another_call():
    x = cases.draw((4, 9))
    make_known("logsumexp", x, 1)
    assert not knows("logsumexp", x, 1, keepdims=True)
    make_known("logsumexp", x, 1, keepdims=True)
    assert nbsoftmax.logsumexp(x, 1, keepdims=True).shape == (4, 1)
    assert nbsoftmax.logsumexp(x, 1).shape == (4,)


def test_more_geometries_than_slots():
    numbers = cases.draw((3 << _direct.SLOTS_BITS, 3))
    for _ in range(3):
        for rows in range(1, len(numbers), 5):
            x = numbers[:rows]
            result = nbsoftmax.logsumexp(x, 1)
            assert result.shape == (rows,)
    assert_right("logsumexp", result, x, 1)


def test_other_limits_are_other_calls():
    x = cases.draw((4, 9))
    make_known("softmax", x, 1)
    assert knows("softmax", x, 1)
    with _plan.using(brief_bytes=0):
        assert not knows("softmax", x, 1)
        make_known("softmax", x, 1)
        assert knows("softmax", x, 1)
    assert not knows("softmax", x, 1)


@pytest.mark.parametrize("given", [False, True])
def test_long_calls_leave_the_interpreter_to_others(given):
    x = cases.draw((512, 512))
    out = np.empty_like(x) if given else None
    expected = nbsoftmax.softmax(x, 1)
    others, interval = [], sys.getswitchinterval()
    with _plan.using(serial_bytes=1 << 60):
        make_known("softmax", x, 1, out=out)
        assert knows("softmax", x, 1, out=out)
        try:
            sys.setswitchinterval(1000)  # nobody is asked to let go of the lock
            go = threading.Event()
            other = threading.Thread(target=lambda: others.append(go.wait()))
            other.start()
            go.set()
            for _ in range(1000):
                result = found("softmax", x, 1, out)
                if others:
                    break
        finally:
            sys.setswitchinterval(interval)
        other.join()
        assert others == [True]
        assert result.tobytes() == expected.tobytes()


def test_a_record_that_is_replaced_while_its_call_runs():
    x, wrong = cases.draw((64, 256)), []
    expected = nbsoftmax.softmax(x, 1).tobytes()
    over = threading.Event()

    def call():
        while not over.is_set():
            if nbsoftmax.softmax(x, 1).tobytes() != expected:
                wrong.append(1)

    with _plan.using(serial_bytes=1 << 60, brief_bytes=0):
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(2000):
            forget()
            make_known("softmax", x, 1)
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_only_every_so_many_unknown_calls_are_written_down(monkeypatch):
    x = cases.draw((4, 9))
    make_known("softmax", x, 1)
    forget()
    monkeypatch.setattr(_direct, "UNKNOWN_CALLS", 5)
    known = [knows("softmax", x, 1) for _ in range(12) if nbsoftmax.softmax(x, 1) is not None]
    assert known == [False] * 4 + [True] * 8


@pytest.mark.parametrize("op", OPS)
def test_references_are_given_back(op):
    x = cases.draw((6,))
    out = np.asarray(out_for(op, x, 0))
    make_known(op, x, 0)
    make_known(op, x, 0, out=out)
    objects = x, out, x.dtype, 0

    def calls():
        for _ in range(1000):
            getattr(nbsoftmax, op)(x, 0)
            getattr(nbsoftmax, op)(x, 0, out=out)
            found(op, "no array")
            found(op, x, 1)

    calls()
    gc.collect()
    before = [sys.getrefcount(o) for o in objects], sys.getallocatedblocks()
    calls()
    gc.collect()
    after = [sys.getrefcount(o) for o in objects], sys.getallocatedblocks()
    assert np.abs(np.subtract(before[0], after[0])).max() < 100
    assert abs(before[1] - after[1]) < 100


def test_threads_that_learn_and_forget():
    xs = [cases.draw((rows, n)) for rows in range(1, 9) for n in (2, 3, 5, 9)]
    expected = [nbsoftmax.softmax(x, 1).tobytes() for x in xs]
    wrong = []
    over = threading.Event()

    def call():
        while not over.is_set():
            for x, bits in zip(xs, expected, strict=True):
                if nbsoftmax.softmax(x, 1).tobytes() != bits:
                    wrong.append(x.shape)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        forget()
        nbsoftmax.softmax(xs[0], 1)
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_learn_the_same_slots():
    """Whoever comes second leaves no record behind that nobody keeps."""
    xs = [cases.draw((rows, 3)) for rows in range(1, 2000, 7)]
    wrong = []

    def call(seed):
        for i in np.random.default_rng(seed).permutation(np.repeat(np.arange(len(xs)), 10)):
            if nbsoftmax.logsumexp(xs[i], 1).shape != (len(xs[i]),):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    calls = _cpu._DIRECT["logsumexp"][0]
    records = {kept[0].ctypes.data for kept in calls._kept.values()}
    assert {int(word) for word in calls.table[_direct.SLOTS :] if word} == records
