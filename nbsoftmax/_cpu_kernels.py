"""The kernels: lanes walked by vectors, several lanes in flight, compiled by Numba on first use.

Every array is seen as ``(outer, n, inner)``, the lane in the middle.  A *panel* is up to four
vectors side by side.  **Along**: the lane itself is contiguous (inner = 1), a panel is four vectors
of one lane and the walk goes on by panels; a few lanes side by side are walked as one, their
elements in turn.  **Beside**: a panel is one vector of each of four such lanes, and the walk goes
on by vectors.  **Across**: the elements of a vector are neighbouring lanes, and the walk goes on by
rows.  They differ in the stride of the walk and in what of the panel's sums is joined at the end;
all else is one code.  **Short** rows are turned into columns of a tile in registers, walked across,
and turned back.

A lane may be cut into *blocks* of fixed length: then one call makes the pairs ``(m, s, c)`` of all
blocks, a second merges them, and a third applies the result.  The work list is
``item = (outer, block, panel)``; what one item computes never depends on the others, nor on who
runs them, so results are the same bits for every number of threads.

x is read from memory once and out written once: one loop takes the maximum of item i + 2, sums the
terms of item i + 1 and finishes item i (`STAGES`), so that memory and arithmetic overlap.
"""

import contextlib
import dataclasses
import functools
import itertools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config
from numba.core import cgutils, types
from numba.extending import intrinsic

from . import _entry, _scalars
from ._formats import FORMATS, Format
from ._llvm import I8, I64, Vector
from ._semantics import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from ._simd import VECTOR_BYTES, Emitter, Join, Variable

CACHE_LINE_BYTES = 64
PAGE_BYTES = 4096

COMPILES = not config.DISABLE_JIT


def _in_hardware(feature: str, machines: tuple[str, ...] = ()) -> bool:
    """Whether the processor has it, as far as is known; some machines always do."""
    if config.CPU_NAME is not None or config.CPU_FEATURES is not None:
        return False  # the user names another processor
    return get_host_cpu_features().get(feature, platform.machine() in machines)


# Whether it converts float16; without it LLVM would call a missing library.
HALF_IN_HARDWARE = _in_hardware("f16c", ("aarch64", "arm64"))
# Whether it picks the elements of one vector by another, and so looks up roots of two.
ROOTS_IN_HARDWARE = _in_hardware("avx512f")

# Pairs of blocks; those that log_softmax wants are good for all.
PAIRS, PAIRS_SOFTMAX, PAIRS_LOGSUMEXP = "pairs", "pairs_softmax", "pairs_logsumexp"
MERGE, MERGE_LOGSUMEXP = "merge", "merge_logsumexp"
APPLY_SOFTMAX, APPLY_LOG_SOFTMAX = "apply_softmax", "apply_log_softmax"
COPY, READ = "copy", "read"  # yardsticks: the same walk without the mathematics
# Additions after which a sum is set aside: so what a sum of many numbers loses does not show. Rows
# that are walked in groups are shorter.
SEGMENT_ADDITIONS = 128
# How far a stage that stores past the cache keeps ahead of loads that would wait for it.
LEAD_BYTES = 512
OF_ROWS = ("short", "beside")  # walks whose items are groups of whole rows
# Stores past the cache leave it to others. Either out lies on whole vectors; or results are held
# until they fill lines: groups of rows, or across a slab, all lanes' results of one block.
IN_CACHE, PAST_CACHE, BY_LINES = "in_cache", "past_cache", "by_lines"


@dataclass(frozen=True)
class Job:
    """What one compiled kernel does."""

    op: str
    source: str  # names of formats
    result: str
    walk: str  # along, beside, across, or short: whole rows turned in registers
    panel: int = 4  # vectors; four independent exps hide each other's latency
    stores: str = IN_CACHE  # or one of the two past it
    lanes: int = 1  # along: whose elements take turns; whole panels hold as many of each
    masked: bool = False  # across: fewer lanes side by side than a panel has
    wraps: bool = False  # the last panel goes on at the beginning of the next row
    dealt: int = 0  # short: so many numbers in each row, without gaps between rows
    careful: bool = False  # largest terms are counted from the start, not where they must be
    weighted: bool = False
    runs: bool = False  # the walk's positions lie in runs; of groups of rows, the rows do

    @property
    def of_rows(self) -> bool:
        return self.walk in OF_ROWS

    @property
    def group(self) -> int:
        """Rows that are one item."""
        width = VECTOR_BYTES // FORMATS[self.source].real.itemsize
        return {"short": self.panel * width, "beside": self.panel}.get(self.walk, 1)

    @property
    def by_slabs(self) -> bool:
        """Whether what is held until it fills lines are a block's results of all lanes."""
        return self.stores == BY_LINES and self.walk == "across"


# The numbers a kernel is told, in this order: strides and steps in bytes.
PARAMETERS = (
    "items",
    "chunk",  # items taken at a time
    "chunks",
    "n",  # positions of a lane: its elements, or along in runs those of whole vectors
    "block",  # positions of one block
    "blocks",
    "panels",
    "inner",
    "ahead",  # prefetch so many positions ahead of the walk; 0 for the next item
    "shifted",  # whether the first panel ends where the array's whole vectors begin
    "outer_runs",  # `divisor` of an outer index by the length of its runs; 0 for a single run
    "lane_runs",  # and of a position
    "run_elements",  # along: how many elements a run has
    "run_positions",  # and how many positions
    "x_outer",
    "x_outer_jump",
    "x_row",  # from one position to the next
    "x_row_jump",
    "out_outer",
    "out_outer_jump",
    "out_row",
    "out_row_jump",
    "plane",  # distance of the m, s and c of the pairs read
    "out_plane",  # and of those written
    "scratch",  # bytes of one item's numbers
)

DIVISOR_BITS = 62


def divisor(run: int) -> int:
    """What `Kernel.run_of` divides by ``run`` with, exactly while index * run < 2^62."""
    return (1 << DIVISOR_BITS) // run + 1


# -- one item: where it lies and how long it is ---------------------------------------------------


@dataclass
class Item:
    x: ir.Value
    out: ir.Value
    lane: ir.Value  # index of the first of its results, in elements
    first: ir.Value  # and in the row
    columns: ir.Value  # lanes side by side; 1 along
    results: ir.Value  # how many of them are written
    length: ir.Value  # positions
    start: ir.Value  # the first of them, in the lane
    tile: ir.Value  # short: where its rows are turned


