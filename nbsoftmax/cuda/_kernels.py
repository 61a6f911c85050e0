"""The kernels: how threads share lanes, hold numbers in registers, and join what they know.

An array is folded to ``(outer, n, inner)``, and a *tile* is what a group of threads holds of it: of one
row (``inner`` is 1), or of neighbouring columns.  Kernels with the same tiles do all there is to do:

* ``whole``: a tile holds its lanes from end to end. x is read once.
* ``pairs``, then ``apply`` (for logsumexp ``merge``): a lane is cut into chunks, one for each block.
  The first leaves each chunk's pair in scratch memory, the second joins a lane's pairs and reads x
  again. ``reduce``: pairs of a single chunk, made logsumexp at once.

A lane's pair is ``(m, count, s, c)``: its maximum, how many elements equal it, and the sum of the other
terms in two parts (`_scalars`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda

from .. import _scalars
from .._formats import FORMATS, Format
from .._semantics import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from ._prims import SIMULATED, Group, lifted

Values = list[Any]
INFINITY = float("inf")
PARTS = 4  # of a pair


@dataclass(frozen=True)
class Job:
    """One kernel: everything that shapes its machine code."""

    stage: str  # whole, pairs, reduce, apply, merge
    op: str
    source: str  # formats of x and of the result
    result: str
    along: bool  # lanes are rows; else columns
    group: Group
    width: int  # neighbouring numbers that a thread holds
    vectors: int  # how many times
    access: int  # numbers that x lets it read at once
    out_access: int
    block: int  # threads

    @property
    def form(self) -> Format:
        return FORMATS[self.source]

    @property
    def out_form(self) -> Format:
        return FORMATS[self.result]

    @property
    def lanes(self) -> int:
        """How many lanes a thread holds numbers of."""
        return 1 if self.along else self.width

    @property
    def real(self) -> _scalars.Real:
        return self.form.real

    @property
    def pair_form(self) -> Format:
        return FORMATS[self.real.name]

    @property
    def deep(self) -> int:
        """Threads behind each other along the lanes, in all blocks that share them."""
        return self.group.deep * self.group.blocks

    @property
    def advance(self) -> int:
        """Lane elements from one of a thread's vectors to its next."""
        return self.deep * self.width if self.along else self.deep

    @property
    def tile(self) -> int:
        """Lane elements of one tile."""
        return self.advance * self.vectors

    @property
    def items(self) -> int:
        """Tiles that a block works on at a time."""
        return self.block // self.group.threads

    def split(self, values: Values) -> list[Values]:
        """A thread's numbers by lane."""
        return [values] if self.along else [values[k :: self.width] for k in range(self.width)]

    def together(self, lanes: list[Values]) -> Values:
        """Numbers by lane in the order in which a thread holds them."""
        return lanes[0] if self.along else [v for vector in zip(*lanes, strict=True) for v in vector]

    @property
    def name(self) -> str:
        letter = "r" if self.along else "c"
        shape = f"{self.group.across}x{self.group.deep}x{self.group.blocks}"
        held = f"{self.vectors}x{self.width}a{self.access}a{self.out_access}b{self.block}"
        return f"{self.op}_{self.stage}_{self.source}_{self.result}_{letter}{shape}_{held}"


# -- a lane's numbers in registers ----------------------------------------------------------------


def maximum(o: Any, values: Values) -> Any:
    """The largest number. NaNs are passed over: the sum keeps them."""
    m = o.const(-INFINITY)
    for x in values:
        m = o.larger(x, m)
    return m


def larger(o: Any, p: Values, q: Values) -> Values:
    return [o.larger(a, b) for a, b in zip(p, q, strict=True)]


def terms(o: Any, values: Values, m: Any) -> Values:
    by = _scalars.scale(o, m)
    return [_scalars.exp(o, _scalars.shifted(o, x, m, by), by) for x in values]


def total(o: Any, terms: Values) -> Values:
    """The sum of terms in two parts."""
    start = o.const(2.0 ** (o.real.bias + 1))  # more than any term
    s, c = start, o.const(0.0)
    for term in terms:
        s, c = _scalars.add_to_more(s, c, term)
    return [s - start, c]


