"""The kernels: how threads share lanes, hold numbers in registers, and join what they know.

An array is folded to ``(outer, n, inner)``, and a *tile* is what a group of threads holds of it: of
one row (``inner`` is 1), or of neighbouring columns. Kernels with the same tiles do all there is to
do:

* ``whole``: a tile holds its lanes from end to end. x is read once.
* ``pairs``, then ``apply`` (for logsumexp ``merge``): a lane is cut into chunks, one for each
  block. The first leaves each chunk's pair in scratch memory, the second joins a lane's pairs and
  reads x again. ``reduce``: pairs of a single chunk, made logsumexp at once.

Arrays that are not folded, or have a mask, are packed to rows first, and results taken to where
they belong: `Elements`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba import cuda

from .. import _scalars
from .._formats import FORMATS
from .._semantics import LOGSUMEXP, SOFTMAX
from . import _lanes
from ._jobs import SIMULATED, Elements, Job, Values
from ._prims import device_function, lifted

# -- what kernels call ----------------------------------------------------------------------------


class Functions:
    """The functions of one job, for its kernel to call."""

    def __init__(self, job: Job) -> None:
        self.job = job
        lanes, held, pairs = job.lanes, job.vectors * job.width, job.parts * job.lanes
        reduces = job.op == LOGSUMEXP
        # Logarithms of neighbouring lanes: each of the threads behind each other makes one.
        self.one_each = reduces and job.group.deep >= lanes > 1
        finished = 1 if self.one_each else lanes

        def function(body: Callable[..., Any], results: int = 0) -> Callable[..., Any]:
            return lifted(body, job.real, results)

        self.load = function(self._load, held)
        self.store = function(self._store)
        self.softmax = function(self._softmax, held)
        # All maxima; and of each lane that is finished here its sum in two parts or its result, and
        # whether that is good enough.
        self.known = 2 if reduces else 3
        self.sums = function(self._sums, lanes + self.known * finished)
        self.careful_sums = function(self._careful_sums, lanes + self.known * finished)
        self.anywhere = function(self._anywhere, 1)
        self.logarithms = function(self._logarithms, finished if reduces else held)
        self.no_pairs = function(self._no_pairs, pairs)
        self.push_tile = function(self._push_tile, pairs)
        self.push_weighted = function(self._push_weighted, pairs)
        self.load_weights = function(self._load_weights, held)
        self.share_pairs = function(self._share_pairs, pairs)
        self.join_pairs = function(self._join_pairs, pairs)
        self.load_pairs = function(self._load_pairs, pairs)
        self.store_pairs = function(self._store_pairs)
        self.finish_lanes = function(self._finish_lanes, lanes * _lanes.NEEDS[job.op])
        self.finish_values = function(self._finish_values, lanes)
        self.finish_signs = function(self._finish_signs, lanes)
        self.apply = function(self._apply, held)
        self.store_lanes = function(self._store_lanes)
        self.store_own = function(self._store_own)
        self.cluster_arrive = function(self._cluster_arrive)
        self.cluster_wait = function(self._cluster_wait)

    # Memory. The address is that of a thread's first vector, `first` its lane element, `step` the
    # bytes to its next one. `limit` is where the lane ends, and `edge` how many columns there are.

    def _places(
        self, o: Any, address: Any, step: Any, first: Any, limit: Any, edge: Any, out: bool = False
    ) -> Iterator[tuple[Any, Any]]:
        job = self.job
        access, form = (job.out_access, job.out_form) if out else (job.access, job.form)
        left, edge = o.count(limit, first, job.tile), o.count(edge, 0, job.width)
        for j in range(job.vectors):
            at = j * job.advance
            start = o.plus(address, at * form.itemsize if job.along else o.times(step, j))
            for k in range(0, job.width, access):
                place = o.plus(start, k * form.itemsize)
                if job.along:
                    yield place, o.above(left, at + k)
                else:
                    yield place, o.all_of([o.above(left, at), o.above(edge, k)])

    def _load(self, o: Any, address: Any, step: Any, first: Any, limit: Any, edge: Any) -> Values:
        return self._tile(o, self._places(o, address, step, first, limit, edge), -_lanes.INFINITY)

    def _load_weights(
        self, o: Any, address: Any, step: Any, first: Any, limit: Any, edge: Any
    ) -> Values:
        return self._tile(o, self._places(o, address, step, first, limit, edge), 0.0)

    def _tile(self, o: Any, places: Any, fill: float) -> Values:
        values: Values = []
        for place, live in places:
            values += o.read(self.job.form, place, self.job.access, live, fill)
        return values

    def _store(
        self, o: Any, address: Any, step: Any, first: Any, limit: Any, edge: Any, values: Values
    ) -> None:
        access = self.job.out_access
        places = self._places(o, address, step, first, limit, edge, out=True)
        for i, (place, live) in enumerate(places):
            o.write(self.job.out_form, place, values[i * access : (i + 1) * access], live)

    # A tile that holds its lanes from end to end.

    def _totals(
        self, o: Any, values: Values, keep: bool
    ) -> tuple[Values, list[Values], list[Values]]:
        """Of each lane: its maximum, its terms if they are to be kept, their sum."""
        job = self.job
        lanes = job.split(values)
        maxima = o.reduce(job.group, _lanes.larger, [_lanes.maximum(o, lane) for lane in lanes])
        held = [_lanes.total(o, lane, m, keep) for lane, m in zip(lanes, maxima, strict=True)]
        sums = _lanes.add_totals(o, job.group, [lane[:2] for lane in held])
        return maxima, [lane[2:] for lane in held], sums

    def _softmax(self, o: Any, values: Values) -> Values:
        made = []
        for m, lane, sums in zip(*self._totals(o, values, True), strict=True):
            inverse = _scalars.reciprocal(o, m, *sums)
            made.append([_scalars.softmax(o, term, *inverse) for term in lane])
        return self.job.together(made)

    # log_softmax wants the sum of all terms but one largest, to its last bit. `own` says which lane
    # this thread finishes, where each does one.

    def _finished(self, o: Any, own: Any, lanes: list[Values]) -> list[Values]:
        """What is known of the lanes that this thread finishes, from that of all."""
        if not self.one_each:
            return lanes
        chosen = lanes[0]
        for k, lane in enumerate(lanes[1:], 1):
            here = o.above(own, k - 1)
            chosen = [o.chosen(here, b, a) for a, b in zip(chosen, lane, strict=True)]
        return [chosen]

    def _sums(self, o: Any, values: Values, own: Any) -> Values:
        """From the sum of all terms."""
        job = self.job
        additions = job.vectors * (job.width if job.along else 1) + job.deep.bit_length()
        maxima, _, totals = self._totals(o, values, False)
        found = maxima
        lanes = [[m, *sums] for m, sums in zip(maxima, totals, strict=True)]
        for m, *sums in self._finished(o, own, lanes):
            if job.op == LOGSUMEXP:
                found = found + _lanes.logsumexp(o, m, sums)
            else:
                found = found + _lanes.rest(o, m, sums, additions)
        return found

    def _careful_sums(self, o: Any, values: Values, sums: Values, own: Any) -> Values:
        """With the largest terms counted instead, for lanes that want it."""
        job = self.job
        maxima = sums[: job.lanes]
        known = _lanes.each_pair(sums[job.lanes :], self.known)
        pairs: Values = []
        # This is rare. What it has in common with the first sum is computed again: kept until here,
        # it would take twice the registers.
        values = [o.opaque(v) for v in values]
        for lane, m in zip(job.split(values), maxima, strict=True):
            pairs += _lanes.push(o, _lanes.empty(o, job.parts), lane, o.opaque(m))
        pairs = _lanes.reduced(o, job.group, job.parts, pairs)
        finished = self._finished(o, own, _lanes.each_pair(pairs, job.parts))
        found = maxima
        for (*quick, small), pair in zip(known, finished, strict=True):
            better = list(_scalars.with_equals(o, *pair))
            if job.op == LOGSUMEXP:
                better = _lanes.finish_rest(o, job.op, pair[0], *better)
            again = small > o.const(0.0)
            chosen = [o.where(again, a, b) for a, b in zip(better, quick, strict=True)]
            found = [*found, *chosen, small]
        return found

    def _anywhere(self, o: Any, sums: Values) -> Values:
        """1 if any lane of the threads that sum together wants careful sums."""
        known = _lanes.each_pair(sums[self.job.lanes :], self.known)
        wanted = functools.reduce(o.larger, [small for *_, small in known])
        return [o.anywhere(wanted, self.job.group)]

    def _logarithms(self, o: Any, values: Values, sums: Values) -> Values:
        job, made = self.job, []
        maxima, known = sums[: job.lanes], _lanes.each_pair(sums[job.lanes :], self.known)
        if job.op == LOGSUMEXP:
            return [value for value, _ in known]
        for lane, m, (s, c, _) in zip(job.split(values), maxima, known, strict=True):
            made.append(_lanes.answers(o, job.op, lane, _lanes.finish_rest(o, job.op, m, s, c)))
        return job.together(made)

    # Tiles of lanes that are longer.

    def _no_pairs(self, o: Any) -> Values:
        return _lanes.empty(o, self.job.parts) * self.job.lanes

    def _push_tile(self, o: Any, pairs: Values, values: Values) -> Values:
        pushed: Values = []
        pairs_ = _lanes.each_pair(pairs, self.job.parts)
        for pair, lane in zip(pairs_, self.job.split(values), strict=True):
            pushed += _lanes.grown(o, pair, lane)
        return pushed

    def _push_weighted(self, o: Any, pairs: Values, values: Values, weights: Values) -> Values:
        """Of one lane. A weight of 0 hides its number, and -inf its weight."""
        zero, least = o.const(0.0), o.const(-_lanes.INFINITY)
        values = [o.where(w == zero, least, x) for x, w in zip(values, weights, strict=True)]
        weights = [o.where(x == least, zero, w) for x, w in zip(values, weights, strict=True)]
        return _lanes.grown(o, pairs, values, weights)

    def _share_pairs(self, o: Any, pairs: Values) -> Values:
        return _lanes.shared(o, self.job.group, self.job.parts, pairs)

    def _join_pairs(self, o: Any, pairs: Values, others: Values) -> Values:
        return _lanes.join(o, self.job.parts, pairs, others)

    def _pair_places(self, o: Any, address: Any, plane: Any, edge: Any) -> Any:
        """Where the parts of pairs lie: one plane for all maxima, and so on."""
        job = self.job
        for k in range(job.lanes):
            live = o.above(edge, k)
            for part in range(job.parts):
                place = o.plus(o.plus(address, o.times(plane, part)), k * job.real.itemsize)
                yield place, live, part

    def _load_pairs(self, o: Any, address: Any, plane: Any, edge: Any) -> Values:
        values = []
        for place, live, part in self._pair_places(o, address, plane, edge):
            fill = 0.0 if part else -_lanes.INFINITY
            values += o.read(self.job.pair_form, place, 1, live, fill)
        return values

    def _store_pairs(self, o: Any, address: Any, plane: Any, edge: Any, pairs: Values) -> None:
        places = self._pair_places(o, address, plane, edge)
        for pair, (place, live, _) in zip(pairs, places, strict=True):
            o.write(self.job.pair_form, place, [pair], live)

    def _finish_lanes(self, o: Any, pairs: Values) -> Values:
        made: Values = []
        for pair in _lanes.each_pair(pairs, self.job.parts):
            made += _lanes.finish(o, self.job.op, pair)
        return made

    def _finish_values(self, o: Any, pairs: Values) -> Values:
        pairs_ = _lanes.each_pair(pairs, self.job.parts)
        if self.job.weighted:
            return [_lanes.finish_weighted(o, pair)[0] for pair in pairs_]
        return [_lanes.finish(o, LOGSUMEXP, pair)[0] for pair in pairs_]

    def _finish_signs(self, o: Any, pairs: Values) -> Values:
        return [
            _lanes.finish_weighted(o, pair)[1] for pair in _lanes.each_pair(pairs, self.job.parts)
        ]

    def _apply(self, o: Any, values: Values, needs: Values) -> Values:
        job = self.job
        size = len(needs) // job.lanes
        lanes = [
            _lanes.answers(o, job.op, lane, needs[size * i : size * (i + 1)])
            for i, lane in enumerate(job.split(values))
        ]
        return job.together(lanes)

    def _store_own(self, o: Any, address: Any, edge: Any, own: Any, values: Values) -> None:
        """The result of one lane, if there is such."""
        form = self.job.out_form
        o.write(form, o.plus(address, o.times(own, form.itemsize)), values, o.below(own, edge))

    def _store_lanes(self, o: Any, address: Any, edge: Any, values: Values) -> None:
        """One result for each lane."""
        form = self.job.out_form
        for k, value in enumerate(values):
            live = o.above(edge, k)
            o.write(form, o.plus(address, k * form.itemsize), [value], live)

    # No block may end while another reads its memory. Who arrives before it stores need not wait
    # for its stores.

    def _cluster_arrive(self, o: Any) -> None:
        o.cluster_arrive()

    def _cluster_wait(self, o: Any) -> None:
        o.cluster_wait()


# -- the kernels ----------------------------------------------------------------------------------

# Every argument is a 64-bit integer: addresses, then sizes in elements, then strides in bytes.
# Blocks count through the tiles of one index of ``outer`` after the other, and where a lane is cut
# through its chunks first.


def kernel(job: "Job | Elements") -> Callable[..., None]:
    """A job's kernel as Python, for the compiler or the simulator."""
    makers: dict[str, Callable[[Any], Callable[..., None]]] = {
        "whole": _whole,
        "pairs": _pairs,
        "reduce": _pairs,
        "apply": _apply,
        "merge": _apply,
        "elements": _elements,
    }
    return makers[job.stage](job)


