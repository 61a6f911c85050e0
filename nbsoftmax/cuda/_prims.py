"""All that is particular to numba-cuda: registers, memory, exchange between threads; its simulator.

Kernels call functions made by `lifted`. Such a function is Python over ``o``, a machine: its
operations (`_scalars` says which) and what is below. On a device it runs once, when the kernel is
compiled, and writes instructions; in Numba's simulator it runs in each thread, on numbers.

Memory is addressed by integers, in bytes. The simulator's device memory is the host's, and what a
kernel touches there is checked against what it was lent (`lent`).
"""

import contextlib
import ctypes
import functools
import inspect
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.core import cgutils

from .. import _llvm, _plain, _scalars
from .._formats import Format
from .._llvm import I32, I64
from ._jobs import SIMULATED, WARP, Group

Value = Any  # one register
Join = Callable[[Any, list[Value], list[Value]], list[Value]]

_places = itertools.count()  # names of shared arrays


def _architecture() -> tuple[int, int]:
    """What Numba compiles for."""
    from numba.cuda.core import targetconfig

    version = targetconfig.ConfigStack().top().compute_capability
    return version[0], version[1]


class Device(_llvm.Arithmetic):
    """A GPU: instructions for one thread."""

    def __init__(self, builder: ir.IRBuilder, real: _scalars.Real) -> None:
        super().__init__(builder, real)

    def product(self, a: _llvm.Vector, b: _llvm.Vector) -> _llvm.Vector:
        # A plain product may be fused with a sum, which then is not the sum that was meant.
        return self._nvvm("llvm.nvvm.mul.rn", [a, b])

    def magnitude(self, a: _llvm.Vector) -> _llvm.Vector:
        return self._nvvm("llvm.nvvm.fabs", [a])

    def maximum_number(self, a: _llvm.Vector, b: _llvm.Vector) -> _llvm.Vector:
        """The larger; of a NaN and a number b, the number."""
        if self.real.itemsize == 8:  # for which there is no such instruction
            return super().larger(a, b)
        return self._nvvm("llvm.nvvm.fmax", [a, b])

    def larger(self, a: _llvm.Vector, b: _llvm.Vector) -> _llvm.Vector:
        if self.real.itemsize == 8 or _architecture() < (8, 0):
            return super().larger(a, b)
        text = "max.NaN.f32 $0, $1, $2;"
        return _llvm.Vector(
            self, self._assembly(text, "=f,f,f", self.type, [a.value, b.value], False)
        )

    def quotient(self, a: _llvm.Vector, b: _llvm.Vector) -> _llvm.Vector:
        """``a / b`` for a finite a and a b whose reciprocal is normal: less than an ulp off.

        The compiler's own division looks for the others first, in each thread. With weights there
        may be others.
        """
        if self.real not in (_scalars.FLOAT32, _scalars.HALF):
            return super().quotient(a, b)
        text = "rcp.approx.ftz.f32 $0, $1;"
        inverse = _llvm.Vector(self, self._assembly(text, "=f,f", self.type, [b.value], False))
        near = a * inverse
        rest = self.fma(_scalars.negative(self, near), b, a)
        return self.fma(rest, inverse, near)

    def exp2(self, t: _llvm.Vector) -> _llvm.Vector:
        """The hardware's, good to 2^-22; 0 instead of a subnormal number."""
        text = "ex2.approx.ftz.f32 $0, $1;"
        return _llvm.Vector(self, self._assembly(text, "=f,f", self.type, [t.value], False))

    def usually(
        self,
        condition: _llvm.Vector,
        usual: Callable[[], Sequence[_llvm.Vector]],
        otherwise: Callable[[], Sequence[_llvm.Vector]],
    ) -> Sequence[_llvm.Vector]:
        b, ways = self.b, []
        with b.if_else(condition.value, likely=True) as (then, rarely):
            for branch, run in ((then, usual), (rarely, otherwise)):
                with branch:
                    ways.append((run(), b.block))
        found = []
        for i in range(len(ways[0][0])):
            phi = b.phi(self.type)
            for values, end in ways:
                phi.add_incoming(values[i].value, end)
            found.append(_llvm.Vector(self, phi))
        return found

    def _nvvm(self, name: str, arguments: Sequence[_llvm.Vector]) -> _llvm.Vector:
        kind = ir.FunctionType(self.type, [self.type] * len(arguments))
        name = f"{name}.{'f' if self.real.itemsize == 4 else 'd'}"
        function = cgutils.get_or_insert_function(self.b.module, kind, name)
        return _llvm.Vector(self, self.b.call(function, [a.value for a in arguments]))

    def _register(self, name: str) -> ir.Value:
        kind = ir.FunctionType(I32, [])
        name = f"llvm.nvvm.read.ptx.sreg.{name}"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), [])

    def _thread(self, group: Group) -> ir.Value:
        """The number of this thread within its block."""
        b, number = self.b, self._register("tid.x")
        if group.row_of_threads:
            return number
        for behind, size in (("y", ("x",)), ("z", ("x", "y"))):
            count = functools.reduce(b.mul, [self._register(f"ntid.{axis}") for axis in size])
            number = b.add(number, b.mul(self._register(f"tid.{behind}"), count))
        return number

    def _barrier(self) -> None:
        kind = ir.FunctionType(ir.VoidType(), [])
        self.b.call(cgutils.get_or_insert_function(self.b.module, kind, "llvm.nvvm.barrier0"), [])

    def _assembly(
        self,
        text: str,
        constraints: str,
        result: ir.Type,
        arguments: Sequence[ir.Value],
        effect: bool,
    ) -> ir.Value:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.b.call(ir.InlineAsm(kind, text, constraints, side_effect=effect), arguments)

    def opaque(self, value: _llvm.Vector) -> _llvm.Vector:
        """The same number, of which the compiler knows nothing."""
        letter, bits = ("f", 32) if self.real.itemsize == 4 else ("d", 64)
        text, constraints = f"mov.f{bits} $0, $1;", f"={letter},{letter}"
        return _llvm.Vector(self, self._assembly(text, constraints, self.type, [value.value], True))

    # -- between threads ------------------------------------------------------------------------

    def shuffle(self, value: _llvm.Vector, step: int) -> _llvm.Vector:
        """The value of the thread whose number differs in the bit ``step``."""
        b = self.b
        result = ir.LiteralStructType((I32, ir.IntType(1)))
        kind = ir.FunctionType(result, [I32] * 5)
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.nvvm.shfl.sync.i32")
        bits = b.bitcast(value.value, self.integer)
        got = ir.Constant(self.integer, 0)
        for part in range(self.real.itemsize // 4):
            low = ir.Constant(self.integer, 32 * part)
            word = bits if self.integer == I32 else b.trunc(b.lshr(bits, low), I32)
            mask, exclusive, distance, all_lanes = (
                ir.Constant(I32, v) for v in (-1, 3, step, WARP - 1)
            )
            word = b.extract_value(
                b.call(function, [mask, exclusive, word, distance, all_lanes]), 0
            )
            got = word if self.integer == I32 else b.or_(got, b.shl(b.zext(word, I64), low))
        return _llvm.Vector(self, b.bitcast(got, self.element))

    def reduce(self, group: Group, join: Join, values: list[Value]) -> list[Value]:
        """Values joined of all threads that hold the same lanes; each of them gets the same."""
        values = self._butterfly(group.across, group.lanes, join, values)
        if group.warps > 1:
            parts = self._through_block(group, values)
            values = functools.reduce(functools.partial(join, self), parts)
            together = min(group.warps, WARP // group.across)
            values = self._butterfly(group.across, together, join, values)
        if group.blocks > 1:
            values = self._through_cluster(group, values)
            values = self._butterfly(group.across, group.blocks, join, values)
        return values

    def anywhere(self, wanted: _llvm.Vector, group: Group) -> _llvm.Vector:
        """1 if it is 1 in any thread that this one may meet if so, else 0.

        What depends on it may hold barriers of a cluster: then all its blocks must have the same
        flag, as they have where it follows from values that they have joined.
        """
        if not group.meets:
            return wanted
        b, flag = self.b, (wanted > self.const(0.0)).value
        if group.within_warp:
            one_bit = ir.IntType(1)
            kind = ir.FunctionType(one_bit, [I32, one_bit])
            function = cgutils.get_or_insert_function(b.module, kind, "llvm.nvvm.vote.any.sync")
            found = b.call(function, [ir.Constant(I32, -1), flag])
        else:
            kind = ir.FunctionType(I32, [I32])
            function = cgutils.get_or_insert_function(b.module, kind, "llvm.nvvm.barrier0.or")
            found = b.icmp_unsigned(
                "!=", b.call(function, [b.zext(flag, I32)]), ir.Constant(I32, 0)
            )
        return self.where(_llvm.Vector(self, found), self.const(1.0), self.const(0.0))

    def _butterfly(self, step: int, count: int, join: Join, values: list[Value]) -> list[Value]:
        for _ in range(count.bit_length() - 1):
            values = join(self, values, [self.shuffle(v, step) for v in values])
            step *= 2
        return values

    def _shared(self, count: int) -> ir.Value:
        """Shared memory for so many numbers, all its own."""
        kind = ir.ArrayType(self.element, count)
        memory = ir.GlobalVariable(self.b.module, kind, f"exchange_{next(_places)}", addrspace=3)
        memory.linkage = "internal"
        memory.align = 16
        memory.initializer = ir.Constant(kind, ir.Undefined)
        return memory

    def _place(self, memory: ir.Value, index: ir.Value) -> ir.Value:
        return self.b.gep(memory, [ir.Constant(I32, 0), index])

    def _through_block(self, group: Group, values: list[Value]) -> list[list[Value]]:
        """What the warps of this thread's group hold: a list for each that this lane reads."""
        b, count = self.b, len(values)
        thread = self._thread(group)
        lane = b.and_(thread, ir.Constant(I32, WARP - 1))
        warp = b.lshr(thread, ir.Constant(I32, 5))
        beside = b.and_(lane, ir.Constant(I32, group.across - 1))
        memory = self._shared(group.block // WARP * count * group.across)

        def at(warp: ir.Value, value: int) -> ir.Value:
            row = b.add(b.mul(warp, ir.Constant(I32, count)), ir.Constant(I32, value))
            return self._place(memory, b.add(b.mul(row, ir.Constant(I32, group.across)), beside))

        with b.if_then(b.icmp_unsigned("<", lane, ir.Constant(I32, group.across))):
            for i, value in enumerate(values):
                b.store(value.value, at(warp, i))
        self._barrier()
        at_once = WARP // group.across
        behind = b.udiv(lane, ir.Constant(I32, group.across))
        first = b.and_(warp, ir.Constant(I32, -group.warps))
        parts = []
        for start in range(0, group.warps, at_once):
            turn = b.add(behind, ir.Constant(I32, start))
            which = b.add(first, b.and_(turn, ir.Constant(I32, group.warps - 1)))
            parts.append([_llvm.Vector(self, b.load(at(which, i))) for i in range(count)])
        return parts

    def _through_cluster(self, group: Group, values: list[Value]) -> list[Value]:
        """What the block of the cluster holds whose number this lane has."""
        b = self.b
        memory = self._shared(len(values))
        thread = self._register("tid.x")
        with b.if_then(b.icmp_unsigned("==", thread, ir.Constant(I32, 0))):
            for i, value in enumerate(values):
                b.store(value.value, self._place(memory, ir.Constant(I32, i)))
        self.cluster_arrive()
        self.cluster_wait()
        rank = b.and_(thread, ir.Constant(I32, group.blocks - 1))
        letter = "f" if self.real.itemsize == 4 else "d"
        text = (
            "{ .reg .u32 place; mapa.shared::cluster.u32 place, $1, $2; "
            f"ld.shared::cluster.f{8 * self.real.itemsize} $0, [place]; }}"
        )
        got = []
        for i in range(len(values)):
            place = b.ptrtoint(self._place(memory, ir.Constant(I32, i)), I32)
            arguments, constraints = [place, rank], f"={letter},r,r,~{{memory}}"
            got.append(
                _llvm.Vector(self, self._assembly(text, constraints, self.type, arguments, True))
            )
        return got

    def cluster_arrive(self) -> None:
        """Say that this thread has read what it will of other blocks' memory."""
        self._cluster("arrive.release")

    def cluster_wait(self) -> None:
        """Wait until all threads of the cluster have arrived."""
        self._cluster("wait.acquire")

    def _cluster(self, step: str) -> None:
        kind = ir.FunctionType(ir.VoidType(), [])
        text = f"barrier.cluster.{step}.aligned;"
        assembly = ir.InlineAsm(kind, text, "~{memory}", side_effect=True)
        # Not to be moved into a branch: all threads of a warp must meet there.
        self.b.call(assembly, [], attrs=("convergent",))

    # -- memory ---------------------------------------------------------------------------------

    def all_of(self, conditions: Sequence[ir.Value]) -> ir.Value:
        return functools.reduce(self.b.and_, conditions)

    def below(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.b.icmp_signed("<", a, b)

    def plus(self, a: ir.Value, b: ir.Value | int) -> ir.Value:
        return self.b.add(a, ir.Constant(a.type, b) if isinstance(b, int) else b)

    def count(self, end: ir.Value, start: ir.Value | int, most: int) -> ir.Value:
        """How many there are from start to end, but no more than ``most``: 32 bits hold it."""
        b, none = self.b, ir.Constant(I64, 0)
        found, most = b.sub(end, start) if start != 0 else end, ir.Constant(I64, most)
        found = b.select(b.icmp_signed("<", found, most), found, most)
        return b.trunc(b.select(b.icmp_signed(">", found, none), found, none), I32)

    def chosen(self, condition: ir.Value, a: _llvm.Vector, b: _llvm.Vector) -> _llvm.Vector:
        return self.where(_llvm.Vector(self, condition), a, b)

    def above(self, a: ir.Value, b: int) -> ir.Value:
        return self.b.icmp_signed(">", a, ir.Constant(a.type, b))

    def times(self, a: ir.Value, b: ir.Value | int) -> ir.Value:
        return self.b.mul(a, ir.Constant(a.type, b) if isinstance(b, int) else b)

    def divided(self, a: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The quotient and the rest."""
        quotient = self.b.udiv(a, b)
        return quotient, self.b.sub(a, self.b.mul(quotient, b))

    def read(
        self,
        form: Format,
        address: ir.Value,
        count: int,
        live: ir.Value,
        fill: float,
        native: bool = True,
    ) -> list[_llvm.Vector]:
        """``count`` neighbouring numbers, aligned to all their bytes; ``fill`` where not live."""
        words = self._words(form, count)
        kind, letter, bits = words
        n = count * form.itemsize * 8 // bits
        names = ", ".join(f"${i}" for i in range(n))
        vector = f".v{n}" if n > 1 else ""
        start = _pattern(form, fill, bits)
        starts = " ".join(f"mov.b{max(bits, 16)} ${i}, {start};" for i in range(n))
        held = "{" + names + "}" if n > 1 else names
        text = (
            f"{{ .reg .pred live; setp.ne.b32 live, ${n + 1}, 0; {starts} "
            f"@live ld.global{vector}.b{bits} {held}, [${n}]; }}"
        )
        constraints = ",".join([f"=&{letter}"] * n + ["l", "r"])
        result = kind if n == 1 else ir.LiteralStructType([kind] * n)
        flag = self.b.zext(live, I32)
        got = self._assembly(text, constraints, result, [address, flag], True)
        raw = [got] if n == 1 else [self.b.extract_value(got, i) for i in range(n)]
        if not native:
            raw = [self._swapped(word, bits) for word in raw]
        values = [form.widen(self, v) for v in self._elements(form, raw, bits)]
        if form.kind in "fV":
            return values
        return [self.where(_llvm.Vector(self, live), v, self.const(fill)) for v in values]

    def _swapped(self, word: ir.Value, bits: int) -> ir.Value:
        """Bytes in the opposite order."""
        if bits == 8:
            return word
        kind = ir.FunctionType(word.type, [word.type])
        name = f"llvm.bswap.i{bits}"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), [word])

    def _words(self, form: Format, count: int) -> tuple[ir.Type, str, int]:
        """The registers that memory is read to: their type, its letter in assembly, its bits."""
        bits = min(64 if form.itemsize == 8 else 32, 8 * form.itemsize * count)
        kind = ir.IntType(max(bits, 16))
        return kind, {8: "h", 16: "h", 32: "r", 64: "l"}[bits], bits

    def _elements(self, form: Format, words: list[ir.Value], bits: int) -> list[ir.Value]:
        size = 8 * form.itemsize
        found = []
        for word in words:
            for start in range(0, bits, size):
                part = word
                if start:
                    part = self.b.lshr(part, ir.Constant(part.type, start))
                if part.type.width > size:
                    part = self.b.trunc(part, ir.IntType(size))
                found.append(self.b.bitcast(part, form.element))
        return found

    def write(
        self,
        form: Format,
        address: ir.Value,
        values: list[_llvm.Vector],
        live: ir.Value,
        native: bool = True,
    ) -> None:
        kind, letter, bits = self._words(form, len(values))
        each, words = max(1, bits // (8 * form.itemsize)), []
        for start in range(0, len(values), each):
            word = self._word(form, values[start : start + each], kind)
            words.append(word if native else self._swapped(word, bits))
        n = len(words)
        names = ", ".join(f"${i}" for i in range(n))
        vector, held = (f".v{n}", "{" + names + "}") if n > 1 else ("", names)
        text = (
            f"{{ .reg .pred live; setp.ne.b32 live, ${n + 1}, 0; "
            f"@live st.global{vector}.b{bits} [${n}], {held}; }}"
        )
        constraints = ",".join([letter] * n + ["l", "r", "~{memory}"])
        flag = self.b.zext(live, I32)
        self._assembly(text, constraints, ir.VoidType(), [*words, address, flag], True)

    def _word(self, form: Format, values: list[_llvm.Vector], kind: ir.Type) -> ir.Value:
        """Neighbouring numbers as they lie in memory, in one register."""
        size, word = 8 * form.itemsize, None
        if form.kind == "V" and self.real.itemsize == 4 and _architecture() >= (8, 0):
            text = (
                "cvt.rn.bf16x2.f32 $0, $2, $1;" if len(values) == 2 else "cvt.rn.bf16.f32 $0, $1;"
            )
            constraints = ",".join(["=r" if len(values) == 2 else "=h", *("f" for _ in values)])
            return self._assembly(text, constraints, kind, [v.value for v in values], False)
        for i, value in enumerate(values):
            part = self.b.bitcast(self._stored(form, value), ir.IntType(size))
            if kind.width > size:
                part = self.b.zext(part, kind)
                part = self.b.shl(part, ir.Constant(kind, i * size)) if i else part
            word = part if word is None else self.b.or_(word, part)
        return word

    def _stored(self, form: Format, value: _llvm.Vector) -> ir.Value:
        """A number as it lies in memory."""
        if form.itemsize > self.real.itemsize:
            return self.b.fpext(value.value, form.element)
        if form.kind != "V":
            return form.narrow(self, value)
        single, number = Device(self.b, _scalars.FLOAT32), value.value
        if self.real.itemsize == 8:
            number = self.b.fptrunc(number, single.type)
        rounded = form.narrow(single, _llvm.Vector(single, number))
        # A GPU's NaN has only ones, which rounding would carry into the sign.
        nan = self.b.fcmp_unordered("uno", number, number)
        return self.b.select(nan, ir.Constant(form.element, 0x7FC0), rounded)


def _pattern(form: Format, value: float, bits: int) -> str:
    """A number as often as it fits so many bits; integers have a zero there."""
    if form.kind not in "fV":
        return "0"
    size = 8 * form.itemsize
    if form.kind == "V":
        one = int(np.float32(value).view(np.uint32)) >> 16
    else:
        one = int(np.dtype(form.name).type(value).view(f"u{form.itemsize}"))
    return hex(sum(one << start for start in range(0, bits, size)))


class Simulated(_plain.Operations):
    """A thread of Numba's simulator. NumPy's functions for arrays take a microsecond a number."""

    def where(self, condition: Any, a: Value, b: Value) -> Value:
        if isinstance(condition, np.ndarray):
            return super().where(condition, a, b)
        return a if condition else b

    def larger(self, a: Value, b: Value) -> Value:
        return self.where(a > b, a, b)

    maximum_number = larger  # for a b that is no NaN

    def usually(self, condition: Any, usual: Any, otherwise: Any) -> Any:
        return usual() if condition else otherwise()

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        if self.real.itemsize == 8 or any(isinstance(v, np.ndarray) for v in (a, b, c)):
            return super().fma(a, b, c)
        return np.float32(float(a) * float(b) + float(c))

    def exp2(self, t: Value) -> Value:
        return np.exp2(t)

    def reduce(self, group: Group, join: Join, values: list[Value]) -> list[Value]:
        """As the device's, from the values of all threads at once."""
        if not group.meets:
            return values
        slots = self._exchanged(values, group)
        me = threading.current_thread().thread_id % group.block  # type: ignore[attr-defined]
        within = me % group.threads
        start, beside = me - within, within % group.across
        held = [
            slots[block * group.block + start + beside + behind * group.across]
            for block in range(group.blocks)
            for behind in range(group.deep)
        ]
        columns = [np.array(column) for column in zip(*held, strict=True)]
        while len(columns[0]) > 1:
            columns = join(self, [c[::2] for c in columns], [c[1::2] for c in columns])
        return [c[0] for c in columns]

    def _exchanged(self, values: list[Value], group: Group) -> dict[int, list[Value]]:
        """What all threads of the group hold, or if it is more than a warp of the block."""
        thread: Any = threading.current_thread()
        who = (group.threads, thread.thread_id // group.threads) if group.within_warp else None
        turns = thread.__dict__.setdefault("turns", Counter())
        turns[who] += 1  # so that no value is overwritten
        meetings = thread._manager.__dict__.setdefault("meetings", {})
        slots, complete = meetings.setdefault((who, turns[who]), ({}, threading.Event()))
        slots[thread.thread_id] = values
        if who is None:
            thread.syncthreads()
            return slots
        # Not the simulator's barrier, which is the block's: other warps may be elsewhere.
        if len(slots) == group.threads:
            complete.set()
        while not complete.wait(0.1):
            if thread.abort:
                raise RuntimeError("another thread of the block failed")
        return slots

    def opaque(self, value: Value) -> Value:
        return value

    def anywhere(self, wanted: Value, group: Group) -> Value:
        if not group.meets:
            return wanted
        return max(value for (value,) in self._exchanged([wanted], group).values())

    def cluster_arrive(self) -> None:
        pass

    def cluster_wait(self) -> None:
        threading.current_thread().syncthreads()  # type: ignore[attr-defined]

    def all_of(self, conditions: Sequence[bool]) -> bool:
        return all(conditions)

    def below(self, a: int, b: int) -> bool:
        return a < b

    def plus(self, a: int, b: int) -> int:
        return a + b

    def count(self, end: int, start: int, most: int) -> int:
        return max(0, min(end - start, most))

    def chosen(self, condition: bool, a: Value, b: Value) -> Value:
        return a if condition else b

    def above(self, a: int, b: int) -> bool:
        return a > b

    def times(self, a: int, b: int) -> int:
        return a * b

    def divided(self, a: int, b: int) -> tuple[int, int]:
        return divmod(a, b)

    def read(
        self,
        form: Format,
        address: int,
        count: int,
        live: bool,
        fill: float,
        native: bool = True,
    ) -> list[Value]:
        if not live:
            return [self.const(fill)] * count
        memory = _memory(form, address, count)
        if not native:
            memory = memory.byteswap()
        if form.kind == "V":
            memory = (memory.astype(np.uint32) << 16).view(np.float32)
        return list(memory.astype(self.dtype))

    def write(
        self,
        form: Format,
        address: int,
        values: list[Value],
        live: bool,
        native: bool = True,
    ) -> None:
        if not live:
            return
        memory, given = _memory(form, address, len(values)), np.array(values)
        if form.kind == "V":
            bits = given.astype(np.float32).view(np.uint32)
            given = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        memory[...] = given if native else given.astype(memory.dtype).byteswap()


_lent: list[tuple[int, int]] = []


@contextlib.contextmanager
def lent(extents: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Memory (first byte, byte after the last) that simulated kernels may touch meanwhile."""
    _lent[:] = extents
    try:
        yield
    finally:
        _lent.clear()


def _memory(form: Format, address: int, count: int) -> np.ndarray[Any, Any]:
    """The numbers at an address of the simulated device."""
    size = count * form.itemsize
    if not any(low <= address and address + size <= high for low, high in _lent):
        raise AssertionError(f"{size} bytes at {address:#x} are none of the arrays lent: {_lent}")
    if address % size:
        raise AssertionError(f"{size} bytes at {address:#x} are not aligned")
    bytes_ = (ctypes.c_char * size).from_address(int(address))
    return np.frombuffer(bytes_, np.uint16 if form.kind == "V" else form.name)


# -- what kernels and device functions share ------------------------------------------------------


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """What kernels may call, compiled anew with each: what it lifts looks at the architecture."""
    if SIMULATED:
        return function
    from numba.cuda.extending import register_jitable

    return register_jitable(function)  # type: ignore[no-any-return]


def _thread_number() -> int:
    """The number of this thread within its block, of whatever shape."""
    behind = cuda.threadIdx.y + cuda.blockDim.y * cuda.threadIdx.z
    return np.int64(cuda.threadIdx.x + cuda.blockDim.x * behind)


def _simulated_thread_number() -> int:
    # Not by way of the module `cuda`, which is another one while a kernel of its file runs.
    return int(threading.current_thread().thread_id)  # type: ignore[attr-defined]


thread_number = _simulated_thread_number if SIMULATED else device_function(_thread_number)


# -- functions of a machine -----------------------------------------------------------------------


def lifted(
    function: Callable[..., Any],
    real: _scalars.Real,
    results: int = 0,
    named: type[tuple[Any, ...]] | None = None,
    converts: bool = False,
) -> Callable[..., Any]:
    """A function ``(o, ...)`` for kernels to call, without the ``o``.

    Its arguments are integers and tuples of numbers or integers (lists for the function); if it
    ``converts``, tuples of anything that can be made such numbers. It returns so many numbers, as a
    tuple or a named one, or nothing.
    """
    if SIMULATED:
        return _in_simulator(function, _simulated(real), named, converts)
    return _on_device(function, real, results, named, converts)


@functools.cache
def _simulated(real: _scalars.Real) -> Simulated:
    return Simulated(real)


def _in_simulator(
    function: Callable[..., Any],
    o: Simulated,
    named: type[tuple[Any, ...]] | None,
    converts: bool,
) -> Callable[..., Any]:
    def held(argument: Any) -> Any:
        if not isinstance(argument, tuple):
            return int(argument)
        return [o.const(v) for v in argument] if converts else list(argument)

    def call(*arguments: Any) -> Any:
        given = (held(a) for a in arguments)
        with np.errstate(all="ignore"):
            result = function(o, *given)
        if result is None:
            return None
        return tuple(result) if named is None else named(*result)

    return call


def _on_device(
    function: Callable[..., Any],
    real: _scalars.Real,
    results: int,
    named: type[tuple[Any, ...]] | None,
    converts: bool,
) -> Callable[..., Any]:
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    number = getattr(types, real.name)
    result = types.void
    if named is not None:
        result = types.NamedUniTuple(number, results, named)
    elif results:
        result = types.UniTuple(number, results)

    def typed(context: Any, *arguments: Any) -> Any:
        kinds = [a if isinstance(a, types.BaseTuple) else types.int64 for a in arguments]

        def held(target: Any, o: Device, kind: Any, value: Any) -> Any:
            if not isinstance(kind, types.BaseTuple):
                return value
            parts = cgutils.unpack_tuple(o.b, value)
            if converts:
                parts = [
                    target.cast(o.b, part, given, number)
                    for part, given in zip(parts, kind, strict=True)
                ]
            elif kind.dtype == types.int64:
                return parts
            return [_llvm.Vector(o, v) for v in parts]

        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            o = Device(builder, real)
            given = (
                held(target, o, kind, value) for kind, value in zip(kinds, values, strict=True)
            )
            made = function(o, *given)
            if not results:
                return target.get_dummy_value()
            return target.make_tuple(builder, signature.return_type, [v.value for v in made])

        return result(*kinds), generate

    # Numba binds calls by the signature, and takes none with *arguments.
    parameters = list(inspect.signature(function).parameters.values())[1:]
    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    typed.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    typed.__name__ = function.__name__
    return intrinsic(typed)  # type: ignore[no-any-return]