def add_totals(o: Any, p: Values, q: Values) -> Values:
    joined: Values = []
    for i in range(0, len(p), 2):
        joined += _scalars.merge(p[i], p[i + 1], q[i], q[i + 1])
    return joined


def push(o: Any, pair: Values, values: Values, m: Any) -> Values:
    """A pair of maximum ``m`` with more numbers, none above it."""
    _, count, s, c = pair
    by = _scalars.scale(o, m)
    one, zero = o.const(1.0), o.const(0.0)
    for x in values:
        equal = x == m
        near = o.where(equal, by.near, x - by.shift)
        term, c = _scalars.exp_two_parts(o, near, by, c, equal)
        s, c = _scalars.add(s, c, term)
        count = count + o.where(equal, one, zero)
    return [m, count, s, c]


def empty(o: Any) -> Values:
    """The pair of no numbers."""
    return [o.const(-INFINITY), o.const(0.0), o.const(0.0), o.const(0.0)]


def raised(o: Any, pair: Values, whole: Any) -> Values:
    """A pair as part of a lane with the maximum ``whole``."""
    m, count, s, c = pair
    same = m == whole
    by, factor = _scalars.scale(o, whole), _scalars.rescale(o, m, whole)
    term = _scalars.exp(o, m - by.shift, by)
    product = count * term
    rest = o.fma(count, term, o.const(0.0) - product)
    sum_, low = _scalars.add(product, rest + c * factor, s * factor)
    zero = o.const(0.0)
    return [
        whole,
        o.where(same, count, zero),
        o.where(same, s, sum_),
        o.where(same, c, low),
    ]


def add_pairs(o: Any, p: Values, q: Values) -> Values:
    """Pairs of the same maxima, joined."""
    joined: Values = []
    for i in range(0, len(p), PARTS):
        s, c = _scalars.merge(p[i + 2], p[i + 3], q[i + 2], q[i + 3])
        joined += [p[i], p[i + 1] + q[i + 1], s, c]
    return joined


def join(o: Any, p: Values, q: Values) -> Values:
    """Any pairs, joined."""
    joined: Values = []
    for i in range(0, len(p), PARTS):
        m = o.larger(p[i], q[i])
        joined += add_pairs(o, raised(o, p[i : i + PARTS], m), raised(o, q[i : i + PARTS], m))
    return joined


def finish(o: Any, op: str, pair: Values) -> Values:
    """What the results of a lane need of its pair; for logsumexp, the result."""
    m, count, s, c = pair
    s, c = _scalars.with_equals(o, m, count, s, c)
    if op == SOFTMAX:
        return [m, *_scalars.reciprocal(o, m, *_scalars.whole(o, m, s, c))]
    if op == LOGSUMEXP:
        return [_scalars.logsumexp(o, m, s, c)]
    return [m, _scalars.log_sum(o, m, s, c)[0]]


def answers(o: Any, op: str, values: Values, needs: Values) -> Values:
    """A lane's results from its numbers."""
    m = needs[0]
    if op == SOFTMAX:
        return [_scalars.softmax(o, term, *needs[1:]) for term in terms(o, values, m)]
    return [_scalars.log_softmax(x, m, needs[1]) for x in values]


NEEDS = {SOFTMAX: 3, LOG_SOFTMAX: 2, LOGSUMEXP: 1}  # numbers


# -- what kernels call ----------------------------------------------------------------------------


