"""Kernel calls handed to threads that spin for one: no lock and no interpreter in between.

Waking a thread takes 30 to 100 us, as long as a kernel needs for a megabyte.  So a helper that has
just worked listens at its *box* for a while: a few words of memory, whose state says whose turn it
is.  All changes of state are atomic, and only these exist::

    AWAY -> LISTENING -> AWAY                  the helper, when it is there and when it gives up
    LISTENING or AWAY -> TAKEN -> OFFERED      the caller: writes a call
    OFFERED -> AWAY                            the caller: withdraws it
    OFFERED -> WORKING -> LISTENING            the helper: runs the call

A caller offers the call, works itself, withdraws what no helper has begun, and waits for the rest:
`DONE` counts the calls that a box has run.  An offer carries that count, so that nobody withdraws
an offer which another caller has made since: every call that was run has raised it.  A long call
is offered to helpers that are away, too, who have been woken and may still come.
"""

import functools
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config
from numba.core import cgutils, types
from numba.extending import intrinsic

from . import _entry
from ._entry import I64

Array = np.ndarray[Any, Any]

AWAY, LISTENING, TAKEN, OFFERED, WORKING = range(5)
COUNT = 8  # the state of an offer is OFFERED + COUNT * DONE
STATE, DONE, CALL = 0, 1, 2  # words of a box; the call is the kernel and its arguments
ARGUMENTS = 5  # x, out, pairs, parameters, ticket
BEGAN = 16  # word of the ticket from which on there is one for each box
BOX_WORDS = 16  # two cache lines: neighbours do not disturb each other
# A helper gives up after so many looks, about 70 us (Zen 4): longer than a caller takes from one
# call to the next, and no more than waking up would have cost.
LOOKS = 4000
# One who was woken to listen comes in the middle of a call, and waits for its caller's next one.
LOOKS_WHEN_WOKEN = 8 * LOOKS
# A caller that waited so long leaves it to the interpreter, which lets others run meanwhile.
PATIENCE = 100_000
# What `lend` says: all is done; all is done, but somebody who seemed to listen did not begin, as on
# a machine with more threads at work than cores; parts of the call are not done yet.
TOGETHER, UNHEARD, LATE = range(3)
FINISHED = 8  # word of the ticket that counts the items that are done
ITEMS = 0  # word of the parameters that says how many there are