def _position(job: Job) -> Callable[..., Any]:
    """Where a thread is: its index of outer, first column, columns, and threads before it."""
    along, width, items = job.along, job.width, job.group.together
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


def in_registers(f: Functions) -> Callable[..., Any]:
    """The results of lanes from the numbers of them that a thread holds, and its own lane."""
    sums, careful_sums, anywhere, logarithms = f.sums, f.careful_sums, f.anywhere, f.logarithms
    softmax = f.softmax
    if f.job.op == SOFTMAX:
        return device_function(lambda values, own: softmax(values))

    @device_function
    def results(values: Any, own: int) -> Any:
        known = sums(values, own)
        if anywhere(known)[0] > 0:
            known = careful_sums(values, known, own)
        return logarithms(values, known)

    return results


def _whole(job: Job) -> Callable[..., None]:
    f, position = Functions(job), _position(job)
    load, store, store_lanes, store_own = f.load, f.store, f.store_lanes, f.store_own
    one_each, lanes = f.one_each, job.lanes
    cluster_arrive, cluster_wait = f.cluster_arrive, f.cluster_wait
    results_of = in_registers(f)
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
        results = results_of(values, before & (lanes - 1) if one_each else 0)
        if clusters:
            cluster_arrive()
        address = out + index * out_outer + column * out_size
        if one_each:
            store_own(address, min(edge, lanes), before, results)
        elif reduces:
            store_lanes(address, edge if before == 0 else 0, results)
        else:
            store(address + first * out_n, advance * out_n, first, limit, edge, results)
        if clusters:
            cluster_wait()

    return kernel