class Functions:
    """The functions of one job, for its kernel to call."""

    def __init__(self, job: Job) -> None:
        self.job = job
        lanes, held, pairs = job.lanes, job.vectors * job.width, PARTS * job.lanes
        reduces = job.op == LOGSUMEXP

        def function(body: Callable[..., Any], results: int = 0) -> Callable[..., Any]:
            return lifted(body, job.real, results)

        self.load = function(self._load, held)
        self.store = function(self._store)
        self.whole = function(self._whole, lanes if reduces else held)
        self.no_pairs = function(self._no_pairs, pairs)
        self.push_tile = function(self._push_tile, pairs)
        self.share_pairs = function(self._share_pairs, pairs)
        self.join_pairs = function(self._join_pairs, pairs)
        self.load_pairs = function(self._load_pairs, pairs)
        self.store_pairs = function(self._store_pairs)
        self.finish_lanes = function(self._finish_lanes, lanes * NEEDS[job.op])
        self.apply = function(self._apply, held)
        self.store_lanes = function(self._store_lanes)
        self.cluster_barrier = function(self._cluster_barrier)

    # Memory. The address is that of a thread's first vector, `first` its lane element, `step` the
    # bytes to its next one. `limit` is where the lane ends, and `edge` how many columns there are.

    def _places(self, o: Any, address: Any, step: Any, first: Any, limit: Any, edge: Any, form: Format, access: int) -> Any:
        job = self.job
        for j in range(job.vectors):
            at = o.plus(first, j * job.advance)
            for k in range(0, job.width, access):
                place = o.plus(o.plus(address, o.times(step, j)), k * form.itemsize)
                if job.along:
                    live = o.below(o.plus(at, k), limit)
                else:
                    live = o.all_of([o.below(at, limit), o.below(o.plus(o.times(edge, 0), k), edge)])
                yield place, live

    def _load(self, o: Any, address: Any, step: Any, first: Any, limit: Any, edge: Any) -> Values:
        job, values = self.job, []
        for place, live in self._places(o, address, step, first, limit, edge, job.form, job.access):
            values += o.read(job.form, place, job.access, live, -INFINITY)
        return values

    def _store(self, o: Any, address: Any, step: Any, first: Any, limit: Any, edge: Any, values: Any) -> None:
        job, access = self.job, self.job.out_access
        places = self._places(o, address, step, first, limit, edge, job.out_form, access)
        for i, (place, live) in enumerate(places):
            o.write(job.out_form, place, values[i * access : (i + 1) * access], live)

    # A tile that holds its lanes from end to end.

    def _whole(self, o: Any, values: Values) -> Values:
        job = self.job
        lanes = job.split(values)
        maxima = o.reduce(job.group, larger, [maximum(o, lane) for lane in lanes])
        if job.op == SOFTMAX:
            held = [terms(o, lane, m) for lane, m in zip(lanes, maxima, strict=True)]
            sums = o.reduce(job.group, add_totals, [part for lane in held for part in total(o, lane)])
            made = []
            for i, (lane, m) in enumerate(zip(held, maxima, strict=True)):
                inverse = _scalars.reciprocal(o, m, *sums[2 * i : 2 * i + 2])
                made.append([_scalars.softmax(o, term, *inverse) for term in lane])
            return job.together(made)
        pairs: Values = []
        for lane, m in zip(lanes, maxima, strict=True):
            pairs += push(o, empty(o), lane, m)
        pairs = o.reduce(job.group, add_pairs, pairs)
        made = []
        for i, (lane, m) in enumerate(zip(lanes, maxima, strict=True)):
            needs = finish(o, job.op, [m, *pairs[PARTS * i + 1 : PARTS * (i + 1)]])
            made.append(needs if job.op == LOGSUMEXP else answers(o, job.op, lane, needs))
        return [v for lane in made for v in lane] if job.op == LOGSUMEXP else job.together(made)

    # Tiles of lanes that are longer.

    def _no_pairs(self, o: Any) -> Values:
        return empty(o) * self.job.lanes

    def _push_tile(self, o: Any, pairs: Values, values: Values) -> Values:
        pushed: Values = []
        for i, lane in enumerate(self.job.split(values)):
            pair = pairs[PARTS * i : PARTS * (i + 1)]
            m = o.larger(maximum(o, lane), pair[0])
            pushed += push(o, raised(o, pair, m), lane, m)
        return pushed

    def _share_pairs(self, o: Any, pairs: Values) -> Values:
        """Of all threads of a group."""
        maxima = o.reduce(self.job.group, larger, pairs[::PARTS])
        same: Values = []
        for i, m in enumerate(maxima):
            same += raised(o, pairs[PARTS * i : PARTS * (i + 1)], m)
        return o.reduce(self.job.group, add_pairs, same)

    def _join_pairs(self, o: Any, pairs: Values, others: Values) -> Values:
        return join(o, pairs, others)

    def _pair_places(self, o: Any, address: Any, plane: Any, edge: Any) -> Any:
        """Where the parts of pairs lie: one plane for all maxima, and so on."""
        job = self.job
        for k in range(job.lanes):
            live = o.below(o.plus(o.times(edge, 0), k), edge)
            for part in range(PARTS):
                place = o.plus(o.plus(address, o.times(plane, part)), k * job.real.itemsize)
                yield place, live, part

    def _load_pairs(self, o: Any, address: Any, plane: Any, edge: Any) -> Values:
        values = []
        for place, live, part in self._pair_places(o, address, plane, edge):
            fill = 0.0 if part else -INFINITY
            values += o.read(self.job.pair_form, place, 1, live, fill)
        return values

    def _store_pairs(self, o: Any, address: Any, plane: Any, edge: Any, pairs: Values) -> None:
        places = self._pair_places(o, address, plane, edge)
        for pair, (place, live, _) in zip(pairs, places, strict=True):
            o.write(self.job.pair_form, place, [pair], live)

    def _finish_lanes(self, o: Any, pairs: Values) -> Values:
        made: Values = []
        for i in range(self.job.lanes):
            made += finish(o, self.job.op, pairs[PARTS * i : PARTS * (i + 1)])
        return made

    def _apply(self, o: Any, values: Values, needs: Values) -> Values:
        job = self.job
        size = len(needs) // job.lanes
        lanes = [
            answers(o, job.op, lane, needs[size * i : size * (i + 1)])
            for i, lane in enumerate(job.split(values))
        ]
        return job.together(lanes)

    def _store_lanes(self, o: Any, address: Any, edge: Any, values: Values) -> None:
        """One result for each lane."""
        form = self.job.out_form
        for k, value in enumerate(values):
            live = o.below(o.plus(o.times(edge, 0), k), edge)
            o.write(form, o.plus(address, k * form.itemsize), [value], live)

    def _cluster_barrier(self, o: Any) -> None:
        o.cluster_barrier()


