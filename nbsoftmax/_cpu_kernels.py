"""The kernels: lanes walked by vectors, several lanes in flight, compiled by Numba on first use.

Every array is seen as ``(outer, n, inner)``, the lane in the middle.  A *panel* is up to four
vectors side by side.  **Along**: the lane itself is contiguous (inner = 1), a panel is four vectors
of one lane and the walk goes on by panels.  **Across**: the elements of a vector are neighbouring
lanes, and the walk goes on by rows.  The two differ in the stride of the walk and in whether the
panel's sums are joined at the end; all else is one code.  **Short** rows are turned into columns of
a tile in registers, walked across, and turned back.

A lane may be cut into *blocks* of fixed length: then one call makes the pairs ``(m, s, c)`` of all
blocks, a second merges them, and a third applies the result.  The work list is
``item = (outer, block, panel)``; what one item computes never depends on the others, nor on who
runs them, so results are the same bits for every number of threads.

x is read from memory once and out written once: one loop takes the maximum of item i + 2, sums the
terms of item i + 1 and finishes item i (`STAGES`), so that memory and arithmetic overlap.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import logging
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, njit
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from . import _scalars
from ._formats import FORMATS, Format
from ._semantics import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from ._simd import I8, I64, VECTOR_BYTES, Emitter, Variable, Vector

log = logging.getLogger(__name__)

PREFETCH_BYTES = 4096  # ahead of the walk: memory latency at full bandwidth, measured 4-16 KB alike
PREFETCH_ROWS = 8
PREFETCH_GROUPS = 2  # of short rows
CACHE_LINE_BYTES = 64

COMPILES = not config.DISABLE_JIT


def _half_in_hardware() -> bool:
    """Whether the processor converts float16; without it LLVM would call a missing library."""
    if config.CPU_NAME is not None or config.CPU_FEATURES is not None:
        return False  # the user names another processor
    return get_host_cpu_features().get("f16c", platform.machine() in ("aarch64", "arm64"))


HALF_IN_HARDWARE = _half_in_hardware()

PAIRS, MERGE, MERGE_LOGSUMEXP = "pairs", "merge", "merge_logsumexp"
APPLY_SOFTMAX, APPLY_LOG_SOFTMAX = "apply_softmax", "apply_log_softmax"
COPY, READ = "copy", "read"  # yardsticks: the same walk without the mathematics


@dataclass(frozen=True)
class Job:
    """What one compiled kernel does."""

    op: str
    source: str  # names of formats
    result: str
    walk: str  # along, across, or short: whole rows turned in registers
    panel: int = 4  # vectors; four independent exps hide each other's latency
    past_cache: bool = False  # stores that leave the cache to others; out lies on whole vectors
    weighted: bool = False


# The numbers a kernel is told, in this order: strides and steps in bytes.
PARAMETERS = (
    "items",
    "chunk",  # items taken at a time
    "chunks",
    "n",
    "block",  # lane elements of one block
    "blocks",
    "panels",
    "inner",
    "shifted",  # whether the first panel ends where the array's whole vectors begin
    "x_outer",
    "x_block",
    "x_row",
    "out_outer",
    "out_block",
    "out_row",
    "plane",  # distance of the m, s and c of the pairs read
    "out_plane",  # and of those written
    "scratch",
)

# -- a Numba argument that is an array's address and nothing else ---------------------------------
# Reading the data pointer takes one instruction; unboxing a Numba array takes 0.1 us, and compiles
# again for every number of dimensions.


class Address(types.Type):
    """The data pointer of an array of anything; None is 0."""

    def __init__(self, name: str = "nbsoftmax.Address") -> None:
        super().__init__(name=name)


class Target(Address):
    """The address of x, whose type says which kernel is meant."""

    def __init__(self, job: Job) -> None:
        self.job = job
        super().__init__(name=f"nbsoftmax.Target({job})")


@register_model(Address)
@register_model(Target)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, I64)


@unbox(Address)
@unbox(Target)
def _unbox_address(typ: Any, obj: ir.Value, c: Any) -> NativeValue:
    # PyArrayObject starts with the object head, then `char *data`: a part of NumPy's ABI.
    head = ir.Constant(I64, object.__basicsize__)
    field = c.builder.inttoptr(c.builder.add(c.builder.ptrtoint(obj, I64), head), I64.as_pointer())
    none = c.builder.icmp_unsigned("==", obj, c.pyapi.borrow_none())
    return NativeValue(c.builder.select(none, ir.Constant(I64, 0), c.builder.load(field)))


ADDRESS = Address()


# -- one item: where it lies and how long it is ---------------------------------------------------


@dataclass
class Item:
    x: ir.Value
    out: ir.Value
    lane: ir.Value  # index of the first of its results, in elements
    columns: ir.Value  # lanes side by side; 1 along
    results: ir.Value  # how many of them are written
    length: ir.Value  # lane elements


@dataclass
class Range:
    """The part of an item that a stage walks, in steps of one panel or one row."""

    x: ir.Value
    out: ir.Value
    scratch: ir.Value
    count: ir.Value  # along: elements; across: columns
    full: ir.Value  # steps that need no mask
    steps: ir.Value


class Kernel:
    """One kernel being written: its parameters, its item geometry, its stages."""

    def __init__(self, builder: ir.IRBuilder, job: Job, arguments: list[ir.Value]) -> None:
        self.job = job
        self.source: Format = FORMATS[job.source]
        self.result: Format = FORMATS[job.result]
        real = _scalars.WEIGHTED[self.source.real.name] if job.weighted else self.source.real
        self.o = Emitter(builder, real)
        self.b = builder
        self.along = job.walk == "along"
        self.x, self.out, self.pairs, parameters, self.ticket = arguments
        for i, name in enumerate(PARAMETERS):
            at = builder.add(parameters, self.int(8 * i))
            setattr(self, name, builder.load(builder.inttoptr(at, I64.as_pointer())))
        self.panel = job.panel
        self.panel_elements = job.panel * self.o.width
        self.sets = 1 if self.along else job.panel  # states that stay separate to the end
        # Along, two sums hide each other's latency, and more would not stay in registers.
        self.sums = 2 if self.along else job.panel

    def int(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def clipped(self, a: ir.Value) -> ir.Value:
        """``max(a, 0)``."""
        zero = self.int(0)
        return self.b.select(self.b.icmp_signed(">", a, zero), a, zero)

    # -- geometry -----------------------------------------------------------------------------

    def item(self, index: ir.Value, low: ir.Value, high: ir.Value) -> Item:
        b = self.b
        active = b.and_(b.icmp_signed(">=", index, low), b.icmp_signed("<", index, high))
        index = b.select(active, index, low)
        panel = b.urem(index, self.panels)
        rest = b.udiv(index, self.panels)
        block = b.urem(rest, self.blocks)
        outer = b.udiv(rest, self.blocks)
        first, columns = self.columns(panel)

        def address(base: ir.Value, by_outer: ir.Value, by_block: ir.Value, size: int) -> ir.Value:
            base = b.add(base, b.add(b.mul(outer, by_outer), b.mul(block, by_block)))
            return b.add(base, b.mul(first, self.int(size)))

        length = self.smaller(self.block, b.sub(self.n, b.mul(block, self.block)))
        lane = b.add(b.mul(rest, self.inner), first)
        if self.job.op.startswith("apply"):  # results of the whole lane, not of its blocks
            lane = b.add(b.mul(outer, self.inner), first)
        some = b.and_(active, b.icmp_signed(">", columns, self.int(0)))
        return Item(
            x=address(self.x, self.x_outer, self.x_block, self.source.itemsize),
            out=address(self.out, self.out_outer, self.out_block, self.result.itemsize),
            lane=lane,
            columns=columns,
            results=b.select(active, columns, self.int(0)),
            length=b.select(some, length, self.int(0)),
        )

    def columns(self, panel: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first lane of a panel and how many there are, 0 or less for none.

        Panels may start anywhere: each lane is summed by itself. So they are laid where the array
        that moves most, out or else x, has whole vectors.
        """
        if self.along:
            return self.int(0), self.int(1)
        b = self.b
        most, size = self.out, self.result.itemsize
        if self.writes_lanes:
            most, size = self.x, self.source.itemsize
        vector = self.o.width * size
        lead = b.lshr(b.and_(most, self.int(vector - 1)), self.int(size.bit_length() - 1))
        lead = b.mul(lead, self.shifted)
        width = self.int(self.panel_elements)
        start = b.sub(b.mul(panel, width), lead)
        first = self.clipped(start)
        return first, b.sub(self.smaller(b.add(start, width), self.inner), first)

    def range(self, item: Item, skip: ir.Value | None = None) -> Range:
        """All of an item, or along all but the first ``skip`` elements."""
        b = self.b
        x, out, scratch, length = item.x, item.out, self.buffer, item.length
        if not self.along:
            whole = b.icmp_signed(">=", item.columns, self.int(self.panel_elements))
            full = b.select(whole, length, self.int(0))
            return Range(x, out, scratch, item.columns, full, length)
        if skip is not None:
            x = b.add(x, b.mul(skip, self.int(self.source.itemsize)))
            out = b.add(out, b.mul(skip, self.int(self.result.itemsize)))
            scratch = b.add(scratch, b.mul(skip, self.int(self.o.real.itemsize)))
            length = b.sub(length, skip)
        width = self.int(self.panel_elements)
        full = b.sdiv(length, width)
        steps = b.sdiv(b.add(length, self.int(self.panel_elements - 1)), width)
        return Range(x, out, scratch, length, full, steps)

    def masks(self, r: Range, j: ir.Value) -> list[Vector]:
        count = r.count
        if self.along:
            count = self.b.sub(count, self.b.mul(j, self.int(self.panel_elements)))
        width = self.o.width
        return [self.o.live(self.b.sub(count, self.int(u * width))) for u in range(self.panel)]

    def at(self, base: ir.Value, j: ir.Value, row: ir.Value, u: int, size: int) -> ir.Value:
        """Address of vector u of step j, for elements of ``size`` bytes."""
        step = self.int(self.panel_elements * size) if self.along else row
        offset = self.int(u * self.o.width * size)
        return self.b.add(self.b.add(base, self.b.mul(j, step)), offset)

    def x_at(self, r: Range, j: ir.Value, u: int) -> ir.Value:
        return self.at(r.x, j, self.x_row, u, self.source.itemsize)

    def out_at(self, r: Range, j: ir.Value, u: int) -> ir.Value:
        return self.at(r.out, j, self.out_row, u, self.result.itemsize)

    def scratch_at(self, r: Range, j: ir.Value, u: int) -> ir.Value:
        row = self.int(self.panel * VECTOR_BYTES)
        return self.at(r.scratch, j, row, u, self.o.real.itemsize)

    def load_x(self, r: Range, j: ir.Value, u: int, mask: Vector | None) -> Vector:
        return self.source.load(self.o, self.x_at(r, j, u), mask, fill=-float("inf"))

    def store_out(self, r: Range, j: ir.Value, u: int, value: Vector, mask: Vector | None) -> None:
        self.result.store(self.o, self.out_at(r, j, u), value, mask, self.job.past_cache)

    # -- values kept between items ------------------------------------------------------------

    def variables(self, count: int, start: float = 0.0) -> list[Variable]:
        return [Variable(self.o, self.o.const(start)) for _ in range(count)]

    @contextlib.contextmanager
    def each_set(self, *groups: list[Variable]) -> Iterator[tuple[ir.Value, list[Variable]]]:
        """A run-time loop over the states of a panel: what is done to each is compiled once."""
        if self.sets == 1:
            yield self.int(0), [group[0] for group in groups]
            return
        kind = self.o.type
        memory = [cgutils.alloca_once(self.b, kind, size=self.int(self.sets)) for _ in groups]
        for place, group in zip(memory, groups, strict=True):
            for u, variable in enumerate(group):
                self.b.store(variable.get().value, self.b.gep(place, [self.int(u)]))
        with self.o.loop(self.int(0), self.int(self.sets)) as u:
            one = self.variables(len(groups))
            for place, variable in zip(memory, one, strict=True):
                variable.set(Vector(self.o, self.b.load(self.b.gep(place, [u]))))
            yield u, one
            for place, variable in zip(memory, one, strict=True):
                self.b.store(variable.get().value, self.b.gep(place, [u]))
        for place, group in zip(memory, groups, strict=True):
            for u, variable in enumerate(group):
                variable.set(Vector(self.o, self.b.load(self.b.gep(place, [self.int(u)]))))

    # -- the walk -----------------------------------------------------------------------------

    def walk(self, stages: "list[Stage]") -> None:
        """All steps of the stages' items: together while none needs a mask, then each alone."""
        common = functools.reduce(self.smaller, [stage.range.full for stage in stages])
        with self.o.loop(self.int(0), common) as j:
            if self.job.walk != "short":  # a tile lies in the first-level cache
                stages[0].prefetch(j)
            # Last stage first: it reads the scratch that the stage before it fills.
            for stage in reversed(stages):
                for u in range(self.panel):
                    stage.step(j, u, None)
        for stage in reversed(stages):
            with self.o.loop(common, stage.range.steps) as j:
                masks = self.masks(stage.range, j)
                for u in range(self.panel):
                    stage.step(j, u, masks[u])

    def run(self) -> None:
        """Take chunks of items from the ticket until none is left."""
        b = self.b
        own = cgutils.alloca_once(b, ir.ArrayType(I64, 2))
        b.store(ir.Constant(own.type.pointee, None), own)
        alone = b.icmp_signed("==", self.ticket, self.int(0))
        own_next = b.ptrtoint(own, I64)
        next_chunk = b.select(alone, own_next, self.ticket)
        done_items = b.select(
            alone, b.add(own_next, self.int(8)), b.add(self.ticket, self.int(VECTOR_BYTES))
        )
        # Alone, everything is one chunk: its first items run without overlap.
        chunk = b.select(alone, self.items, self.chunk)
        chunks = b.select(alone, self.int(1), self.chunks)
        memory = self._malloc(self.scratch)
        self.buffer = b.and_(b.add(memory, self.int(63)), self.int(-64))
        work_on = self.tile() if self.job.walk == "short" else self
        stages = [kind(work_on) for kind in STAGES[self.job.op]]

        def count(address: ir.Value, by: ir.Value) -> ir.Value:
            return b.atomic_rmw("add", b.inttoptr(address, I64.as_pointer()), by, "acq_rel")

        take = b.append_basic_block("take")
        work = b.append_basic_block("work")
        leave = b.append_basic_block("leave")
        b.branch(take)
        b.position_at_end(take)
        taken = count(next_chunk, self.int(1))
        b.cbranch(b.icmp_signed("<", taken, chunks), work, leave)
        b.position_at_end(work)
        low = b.mul(taken, chunk)
        high = self.smaller(b.add(low, chunk), self.items)
        if self.job.walk == "short":
            self.turned_rows(stages, low, high)
        else:
            self.pipeline(stages, low, high)
        count(done_items, b.sub(high, low))
        b.branch(take)
        b.position_at_end(leave)
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
        free = cgutils.get_or_insert_function(b.module, kind, "free")
        b.call(free, [b.inttoptr(memory, I8.as_pointer())])

    def pipeline(self, stages: "list[Stage]", low: ir.Value, high: ir.Value) -> None:
        """Items low to high, each stage one item ahead of the next."""
        ahead = self.int(len(stages) - 1)
        with self.o.loop(self.b.sub(low, ahead), high) as i:
            for lag, stage in enumerate(reversed(stages)):
                stage.enter(self.item(self.b.add(i, self.int(lag)), low, high))
            self.walk(stages)
            for stage in reversed(stages):
                stage.leave()

    # -- short rows ---------------------------------------------------------------------------

    def tile(self) -> "Kernel":
        """The same kernel on as many short rows as a vector has elements, turned into columns."""
        tile = copy.copy(self)
        native = FORMATS[self.o.real.name]
        tile.source = native
        tile.x_row = tile.out_row = self.int(VECTOR_BYTES)
        if not self.writes_lanes:
            tile.result = native
        return tile

    @property
    def writes_lanes(self) -> bool:
        """Whether the result is one number a lane."""
        return self.job.op in (LOGSUMEXP, PAIRS, MERGE, MERGE_LOGSUMEXP, READ)

    def turned_rows(self, stages: "list[Stage]", low: ir.Value, high: ir.Value) -> None:
        """Rows low to high, one vector's worth at a time: turn, walk the columns, turn back."""
        b, o, width = self.b, self.o, self.o.width
        with o.loop(low, high, width) as row:
            live = b.sub(high, row)
            rows = [
                b.add(row, self.smaller(self.int(i), b.sub(live, self.int(1))))
                for i in range(width)
            ]
            rows = [b.add(self.x, b.mul(r, self.x_outer)) for r in rows]
            next_rows = b.add(rows[0], b.mul(self.x_outer, self.int(PREFETCH_GROUPS * width)))
            with o.loop(self.int(0), b.mul(self.x_outer, self.int(width)), CACHE_LINE_BYTES) as at:
                o.prefetch(b.add(next_rows, at))
            with o.loop(self.int(0), self.n, width) as q:
                mask = o.live(b.sub(self.n, q))
                offset = b.mul(q, self.int(self.source.itemsize))
                square = o.transpose([self.source.load(o, b.add(r, offset), mask) for r in rows])
                for j, column in enumerate(square):
                    o.store(self.tile_at(q, j), column)
            whole = self.int(width)
            item = Item(
                x=self.buffer,
                out=self.out if self.writes_lanes else self.buffer,
                lane=row,
                columns=whole,
                results=self.smaller(live, whole),
                length=self.n,
            )
            for stage in stages:
                stage.k.buffer = self.buffer
                stage.enter(item)
                stage.k.walk([stage])
                stage.leave()
            if not self.writes_lanes:
                self.turn_back(row, live)

    def turn_back(self, row: ir.Value, live: ir.Value) -> None:
        """The tile's columns to rows of out."""
        b, o = self.b, self.o
        with o.loop(self.int(0), self.n, o.width) as q:
            square = o.transpose([o.load(self.tile_at(q, j)) for j in range(o.width)])
            mask = o.live(b.sub(self.n, q))
            start = b.add(self.out, b.mul(q, self.int(self.result.itemsize)))
            for i, line in enumerate(square):
                place = b.add(start, b.mul(b.add(row, self.int(i)), self.out_outer))
                with b.if_then(b.icmp_signed("<", self.int(i), live)):
                    self.result.store(o, place, line, mask)

    def tile_at(self, q: ir.Value, j: int) -> ir.Value:
        row = self.b.add(q, self.int(j))
        return self.b.add(self.buffer, self.b.mul(row, self.int(VECTOR_BYTES)))

    def _malloc(self, size: ir.Value) -> ir.Value:
        kind = ir.FunctionType(I8.as_pointer(), [I64])
        malloc = cgutils.get_or_insert_function(self.b.module, kind, "malloc")
        return self.b.ptrtoint(self.b.call(malloc, [size]), I64)