def _pairs(job: Job) -> Callable[..., None]:
    f, position = Functions(job), _position(job)
    load, push_tile, share_pairs, no_pairs = f.load, f.push_tile, f.share_pairs, f.no_pairs
    load_weights, push_weighted = f.load_weights, f.push_weighted
    store_lanes, store_pairs = f.store_lanes, f.store_pairs
    finish_values, finish_signs = f.finish_values, f.finish_signs
    along, width, advance, tile = job.along, job.width, job.advance, job.tile
    size, out_size, pair_size = job.form.itemsize, job.out_form.itemsize, job.real.itemsize
    final, weighted = job.stage == "reduce", job.weighted

    def kernel(
        x: int, weights: int, out: int, signs: int, outer: int, n: int, inner: int,
        x_outer: int, x_n: int, out_outer: int, chunks: int, length: int,
    ) -> None:  # fmt: skip
        chunk = np.int64(cuda.blockIdx.x) % chunks
        index, column, edge, before = position(chunks, outer, inner)
        first = before * width if along else before
        start = chunk * length
        end = min(start + length, n)
        limit = end if edge > 0 else 0
        place = index * x_outer + column * size + first * x_n
        pairs = no_pairs()
        while start < end:
            at, step = place + start * x_n, advance * x_n
            values = load(x + at, step, start + first, limit, edge)
            if weighted:
                by = load_weights(weights + at, step, start + first, limit, edge)
                pairs = push_weighted(pairs, values, by)
            else:
                pairs = push_tile(pairs, values)
            start += tile
        pairs = share_pairs(pairs)
        edge = edge if before == 0 else 0
        if final:
            place = index * out_outer + column * out_size
            store_lanes(out + place, edge, finish_values(pairs))
            if weighted:
                store_lanes(signs + place, edge, finish_signs(pairs))
        else:
            lanes = outer * inner
            lane = chunk * lanes + index * inner + column
            store_pairs(out + lane * pair_size, chunks * lanes * pair_size, edge, pairs)

    return kernel