# -- the kernels ----------------------------------------------------------------------------------

# Every argument is a 64-bit integer: addresses, then sizes in elements, then strides in bytes. Blocks
# count through the tiles of one index of ``outer`` after the other; where a lane is cut, through its
# chunks first.


def kernel(job: Job) -> Callable[..., None]:
    """A job's kernel as Python, for the compiler or the simulator."""
    return {"whole": _whole, "pairs": _pairs, "reduce": _pairs, "apply": _apply, "merge": _apply}[
        job.stage
    ](job)


def _position(job: Job) -> Callable[..., Any]:
    """Where a thread is: its index of outer, first column, columns, and threads before it."""
    along, width, items = job.along, job.width, job.items
    across, threads, deep, blocks = (
        job.group.across,
        job.group.threads,
        job.group.deep,
        job.group.blocks,
    )

    @cuda.jit(device=True)
    def position(chunks: int, outer: int, inner: int) -> Any:
        thread = np.int64(cuda.threadIdx.x)
        unit = np.int64(cuda.blockIdx.x) // chunks
        before = thread % threads // across
        if SIMULATED:  # there a cluster is a block, and its blocks are rows of threads
            before += np.int64(cuda.threadIdx.y) * deep
        elif blocks > 1:
            before += unit % blocks * deep
            unit = unit // blocks
        item = unit * items + thread // threads
        if along:
            return item, np.int64(0), np.int64(1 if item < outer else 0), before
        panels = (inner + (across * width - 1)) // (across * width)
        column = (item % panels * across + thread % across) * width
        index = item // panels
        return index, column, max(0, min(inner - column, width)) if index < outer else 0, before

    return position


def _whole(job: Job) -> Callable[..., None]:
    f, position = Functions(job), _position(job)
    load, store, whole, store_lanes = f.load, f.store, f.whole, f.store_lanes
    cluster_barrier = f.cluster_barrier
    along, width, advance, clusters = job.along, job.width, job.advance, job.group.blocks > 1
    size, out_size, reduces = job.form.itemsize, job.out_form.itemsize, job.op == LOGSUMEXP

    def kernel(
        x: int, out: int, outer: int, n: int, inner: int,
        x_outer: int, x_n: int, out_outer: int, out_n: int,
    ) -> None:  # fmt: skip
        index, column, edge, before = position(1, outer, inner)
        first = before * width if along else before
        limit = n if edge > 0 else 0
        address = x + index * x_outer + column * size + first * x_n
        values = load(address, advance * x_n, first, limit, edge)
        results = whole(values)
        address = out + index * out_outer + column * out_size
        if reduces:
            store_lanes(address, edge if before == 0 else 0, results)
        else:
            store(address + first * out_n, advance * out_n, first, limit, edge, results)
        if clusters:  # no block may end while another reads its memory
            cluster_barrier()

    return kernel