# -- the stages -----------------------------------------------------------------------------------


class Stage:
    """What is done to one item in one walk. `leave` hands its result to the stage behind it."""

    def __init__(self, kernel: Kernel) -> None:
        self.k = kernel
        self.o = kernel.o

    def enter(self, item: Item) -> None:
        self.current = item
        self.range = self.k.range(item)

    def prefetch(self, j: ir.Value) -> None:
        """Called for the first stage, which reads x from memory; the others find it in cache."""
        k = self.k
        lines = max(1, k.panel * k.o.width * k.source.itemsize // CACHE_LINE_BYTES)
        ahead = k.int(PREFETCH_BYTES) if k.along else k.b.mul(k.x_row, k.int(PREFETCH_ROWS))
        start = k.b.add(k.x_at(self.range, j, 0), ahead)
        for line in range(lines):
            self.o.prefetch(k.b.add(start, k.int(CACHE_LINE_BYTES * line)))

    def step(self, j: ir.Value, u: int, mask: Vector | None) -> None:
        raise NotImplementedError

    def leave(self) -> None:
        pass

    def write(self, u: ir.Value, values: tuple[Vector, ...]) -> None:
        k, b = self.k, self.k.b
        first = b.mul(u, k.int(self.o.width))
        mask = self.o.live(b.sub(self.current.results, first))
        place = b.mul(b.add(self.current.lane, first), k.int(k.result.itemsize))
        place = b.add(k.out, place)
        for plane, value in enumerate(values):
            k.result.store(self.o, b.add(place, b.mul(k.out_plane, k.int(plane))), value, mask)


class Maximum(Stage):
    """m of the lane."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.parts = kernel.variables(kernel.sums)
        self.m = kernel.m = kernel.variables(kernel.sets)  # of the item that just passed

    def enter(self, item: Item) -> None:
        super().enter(item)
        for part in self.parts:
            part.set(self.o.const(-float("inf")))

    def step(self, j: ir.Value, u: int, mask: Vector | None) -> None:
        x = self.k.load_x(self.range, j, u, mask)
        part = self.parts[u % self.k.sums]
        part.set(self.o.larger(x, part.get()))

    def leave(self) -> None:
        if self.k.along:
            m = functools.reduce(self.o.larger, [part.get() for part in self.parts])
            self.m[0].set(self.o.max_of_elements(m))
        else:
            for m, part in zip(self.m, self.parts, strict=True):
                m.set(part.get())


class Sum(Stage):
    """s + c of the lane, whose m is known; the terms stay in scratch if the op wants them again.

    Where a vector is not full, x is -inf: terms as good as 0.
    """

    keeps_terms = False
    counts_largest = True  # instead of summing them
    rounded_terms = True  # or their last addition is kept too, for the strictest budget

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.m = kernel.variables(kernel.sets)
        self.count = kernel.variables(kernel.sets)
        self.s = kernel.variables(kernel.sums)
        self.c = kernel.variables(kernel.sums)

    def enter(self, item: Item) -> None:
        super().enter(item)
        for mine, passed in zip(self.m, self.k.m, strict=True):
            mine.set(passed.get())
        for part in (*self.count, *self.s, *self.c):
            part.set(self.o.const(0.0))
        self.scales = [_scalars.scale(self.o, m.get()) for m in self.m]

    def step(self, j: ir.Value, u: int, mask: Vector | None) -> None:
        o, k = self.o, self.k
        x = k.load_x(self.range, j, u, mask)
        by = self.scales[u % k.sets]
        terms = [_scalars.exp(o, x, by)] if self.rounded_terms else _scalars.exp_two_parts(o, x, by)
        one, zero = o.const(1.0), o.const(0.0)
        if k.job.weighted:
            weight = k.b.add(k.x_at(self.range, j, u), k.b.sub(k.pairs, k.x))
            one = k.source.load(o, weight, mask)
            terms = [term * one for term in terms]
        if self.keeps_terms:
            o.store(k.scratch_at(self.range, j, u), terms[0])
        if self.counts_largest:
            largest = x == self.m[u % k.sets].get()
            terms = [o.where(largest, zero, term) for term in terms]
            count = self.count[u % k.sets]
            count.set(count.get() + o.where(largest, one, zero))
        part = u % k.sums
        s, c = _scalars.add(self.s[part].get(), self.c[part].get(), terms[0])
        for low in terms[1:]:
            c = c + low
        self.s[part].set(s)
        self.c[part].set(c)

    def leave(self) -> None:
        k, o = self.k, self.o
        if k.along:
            parts = [(s.get(), c.get()) for s, c in zip(self.s, self.c, strict=True)]
            s, c = functools.reduce(lambda p, q: _scalars.merge(*p, *q), parts)
            s, c = o.sum_of_elements(s, c)
            self.s[0].set(s)
            self.c[0].set(c)
            if self.counts_largest:
                self.count[0].set(o.sum_of_elements(self.count[0].get(), o.const(0.0))[0])
        with k.each_set(self.m, self.count, self.s, self.c) as (u, (m, count, s, c)):
            if self.counts_largest:
                s2, c2 = _scalars.with_equals(o, m.get(), count.get(), s.get(), c.get())
                s.set(s2)
                c.set(c2)
            self.finish(u, m, s, c)

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        raise NotImplementedError


class SumForSoftmax(Sum):
    """Leaves the terms in scratch and turns s, c into the two parts of the reciprocal."""

    keeps_terms = True
    counts_largest = False

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        kernel.finished = [self.s, self.c]

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        high, low = _scalars.reciprocal(self.o, m.get(), s.get(), c.get())
        s.set(high)
        c.set(low)


class SumForLogSoftmax(Sum):
    """Turns s into the logarithm that is subtracted."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        kernel.finished = [self.m, self.s]

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        s.set(_scalars.log_sum(self.o, m.get(), s.get(), c.get())[0])


class SumForPairs(Sum):
    """Writes m, s and c; s is NaN only if the lane holds one."""

    rounded_terms = False

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        self.write(u, (m.get(), s.get(), c.get()))


class SumForLogSumExp(SumForPairs):
    """Writes logsumexp of the lane."""

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        self.write(u, (_scalars.logsumexp(self.o, m.get(), s.get(), c.get()),))


class Output(Stage):
    """A stage that writes out. Stores past the cache start at the first whole vector of out."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.first = kernel.variables(kernel.sets)
        self.second = kernel.variables(kernel.sets)

    def parameters(self) -> None:
        for mine, passed in zip((self.first, self.second), self.k.finished, strict=True):
            for variable, value in zip(mine, passed, strict=False):
                variable.set(value.get())

    def enter(self, item: Item) -> None:
        super().enter(item)
        self.parameters()
        k, b = self.k, self.k.b
        if not (k.along and k.job.past_cache):
            return
        bytes_ = k.o.width * k.result.itemsize
        misaligned = b.and_(b.sub(k.int(0), item.out), k.int(bytes_ - 1))
        skip = k.smaller(b.sdiv(misaligned, k.int(k.result.itemsize)), item.length)
        r = self.range
        self.step_at(r, k.int(0), 0, k.o.live(skip))
        self.range = k.range(item, skip)

    def step(self, j: ir.Value, u: int, mask: Vector | None) -> None:
        self.step_at(self.range, j, u, mask)

    def step_at(self, r: Range, j: ir.Value, u: int, mask: Vector | None) -> None:
        raise NotImplementedError


class Scale(Output):
    """softmax from the terms in scratch."""

    def step_at(self, r: Range, j: ir.Value, u: int, mask: Vector | None) -> None:
        k = self.k
        term = self.o.load(k.scratch_at(r, j, u))
        high, low = self.first[u % k.sets].get(), self.second[u % k.sets].get()
        k.store_out(r, j, u, _scalars.softmax(self.o, term, high, low), mask)


class Subtract(Output):
    """log_softmax, reading x again."""

    def step_at(self, r: Range, j: ir.Value, u: int, mask: Vector | None) -> None:
        k = self.k
        x = k.load_x(r, j, u, mask)
        m, log_ = self.first[u % k.sets].get(), self.second[u % k.sets].get()
        k.store_out(r, j, u, _scalars.log_softmax(x, m, log_), mask)


class Apply(Output):
    """The lane's merged pair, read from memory once per item."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.m = kernel.variables(kernel.sets)

    def parameters(self) -> None:
        k, o, b = self.k, self.o, self.k.b
        with k.each_set(self.m, self.first, self.second) as (u, (m, first, second)):
            start = b.mul(u, k.int(o.width))
            mask = o.live(b.sub(self.current.columns, start))
            place = b.add(self.current.lane, start)
            place = b.add(k.pairs, b.mul(place, k.int(o.real.itemsize)))
            for plane, variable in enumerate((m, first, second)):
                value = o.load(b.add(place, b.mul(k.plane, k.int(plane))), mask)
                variable.set(o.shuffle(value, value, [0] * o.width) if k.along else value)
            self.finish(m, first, second)

    def finish(self, m: Variable, s: Variable, c: Variable) -> None:
        raise NotImplementedError


class ApplySoftmax(Apply):
    """softmax in a second reading of x."""

    def parameters(self) -> None:
        super().parameters()
        self.scales = [_scalars.scale(self.o, m.get()) for m in self.m]

    def finish(self, m: Variable, s: Variable, c: Variable) -> None:
        total = _scalars.whole(self.o, m.get(), s.get(), c.get())
        high, low = _scalars.reciprocal(self.o, m.get(), *total)
        s.set(high)
        c.set(low)

    def step_at(self, r: Range, j: ir.Value, u: int, mask: Vector | None) -> None:
        k = self.k
        x = k.load_x(r, j, u, mask)
        term = _scalars.exp(self.o, x, self.scales[u % k.sets])
        high, low = self.first[u % k.sets].get(), self.second[u % k.sets].get()
        k.store_out(r, j, u, _scalars.softmax(self.o, term, high, low), mask)


class ApplyLogSoftmax(Apply):
    """log_softmax in a second reading of x."""

    def finish(self, m: Variable, s: Variable, c: Variable) -> None:
        s.set(_scalars.log_sum(self.o, m.get(), s.get(), c.get())[0])

    def step_at(self, r: Range, j: ir.Value, u: int, mask: Vector | None) -> None:
        k = self.k
        x = k.load_x(r, j, u, mask)
        m, log_ = self.m[u % k.sets].get(), self.first[u % k.sets].get()
        k.store_out(r, j, u, _scalars.log_softmax(x, m, log_), mask)


class Copy(Output):
    """x to out."""

    def parameters(self) -> None:
        """There are none."""

    def step_at(self, r: Range, j: ir.Value, u: int, mask: Vector | None) -> None:
        self.k.store_out(r, j, u, self.k.load_x(r, j, u, mask), mask)


class Read(Maximum):
    """Writes m: the least that reading x can be for."""

    def leave(self) -> None:
        super().leave()
        for u, m in enumerate(self.m):
            self.write(self.k.int(u), (m.get(),))


class Merge(SumForPairs):
    """The pairs of a lane's blocks to the pair of the lane; x is the pairs, a row a block."""

    def __init__(self, kernel: Kernel) -> None:
        self.k, self.o = kernel, kernel.o
        self.m, self.count, self.s, self.c = (kernel.variables(1) for _ in range(4))

    def plane(self, j: ir.Value, index: int, mask: Vector) -> Vector:
        k = self.k
        place = k.b.add(k.x_at(self.range, j, 0), k.b.mul(k.plane, k.int(index)))
        return k.source.load(self.o, place, mask)

    def enter(self, item: Item) -> None:
        self.current, self.range = item, self.k.range(item)
        o, k = self.o, self.k
        (mask,) = k.masks(self.range, k.int(0))
        m, count, s, c = self.m[0], self.count[0], self.s[0], self.c[0]
        m.set(o.const(-float("inf")))
        for part in (count, s, c):
            part.set(o.const(0.0))
        with o.loop(k.int(0), item.length) as j:
            m.set(o.larger(self.plane(j, 0, mask), m.get()))
        with o.loop(k.int(0), item.length) as j:
            one, zero = o.const(1.0), o.const(0.0)
            part_m, s2, c2 = (self.plane(j, index, mask) for index in range(3))
            largest = part_m == m.get()
            count.set(count.get() + o.where(largest, one, zero))
            factor = _scalars.rescale(o, part_m, m.get())
            term = _scalars.exp(o, part_m, _scalars.scale(o, m.get()))
            term = o.where(largest, zero, term)
            s2, c2 = _scalars.merge(term, zero, factor * s2, factor * c2)
            s2, c2 = _scalars.merge(s.get(), c.get(), s2, c2)
            s.set(s2)
            c.set(c2)

    def step(self, j: ir.Value, u: int, mask: Vector | None) -> None:
        """Nothing is left for the walk to do."""

    def leave(self) -> None:
        m, count, s, c = self.m[0], self.count[0], self.s[0], self.c[0]
        s2, c2 = _scalars.with_equals(self.o, m.get(), count.get(), s.get(), c.get())
        s.set(s2)
        c.set(c2)
        self.finish(self.k.int(0), m, s, c)

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        infinite = m.get() == self.o.const(float("inf"))  # no terms for softmax to divide
        s.set(self.o.where(infinite, self.o.const(float("nan")), s.get()))
        self.write(u, (m.get(), s.get(), c.get()))


class MergeLogSumExp(Merge):
    """The pairs of a lane's blocks to its logsumexp."""

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        self.write(u, (_scalars.logsumexp(self.o, m.get(), s.get(), c.get()),))


# First to last: the last stage works on item i, the one before it on i + 1, and so on.
STAGES: dict[str, tuple[type[Stage], ...]] = {
    SOFTMAX: (Maximum, SumForSoftmax, Scale),
    LOG_SOFTMAX: (Maximum, SumForLogSoftmax, Subtract),
    LOGSUMEXP: (Maximum, SumForLogSumExp),
    PAIRS: (Maximum, SumForPairs),
    MERGE: (Merge,),
    MERGE_LOGSUMEXP: (MergeLogSumExp,),
    APPLY_SOFTMAX: (ApplySoftmax,),
    APPLY_LOG_SOFTMAX: (ApplyLogSoftmax,),
    COPY: (Copy,),
    READ: (Read,),
}


# -- the compiled entry ---------------------------------------------------------------------------


@intrinsic
def _emit(typing_context: Any, x: Any, out: Any, pairs: Any, parameters: Any, ticket: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Kernel(builder, x.job, list(arguments)).run()
        return context.get_dummy_value()

    return types.void(x, out, pairs, parameters, ticket), generate


def _kernel(x, out, pairs, parameters, ticket):  # type: ignore[no-untyped-def]
    _emit(x, out, pairs, parameters, ticket)


def _digest() -> str:
    here = Path(__file__).parent
    names = ("_cpu_kernels.py", "_formats.py", "_scalars.py", "_semantics.py", "_simd.py")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()[:16]


# Of every file that shapes the machine code, as it was when this process read it. It is part of
# each kernel's name: Numba's cache does not see a change in a file that the kernel's own file
# imports, and would go on running the old binary.
SOURCES = _digest()


def dispatcher(job: Job, cache: bool = True) -> Any:
    """A Numba function for this job alone, so that each has its own files in the cache.

    Numba numbers the binaries of one function without a lock: two processes that compile two jobs
    at once would give both the same number, and a third would load the wrong one.
    """
    words = (str(value) for value in dataclasses.astuple(job))
    name = "_".join([*words, SOURCES])
    code = _kernel.__code__.replace(co_name=name, co_qualname=name)
    function = FunctionType(code, globals(), name)
    function.__qualname__ = name
    try:
        return njit(nogil=True, cache=cache)(function)
    except RuntimeError:  # no folder for the cache can be written
        return njit(nogil=True)(function)


@functools.cache
def compiled(job: Job) -> Any:
    """``kernel(x, out, pairs, parameters, ticket)``: from the disk cache, or compiled now."""
    signature = (Target(job), ADDRESS, ADDRESS, ADDRESS, ADDRESS)
    function = dispatcher(job)
    return _from_disk(function, signature) or _compile(function, job, signature)


def _from_disk(function: Any, signature: tuple[types.Type, ...]) -> Any:
    """The cached kernel, without waiting for all that other compiled code may use.

    Numba's own way first imports it, scipy.linalg included: 0.3 s for functions no kernel calls.
    """
    try:
        found = function._cache._load_overload(signature, cpu_target.target_context)
    except Exception:  # another version of Numba, an unreadable cache: the usual way decides
        log.debug("no quick way to the cached kernel", exc_info=True)
        return None
    return found.entry_point if found is not None else None


def _compile(function: Any, job: Job, signature: tuple[types.Type, ...]) -> Any:
    try:
        return function.compile(signature)
    except Exception:
        log.debug("the kernel cache is damaged, full or gone", exc_info=True)
    try:
        function._cache.flush()
        return function.compile(signature)
    except Exception:
        log.debug("the kernel is compiled for this process alone", exc_info=True)
        return dispatcher(job, cache=False).compile(signature)