def _apply(job: Job) -> Callable[..., None]:
    f, position = Functions(job), _position(job)
    load, store, apply, no_pairs = f.load, f.store, f.apply, f.no_pairs
    load_pairs, join_pairs, share_pairs = f.load_pairs, f.join_pairs, f.share_pairs
    finish_lanes, finish_values, finish_signs = f.finish_lanes, f.finish_values, f.finish_signs
    store_lanes = f.store_lanes
    along, width, advance, tile, deep = job.along, job.width, job.advance, job.tile, job.deep
    size, out_size, pair_size = job.form.itemsize, job.out_form.itemsize, job.real.itemsize
    reduces, weighted = job.stage == "merge", job.weighted

    def kernel(
        x: int, pairs_: int, out: int, signs: int, outer: int, n: int, inner: int,
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
        pairs = share_pairs(pairs)
        place = index * out_outer + column * out_size
        if reduces:
            edge = edge if before == 0 else 0
            store_lanes(out + place, edge, finish_values(pairs))
            if weighted:
                store_lanes(signs + place, edge, finish_signs(pairs))
        else:
            needs = finish_lanes(pairs)
            first = before * width if along else before
            chunk = np.int64(cuda.blockIdx.x) % chunks
            low = chunk * length
            limit = min(low + length, n)
            # Backwards: what was read last lies in the cache.
            start = low + (limit - 1 - low) // tile * tile
            limit = limit if edge > 0 else 0
            address = x + index * x_outer + column * size + first * x_n
            to = out + place + first * out_n
            while start >= low:
                values = load(address + start * x_n, advance * x_n, start + first, limit, edge)
                results = apply(values, needs)
                store(to + start * out_n, advance * out_n, start + first, limit, edge, results)
                start -= tile

    return kernel


# -- one element after the other ------------------------------------------------------------------


def _elements(job: Elements) -> Callable[..., None]:
    form, out_form = FORMATS[job.source], FORMATS[job.result]
    mask_form = FORMATS[job.mask] if job.mask else None

    def copy(
        o: Any, i: Any, count: Any, x: Any, mask: Any, out: Any,
        sizes: Any, steps: Any, mask_steps: Any, out_steps: Any,
    ) -> None:  # fmt: skip
        live = o.below(i, count)
        for size, *strides in reversed(list(zip(sizes, steps, mask_steps, out_steps, strict=True))):
            i, index = o.divided(i, size)
            x, mask, out = (
                o.plus(place, o.times(index, stride))
                for place, stride in zip((x, mask, out), strides, strict=True)
            )
        (value,) = o.read(form, x, 1, live, 0.0, job.native)
        if mask_form is not None:
            (visible,) = o.read(mask_form, mask, 1, live, 0.0)
            value = o.where(visible > o.const(job.above), value, o.const(job.fill))
        o.write(out_form, out, [value], live, job.result_native)

    body, block = lifted(copy, form.real), job.group.block

    def kernel(
        x: int, mask: int, out: int, count: int,
        sizes: Any, steps: Any, mask_steps: Any, out_steps: Any,
    ) -> None:  # fmt: skip
        i = np.int64(cuda.blockIdx.x) * block + np.int64(cuda.threadIdx.x)
        body(i, count, x, mask, out, sizes, steps, mask_steps, out_steps)

    return kernel