def _pairs(job: Job) -> Callable[..., None]:
    f, position = Functions(job), _position(job)
    load, push_tile, share_pairs, no_pairs = f.load, f.push_tile, f.share_pairs, f.no_pairs
    finish_lanes, store_lanes, store_pairs = f.finish_lanes, f.store_lanes, f.store_pairs
    along, width, advance, tile = job.along, job.width, job.advance, job.tile
    size, out_size, pair_size = job.form.itemsize, job.out_form.itemsize, job.real.itemsize
    final = job.stage == "reduce"

    def kernel(
        x: int, out: int, outer: int, n: int, inner: int,
        x_outer: int, x_n: int, out_outer: int, chunks: int, length: int,
    ) -> None:  # fmt: skip
        chunk = np.int64(cuda.blockIdx.x) % chunks
        index, column, edge, before = position(chunks, outer, inner)
        first = before * width if along else before
        start = chunk * length
        end = min(start + length, n)
        limit = end if edge > 0 else 0
        address = x + index * x_outer + column * size + first * x_n
        pairs = no_pairs()
        while start < end:
            values = load(address + start * x_n, advance * x_n, start + first, limit, edge)
            pairs = push_tile(pairs, values)
            start += tile
        pairs = share_pairs(pairs)
        edge = edge if before == 0 else 0
        if final:
            address = out + index * out_outer + column * out_size
            store_lanes(address, edge, finish_lanes(pairs))
        else:
            lanes = outer * inner
            lane = chunk * lanes + index * inner + column
            store_pairs(out + lane * pair_size, chunks * lanes * pair_size, edge, pairs)

    return kernel


def _apply(job: Job) -> Callable[..., None]:
    f, position = Functions(job), _position(job)
    load, store, apply, no_pairs = f.load, f.store, f.apply, f.no_pairs
    load_pairs, join_pairs, share_pairs = f.load_pairs, f.join_pairs, f.share_pairs
    finish_lanes, store_lanes = f.finish_lanes, f.store_lanes
    along, width, advance, tile, deep = job.along, job.width, job.advance, job.tile, job.deep
    size, out_size, pair_size = job.form.itemsize, job.out_form.itemsize, job.real.itemsize
    reduces = job.op == LOGSUMEXP

    def kernel(
        x: int, out: int, pairs_: int, outer: int, n: int, inner: int,
        x_outer: int, x_n: int, out_outer: int, out_n: int, chunks: int, length: int,
    ) -> None:  # fmt: skip
        parts = 1 if reduces else chunks  # that this lane's results are written in
        index, column, edge, before = position(parts, outer, inner)
        lanes = outer * inner
        plane = chunks * lanes * pair_size
        address = pairs_ + (index * inner + column) * pair_size
        pairs = no_pairs()
        chunk = before
        while chunk < chunks:
            others = load_pairs(address + chunk * lanes * pair_size, plane, edge)
            pairs = join_pairs(pairs, others)
            chunk += deep
        needs = finish_lanes(share_pairs(pairs))
        to = out + index * out_outer + column * out_size
        if reduces:
            store_lanes(to, edge if before == 0 else 0, needs)
        else:
            first = before * width if along else before
            chunk = np.int64(cuda.blockIdx.x) % chunks
            low = chunk * length
            limit = min(low + length, n)
            # Backwards: what was read last lies in the cache.
            start = low + (limit - 1 - low) // tile * tile
            limit = limit if edge > 0 else 0
            address = x + index * x_outer + column * size + first * x_n
            to += first * out_n
            while start >= low:
                values = load(address + start * x_n, advance * x_n, start + first, limit, edge)
                results = apply(values, needs)
                store(to + start * out_n, advance * out_n, start + first, limit, edge, results)
                start -= tile

    return kernel
