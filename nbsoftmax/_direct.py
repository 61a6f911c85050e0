"""Calls met before: machine code looks at the arrays, makes the result and runs the kernel.

To say what is to be done with a few numbers takes the interpreter ten times as long as doing it:
shapes and strides as tuples, a look-up, memory for the result, a kernel's arguments.  What is met
again and again is therefore written down as a *record*: which arrays, and which kernel they go to.
`find` compares its arguments with the one record that may be theirs, and does the rest.  Only the
interpreter's lock keeps a record in its place: a call that lets go of it holds the record itself.

It reads NumPy's arrays by themselves and has NumPy make new ones, both as its C headers say.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config
from numba.core import cgutils
from numba.extending import intrinsic

from . import _entry
from ._entry import BYTES, I64, ArrayObject, word

Array = np.ndarray[Any, Any]

I32 = ir.IntType(32)

# Only the interpreter's lock keeps a record from being replaced while it is read.
WORKS = not config.DISABLE_JIT and getattr(sys, "_is_gil_enabled", lambda: True)()

# Calls for which there is no record, of which one is written: most geometries do not come again.
# A prime, so that calls that take turns all have theirs.
UNKNOWN_CALLS = 31

SLOTS_BITS = 10
# A table begins with what the interpreter and NumPy have for everybody.
NDARRAY, NEW_FROM_DESCR, RETURN, SLOTS = range(4)
# A record: x and out are the shape and strides behind it, the rest is compared or passed on.
RECORD = (
    "kept",  # the object that keeps all of it
    "brief",  # whether the call may hold the interpreter's lock
    "kernel",  # machine code
    "parameters",
    "axis",  # the very object
    "descr",
    "ndim",
    "given",  # whether out is an argument
    "out_descr",
    "out_ndim",
    "in_place",  # whether out may be where x is
    "x_low",  # from an array's data to its first byte
    "x_high",  # and to the one after its last
    "out_low",
    "out_high",
)
# NumPy's flag, and the place of two functions in its table, which are a part of its ABI.
WRITEABLE = 0x0400
API_NEW_FROM_DESCR, API_RETURN = 94, 76


class Calls:
    """The records of one function's calls."""

    __slots__ = ("_changing", "_kept", "_unknown", "find", "table")

    def __init__(self) -> None:
        self.table: Array | None = None
        self.find: Callable[[Array | None, object, object, object], object] = _unready
        self._kept: dict[int, tuple[object, ...]] = {}  # what records point to
        self._unknown = 0
        self._changing = threading.Lock()

    def forget(self) -> None:
        """Know no call any more."""
        with self._changing:
            if self.table is not None:
                self.table[SLOTS:] = 0
            self._kept.clear()
            self._unknown = 0

    def learn(
        self,
        slot: object,
        x: Array,
        out: Array | None,
        axis: object,
        like: Array,
        call: Any,
        brief: bool,
    ) -> None:
        """Perhaps write a record of a call that `find` did not know, for which it said ``slot``.

        ``like`` is the result.  ``call`` has the ``machine_code`` and ``parameters`` of a kernel
        that this thread runs alone, under the interpreter's lock if that is ``brief``.
        """
        self._unknown += 1
        if not WORKS or type(slot) is not int or self._unknown % UNKNOWN_CALLS:
            return
        # Not waited for: a signal's handler may call while its own thread is here.
        if not self._changing.acquire(blocking=False):
            return
        try:
            if self.table is None:
                table = np.zeros(SLOTS + (1 << SLOTS_BITS), np.int64)
                table[:SLOTS] = _of_numpy()
                find = _find()
                self.table = table  # before who needs it
                self.find = find
            else:
                record = _record(x, out, axis, like, call, brief)
                before = self._kept.get(slot)
                kept = record, call, axis, x.dtype, like.dtype
                record[RECORD.index("kept")] = id(kept)
                self._kept[slot] = kept
                self.table[SLOTS + slot] = record.ctypes.data
                del before  # not sooner
        finally:
            self._changing.release()


def _record(
    x: Array, out: Array | None, axis: object, like: Array, call: Any, brief: bool
) -> Array:
    """All but what keeps it."""
    same = out is not None and (out.strides, out.dtype) == (x.strides, x.dtype)
    words = {
        "kept": 0,
        "brief": brief,
        "kernel": call.machine_code[0],
        "parameters": call.parameters.ctypes.data,
        "axis": id(axis),
        "descr": id(x.dtype),
        "ndim": x.ndim,
        "given": out is not None,
        "out_descr": id(like.dtype),
        "out_ndim": like.ndim,
        "in_place": same and like.shape == x.shape,
    }
    for name, array in (("x", x), ("out", like)):
        words[f"{name}_low"], words[f"{name}_high"] = _extent(array)
    values = [int(words[name]) for name in RECORD]
    return np.array([*values, *x.shape, *x.strides, *like.shape, *like.strides], np.int64)


def _unready(table: Array | None, x: object, out: object, axis: object) -> object:
    return 0