def boxes(count: int) -> Array:
    """Boxes for ``count`` helpers, all of them away."""
    memory = np.zeros((count + 1) * BOX_WORDS, np.int64)
    start = -(memory.ctypes.data // 8) % BOX_WORDS
    return memory[start : start + count * BOX_WORDS].reshape(count, BOX_WORDS)


@functools.cache
def _new_ticket(threads: int) -> Array:
    words = np.zeros(BEGAN + threads, np.int64)
    words[BEGAN:] = -1
    return words


def ticket(threads: int) -> Array:
    """The words that threads count by in one call: nothing is taken, nobody has begun."""
    return _new_ticket(threads).copy()


class _Box:
    """A box as machine code sees it."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value) -> None:
        self.b = builder
        self.address = address

    def word(self, index: int) -> ir.Value:
        return _entry.word(self.b, self.address, index)

    def read(self, index: int) -> ir.Value:
        return self.b.load_atomic(self.word(index), "acquire", 8)

    def write(self, index: int, value: ir.Value | int) -> None:
        if isinstance(value, int):
            value = ir.Constant(I64, value)
        self.b.store_atomic(value, self.word(index), "release", 8)

    def change(self, before: ir.Value | int, after: int) -> ir.Value:
        """Whether the state was ``before``, and is ``after`` now."""
        if isinstance(before, int):
            before = ir.Constant(I64, before)
        after_ = ir.Constant(I64, after)
        pair = self.b.cmpxchg(self.word(STATE), before, after_, "acq_rel", "acquire")
        return self.b.extract_value(pair, 1)

    def offer(self, done: ir.Value) -> ir.Value:
        """The state of an offer that was made after ``done`` calls."""
        counted = self.b.mul(done, ir.Constant(I64, COUNT))
        return self.b.add(counted, ir.Constant(I64, OFFERED))


def _count(b: ir.IRBuilder, counter: ir.Value, by: int = 1) -> ir.Value:
    """One more, and how many there are now."""
    count = b.add(b.load(counter), ir.Constant(I64, by))
    b.store(count, counter)
    return count


def _looked(b: ir.IRBuilder, left: ir.Value) -> ir.Value:
    """Count a look in vain, and pause; whether none are ``left``."""
    if platform.machine() in ("x86_64", "AMD64"):
        kind = ir.FunctionType(ir.VoidType(), [])
        b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])
    return b.icmp_signed("<=", _count(b, left, -1), ir.Constant(I64, 0))


@intrinsic
def _emit_listen(typing_context: Any, box: Any, looks: Any) -> Any:
    def generate(context: Any, b: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        box = _Box(b, arguments[0])
        left = cgutils.alloca_once_value(b, arguments[1])
        look, work = b.append_basic_block("look"), b.append_basic_block("work")
        rest, leave = b.append_basic_block("rest"), b.append_basic_block("leave")
        b.branch(look)

        b.position_at_end(look)
        state = box.read(STATE)
        bare = b.and_(state, ir.Constant(I64, COUNT - 1))
        offered = b.icmp_signed("==", bare, ir.Constant(I64, OFFERED))
        with b.if_then(offered, likely=False), b.if_then(box.change(state, WORKING)):
            b.branch(work)
        away = b.icmp_signed("==", state, ir.Constant(I64, AWAY))
        with b.if_then(away, likely=False):
            box.change(AWAY, LISTENING)
        b.branch(rest)

        b.position_at_end(work)
        kernel, *values = (b.load(box.word(CALL + i)) for i in range(1 + ARGUMENTS))
        _entry.call_address(b, kernel, values)
        # In this order: whoever offers next must see the count that its own call will raise.
        box.write(DONE, b.add(box.read(DONE), ir.Constant(I64, 1)))
        box.write(STATE, LISTENING)
        b.store(ir.Constant(I64, LOOKS), left)
        b.branch(look)

        b.position_at_end(rest)
        tired = _looked(b, left)
        with b.if_then(tired, likely=False), b.if_then(box.change(LISTENING, AWAY)):
            b.branch(leave)
        b.branch(look)

        b.position_at_end(leave)
        return context.get_dummy_value()

    return types.void(box, looks), generate


@intrinsic
def _emit_lend(
    typing_context: Any,
    boxes: Any,
    count: Any,
    kernel: Any,
    x: Any,
    out: Any,
    pairs: Any,
    parameters: Any,
    ticket: Any,
    everyone: Any,
) -> Any:
    def generate(context: Any, b: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        first, count, kernel, *values, everyone = arguments
        words = [b.load(_entry.word(b, kernel, 0)), *values]
        parameters, ticket = values[-2:]
        helps = [*words[:-1], b.or_(ticket, ir.Constant(I64, 1))]  # an odd ticket
        size = ir.Constant(I64, 8 * BOX_WORDS)
        nobody, zero = ir.Constant(I64, -1), ir.Constant(I64, 0)
        asked, helped, late = (cgutils.alloca_once_value(b, zero) for _ in range(3))

        def each() -> Any:
            """A loop over the boxes, with the place that keeps each one's count of calls."""
            with cgutils.for_range(b, count, intp=I64) as loop:
                box = _Box(b, b.add(first, b.mul(loop.index, size)))
                began = b.add(loop.index, ir.Constant(I64, BEGAN))
                yield box, _entry.word(b, ticket, began)

        for box, place in each():
            b.store(nobody, place)
            listens = box.change(LISTENING, TAKEN)
            taken = cgutils.alloca_once_value(b, listens)
            with b.if_then(b.and_(b.not_(listens), b.icmp_signed("!=", everyone, zero))):
                b.store(box.change(AWAY, TAKEN), taken)
            with b.if_then(b.load(taken)):
                done = box.read(DONE)
                b.store(done, place)
                for i, word in enumerate(helps):
                    b.store(word, box.word(CALL + i))
                box.write(STATE, box.offer(done))
            with b.if_then(listens):
                _count(b, asked)
        _entry.call_address(b, words[0], values)
        for box, place in each():
            before = b.load(place)
            with b.if_then(b.icmp_signed("!=", before, nobody)):
                withdrawn = box.change(box.offer(before), AWAY)  # who is there will say so
                b.store(b.select(withdrawn, nobody, before), place)
                with b.if_then(b.not_(withdrawn)):
                    _count(b, helped)
                    _wait(b, box, before, place, late)
        items = b.load(_entry.word(b, parameters, ITEMS))
        missing = b.icmp_signed("!=", _Box(b, ticket).read(FINISHED), items)
        missing = b.or_(missing, b.icmp_signed("!=", b.load(late), zero))
        in_vain = b.icmp_signed("<", b.load(helped), b.load(asked))
        answer = b.select(in_vain, ir.Constant(I64, UNHEARD), ir.Constant(I64, TOGETHER))
        return b.select(missing, ir.Constant(I64, LATE), answer)

    arguments = (boxes, count, kernel, x, out, pairs, parameters, ticket, everyone)
    return types.int64(*arguments), generate


def _wait(b: ir.IRBuilder, box: _Box, before: ir.Value, place: ir.Value, late: ir.Value) -> None:
    """Until the box has run its call, which ``place`` says then, or until it is too ``late``."""
    left = cgutils.alloca_once_value(b, ir.Constant(I64, PATIENCE))
    look, rest = b.append_basic_block("wait"), b.append_basic_block("wait_on")
    done, leave = b.append_basic_block("done"), b.append_basic_block("waited")
    b.branch(look)
    b.position_at_end(look)
    b.cbranch(b.icmp_signed("==", box.read(DONE), before), rest, done)
    b.position_at_end(rest)
    with b.if_then(_looked(b, left)):
        b.store(ir.Constant(I64, 1), late)
        b.branch(leave)
    b.branch(look)
    b.position_at_end(done)
    b.store(ir.Constant(I64, -1), place)
    b.branch(leave)
    b.position_at_end(leave)


def _listen(box, looks):  # type: ignore[no-untyped-def]
    _emit_listen(box, looks)


def _lend(boxes, count, kernel, x, out, pairs, parameters, ticket, everyone):  # type: ignore
    return _emit_lend(boxes, count, kernel, x, out, pairs, parameters, ticket, everyone)


def prepare() -> None:
    """Compile both sides, in a thread that calls.

    In a helper, or first when one is found listening, it could happen while another thread forks:
    the child would wait for Numba's compiler lock for ever.
    """
    if not config.DISABLE_JIT:
        listen()
        lend()


@functools.cache
def listen() -> Any:
    """``listen(box, looks)``: run the calls that are offered there, until none comes for a while.

    That is so many ``looks`` for the first one, and `LOOKS` for each further one.
    """
    if config.DISABLE_JIT:
        return lambda box, looks: None
    return _entry.ready(_listen, ["listen"], (_entry.ADDRESS, types.int64)).call


@functools.cache
def lend() -> Any:
    """``lend(boxes, count, kernel, x, out, pairs, parameters, ticket, everyone)``.

    Run a kernel together: in this thread, and in every box whose helper listens; if ``everyone``,
    also of those that come before it is done.  ``kernel`` holds the address of its
    machine code.  The ticket gets a word for each box: -1, or what its `DONE` was before a call
    that still runs.  Returns `TOGETHER`, `UNHEARD` or `LATE`.
    """
    arrays = [_entry.ADDRESS] * (1 + ARGUMENTS)
    signature = (_entry.ADDRESS, types.int64, *arrays, types.int64)
    return _entry.ready(_lend, ["lend"], signature).call