class Slot:
    """An item in memory, for LLVM to keep in registers; items move on from slot to slot."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder
        self.fields = {f.name: cgutils.alloca_once(builder, I64) for f in dataclasses.fields(Item)}

    def set(self, item: Item) -> None:
        for name, pointer in self.fields.items():
            self.b.store(getattr(item, name), pointer)

    def get(self) -> Item:
        return Item(**{name: self.b.load(pointer) for name, pointer in self.fields.items()})


class Cursor:
    """Counts items, panels innermost, without a division for each."""

    def __init__(self, kernel: "Kernel", index: ir.Value) -> None:
        self.k, b = kernel, kernel.b
        rest = b.udiv(index, kernel.panels)
        starts = {
            "index": index,
            "panel": b.urem(index, kernel.panels),
            "block": b.urem(rest, kernel.blocks),
            "outer": b.udiv(rest, kernel.blocks),
        }
        self.counters = {name: cgutils.alloca_once(b, I64) for name in starts}
        for name, value in starts.items():
            b.store(value, self.counters[name])

    def get(self, name: str) -> ir.Value:
        return self.k.b.load(self.counters[name])

    def step(self) -> None:
        k, b = self.k, self.k.b
        b.store(b.add(self.get("index"), k.int(k.group)), self.counters["index"])
        more = k.int(k.group)
        for name, size in (("panel", k.panels), ("block", k.blocks)):
            if k.of_rows:
                break
            value = b.add(self.get(name), more)
            full = b.icmp_signed("==", value, size)
            b.store(b.select(full, k.int(0), value), self.counters[name])
            more = b.zext(full, I64)
        b.store(b.add(self.get("outer"), more), self.counters["outer"])


Place = ir.Value | list[ir.Value]  # an address; beside, that of each row


@dataclass
class Range:
    """The part of an item that a stage walks. Positions: in rows, elements; across, rows."""

    x: Place
    x_row: ir.Value
    out: Place
    scratch: Place
    count: ir.Value  # in rows: elements; across: columns
    begin: ir.Value  # 0, or -1 if a panel wraps; then position -1 needs a mask
    full: ir.Value  # positions before this one need none
    end: ir.Value
    start: ir.Value  # the position in the lane of position 0
    x_jump: ir.Value  # between runs
    native: bool = False  # x is a copy, in the format that is computed in
    shifted: bool = False  # and has no maximum that needs a shift


class Kernel:
    """One kernel being written: its parameters, its item geometry, its stages."""

    def __init__(self, builder: ir.IRBuilder, job: Job, arguments: list[ir.Value]) -> None:
        self.job = job
        real = FORMATS[job.source].real
        self.native = FORMATS[real.name]
        merges = job.op in (MERGE, MERGE_LOGSUMEXP)
        self.source: Format = self.native if merges else FORMATS[job.source]  # of what is read
        self.result: Format = FORMATS[job.result]
        if job.weighted:
            real = _scalars.WEIGHTED[real.name]
        elif real.precise and ROOTS_IN_HARDWARE:
            real = _scalars.ROOTED[real.name]
        self.o = Emitter(builder, real)
        self.b = builder
        self.beside = job.walk == "beside"
        self.along = job.walk == "along" or self.beside  # vectors of elements of one lane
        self.short = job.walk == "short"
        self.of_rows, self.group = job.of_rows, job.group
        self.lane_in_runs = job.runs and not self.of_rows
        self.vectors_in_runs = job.runs and job.walk == "along"  # each may be of another run
        self.by_slabs = job.by_slabs
        self.sends_vectors = job.stores == PAST_CACHE and job.walk == "along"  # and not panels
        # Across, the first stage copies what it reads: rows that are far apart compete for the same
        # few places of a cache, and would be read from memory by every stage. In runs, it does so
        # that the stage behind it walks one piece.
        self.packs = STAGES[job.op][0] is Maximum and (job.walk == "across" or self.vectors_in_runs)
        self.x, self.out, self.pairs, parameters, self.ticket = arguments
        for i, name in enumerate(PARAMETERS):
            setattr(self, name, builder.load(_entry.word(builder, parameters, i)))
        self.panel = job.panel
        self.panel_elements = job.panel * self.o.width
        # Positions in one step of the walk; and in one of what it leaves, with so many vectors.
        self.stride, self.rest = 1, (1, self.panel)
        if self.beside:
            self.stride, self.rest = self.o.width, (self.o.width, self.panel)
        elif self.along:
            self.stride, self.rest = self.panel_elements, (self.o.width, 1)
        self.added = self.o.width if self.along else 1  # positions that one addition takes
        # Whether each vector of a panel begins with another lane.
        shifting = self.o.width % job.lanes != 0
        if shifting:
            self.rest = self.panel_elements, self.panel
        # Sums that stay separate, and vectors that hold what becomes of them: beside one for all,
        # whose elements are the rows.
        self.sets = job.panel if self.beside or shifting or not self.along else 1
        self.states = job.panel if shifting or not self.along else 1

    def int(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def clipped(self, a: ir.Value) -> ir.Value:
        """``max(a, 0)``."""
        zero = self.int(0)
        return self.b.select(self.b.icmp_signed(">", a, zero), a, zero)

    def select(self, condition: ir.Value, a: Place, b: Place) -> Place:
        if isinstance(a, list):
            return [self.b.select(condition, *rows) for rows in zip(a, b, strict=True)]
        return self.b.select(condition, a, b)

    # -- geometry -----------------------------------------------------------------------------

    def run_of(self, index: ir.Value, runs: ir.Value) -> ir.Value:
        """How many runs end before ``index``: a product and a shift instead of a division."""
        b, wide = self.b, ir.IntType(128)
        product = b.mul(b.zext(index, wide), b.zext(runs, wide))
        return b.trunc(b.lshr(product, ir.Constant(wide, DIVISOR_BITS)), I64)

    def jumps(self, position: ir.Value, jump: ir.Value) -> ir.Value:
        """What the runs before a position add to its address."""
        if not self.lane_in_runs:
            return self.int(0)
        return self.b.mul(self.run_of(position, self.lane_runs), jump)

    def lane_at(self, array: str, outer: ir.Value) -> ir.Value:
        """Where x or out has the lanes of an outer index."""
        b = self.b
        step, jump = (getattr(self, f"{array}_outer{part}") for part in ("", "_jump"))
        base = b.add(getattr(self, array), b.mul(outer, step))
        return b.add(base, b.mul(self.run_of(outer, self.outer_runs), jump))

    def line_at(self, array: str, item: Item, i: ir.Value) -> ir.Value:
        """Where x or out has the row i of a group of short ones."""
        if self.job.runs:
            return self.lane_at(array, self.b.add(item.lane, i))
        step = getattr(self, f"{array}_outer")
        return self.b.add(getattr(item, array), self.b.mul(step, i))

    def item(self, cursor: Cursor, high: ir.Value, tile: ir.Value) -> Item:
        """Where the cursor stands, nothing to do if that is ``high`` or more."""
        b = self.b
        index, panel, block, outer = (cursor.get(name) for name in cursor.counters)
        active = b.icmp_signed("<", index, high)
        first, columns = self.columns(panel)
        if self.of_rows:
            columns = self.smaller(b.sub(high, index), self.int(self.group))

        start = b.mul(block, self.block)

        def address(array: str, size: int) -> ir.Value:
            base = b.mul(start, getattr(self, f"{array}_row"))
            base = b.add(self.lane_at(array, outer), base)
            return b.add(base, b.mul(first, self.int(size)))

        length = self.smaller(self.block, b.sub(self.n, start))
        lane = outer
        if not self.job.op.startswith("apply"):  # results of blocks, not of the whole lane
            lane = b.add(b.mul(outer, self.blocks), block)
        lane = b.add(b.mul(lane, self.inner), first)
        some = b.and_(active, b.icmp_signed(">", columns, self.int(0)))
        return Item(
            x=address("x", self.source.itemsize),
            out=address("out", self.result.itemsize),
            lane=lane,
            first=first,
            columns=columns,
            results=b.select(active, columns, self.int(0)),
            length=b.select(some, length, self.int(0)),
            start=start if self.cuts else self.int(0),
            tile=tile,
        )

    def columns(self, panel: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first lane of a panel and how many there are, 0 or less for none.

        Panels may start anywhere: each lane is summed by itself. So they are laid where the array
        that moves most, out or else x, has whole vectors: the first and the last one are parts, or
        the last one wraps. If not, the last one is whole, too, and has the same results as the one
        before it for some lanes; unless their x is overwritten.
        """
        if self.job.walk != "across":
            return self.int(0), self.int(self.job.lanes)
        b = self.b
        most, size = self.out, self.result.itemsize
        if self.writes_lanes:
            most, size = self.x, self.source.itemsize
        vector = self.o.width * size
        lead = b.lshr(b.and_(most, self.int(vector - 1)), self.int(size.bit_length() - 1))
        width = self.int(self.panel_elements)
        if self.job.wraps:
            behind = b.and_(b.sub(self.int(0), lead), self.int(self.o.width - 1))
            first = b.add(b.mul(panel, width), behind)
            return first, self.smaller(width, b.sub(self.inner, first))
        lead = b.mul(lead, self.shifted)
        start = b.sub(b.mul(panel, width), lead)
        first = self.clipped(start)
        if self.job.stores != PAST_CACHE:
            in_place = b.icmp_signed("==", self.x, self.out)
            once = b.or_(in_place, b.icmp_signed("!=", self.shifted, self.int(0)))
            last = b.select(once, self.inner, self.clipped(b.sub(self.inner, width)))
            first = self.smaller(first, last)
        return first, b.sub(self.smaller(b.add(start, width), self.inner), first)

    def range(self, item: Item) -> Range:
        """All of an item."""
        b = self.b
        x, out, scratch, length = item.x, item.out, self.buffer, item.length
        zero = self.int(0)
        lane = item.start, self.x_row_jump
        if self.short:
            row = self.int(self.panel * VECTOR_BYTES)
            steps = zero, length, length
            return Range(item.tile, row, item.tile, item.tile, item.columns, *steps, *lane, True)
        if self.beside:
            # Where there are not enough, the last row is walked again, with the same results.
            last = self.clipped(b.sub(item.columns, self.int(1)))
            numbers = [self.smaller(self.int(u), last) for u in range(self.panel)]
            x, out = ([self.line_at(a, item, i) for i in numbers] for a in ("x", "out"))
            steps = zero, b.and_(length, self.int(-self.o.width)), length
            return Range(x, self.x_row, out, self.own_lines(scratch), length, *steps, *lane)
        if not self.along:
            whole = b.icmp_signed(">=", item.columns, self.int(self.panel_elements))
            steps = zero, length if self.job.masked else b.select(whole, length, zero), length
            if self.job.wraps:
                part = b.and_(b.icmp_signed(">", length, zero), b.not_(whole))
                one = b.zext(part, I64)
                steps = b.sub(zero, one), b.sub(length, one), length
            return Range(x, self.x_row, out, scratch, item.columns, *steps, *lane)
        steps = zero, self.whole_panels(length), length
        return Range(x, self.x_row, out, scratch, length, *steps, *lane)

    def own_lines(self, base: ir.Value) -> list[ir.Value]:
        """Beside, where rows of our own memory begin: whole vectors, and a gap behind them."""
        b = self.b
        size = b.mul(b.add(self.n, self.int(2 * self.o.width - 1)), self.int(self.o.real.itemsize))
        size = b.and_(size, self.int(-VECTOR_BYTES))
        return [b.add(base, b.mul(size, self.int(u))) for u in range(self.panel)]

    def whole_panels(self, length: ir.Value) -> ir.Value:
        """How many of so many elements are those of whole panels."""
        size = self.int(self.panel_elements)
        return self.b.mul(self.b.udiv(length, size), size)

    def after(self, r: Range, skip: ir.Value) -> Range:
        """Along, all but the first ``skip`` elements."""
        b = self.b
        length = b.sub(r.end, skip)
        return dataclasses.replace(
            r,
            x=b.add(r.x, b.mul(skip, self.int(self.source.itemsize))),
            out=b.add(r.out, b.mul(skip, self.int(self.result.itemsize))),
            scratch=b.add(r.scratch, b.mul(skip, self.int(self.o.real.itemsize))),
            count=length,
            full=self.whole_panels(length),
            end=length,
        )

    def mask(self, r: Range, j: ir.Value, u: int) -> Vector:
        b = self.b
        if self.vectors_in_runs:
            position = self.position(r, j, u)
            run = self.run_of(position, self.lane_runs)
            start = b.mul(run, self.run_positions)
            return self.o.live(b.sub(self.run_elements, b.sub(position, start)))
        count = b.sub(r.count, j) if self.along else r.count
        before = self.int(0 if self.beside else u * self.o.width)
        if not self.job.wraps:
            return self.o.live(b.sub(count, before))
        # First only what is of the next row, then all, at last only what is of this one.
        inside = b.icmp_unsigned("<", j, r.full)
        this = self.o.live(b.sub(b.select(inside, self.int(self.panel_elements), count), before))
        first = b.icmp_signed("<", j, self.int(0))
        return Vector(self.o, b.select(first, b.not_(this.value), this.value))

    def position(self, r: Range, j: ir.Value, u: int) -> ir.Value:
        """Where in the lane vector u is at position j of a range."""
        before = self.int(u * self.o.width if self.along else 0)
        return self.b.add(self.b.add(r.start, j), before)

    def everywhere(self, r: Range) -> Iterator[tuple[ir.Value, int, Vector | None]]:
        """A loop over all of a range, for what is too rare to have its own place in the walk."""
        step, vectors = self.rest
        with self.o.loop(r.begin, r.end, step) as j:
            for u in range(vectors):
                yield j, u, None if self.short else self.mask(r, j, u)

    def at(self, base: Place, j: ir.Value, row: ir.Value, u: int, size: int) -> ir.Value:
        """Address of vector u at position j, for elements of ``size`` bytes."""
        step = self.int(size) if self.along else row
        if isinstance(base, list):
            return self.b.add(base[u], self.b.mul(j, step))
        offset = self.int(u * self.o.width * size)
        return self.b.add(self.b.add(base, self.b.mul(j, step)), offset)

    def x_at(self, r: Range, j: ir.Value, u: int) -> ir.Value:
        source = self.native if r.native else self.source
        base = r.x
        if self.lane_in_runs:
            base = self.b.add(base, self.jumps(self.position(r, j, u), r.x_jump))
        return self.at(base, j, r.x_row, u, source.itemsize)

    def scratch_at(self, base: Place, j: ir.Value, u: int) -> ir.Value:
        row = self.int(self.panel * VECTOR_BYTES)
        return self.at(base, j, row, u, self.o.real.itemsize)

    def load_x(self, r: Range, j: ir.Value, u: int, mask: Vector | None) -> Vector:
        source = self.native if r.native else self.source
        return source.load(self.o, self.x_at(r, j, u), mask, fill=-float("inf"))

    def store_out(self, r: Range, j: ir.Value, u: int, value: Vector, mask: Vector | None) -> None:
        base = r.out
        if self.lane_in_runs:
            base = self.b.add(base, self.jumps(self.position(r, j, u), self.out_row_jump))
        place = self.at(base, j, self.out_row, u, self.result.itemsize)
        self.result.store(self.o, place, value, mask, self.job.stores == PAST_CACHE)

    def early(self, array: str, item: Item, next_item: Item) -> tuple[ir.Value, ir.Value]:
        """Where to fetch x or out from while an item is walked: the next item, or so much ahead.

        An address, and its position in the lane.
        """
        b = self.b
        further = b.icmp_signed("==", self.ahead, self.int(0))
        place = b.add(getattr(item, array), b.mul(self.ahead, getattr(self, f"{array}_row")))
        position = b.add(item.start, self.ahead)
        return (
            b.select(further, getattr(next_item, array), place),
            b.select(further, next_item.start, position),
        )

    def prefetch(
        self, array: str, start: tuple[ir.Value, ir.Value], j: ir.Value, vectors: int
    ) -> None:
        """The cache lines of vectors of x or out, j positions after where `early` said."""
        base, first = start
        size = self.source.itemsize if array == "x" else self.result.itemsize
        row, jump = (getattr(self, f"{array}_row{part}") for part in ("", "_jump"))
        apart = self.beside or self.vectors_in_runs
        length = self.o.width * size * (1 if apart else vectors)
        places = list(range(0, length, CACHE_LINE_BYTES))
        if not self.along or self.vectors_in_runs:
            places.append(length - 1)  # another line, unless rows begin with one
        for u in range(vectors if apart else 1):
            position = j if self.beside else self.b.add(j, self.int(u * self.o.width))
            further = self.jumps(self.b.add(first, position), jump)
            if self.beside:
                further = self.b.mul(getattr(self, f"{array}_outer"), self.int(u))
            line = self.at(self.b.add(base, further), position, row, 0, size)
            for place in places:
                self.o.prefetch(self.b.add(line, self.int(place)), to_write=array == "out")

    # -- values kept between items ------------------------------------------------------------

    def variables(self, count: int, start: float = 0.0) -> list[Variable]:
        return [Variable(self.o, self.o.const(start)) for _ in range(count)]

    @contextlib.contextmanager
    def each_state(self, *groups: list[Variable]) -> Iterator[tuple[ir.Value, list[Variable]]]:
        """A run-time loop over the states of a panel: what is done to each is compiled once.

        Two at a time, in one wide vector that LLVM cuts up again: what ends a lane is a chain of
        instructions that wait for each other, and so two chains take turns.
        """
        b, states = self.b, self.int(self.states)
        memory = [cgutils.alloca_once(b, self.o.type, size=states) for _ in groups]
        for place, group in zip(memory, groups, strict=True):
            for u in range(self.states):
                b.store(group[u].get().value, b.gep(place, [self.int(u)]))
        o = Emitter(b, self.o.real, 1 if self.states % 2 else 2)
        with self.o.loop(self.int(0), states, o.width // self.o.width) as u:
            pointers = [b.bitcast(b.gep(place, [u]), o.type.as_pointer()) for place in memory]
            some = [Variable(o, Vector(o, b.load(at, align=VECTOR_BYTES))) for at in pointers]
            yield u, some
            for at, variable in zip(pointers, some, strict=True):
                b.store(variable.get().value, at, align=VECTOR_BYTES)
        for place, group in zip(memory, groups, strict=True):
            for u in range(self.states):
                group[u].set(Vector(self.o, b.load(b.gep(place, [self.int(u)]))))

    def joined(self, *groups: list[Variable], join: Join) -> None:
        """Join the elements of vectors that belong to one lane, if there are such."""
        if not self.along:
            return
        parts = [tuple(one.get() for one in part) for part in zip(*groups, strict=True)]
        if self.beside:
            parts = self.o.joined(parts, join)
        else:
            parts = self.o.joined_in_turn(parts, join, self.job.lanes)
        for variables, part in zip(zip(*groups, strict=True), parts, strict=False):
            for variable, value in zip(variables, part, strict=True):
                variable.set(value)

    def own(self, states: list[Vector]) -> list[Vector]:
        """What each sum has of the states: beside, its element in every element of a vector."""
        if not self.beside:
            return states
        packed, width = states[0], self.o.width
        return [self.o.shuffle(packed, packed, [u] * width) for u in range(self.panel)]

    # -- the walk -----------------------------------------------------------------------------

    def walk(self, stages: "list[Stage]", items: list[Item]) -> None:
        """All steps of the stages' items: together while none needs a mask, then each by itself.

        ``items`` begins with the one that comes next, and ends with the last stage's.
        """
        common = functools.reduce(self.smaller, [stage.range.full for stage in stages])
        stages[0].look_ahead(items[0])
        stages[-1].look_ahead_out(items[-2])
        if self.job.wraps:
            for stage in reversed(stages):
                self.steps([stage], stage.range.begin, self.int(0), stages[0], masked=True)
        self.steps(stages, self.int(0), common)
        for stage in reversed(stages):
            left = common
            # Where a chunk begins, items have no neighbours.
            if self.job.walk == "along" or self.job.wraps:
                left = stage.range.full
                self.steps([stage], common, left, stages[0])
            self.steps([stage], left, stage.range.end, stages[0], masked=True)
        for stage in reversed(stages):
            stage.leave()

    def steps(
        self,
        stages: "list[Stage]",
        start: ir.Value,
        end: ir.Value,
        first: "Stage | None" = None,
        masked: bool = False,
    ) -> None:
        """The steps of some stages together.

        ``first`` is the first of all stages, which prefetches. Along, what needs a mask is taken by
        single vectors.
        """
        step, vectors = self.rest if masked else (self.stride, self.panel)
        # The last stage reads the scratch that the stage before it fills. Along, there is a second
        # reason to load before anything is stored: a load waits for a store before it whose place
        # in a page it overlaps in part, as rows of x and out often do.
        turns = [(stage, u) for stage in reversed(stages) for u in range(vectors)]
        together = self.along or len(STAGES[self.job.op]) == 1
        groups = [turns] if together else [[turn] for turn in turns]
        mask_of = self.mask_of if masked else self.run_mask
        sums = [stage for stage in stages if isinstance(stage, Sum)]
        with self.o.loop(start, end, step) as j:
            if first in (None, stages[0]):
                stages[0].prefetch(j, vectors)
            if first is None:
                stages[-1].prefetch_out(j)
            for group in groups:
                masks = [mask_of(stage, j, u) for stage, u in group]
                masked_turns = list(zip(group, masks, strict=True))
                values = [stage.read(j, u, mask) for (stage, u), mask in masked_turns]
                for ((stage, u), mask), value in zip(masked_turns, values, strict=True):
                    stage.step(j, u, mask, value)
            self.pause(sums, self.b.add(j, self.int(step)))

    def pause(self, sums: "list[Sum]", behind: ir.Value) -> None:
        """Let sums pause where a segment of the lane ends."""
        if self.of_rows or not sums:
            return
        b = self.b

        def ends(count: ir.Value) -> ir.Value:
            rest = b.and_(count, self.int(SEGMENT_ADDITIONS * self.added - 1))
            return b.icmp_signed("==", rest, self.int(0))

        here = ends(behind)
        # Lanes that wrapped are one row ahead of the others.
        ahead = ends(b.add(behind, self.int(1))) if self.job.wraps else here
        with b.if_then(b.or_(here, ahead), likely=False):
            for one in sums:
                one.pause(here)

    def mask_of(self, stage: "Stage", j: ir.Value, u: int) -> Vector:
        return self.mask(stage.range, j, u)

    def run_mask(self, stage: "Stage", j: ir.Value, u: int) -> Vector | None:
        """What of a vector counts where whole ones are walked.

        Along in runs, what belongs to one; but sums are of a copy without gaps. Across, the lanes
        that there are, if they are fewer than a panel has.
        """
        gaps = self.vectors_in_runs and not isinstance(stage, Sum)
        return self.mask(stage.range, j, u) if gaps or self.job.masked else None

    def group_vectors(
        self, start: ir.Value, item: Item, size: int
    ) -> list[tuple[ir.Value, Vector]]:
        """Where the vectors of a group of short rows without gaps are, and their masks."""
        b, o = self.b, self.o
        count = b.mul(item.columns, self.int(self.job.dealt))
        starts = [v * o.width for v in range(self.panel * self.job.dealt)]
        return [
            (b.add(start, self.int(first * size)), o.live(b.sub(count, self.int(first))))
            for first in starts
        ]

    def squares(self, length: ir.Value) -> Iterator[tuple[ir.Value, int]]:
        """The squares in which rows are turned: where, and of how many columns.

        As many rows as a vector has elements, and as many columns; or if no more are left, half or
        a quarter of it: then several rows share a vector.
        """
        b, width = self.b, self.o.width
        with self.o.loop(self.int(0), length, width) as q:
            left = b.sub(length, q)
            quarter, half = (b.icmp_signed("<=", left, self.int(width // part)) for part in (4, 2))
            with b.if_else(quarter) as (few, others):
                with few:
                    yield q, width // 4
                with others, b.if_else(half) as (some, many):
                    with some:
                        yield q, width // 2
                    with many:
                        yield q, width

    def turned_walk(self, stages: "list[Stage]", items: list[Item]) -> None:
        """The same for short rows, whose tiles lie in the first-level cache: one after the other.

        Independent of each other, they hide each other's latency.
        """
        stages[0].look_ahead(items[0])
        for stage in reversed(stages):
            stage.turned()
            stage.leave()

    def run(self) -> None:
        """Take chunks of items from the ticket until none is left.

        A helper, whose ticket is odd, begins at the end: so who called again with the same arrays
        finds in its core's own cache what it worked on before. One word counts both ends' chunks.
        """
        b = self.b
        helps = b.trunc(self.ticket, ir.IntType(1))
        self.ticket = b.and_(self.ticket, self.int(-2))
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
        # Terms, inputs less their shift, copied inputs or rows of out, tiles.
        parts = 2 + (self.packs or self.of_rows) + MOST_STAGES * self.short
        size = b.mul(self.scratch, self.int(parts))
        slab = self.int(0)
        if self.by_slabs:
            slab = b.add(b.mul(self.block, self.out_row), self.int(2 * VECTOR_BYTES))
        memory = self._malloc(b.add(b.add(size, slab), self.int(VECTOR_BYTES + PAGE_BYTES)))
        self.buffer = self.apart(memory)
        if self.job.wraps:  # position -1 comes first
            self.buffer = b.add(self.buffer, self.int(self.panel * VECTOR_BYTES))
        self.shifted_x = b.add(self.buffer, self.scratch)
        self.packed_x = self.line_buffer = b.add(self.shifted_x, self.scratch)
        if self.by_slabs:
            self.line_buffer = b.add(self.buffer, size)
        stages = [kind(self) for kind in STAGES[self.job.op]]

        def count(address: ir.Value, by: ir.Value) -> ir.Value:
            return b.atomic_rmw("add", b.inttoptr(address, I64.as_pointer()), by, "acq_rel")

        take = b.append_basic_block("take")
        work = b.append_basic_block("work")
        leave = b.append_basic_block("leave")
        b.branch(take)
        b.position_at_end(take)
        counts = count(next_chunk, b.select(helps, self.int(1 << 32), self.int(1)))
        first, last = b.and_(counts, self.int(0xFFFFFFFF)), b.lshr(counts, self.int(32))
        b.cbranch(b.icmp_signed("<", b.add(first, last), chunks), work, leave)
        b.position_at_end(work)
        taken = b.select(helps, b.sub(b.sub(chunks, self.int(1)), last), first)
        low = b.mul(taken, chunk)
        high = self.smaller(b.add(low, chunk), self.items)
        self.pipeline(stages, low, high)
        count(done_items, b.sub(high, low))
        b.branch(take)
        b.position_at_end(leave)
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
        free = cgutils.get_or_insert_function(b.module, kind, "free")
        b.call(free, [b.inttoptr(memory, I8.as_pointer())])

    def apart(self, memory: ir.Value) -> ir.Value:
        """The first whole vector in ``memory`` that lies half a page from x, but for whole pages.

        Where rows are as long as some pages, loads of x would else meet the stores of the terms.
        """
        b = self.b
        first = b.and_(b.add(memory, self.int(VECTOR_BYTES - 1)), self.int(-VECTOR_BYTES))
        distance = b.sub(b.add(self.x, self.int(PAGE_BYTES // 2)), first)
        return b.add(first, b.and_(distance, self.int(PAGE_BYTES - VECTOR_BYTES)))

    def pipeline(self, stages: "list[Stage]", low: ir.Value, high: ir.Value) -> None:
        """Items low to high, each stage one item ahead of the next."""
        b = self.b
        slots = [Slot(b) for _ in range(len(stages) + 1)]  # the first item is only prefetched
        tiles = [cgutils.alloca_once(b, I64) for _ in stages]
        for i, tile in enumerate(tiles):
            b.store(b.add(self.buffer, b.mul(self.scratch, self.int(3 + i))), tile)
        cursor = Cursor(self, low)
        item = self.item(cursor, high, b.load(tiles[0]))
        slots[0].set(item)
        zero = self.int(0)
        for slot in slots[1:]:
            slot.set(dataclasses.replace(item, columns=zero, results=zero, length=zero))
        items = b.sub(high, low)
        if self.of_rows:
            items = b.sdiv(b.add(items, self.int(self.group - 1)), self.int(self.group))
        stages[-1].begin(low)
        with self.o.loop(zero, b.add(items, self.int(len(stages) - 1))):
            for newer, older in reversed(list(itertools.pairwise(slots))):
                older.set(newer.get())
            used = [b.load(tile) for tile in tiles]
            for tile, address in zip(tiles, [*used[1:], used[0]], strict=True):
                b.store(address, tile)
            cursor.step()
            slots[0].set(self.item(cursor, high, b.load(tiles[0])))
            for stage, slot in reversed(list(zip(stages, slots[1:], strict=True))):
                stage.enter(slot.get())
            walk = self.turned_walk if self.short else self.walk
            walk(stages, [slot.get() for slot in slots])
        stages[-1].end()

    @property
    def cuts(self) -> bool:
        """Whether lanes may be cut into blocks."""
        return self.job.op not in (SOFTMAX, LOG_SOFTMAX, LOGSUMEXP)

    @property
    def copies_huge(self) -> bool:
        """Whether what needs a shift gets it once, in a copy, and not in every step."""
        return self.short or self.packs or self.source == self.native

    @property
    def writes_lanes(self) -> bool:
        """Whether the result is one number a lane."""
        return issubclass(STAGES[self.job.op][-1], Sum | Maximum)

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

    def begin(self, low: ir.Value) -> None:
        """Called before a chunk of items, for the last stage."""

    def end(self) -> None:
        """Called after it."""

    def enter(self, item: Item) -> None:
        self.current = item
        self.range = self.k.range(item)

    def look_ahead(self, next_item: Item) -> None:
        """Say what the first stage, which reads x from memory, is to fetch early."""
        self.ahead = self.k.early("x", self.current, next_item)

    def prefetch(self, j: ir.Value, vectors: int) -> None:
        self.k.prefetch("x", self.ahead, j, vectors)

    def look_ahead_out(self, next_item: Item) -> None:
        """For the last stage, if it writes as much as the first one reads."""

    def prefetch_out(self, j: ir.Value) -> None:
        """The same."""

    def read(self, j: ir.Value, u: int, mask: Vector | None) -> Vector:
        """What a step works on: x, or what the stage before has made of it."""
        return self.k.load_x(self.range, j, u, mask)

    def step(self, j: ir.Value, u: int, mask: Vector | None, value: Vector) -> None:
        """Vector u of the panel at position j, where ``value`` was read."""
        raise NotImplementedError

    def turned(self) -> None:
        """The whole walk over a tile of short rows."""
        with self.o.loop(self.k.int(0), self.range.end) as j:
            for u in range(self.k.panel):
                self.step(j, u, None, self.read(j, u, None))

    def leave(self) -> None:
        pass

    def write(self, u: ir.Value, values: tuple[Vector, ...]) -> None:
        k, b, o = self.k, self.k.b, values[0].o
        first = b.mul(u, k.int(self.o.width))
        mask = o.live(b.sub(self.current.results, first))
        place = b.mul(b.add(self.current.lane, first), k.int(k.result.itemsize))
        place = b.add(k.out, place)
        for plane, value in enumerate(values):
            k.result.store(o, b.add(place, b.mul(k.out_plane, k.int(plane))), value, mask)


class Maximum(Stage):
    """m of the lane."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.parts = kernel.variables(kernel.sets)
        self.m = kernel.m = kernel.variables(kernel.states)  # of the item that just passed

    def enter(self, item: Item) -> None:
        super().enter(item)
        for part in self.parts:
            part.set(self.o.const(-float("inf")))

    def step(self, j: ir.Value, u: int, mask: Vector | None, value: Vector) -> None:
        k = self.k
        if k.packs:
            self.o.store(k.scratch_at(k.packed_x, j, u), value)
        self.take(value, u)

    def take(self, x: Vector, u: int) -> None:
        part = self.parts[u % self.k.sets]
        part.set(self.o.larger(x, part.get()))

    def turned(self) -> None:
        """Rows of x to the columns of the tile."""
        k, b, o, item = self.k, self.k.b, self.o, self.current
        with o.loop(k.int(0), b.mul(k.x_outer, k.int(k.group)), CACHE_LINE_BYTES) as at:
            o.prefetch(b.add(self.ahead[0], at))
        if k.job.dealt:
            vectors = [
                k.source.load(o, place, mask, fill=-float("inf"))
                for place, mask in k.group_vectors(item.x, item, k.source.itemsize)
            ]
            for u in range(k.panel):
                own = vectors[u * k.job.dealt : (u + 1) * k.job.dealt]
                for j, column in enumerate(o.dealt(own)):
                    self.take(column, u)
                    o.store(k.scratch_at(item.tile, k.int(j), u), column)
            return
        last = k.clipped(b.sub(item.columns, k.int(1)))
        lines = [k.line_at("x", item, k.smaller(k.int(i), last)) for i in range(k.group)]
        for q, side in k.squares(item.length):
            offset, left = b.mul(q, k.int(k.source.itemsize)), b.sub(item.length, q)
            for u in range(k.panel):
                places = [b.add(line, offset) for line in lines[u * o.width : (u + 1) * o.width]]
                rows = [
                    k.source.load_parts(o, places[i::side], left, fill=-float("inf"))
                    for i in range(side)
                ]
                for j, column in enumerate(o.transpose(rows)):
                    self.take(column, u)
                    o.store(k.scratch_at(item.tile, b.add(q, k.int(j)), u), column)

    def leave(self) -> None:
        self.k.joined(self.parts, join=lambda a, b: (self.o.larger(b[0], a[0]),))
        for m, part in zip(self.m, self.parts, strict=False):
            m.set(part.get())


class Terms(Stage):
    """A stage that computes exp of x, whose maximum is known."""

    def scale(self, m: list[Variable]) -> None:
        """Fix the scales. Items of huge numbers, rare, are copied less their shift, and read so."""
        k, b, o = self.k, self.k.b, self.o
        maxima = [one.get() for one in m]
        scales = [_scalars.scale(o, one) for one in maxima]
        shifts = [abs(by.shift) > o.const(0.0) for by in scales]
        self.maxima = k.own(maxima)
        fields = [vars(by).values() for by in scales]
        fields = [k.own(list(states)) for states in zip(*fields, strict=True)]
        self.scales = [_scalars.Scale(*own) for own in zip(*fields, strict=True)]
        # What equals it is a largest element.
        self.peaks = [by.near for by in self.scales] if k.source.may_be_huge else self.maxima
        if k.job.weighted:
            self.weights = b.add(self.range.x, b.sub(k.pairs, k.x))
        self.in_memory = self.range
        if not k.copies_huge:
            return
        huge = o.any(functools.reduce(lambda p, q: p | q, shifts))
        r = self.range
        copy = k.own_lines(k.shifted_x) if k.beside else k.shifted_x
        with b.if_then(huge, likely=False):
            for j, u, mask in k.everywhere(r):
                x = self.shifted(k.load_x(r, j, u, mask), u)
                o.store(k.scratch_at(copy, j, u), x)
        row = k.int(k.panel * VECTOR_BYTES)
        usual, usual_row = (k.packed_x, row) if k.packs else (r.x, r.x_row)
        usual_jump = k.int(0) if k.packs else r.x_jump
        self.range = dataclasses.replace(
            r,
            x=k.select(huge, copy, usual),
            x_row=b.select(huge, row, usual_row),
            x_jump=b.select(huge, k.int(0), usual_jump),
            native=True,
            shifted=True,
        )

    def shifted(self, x: Vector, u: int) -> Vector:
        u %= self.k.sets
        return _scalars.shifted(self.o, x, self.maxima[u], self.scales[u])

    def less_shift(self, r: Range, x: Vector, u: int, may_be_inf: bool = False) -> Vector:
        """Less the shift, x is NaN if the maximum and it are inf, unless it ``may_be_inf``."""
        if r.shifted or not self.k.source.may_be_huge:
            return x
        return self.shifted(x, u) if may_be_inf else x - self.scales[u % self.k.sets].shift


class Sum(Terms):
    """s + c of the lane, whose m is known; the terms stay in scratch if the op wants them again.

    Where a vector is not full, x is -inf: terms as good as 0.
    """

    keeps_terms = False
    products = False  # whether terms are added before they are rounded

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.m = kernel.variables(kernel.states)
        self.s, self.c = (kernel.variables(kernel.sets) for _ in range(2))
        self.before = kernel.variables(kernel.sets)  # of the segments that are over
        # What a segment of the lane leaves to be set aside, before its own roundings add up.
        self.rounding = self.c if self.o.real.precise else self.s
        self.start = self.o.const(self.o.real.start)

    def enter(self, item: Item) -> None:
        super().enter(item)
        for mine, passed in zip(self.m, self.k.m, strict=True):
            mine.set(passed.get())
        self.reset(self.start)
        self.scale(self.m)

    def reset(self, start: Vector) -> None:
        for s, c, before in zip(self.s, self.c, self.before, strict=True):
            s.set(start)
            c.set(self.o.const(0.0))
            before.set(self.o.const(0.0))

    def pause(self, here: ir.Value) -> None:
        """A segment ends ``here``, or if not, for the lanes that wrapped."""
        k, o = self.k, self.o
        for u, (part, before) in enumerate(zip(self.rounding, self.before, strict=True)):
            left = zero = o.const(0.0)
            over = part.get()
            if k.job.wraps:
                this = o.live(k.b.sub(self.range.count, k.int(u * o.width))).value
                those = Vector(o, k.b.select(here, this, k.b.not_(this)))
                over, left = o.where(those, over, zero), o.where(those, zero, over)
            before.set(before.get() + over)
            part.set(left)

    def step(self, j: ir.Value, u: int, mask: Vector | None, value: Vector) -> None:
        o, k = self.o, self.k
        s, c = self.s[u % k.sets], self.c[u % k.sets]
        x, by = self.less_shift(self.range, value, u), self.scales[u % k.sets]
        if self.products:
            sums = _scalars.add_exp(o, s.get(), c.get(), x, by)
        else:
            term = _scalars.exp(o, x, by)
            if self.keeps_terms:
                o.store(k.scratch_at(self.range.scratch, j, u), term)
            sums = _scalars.add_one(o, s.get(), c.get(), term, to_more=True)
        for variable, value in zip((s, c), sums, strict=True):
            variable.set(value)

    def leave(self) -> None:
        self.take()
        with self.k.each_state(self.m, self.s, self.c) as (u, (m, s, c)):
            self.finish(u, m, s, c)

    def take(self) -> None:
        """From what the steps have left to the sum that is wanted."""
        for s in self.s:
            s.set(s.get() - self.start)  # without rounding
        self.join()

    def join(self) -> None:
        """What segments have left; and along, the elements of a vector are parts of one sum."""
        if not self.k.of_rows:
            for part, before in zip(self.rounding, self.before, strict=True):
                part.set(part.get() + before.get())
        self.k.joined(self.s, self.c, join=lambda a, b: _scalars.merge(*a, *b))

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        raise NotImplementedError


class SumForSoftmax(Sum):
    """Leaves the terms in scratch and turns s, c into the two parts of the reciprocal."""

    keeps_terms = True

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        kernel.finished = [self.s, self.c]

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        high, low = _scalars.reciprocal(m.o, m.get(), s.get(), c.get())
        s.set(high)
        c.set(low)


class SumOfOthers(Sum):
    """s + c without one largest term, which the logarithms want to the last bit.

    Summed like all others and then taken away, the largest term hides some bits of the rest. Where
    they matter, that is where the rest is small, the item is summed again with the largest terms
    counted instead, and for the strictest budgets with what rounds off in each exp: half as many
    instructions more. That does not pay where one such lane is likely among all those of an item.
    """

    rounded_terms = True

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.count = kernel.variables(kernel.sets)
        self.again = kernel.variables(kernel.states)
        careful = kernel.job.careful or kernel.job.weighted  # weighted terms have no bound
        self.quick = self.pays() and not careful
        if not self.quick:
            self.start = self.o.const(0.0)

    def pays(self) -> bool:
        return self.k.along

    def reset(self, start: Vector) -> None:
        super().reset(start)
        for count in self.count:
            count.set(self.o.const(0.0))

    def step(self, j: ir.Value, u: int, mask: Vector | None, value: Vector) -> None:
        if self.quick:
            super().step(j, u, mask, value)
        else:
            self.careful_step(j, u, mask, self.less_shift(self.range, value, u, True))

    def careful_step(self, j: ir.Value, u: int, mask: Vector | None, x: Vector) -> None:
        o, k = self.o, self.k
        by = self.scales[u % k.sets]
        s, c, count = (part[u % k.sets] for part in (self.s, self.c, self.count))
        weight, one = None, o.const(1.0)
        if k.job.weighted:
            one = weight = k.source.load(
                o, k.at(self.weights, j, k.x_row, u, k.source.itemsize), mask
            )
        skip = x == self.peaks[u % k.sets]
        count.set(o.where(skip, count.get() + one, count.get()))
        if self.rounded_terms:
            term, low = _scalars.exp(o, x, by, skip, weight), c.get()
        else:
            term, low = _scalars.exp_two_parts(o, x, by, c.get(), skip, weight)
        for variable, value in zip((s, c), _scalars.add_one(o, s.get(), low, term), strict=True):
            variable.set(value)

    def take(self) -> None:
        if self.quick:
            self.take_quick()
        else:
            self.take_careful()

    def take_quick(self) -> None:
        k, o = self.k, self.o
        b = k.b
        # Additions to one sum; one behind the last whole vector, and those that join the elements.
        n = b.add(b.udiv(self.range.end, k.int(k.added)), k.int(6))
        segment = k.int(SEGMENT_ADDITIONS)
        to_one = b.add(k.smaller(n, segment), b.udiv(n, segment))
        super().take()
        self.judge(n, to_one)
        flags = [again.get() > o.const(0.0) for again in self.again]
        with k.b.if_then(o.any(functools.reduce(lambda p, q: p | q, flags)), likely=False):
            self.sum_again(flags)

    def judge(self, additions: ir.Value, to_one: ir.Value) -> None:
        """Take the largest term away, and mark the lanes where it may have hidden too much."""
        with self.k.each_state(self.m, self.s, self.c, self.again) as (_, (m, s, c, again)):
            o = m.o
            hidden = _scalars.hidden(o, o.spread(additions), o.spread(to_one))
            rest = _scalars.without_one(o, m.get(), s.get(), c.get(), self.products)
            s.set(rest[0])
            c.set(rest[1])
            least = self.least(m.get(), hidden)
            again.set(_scalars.is_small(o, m.get(), rest[0], least))

    def least(self, m: Vector, hidden: Vector) -> Vector:
        """The rest, in largest terms, that is good enough; ``hidden`` is what the sum asks for."""
        return hidden

    def sum_again(self, flags: list[Vector]) -> None:
        """Careful sums for the lanes that want one; the others keep theirs, whoever is beside."""
        o, k = self.o, self.k
        sums = list(zip(self.s, self.c, strict=True))[: k.states]
        before = [(s.get(), c.get()) for s, c in sums]
        self.reset(o.const(0.0))
        r = self.in_memory if k.packs else self.range  # the copy is already the next item's
        step, vectors = k.rest
        for j, u, mask in k.everywhere(r):
            x = self.less_shift(r, k.load_x(r, j, u, mask), u, True)
            self.careful_step(j, u, mask, x)
            if u == vectors - 1:
                k.pause([self], k.b.add(j, k.int(step)))
        self.take_careful()
        for flag, kept, (s, c) in zip(flags, before, sums, strict=True):
            s.set(o.where(flag, s.get(), kept[0]))
            c.set(o.where(flag, c.get(), kept[1]))

    def take_careful(self) -> None:
        k = self.k
        self.join()
        k.joined(self.count, join=lambda a, b: (a[0] + b[0],))
        with k.each_state(self.m, self.count, self.s, self.c) as (_, (m, count, s, c)):
            join = _scalars.with_largest if k.job.weighted else _scalars.with_equals
            rest = join(m.o, m.get(), count.get(), s.get(), c.get())
            s.set(rest[0])
            c.set(rest[1])


class SumForLogSoftmax(SumOfOthers):
    """Turns s into the logarithm that is subtracted."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        kernel.finished = [self.m, self.s]

    def step(self, j: ir.Value, u: int, mask: Vector | None, value: Vector) -> None:
        super().step(j, u, mask, value)
        k = self.k
        if k.packs:  # the copy will be overwritten before the last stage wants it
            x = self.o.load(k.scratch_at(k.packed_x, j, u))
            self.o.store(k.scratch_at(self.range.scratch, j, u), x)

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        s.set(_scalars.log_sum(m.o, m.get(), s.get(), c.get())[0])


class SumForPairs(SumOfOthers):
    """Writes m, s and c; s is NaN only if the lane holds one."""

    rounded_terms = False

    def pays(self) -> bool:
        return True

    def least(self, m: Vector, hidden: Vector) -> Vector:
        return m.o.larger(_scalars.rounded_terms(m.o, m), hidden)

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        self.write(u, (m.get(), s.get(), c.get()))


class SumForPairsOfSoftmax(SumForPairs):
    """The same, for who wants no more than the whole sum."""

    def least(self, m: Vector, hidden: Vector) -> Vector:
        return m.o.const(-1.0)


class SumForPairsOfLogSumExp(SumForPairs):
    """The same, for who wants more only beside maxima near 0."""

    products = True

    def least(self, m: Vector, hidden: Vector) -> Vector:
        o, strict = m.o, super().least(m, hidden)
        return o.where(abs(m) < o.const(_scalars.NEAR_ZERO), strict, o.const(-1.0))


class SumForLogSumExp(SumForPairs):
    """Writes logsumexp of the lane: from the sum of all terms, unless it is near 0."""

    products = True

    def judge(self, additions: ir.Value, to_one: ir.Value) -> None:
        with self.k.each_state(self.m, self.s, self.c, self.again) as (_, (m, s, c, again)):
            o = m.o
            value = _scalars.logsumexp_of_all(o, m.get(), s.get(), c.get())
            # NaN too: without a shift, a maximum of inf makes one.
            again.set(_scalars.is_near_zero(o, m.get(), value))
            s.set(value)

    def take_careful(self) -> None:
        super().take_careful()
        with self.k.each_state(self.m, self.s, self.c) as (_, (m, s, c)):
            s.set(_scalars.logsumexp(m.o, m.get(), s.get(), c.get()))

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
        self.write(u, (s.get(),))


class Output(Stage):
    """A stage that writes out. Stores past the cache start at the first whole vector of out."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.first = kernel.variables(kernel.sets)
        self.second = kernel.variables(kernel.sets)
        self.lines = Lines(kernel) if kernel.job.stores == BY_LINES else None

    def begin(self, low: ir.Value) -> None:
        if self.lines is not None:
            k = self.k
            b, rest = k.b, k.b.udiv(low, k.panels)
            start = b.mul(b.mul(b.urem(rest, k.blocks), k.block), k.out_row)
            outer = b.mul(b.udiv(rest, k.blocks), k.out_outer)
            self.lines.begin(b.add(k.out, b.add(outer, start)))

    def end(self) -> None:
        if self.lines is not None:
            self.lines.end()

    def parameters(self) -> None:
        for mine, passed in zip((self.first, self.second), self.k.finished, strict=True):
            own = self.k.own([variable.get() for variable in passed])
            for variable, value in zip(mine, own, strict=False):
                variable.set(value)

    def enter(self, item: Item) -> None:
        super().enter(item)
        self.parameters()
        k, b = self.k, self.k.b
        if self.lines is not None and not k.short:
            free = self.lines.free()
            if k.beside:
                out: Place = [b.add(free, b.mul(k.out_outer, k.int(u))) for u in range(k.panel)]
            else:
                out = b.add(free, b.mul(item.first, k.int(k.result.itemsize)))
            self.range = dataclasses.replace(self.range, out=out)
        if not k.sends_vectors:
            return
        bytes_ = k.o.width * k.result.itemsize
        misaligned = b.and_(b.sub(k.int(0), item.out), k.int(bytes_ - 1))
        skip = k.smaller(b.sdiv(misaligned, k.int(k.result.itemsize)), item.length)
        head = k.o.live(skip)
        self.step(k.int(0), 0, head, self.read(k.int(0), 0, head))
        self.range = k.after(self.range, skip)
        if k.states > 1:
            return  # a vector's place says whose it is
        whole = b.and_(self.range.end, k.int(-k.o.width))
        few = k.smaller(k.int(LEAD_BYTES // k.result.itemsize), whole)
        lead = b.select(self.meets_loads(item), few, k.int(0))
        with self.o.loop(k.int(0), lead, k.o.width) as j:
            self.step(j, 0, None, self.read(j, 0, None))
        self.range = k.after(self.range, lead)

    def meets_loads(self, item: Item) -> ir.Value:
        """Whether the other stages read, in their items, near the places of pages that this writes.

        A load waits for a store before it that has part of its place in a page, and a store past
        the cache takes long: then this stage keeps ahead.
        """
        k, b = self.k, self.k.b
        panel = VECTOR_BYTES * k.panel
        x, meets = item.x, ir.Constant(ir.IntType(1), 0)
        for _ in range(len(STAGES[k.job.op]) - 1):
            x = b.add(x, k.x_outer)
            apart = b.and_(b.sub(item.out, b.sub(x, k.int(panel))), k.int(PAGE_BYTES - 1))
            meets = b.or_(meets, b.icmp_unsigned("<", apart, k.int(2 * panel)))
        return meets

    def look_ahead_out(self, next_item: Item) -> None:
        """Have lines of out ready when the next item comes to them, those that are read first.

        Stores leave in order: one that waits for its line holds up all behind it, and the processor
        sees no stream here.
        """
        k, b = self.k, self.k.b
        self.ahead_out = k.early("out", self.current, next_item)
        if k.sends_vectors:
            size = b.mul(next_item.length, k.int(k.result.itemsize))
            for place in (next_item.out, b.add(next_item.out, size)):
                self.o.prefetch(place, to_write=True)

    def prefetch_out(self, j: ir.Value) -> None:
        k = self.k
        if (k.job.walk == "across" or k.lane_in_runs) and k.job.stores == IN_CACHE:
            k.prefetch("out", self.ahead_out, j, k.panel)

    def step(self, j: ir.Value, u: int, mask: Vector | None, value: Vector) -> None:
        self.k.store_out(self.range, j, u, self.result(value, u), mask)

    def result(self, value: Vector, u: int) -> Vector:
        """One vector of it."""
        raise NotImplementedError

    def turned(self) -> None:
        """The tile's columns to rows of out."""
        k, b, o, item = self.k, self.k.b, self.o, self.current
        if k.job.dealt:
            vectors: list[Vector] = []
            for u in range(k.panel):
                terms = [self.read(k.int(j), u, None) for j in range(k.job.dealt)]
                vectors += o.gathered([self.result(term, u) for term in terms])
            out = item.out if self.lines is None else self.lines.free()
            places = k.group_vectors(out, item, k.result.itemsize)
            for vector, (place, mask) in zip(vectors, places, strict=True):
                k.result.store(o, place, vector, mask)
            return
        for q, side in k.squares(item.length):
            start, left = b.mul(q, k.int(k.result.itemsize)), b.sub(item.length, q)
            for u in range(k.panel):
                places = [b.add(q, k.int(j)) for j in range(side)]
                columns = [self.result(self.read(place, u, None), u) for place in places]
                squares = o.transpose(columns)
                for i in range(o.width):
                    number = k.int(u * o.width + i)
                    if self.lines is None:
                        row = k.line_at("out", item, number)
                    else:
                        row = b.add(self.lines.free(), b.mul(number, k.out_outer))
                    square, line = divmod(i, side)
                    with b.if_then(b.icmp_signed("<", number, item.columns)):
                        k.result.store_part(
                            o, b.add(start, row), squares[line], left, square * side, side
                        )

    def leave(self) -> None:
        """The item's rows are whole now: let lines go that wait for no other row."""
        if self.lines is None:
            return
        k, b, item = self.k, self.k.b, self.current
        there = b.icmp_signed(">", item.length, k.int(0))
        size = b.mul(item.columns, k.out_outer)
        if k.by_slabs:
            whole = b.icmp_signed("==", b.add(item.first, item.columns), k.inner)
            there, size = b.and_(there, whole), b.mul(item.length, k.out_row)
        self.lines.take(b.select(there, size, k.int(0)))


class Lines:
    """Results one behind the other, held until they fill lines of out that leave past the cache.

    ``line`` is the next whole vector of out. What is ``held`` for it, of which the first ``skip``
    bytes are not ours, ends where the next results go: at a whole vector, wherever out begins.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.k, self.o, self.b = kernel, kernel.o, kernel.b
        self.line, self.held, self.skip = (cgutils.alloca_once(kernel.b, I64) for _ in range(3))

    def begin(self, address: ir.Value) -> None:
        b, k = self.b, self.k
        before = b.and_(address, k.int(VECTOR_BYTES - 1))
        for variable, value in (
            (self.line, b.sub(address, before)),
            (self.held, before),
            (self.skip, before),
        ):
            b.store(value, variable)

    def free(self) -> ir.Value:
        """Where the next results go."""
        return self.b.add(self.k.line_buffer, self.k.int(VECTOR_BYTES))

    def start(self) -> ir.Value:
        """Where what is held begins."""
        return self.b.sub(self.free(), self.b.load(self.held))

    def take(self, size: ir.Value) -> None:
        """``size`` bytes have been put there: send whole lines, keep the rest."""
        b, k, o = self.b, self.k, self.o
        line, skip, start = b.load(self.line), b.load(self.skip), self.start()
        held = b.add(b.load(self.held), size)
        whole = b.and_(held, k.int(-VECTOR_BYTES))
        some = b.icmp_signed(">", whole, k.int(0))
        cut = b.and_(some, b.icmp_signed(">", skip, k.int(0)))
        with b.if_then(cut, likely=False):
            self.send_part(k.int(VECTOR_BYTES))
        first = b.select(cut, k.int(VECTOR_BYTES), k.int(0))
        with o.loop(first, whole, VECTOR_BYTES) as at:
            value = o.load(b.add(start, at))
            k.result.store(o, b.add(line, at), value, past_cache=True)
        o.store(k.line_buffer, o.load(b.add(k.line_buffer, size)))
        b.store(b.add(line, whole), self.line)
        b.store(b.sub(held, whole), self.held)
        b.store(b.select(some, k.int(0), skip), self.skip)

    def send_part(self, end: ir.Value) -> None:
        """The first line's bytes from ``skip`` to ``end``, which others may share."""
        b, k, o = self.b, self.k, self.o
        size = k.int(k.result.itemsize)
        counts = [b.udiv(value, size) for value in (b.load(self.skip), end)]
        not_ours, ours = (o.live(count) for count in counts)
        mask = Vector(o, b.and_(ours.value, b.not_(not_ours.value)))
        k.result.store(o, b.load(self.line), o.load(self.start()), mask)

    def end(self) -> None:
        self.send_part(self.b.load(self.held))


class Scale(Output):
    """softmax from the terms in scratch."""

    def read(self, j: ir.Value, u: int, mask: Vector | None) -> Vector:
        return self.o.load(self.k.scratch_at(self.range.scratch, j, u))

    def result(self, value: Vector, u: int) -> Vector:
        u %= self.k.sets
        return _scalars.softmax(self.o, value, self.first[u].get(), self.second[u].get())


class Subtract(Output):
    """log_softmax, reading x again."""

    def read(self, j: ir.Value, u: int, mask: Vector | None) -> Vector:
        if self.k.packs:
            return self.o.load(self.k.scratch_at(self.range.scratch, j, u))
        return super().read(j, u, mask)

    def result(self, value: Vector, u: int) -> Vector:
        u %= self.k.sets
        return _scalars.log_softmax(value, self.first[u].get(), self.second[u].get())


class Apply(Output):
    """The lane's merged pair, read from memory once per item."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.m = kernel.variables(kernel.sets)

    def parameters(self) -> None:
        k, o, b = self.k, self.o, self.k.b
        for plane, group in enumerate((self.m, self.first, self.second)):
            for u, variable in enumerate(group):
                start = k.int(0 if k.along else u * o.width)
                mask = o.live(b.sub(self.current.columns, start))
                place = b.add(self.current.lane, start)
                place = b.add(k.pairs, b.mul(place, k.int(o.real.itemsize)))
                value = o.load(b.add(place, b.mul(k.plane, k.int(plane))), mask)
                if k.along:
                    value = o.in_turn(value, k.job.lanes, u * o.width)
                variable.set(value)
        with k.each_state(self.m, self.first, self.second) as (_, (m, first, second)):
            self.finish(m, first, second)

    def finish(self, m: Variable, s: Variable, c: Variable) -> None:
        raise NotImplementedError


class ApplySoftmax(Apply, Terms):
    """softmax in a second reading of x."""

    def parameters(self) -> None:
        super().parameters()
        self.scale(self.m)

    def finish(self, m: Variable, s: Variable, c: Variable) -> None:
        total = _scalars.whole(m.o, m.get(), s.get(), c.get())
        high, low = _scalars.reciprocal(m.o, m.get(), *total)
        s.set(high)
        c.set(low)

    def result(self, value: Vector, u: int) -> Vector:
        u %= self.k.sets
        term = _scalars.exp(self.o, self.less_shift(self.range, value, u), self.scales[u])
        return _scalars.softmax(self.o, term, self.first[u].get(), self.second[u].get())


class ApplyLogSoftmax(Apply):
    """log_softmax in a second reading of x."""

    def finish(self, m: Variable, s: Variable, c: Variable) -> None:
        s.set(_scalars.log_sum(m.o, m.get(), s.get(), c.get())[0])

    def result(self, value: Vector, u: int) -> Vector:
        u %= self.k.sets
        return _scalars.log_softmax(value, self.m[u].get(), self.first[u].get())


class Copy(Output):
    """x to out."""

    def parameters(self) -> None:
        """There are none."""

    def result(self, value: Vector, u: int) -> Vector:
        return value


class Read(Maximum):
    """Writes m: the least that reading x can be for."""

    def leave(self) -> None:
        super().leave()
        with self.k.each_state(self.m) as (u, (m,)):
            self.write(u, (m.get(),))


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
        mask = k.mask(self.range, k.int(0), 0)
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
            by = _scalars.scale(o, m.get())
            term = o.where(largest, zero, _scalars.exp(o, part_m - by.shift, by))
            s2, c2 = _scalars.merge(term, zero, *_scalars.rescaled(o, part_m, m.get(), s2, c2))
            s2, c2 = _scalars.merge(s.get(), c.get(), s2, c2)
            s.set(s2)
            c.set(c2)

    def prefetch(self, j: ir.Value, vectors: int) -> None:
        """The pairs are in cache."""

    def pause(self, here: ir.Value) -> None:
        """The sums are made in one go."""

    def read(self, j: ir.Value, u: int, mask: Vector | None) -> Vector:
        return self.o.const(0.0)

    def step(self, j: ir.Value, u: int, mask: Vector | None, value: Vector) -> None:
        """Nothing is left for the walk to do."""

    def leave(self) -> None:
        m, count, s, c = self.m[0], self.count[0], self.s[0], self.c[0]
        s2, c2 = _scalars.with_equals(self.o, m.get(), count.get(), s.get(), c.get())
        s.set(s2)
        c.set(c2)
        self.finish(self.k.int(0), m, s, c)

    def finish(self, u: ir.Value, m: Variable, s: Variable, c: Variable) -> None:
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
    PAIRS_SOFTMAX: (Maximum, SumForPairsOfSoftmax),
    PAIRS_LOGSUMEXP: (Maximum, SumForPairsOfLogSumExp),
    MERGE: (Merge,),
    MERGE_LOGSUMEXP: (MergeLogSumExp,),
    APPLY_SOFTMAX: (ApplySoftmax,),
    APPLY_LOG_SOFTMAX: (ApplyLogSoftmax,),
    COPY: (Copy,),
    READ: (Read,),
}


MOST_STAGES = max(len(stages) for stages in STAGES.values())


# -- the compiled entry ---------------------------------------------------------------------------


@intrinsic
def _emit(typing_context: Any, x: Any, out: Any, pairs: Any, parameters: Any, ticket: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Kernel(builder, x.job, list(arguments)).run()
        return context.get_dummy_value()

    return types.void(x, out, pairs, parameters, ticket), generate


def _kernel(x, out, pairs, parameters, ticket):  # type: ignore[no-untyped-def]
    _emit(x, out, pairs, parameters, ticket)


def dispatcher(job: Job, cache: bool = True) -> Any:
    """The Numba function of this job alone."""
    return _entry.function(_kernel, dataclasses.astuple(job), cache)


@functools.cache
def compiled(job: Job) -> _entry.Entry:
    """``kernel(x, out, pairs, parameters, ticket)``."""
    return _entry.ready(_kernel, dataclasses.astuple(job), signature(job))


def signature(job: Job) -> tuple[types.Type, ...]:
    return (_entry.Target(job), *[_entry.ADDRESS] * 4)