def _extent(array: Array) -> tuple[int, int]:
    reach = [step * (size - 1) for size, step in zip(array.shape, array.strides, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + array.itemsize


@functools.cache
def _of_numpy() -> tuple[int, ...]:
    """The first words of a table."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = get(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]
    functions = ctypes.cast(api, ctypes.POINTER(ctypes.c_int64))
    return id(np.ndarray), functions[API_NEW_FROM_DESCR], functions[API_RETURN]


# -- machine code ---------------------------------------------------------------------------------


def _word(b: ir.IRBuilder, address: ir.Value, index: int | ir.Value) -> ir.Value:
    return b.load(word(b, address, index))


class _Record:
    def __init__(self, b: ir.IRBuilder, address: ir.Value) -> None:
        self.b = b
        self.address = address

    def get(self, name: str) -> ir.Value:
        return _word(self.b, self.address, RECORD.index(name))

    def lists(self) -> tuple[ir.Value, ...]:
        """Where x's shape and strides begin, and those of out."""
        b = self.b
        place = b.add(self.address, ir.Constant(I64, 8 * len(RECORD)))
        places = [place]
        for name in ("ndim", "ndim", "out_ndim"):
            place = b.add(place, b.mul(self.get(name), ir.Constant(I64, 8)))
            places.append(place)
        return tuple(places)


class _Find:
    """`find` being written: blocks that are gone through as long as all agrees."""

    def __init__(self, b: ir.IRBuilder, arguments: list[ir.Value]) -> None:
        self.b = b
        self.table, x, out, self.axis = arguments
        self.x, self.out = ArrayObject(b, x), ArrayObject(b, out)
        self.miss = b.append_basic_block("miss")

    def require(self, condition: ir.Value, otherwise: ir.Block | None = None) -> None:
        go_on = self.b.append_basic_block("go_on")
        self.b.cbranch(condition, go_on, otherwise or self.miss)
        self.b.position_at_end(go_on)

    def equal(self, a: ir.Value, b: ir.Value) -> None:
        self.require(self.b.icmp_signed("==", a, b))

    def same_lists(self, count: ir.Value, *pairs: tuple[ir.Value, ir.Value]) -> None:
        b = self.b
        zero = ir.Constant(I64, 0)
        other = cgutils.alloca_once(b, I64)
        b.store(zero, other)
        with cgutils.for_range(b, count, intp=I64) as loop:
            for left, right in pairs:
                bits = b.xor(_word(b, left, loop.index), _word(b, right, loop.index))
                b.store(b.or_(b.load(other), bits), other)
        self.equal(b.load(other), zero)

    def slot(self, given: ir.Value) -> ir.Value:
        """Which record it may be."""
        b = self.b
        number = cgutils.alloca_once(b, I64)
        b.store(given, number)

        def mix(value: ir.Value) -> None:
            mixed = b.mul(b.xor(b.load(number), value), ir.Constant(I64, 0x9E3779B97F4A7C15))
            b.store(b.xor(mixed, b.lshr(mixed, ir.Constant(I64, 32))), number)

        mix(self.axis)
        mix(self.x.descr)
        with cgutils.for_range(b, self.x.ndim, intp=I64) as loop:
            mix(_word(b, self.x.shape, loop.index))
            mix(_word(b, self.x.strides, loop.index))
        return b.and_(b.load(number), ir.Constant(I64, (1 << SLOTS_BITS) - 1))

    def compare(self, record: _Record, given: ir.Value) -> None:
        """Go on if the arguments are those of the record."""
        b = self.b
        self.require(b.icmp_signed("!=", record.address, ir.Constant(I64, 0)))
        for name, value in (("axis", self.axis), ("descr", self.x.descr), ("ndim", self.x.ndim)):
            self.equal(record.get(name), value)
        self.equal(record.get("given"), given)
        shape, strides, *_ = record.lists()
        self.same_lists(self.x.ndim, (self.x.shape, shape), (self.x.strides, strides))

    def compare_out(self, record: _Record) -> None:
        """The same for an ``out`` that was given: it must lie apart from x too, or be x."""
        b, out = self.b, self.out
        self.equal(out.kind, _word(b, self.table, NDARRAY))
        for name, value in (("out_descr", out.descr), ("out_ndim", out.ndim)):
            self.equal(record.get(name), value)
        _, _, shape, strides = record.lists()
        self.same_lists(out.ndim, (out.shape, shape), (out.strides, strides))
        writeable = b.and_(out.flags, ir.Constant(I64, WRITEABLE))
        self.require(b.icmp_signed("!=", writeable, ir.Constant(I64, 0)))
        x_low, x_high = (b.add(self.x.data, record.get(f"x_{end}")) for end in ("low", "high"))
        low, high = (b.add(out.data, record.get(f"out_{end}")) for end in ("low", "high"))
        apart = b.or_(b.icmp_unsigned("<=", x_high, low), b.icmp_unsigned("<=", high, x_low))
        may_be_x = b.icmp_signed("!=", record.get("in_place"), ir.Constant(I64, 0))
        is_x = b.and_(may_be_x, b.icmp_signed("==", self.x.data, out.data))
        self.require(b.or_(apart, is_x))

    def new(self, record: _Record, pyapi: Any) -> ir.Value:
        """A new result; 0 if there is no memory."""
        b = self.b
        none = ir.Constant(BYTES, None)
        *_, shape, _ = record.lists()
        descr = b.inttoptr(record.get("out_descr"), BYTES)
        pyapi.incref(descr)  # which will belong to the array
        values = [
            b.inttoptr(_word(b, self.table, NDARRAY), BYTES),
            descr,
            b.trunc(record.get("out_ndim"), I32),
            b.inttoptr(shape, BYTES),
            none,
            none,
            ir.Constant(I32, 0),
            none,
        ]
        return self.of_numpy(NEW_FROM_DESCR, values)

    def of_numpy(self, function: int, values: list[ir.Value]) -> ir.Value:
        """What a function of NumPy returns, an object."""
        b = self.b
        kind = ir.FunctionType(BYTES, [value.type for value in values]).as_pointer()
        place = b.inttoptr(_word(b, self.table, function), kind)
        return b.ptrtoint(b.call(place, values), I64)

    def run(self, record: _Record, out: ir.Value, pyapi: Any) -> None:
        b, zero = self.b, ir.Constant(I64, 0)
        data = ArrayObject(b, out).data
        kernel = record.get("kernel")
        arguments = [self.x.data, data, zero, record.get("parameters"), zero]
        brief = b.icmp_signed("!=", record.get("brief"), zero)
        with b.if_else(brief) as (locked, unlocked):
            with locked:
                _entry.call_address(b, kernel, arguments)
            with unlocked:
                kept = b.inttoptr(record.get("kept"), BYTES)
                pyapi.incref(kept)
                state = pyapi.save_thread()
                _entry.call_address(b, kernel, arguments)
                pyapi.restore_thread(state)
                pyapi.decref(kept)

    def scalar(self, out: ir.Value) -> ir.Value:
        """A result without axes as a scalar; the array is gone then."""
        b = self.b
        result = cgutils.alloca_once_value(b, out)
        no_axes = b.icmp_signed("==", ArrayObject(b, out).ndim, ir.Constant(I64, 0))
        with b.if_then(no_axes):
            b.store(self.of_numpy(RETURN, [b.inttoptr(out, BYTES)]), result)
        return b.load(result)


@intrinsic
def _emit_find(typing_context: Any, table: Any, x: Any, out: Any, axis: Any) -> Any:
    def generate(context: Any, b: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pyapi = context.get_python_api(b)
        none = b.ptrtoint(pyapi.borrow_none(), I64)
        f = _Find(b, list(arguments))
        answer = cgutils.alloca_once(b, I64)
        no_array, leave = b.append_basic_block("no_array"), b.append_basic_block("leave")
        given = b.append_basic_block("given")
        no_memory = b.append_basic_block("no_memory")

        is_array = b.icmp_signed("==", f.x.kind, _word(b, f.table, NDARRAY))
        f.require(is_array, no_array)
        has_out = b.icmp_signed("!=", f.out.address, none)
        slot = f.slot(b.zext(has_out, I64))
        record = _Record(b, _word(b, f.table, b.add(slot, ir.Constant(I64, SLOTS))))
        f.compare(record, b.zext(has_out, I64))
        f.require(b.not_(has_out), given)
        made = f.new(record, pyapi)
        f.require(b.icmp_signed("!=", made, ir.Constant(I64, 0)), no_memory)
        f.run(record, made, pyapi)
        b.store(f.scalar(made), answer)
        b.branch(leave)

        b.position_at_end(given)
        f.compare_out(record)
        f.run(record, f.out.address, pyapi)
        pyapi.incref(b.inttoptr(f.out.address, BYTES))
        b.store(f.out.address, answer)
        b.branch(leave)

        b.position_at_end(no_memory)
        pyapi.err_clear()
        b.branch(no_array)  # who looks further will say it

        b.position_at_end(no_array)
        pyapi.incref(pyapi.borrow_none())
        b.store(none, answer)
        b.branch(leave)

        b.position_at_end(f.miss)
        b.store(b.ptrtoint(pyapi.long_from_ssize_t(slot), I64), answer)
        b.branch(leave)

        b.position_at_end(leave)
        return b.load(answer)

    return _entry.OBJECT(table, x, out, axis), generate


def _look(table, x, out, axis):  # type: ignore[no-untyped-def]
    return _emit_find(table, x, out, axis)


@functools.cache
def _find() -> Any:
    """``find(table, x, out, axis)``: the result.

    A slot, an int, for a call that has no record; None for what is none for a record.
    """
    signature = (_entry.ADDRESS, *[_entry.OBJECT] * 3)
    return _entry.ready(_look, ["find"], signature, nogil=False).call
