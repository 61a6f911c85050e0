"""The NumPy backend: fold, allocate, plan, launch."""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _cpu_kernels as kernels
from . import _direct, _formats, _handover, _memory, _plain, _plan, _pool, _scalars, _semantics
from ._semantics import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX, Array

# What makes the pairs of lanes that are cut into blocks, and what applies them when merged.
_FIRST = {
    SOFTMAX: kernels.PAIRS_SOFTMAX,
    LOG_SOFTMAX: kernels.PAIRS,
    LOGSUMEXP: kernels.PAIRS_LOGSUMEXP,
}
_LAST = {
    SOFTMAX: kernels.APPLY_SOFTMAX,
    LOG_SOFTMAX: kernels.APPLY_LOG_SOFTMAX,
    LOGSUMEXP: None,
}


# -- one kernel call ------------------------------------------------------------------------------

Kernel = Callable[[Array, Array, Array | None, Array, Array | None], object]


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel and the numbers it is told, for arrays of one geometry."""

    kernel: Kernel
    machine_code: Array  # its address
    parameters: Array
    items: int
    parallel: bool
    wakes: bool  # takes longer than waking a thread

    def __call__(self, x: Array, out: Array, pairs: Array | None, threads: int) -> None:
        together = threads > 1 and self.parallel
        threads = _pool.sharers(threads, self.wakes) if together else 1
        if threads == 1:
            self.kernel(x, out, pairs, self.parameters, None)
        else:
            _pool.share(_Running(self, x, out, pairs, threads), threads)
        if together and not self.wakes:
            _pool.short_ended()


class _Running(_pool.Job):
    """A call that threads share."""

    __slots__ = ("call", "loan", "wakes")

    def __init__(self, call: Call, x: Array, out: Array, pairs: Array | None, threads: int) -> None:
        self.call, self.wakes = call, call.wakes
        ticket = _handover.ticket(threads)
        self.loan = (call.machine_code, x, out, pairs, call.parameters, ticket)

    def work(self) -> None:
        self.call.kernel(*self.loan[1:])

    def finished(self) -> bool:
        return bool(self.loan[-1][_handover.FINISHED] == self.call.items)

    def cancel(self) -> None:
        self.loan[-1][0] = 1 << 31  # more chunks than there are


def _call(
    job: kernels.Job,
    shape: tuple[int, int, int],
    block: int,
    item_bytes: int,
    work_bytes: int,
    strides: dict[str, int],
) -> Call:
    """``job`` on an array folded to ``shape``, its lanes cut into blocks of ``block``."""
    outer, n, inner = shape
    itemsize = _formats.FORMATS[job.source].real.itemsize
    width = _plan.VECTOR_BYTES // itemsize
    blocks = max(1, -(-n // block))
    panels = 1
    if job.walk == "across":
        panels = -(-inner // (job.panel * width)) + strides.get("shifted", 0)
    items = outer * blocks * panels
    chunk = items
    threads = _pool.most_threads() if work_bytes >= _plan.LIMITS.serial_bytes else 1
    wakes = work_bytes >= _plan.LIMITS.wake_bytes
    if threads > 1:
        group = panels if job.by_slabs else job.group
        chunk = _plan.chunk_items(items, item_bytes, group, threads, wakes)
    rows = block + 2 * width if job.of_rows else block
    row = {"along": itemsize, "beside": job.panel * itemsize}.get(
        job.walk, job.panel * _plan.VECTOR_BYTES
    )
    numbers = {
        "items": items,
        "chunk": chunk,
        "chunks": -(-items // max(1, chunk)),
        "n": n,
        "block": block,
        "blocks": blocks,
        "panels": panels,
        "inner": inner,
        "scratch": (rows + job.wraps) * row + 6 * _plan.VECTOR_BYTES,
        "ahead": _plan.ahead(job.walk, block * row, _formats.FORMATS[job.source].itemsize),
        **strides,
    }
    parameters = np.array([numbers.get(name, 0) for name in kernels.PARAMETERS], np.int64)
    kernel = kernels.compiled(job)
    machine_code = np.array([kernel.address], np.int64)
    return Call(kernel.call, machine_code, parameters, items, chunk < items, wakes)


# -- one lane layout, remembered -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Launch:
    """All that is known before the data: made once for each shape, strides, dtype and axis."""

    calls: tuple[Call, ...]
    pairs: tuple[tuple[int, ...], ...]  # shapes of the arrays between the calls
    compute: np.dtype[Any]
    result: np.dtype[Any]
    shape: tuple[int, ...]  # of the new result, in the order of the fold
    transpose: tuple[int, ...] | None  # from that order to the array's
    final_shape: tuple[int, ...]
    large: bool  # the result lies on whole vectors, in memory that is kept
    parallel: bool
    small: Kernel | None  # the one kernel, if it runs in this thread
    direct: bool  # and machine code may find it
    brief: bool  # and hold the interpreter's lock meanwhile

    def new(self, x: Array) -> Any:
        """The result as the caller sees it; a full reduction is a scalar."""
        if self.large:
            kept = _plan.LIMITS.past_cache_bytes, _plan.LIMITS.kept_bytes
            out = _memory.empty(self.shape, self.result, _plan.VECTOR_BYTES, kept)
        else:
            out = np.empty(self.shape, self.result)
        self.into(x, out)
        if self.transpose is not None:
            out = out.transpose(self.transpose)
        if self.shape != self.final_shape:
            out = out.reshape(self.final_shape)
        return out if self.final_shape else out[()]

    def fills(self, out: Any, x: Array) -> bool:
        """Whether ``out`` is as a new result would be, and apart from x."""
        if type(out) is not np.ndarray or out.shape != self.final_shape:
            return False
        flags = out.flags
        as_new = flags.c_contiguous and flags.writeable and out.dtype == self.result
        return as_new and self.transpose is None and _apart(out, x)

    def into(self, x: Array, out: Array) -> None:
        """Fill ``out``, whose strides are those that this was made for."""
        if self.small is not None:
            self.small(x, out, None, self.calls[0].parameters, None)
            return
        self.with_threads(x, out, _pool.thread_count() if self.parallel else 1)

    def with_threads(self, x: Array, out: Array, threads: int) -> None:
        """`into` with a number of threads."""
        if not self.pairs:
            self.calls[0](x, out, None, threads)
            return
        made = [np.empty(shape, self.compute) for shape in self.pairs]
        sources = [x, *made[:1], x]
        for call, source, target, pairs in zip(
            self.calls, sources, [*made, out], [None, None, *made[1:]], strict=False
        ):
            call(source, target, pairs, threads)


def _reads(dtype: np.dtype[Any]) -> bool:
    """Whether kernels read this dtype as it lies in memory."""
    if _formats.of(dtype) is None or not kernels.COMPILES:
        return False
    return dtype.name != "float16" or kernels.HALF_IN_HARDWARE


def _wraps(plan: _plan.Plan, n: int, inner: int, width: int) -> bool:
    """Whether the last panel across, of rows without gaps, is to end in the next row.

    So all vectors are whole, and none is in parts.
    """
    enough = n * (inner // width) >= _plan.LIMITS.wrapped_vectors
    return enough and inner % (plan.panel * width) == 0 and plan.blocks(n) == 1


def _past_cache(
    fold: _semantics.Fold,
    plan: _plan.Plan,
    size: int,
    real_size: int,
    out_at: int,
    whole_vectors: bool,
) -> str:
    """How results of ``size`` bytes leave past the cache, if they can.

    ``whole_vectors`` says that those of out are panels across.
    """
    by_n, by_outer, inner = fold.by_n, fold.by_outer, fold.inner
    width = _plan.VECTOR_BYTES // real_size
    if plan.walk == "across" and whole_vectors:
        return kernels.PAST_CACHE
    if plan.walk == "along":
        # A kernel finds the first whole vector of each row. It must begin with the first of the
        # lanes whose elements take turns.
        first = width * size if width % plan.lanes else plan.lanes * size
        starts = (out_at, by_outer.out, by_outer.out_jump)
        return kernels.IN_CACHE if any(start % first for start in starts) else kernels.PAST_CACHE
    row = inner * size
    gaps = by_n.out != row or by_n.run < fold.n
    if fold.outer > 1:
        gaps = gaps or (by_outer.out, by_outer.out_jump) != (fold.n * row, 0)
    held = 0 if plan.walk in kernels.OF_ROWS else min(fold.n, plan.block) * row
    fits = held <= _plan.LIMITS.slab_bytes and size == real_size
    return kernels.BY_LINES if fits and not gaps else kernels.IN_CACHE


@functools.lru_cache(maxsize=1024)
def _launch(
    op: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    axis: Any,
    keepdims: bool,
    out_strides: tuple[int, ...] | None = None,
    out_at: int = 0,
    alone: bool = False,
) -> Launch | None:
    """How to run ``op``, or None if no kernel walks such an array as it lies."""
    axes = _semantics.normalize_axis(axis, len(shape))
    result = _semantics.real_dtype(dtype, "a" if op == LOGSUMEXP else "x")
    if result is None or not _reads(dtype) or 0 in shape:
        return None
    fold = _semantics.fold(shape, strides, out_strides, axes, dtype.itemsize, result.itemsize, True)
    if fold is None:
        return None
    source, target = _formats.FORMATS[dtype.name], _formats.FORMATS[result.name]
    real = source.real
    outer, n, inner = fold.outer, fold.n, fold.inner
    by_outer, by_n = fold.by_outer, fold.by_n
    width = _plan.VECTOR_BYTES // real.itemsize
    in_runs = by_n.run < n
    if in_runs and inner == 1:  # along, no vector is of two runs
        by_n = by_n.in_vectors(width)
        n = n // fold.by_n.run * by_n.run
    work_bytes = outer * n * inner * real.itemsize
    sizes = dtype.itemsize, None if op == LOGSUMEXP else result.itemsize
    dense = fold.dense(*sizes)
    plan = _plan.plan(op, outer, n, inner, real.itemsize, result.itemsize, in_runs, alone, dense)
    if plan.walk == "packed":
        return None
    n *= plan.lanes
    folded = outer, n, inner
    across = plan.walk == "across"
    # Across, panels can be laid where whole vectors begin if all rows start alike.
    steps = [step for by in (by_n, by_outer) for step in (by.out, by.out_jump)]
    size = result.itemsize
    if op == LOGSUMEXP:
        steps = [step for by in (by_n, by_outer) for step in (by.x, by.x_jump)]
        size = dtype.itemsize
    alike = all(step % (width * size) == 0 for step in steps)
    many = inner > _plan.LIMITS.unshifted_panels * plan.panel * width
    shifting = across and alike and not (plan.past_cache and out_at == 0)
    wraps = shifting and plan.past_cache and dense and out_at % size == 0
    wraps = wraps and _wraps(plan, n, inner, width)
    shifted = shifting and many and not wraps
    of_rows = plan.walk in kernels.OF_ROWS
    stores = kernels.IN_CACHE
    if plan.past_cache and out_at % size == 0:
        whole_vectors = alike and (shifted or wraps or out_at == 0)
        stores = _past_cache(fold, plan, size, real.itemsize, out_at, whole_vectors)
    row = plan.panel * _plan.VECTOR_BYTES if across else real.itemsize
    item_bytes = min(n, plan.block) * row
    jumps = by_outer.run < outer if of_rows else in_runs
    x_steps = {
        "outer_runs": kernels.divisor(by_outer.run) if by_outer.run < outer else 0,
        "lane_runs": kernels.divisor(by_n.run) if in_runs else 0,
        "run_elements": fold.by_n.run,
        "run_positions": by_n.run,
        "x_outer": by_outer.x,
        "x_outer_jump": by_outer.x_jump,
        "x_row": by_n.x // plan.lanes,
        "x_row_jump": by_n.x_jump,
        "shifted": int(shifted),
    }
    out_steps = {
        "out_outer": by_outer.out,
        "out_outer_jump": by_outer.out_jump,
        "out_row": by_n.out // plan.lanes,
        "out_row_jump": by_n.out_jump,
    }

    def walk(
        op: str, result: _formats.Format, steps: dict[str, int], stores: str = kernels.IN_CACHE
    ) -> Call:
        job = kernels.Job(
            op,
            source.name,
            result.name,
            plan.walk,
            plan.panel,
            stores,
            lanes=plan.lanes,
            masked=across and inner < plan.panel * width,
            wraps=wraps,
            dealt=n if plan.dealt and fold.whole(*sizes) else 0,
            careful=op == LOGSUMEXP and n <= _plan.LIMITS.careful_elements,
            runs=jumps,
        )
        return _call(job, folded, plan.block, item_bytes, work_bytes, x_steps | steps)

    blocks = plan.blocks(n)
    lanes = outer * inner
    pairs: tuple[tuple[int, ...], ...] = ()
    if blocks == 1:
        calls = [walk(op, target, out_steps, stores)]
    else:
        size = real.itemsize
        last = _LAST[op]
        merge = kernels.Job(
            kernels.MERGE if last else kernels.MERGE_LOGSUMEXP,
            source.name if real is _scalars.HALF else real.name,
            real.name if last else target.name,
            "across",
            panel=1,
        )
        merge_steps = {
            "x_outer": blocks * inner * size,
            "x_row": inner * size,
            "plane": lanes * blocks * size,
            "out_plane": lanes * size,
        }
        merge_bytes = 8 * blocks * _plan.VECTOR_BYTES  # as much work as so much softmax
        pairs = ((3, outer, blocks, inner),)
        calls = [
            walk(_FIRST[op], _formats.FORMATS[real.name], {"out_plane": lanes * blocks * size}),
            _call(merge, (outer, blocks, inner), blocks, merge_bytes, work_bytes, merge_steps),
        ]
        if last:
            pairs += ((3, outer, inner),)
            calls.append(walk(last, target, out_steps | {"plane": lanes * size}, stores))
    kept = tuple(i for i in fold.order if op != LOGSUMEXP or i not in axes)
    order = tuple(sorted(range(len(kept)), key=lambda k: kept[k]))
    in_parallel = any(call.parallel for call in calls)
    small = None if in_parallel or len(calls) > 1 else calls[0].kernel
    transpose = None if order == tuple(range(len(kept))) else order
    # Past the cache, it would matter where out is.
    direct = not plan.past_cache and small is not None and transpose is None
    return Launch(
        calls=tuple(calls),
        pairs=pairs,
        compute=np.dtype(real.name),
        result=result,
        shape=tuple(shape[i] for i in kept),
        transpose=transpose,
        final_shape=_semantics.result_shape(op, shape, axes, keepdims),
        large=plan.past_cache,
        parallel=in_parallel,
        small=small,
        direct=direct,
        brief=work_bytes <= _plan.LIMITS.brief_bytes,
    )


# Calls that machine code knows, without and with keepdims.
_DIRECT = {op: (_direct.Calls(), _direct.Calls()) for op in (SOFTMAX, LOG_SOFTMAX, LOGSUMEXP)}


def _forget() -> None:
    _launch.cache_clear()
    for calls in itertools.chain(*_DIRECT.values()):
        calls.forget()


_plan.on_change(_forget)


# -- yardsticks ------------------------------------------------------------------------------------


def yardstick(x: Array, out: Array | None) -> Callable[[], None]:
    """The call that copies x to ``out``, or reads x if that is None, as the functions' walk does.

    Both contiguous and of one dtype.  Threads, chunks and stores past the cache are those of
    softmax: what remains of its time is mathematics.
    """
    words = x.reshape(-1).view(np.uint8)
    rest = words.size % 4
    source = words[: words.size - rest].view(np.float32)
    size = source.size
    block = max(1, _plan.LIMITS.chunk_bytes // 4)
    if out is None:
        job = kernels.Job(kernels.READ, "float32", "float32", "along")
        result = np.empty(size // block + 1, np.float32)
    else:
        large = x.nbytes > _plan.LIMITS.past_cache_bytes
        stores = kernels.PAST_CACHE if large else kernels.IN_CACHE
        job = kernels.Job(kernels.COPY, "float32", "float32", "along", stores=stores)
        copied = out.reshape(-1).view(np.uint8)
        result = copied[: words.size - rest].view(np.float32)
    steps = {"x_row": 4, "out_row": 4}
    call = _call(job, (1, size, 1), block, 4 * block, x.nbytes, steps)

    def run() -> None:
        call(source, result, None, _pool.thread_count())
        if out is not None and rest:
            copied[-rest:] = words[-rest:]

    return run


# -- the three functions --------------------------------------------------------------------------


def run(
    op: str,
    x: Any,
    axis: Any,
    where: Any = None,
    out: Any = None,
    dtype: Any = None,
    *,
    b: Any = None,
    keepdims: bool = False,
    return_sign: bool = False,
    name: str = "x",
) -> Any:
    """One of the three functions on one array."""
    if where is None and dtype is None and b is None and not return_sign:
        calls = _DIRECT[op][1 if keepdims else 0]
        found = calls.find(calls.table, x, out, axis)
        if type(found) is not int and found is not None:
            return found
        if type(x) is np.ndarray and (axis is None or type(axis) is int):
            # The common call: a look-up of how, memory for the result, and the kernel.
            launch = _launch_for(op, x, axis, out, bool(keepdims))
            if launch is not None:
                if out is None:
                    result = launch.new(x)
                else:
                    launch.into(x, out)
                    result = out
                if launch.direct:
                    calls.learn(found, x, out, axis, result, launch.calls[0], launch.brief)
                return result
    with np.errstate(all="ignore"):
        return _run(op, x, axis, where, out, dtype, b, bool(keepdims), bool(return_sign), name)


def _launch_for(op: str, x: Array, axis: int | None, out: Any, keepdims: bool) -> Launch | None:
    """How to run ``op`` from and to the arrays as they lie, or None if it takes more than that."""
    geometry = op, x.shape, x.strides, x.dtype, axis, keepdims
    if out is None:
        return _launch(*geometry)
    if op == LOGSUMEXP:
        launch = _launch(*geometry)
        return launch if launch is not None and launch.fills(out, x) else None
    if not _takes_directly(x, out):
        return None
    launch = _launch(*geometry, out.strides, _place(out))
    return launch if launch is not None and out.dtype == launch.result else None


def _takes_directly(x: Array, out: Any) -> bool:
    """Whether out is a plain array that a kernel can fill with softmax while it reads x."""
    if type(out) is not np.ndarray or out.shape != x.shape:
        return False
    flags = out.flags
    if not flags.writeable or (0 in out.strides and _repeats(out)):
        return False
    return out is x or _apart(out, x)


def _apart(out: Array, x: Array) -> bool:
    """Whether two arrays have no memory in common; two that own theirs have not, at a glance."""
    return (out.flags.owndata and x.flags.owndata) or not np.may_share_memory(out, x)


def _place(out: Array) -> int:
    """Where out starts within a vector; asked only where it matters, for it takes 1 us."""
    if out.nbytes <= _plan.LIMITS.past_cache_bytes:
        return 0
    return int(out.__array_interface__["data"][0] % _plan.VECTOR_BYTES)


def _run(
    op: str,
    x: Any,
    axis: Any,
    where: Any,
    out: Any,
    dtype: Any,
    b: Any,
    keepdims: bool,
    return_sign: bool,
    name: str,
) -> Any:
    """The general way: every argument looked at."""
    x = _semantics.as_array(x, name)
    chosen = None if dtype is None else _semantics.chosen_dtype(dtype)
    weights = None if b is None else _semantics.as_array(b, "b")
    result = _semantics.real_dtype(x.dtype, name)
    if weights is not None:
        x, weights, result = _with_weights(
            x, weights, result, type(b) in (bool, int, float, complex)
        )
    if chosen is not None:
        if any(a is not None and a.dtype.kind == "c" for a in (x, weights)):
            raise TypeError(f"dtype must not be {chosen} for complex {name} or b")
        result = chosen
    axes = _semantics.normalize_axis(axis, x.ndim)
    mask = None if where is None else _semantics.check_where(where, x.shape)
    shape = _semantics.result_shape(op, x.shape, axes, keepdims)
    if result is None:
        return _scipy(op, x, axes, mask, out, weights, keepdims, return_sign)
    if out is not None:
        _semantics.check_out(out, shape, result)
        if not _lies_apart(out, x, mask, weights):
            x, mask, weights = (None if a is None else a.copy() for a in (x, mask, weights))
    sign = np.empty(shape, result) if return_sign else None
    if x.size == 0:
        target = np.empty(shape, result) if out is None else out
        target[...] = -np.inf
        if sign is not None:
            sign[...] = -1.0  # SciPy's word for an empty sum
    elif weights is not None:
        target = np.empty(shape, result) if out is None else out
        _packed(op, x, axes, mask, weights, target, sign, result)
    else:
        target = _unweighted(op, x, axes, mask, out, result, shape)
        if sign is not None:
            sign[...] = np.where(target == -np.inf, 0.0, np.where(np.isnan(target), np.nan, 1.0))
    answer = target if shape or out is not None else target[()]
    if sign is None:
        return answer
    return answer, (sign if shape else sign[()])


def _with_weights(
    x: Array, weights: Array, result: np.dtype[Any] | None, weak: bool
) -> tuple[Array, Array, np.dtype[Any] | None]:
    """A and b broadcast together, and the dtype that both are computed in."""
    if result is None or _semantics.real_dtype(weights.dtype, "b") is None:
        result = None
    elif not (weak and weights.dtype.kind in "biuf"):  # a Python number leaves a's dtype alone
        both = np.result_type(result, weights.dtype)
        result = both if both.kind == "f" or both == result else np.dtype(np.float64)
    try:
        x, weights = np.broadcast_arrays(x, weights)
    except ValueError:
        raise ValueError(
            f"b of shape {weights.shape} does not broadcast with a of shape {x.shape}"
        ) from None
    return x, weights, result


def _lies_apart(out: Array, x: Array, *others: Array | None) -> bool:
    """Whether writing out cannot spoil an input: no memory in common, or x itself in place."""
    if any(other is not None and np.may_share_memory(out, other) for other in others):
        return False
    if not np.may_share_memory(out, x):
        return True
    at, at_out = x.__array_interface__["data"][0], out.__array_interface__["data"][0]
    same = at == at_out and x.strides == out.strides and x.shape == out.shape
    return bool(same and x.dtype == out.dtype and not _repeats(out))


def _repeats(x: Array) -> bool:
    """Whether several elements of x share memory."""
    return any(step == 0 < size - 1 for size, step in zip(x.shape, x.strides, strict=True))


def _unweighted(
    op: str,
    x: Array,
    axes: tuple[int, ...],
    mask: Array | None,
    out: Array | None,
    result: np.dtype[Any],
    shape: tuple[int, ...],
) -> Array:
    """Straight from and to the arrays as they lie where a kernel can, else packed."""
    keepdims = len(shape) == x.ndim
    if mask is None and _semantics.real_dtype(x.dtype, "x") == result:
        geometry = op, x.shape, x.strides, x.dtype, axes, keepdims
        if out is None or op == LOGSUMEXP:
            launch = _launch(*geometry)
            if launch is not None:
                made = np.asarray(launch.new(x))
                if out is None:
                    return made
                np.copyto(out, made, casting="same_kind")
                return out
        elif out.dtype == result:
            launch = _launch(*geometry, out.strides, _place(out))
            if launch is not None:
                launch.into(x, out)
                return out
    target = np.empty(shape, result) if out is None else out
    _packed(op, x, axes, mask, None, target, None, result)
    return target


# -- arrays that no kernel walks ------------------------------------------------------------------


def _packed(
    op: str,
    x: Array,
    axes: tuple[int, ...],
    mask: Array | None,
    weights: Array | None,
    out: Array,
    sign: Array | None,
    result: np.dtype[Any],
) -> None:
    """Lanes copied, a piece at a time: odd strides, byte orders, dtypes, masks, weights."""
    kept = tuple(i for i in range(x.ndim) if i not in axes)
    kept_shape = tuple(x.shape[i] for i in kept)
    order = kept + axes

    def lanes(a: Array | None) -> Array | None:
        return None if a is None else a.transpose(order)

    def results(a: Array | None) -> Array | None:
        if a is None:
            return None
        if op != LOGSUMEXP:
            return a.transpose(order)
        return a.reshape(kept_shape)  # without the axes that keepdims keeps

    if op == LOGSUMEXP and not out.flags.c_contiguous:
        made = np.empty(out.shape, out.dtype)
        _packed(op, x, axes, mask, weights, made, sign, result)
        out[...] = made
        return
    x, mask, weights = lanes(x), lanes(mask), lanes(weights)  # type: ignore[assignment]
    out, sign = results(out), results(sign)  # type: ignore[assignment]
    n = math.prod(x.shape[len(kept) :])
    lane = tuple(range(-len(axes), 0))  # its axes, in every piece
    wide = 8 if weights is not None else max(4, result.itemsize)

    def compute(piece: Any) -> None:
        part = [None if a is None else a[piece] for a in (mask, weights)]
        value, signs = _piece(op, x[piece], part[0], part[1], lane, result)
        if signs is not None and sign is None:
            value[signs < 0] = np.nan
        out[piece] = value.reshape(out[piece].shape)
        if sign is not None and signs is not None:
            sign[piece] = signs.reshape(sign[piece].shape)

    job = _Pieces(_pieces(kept_shape, n * wide), compute)
    shared = x.size * wide >= _plan.LIMITS.wake_bytes
    threads = _pool.with_cores(_pool.thread_count()) if shared else 1
    if threads > 1 and job.count > 1:
        _pool.share(job, min(threads, job.count))
    else:
        job.work()
    if job.errors:
        raise job.errors[0]


class _Pieces(_pool.Job):
    """Parts of an array that threads share, with what is done to each."""

    def __init__(self, pieces: Iterable[Any], compute: Callable[[Any], object]) -> None:
        self.left = deque(pieces)
        self.compute = compute
        self.count = len(self.left)
        self.done: list[None] = []
        self.errors: list[BaseException] = []  # for the calling thread to raise

    def work(self) -> None:
        with np.errstate(all="ignore"):
            while True:
                try:
                    piece = self.left.popleft()
                except IndexError:
                    return
                try:
                    self.compute(piece)
                except BaseException as error:
                    self.errors.append(error)
                    self.cancel()
                    self.done.extend([None] * self.count)
                self.done.append(None)

    def finished(self) -> bool:
        return len(self.done) >= self.count

    def cancel(self) -> None:
        self.left.clear()


LANES_TOGETHER = 64  # neighbours, if lanes are walked across: whole vectors, and lines of memory


def _pieces(shape: tuple[int, ...], lane_bytes: int) -> Any:
    """Indices that cut the kept axes into pieces of about equal work, whole lanes each."""
    budget = max(1, _plan.LIMITS.packed_bytes // lane_bytes)
    tail = len(shape)
    inside = 1
    while tail and inside * shape[tail - 1] <= budget:
        tail -= 1
        inside *= shape[tail]
    if tail == 0:
        return [(...,)]
    step = max(1, budget // inside)
    if step > LANES_TOGETHER:
        step -= step % LANES_TOGETHER
    heads = itertools.product(*(range(size) for size in shape[: tail - 1]))
    last = shape[tail - 1]
    return [
        (*head, slice(start, min(start + step, last)), ...)
        for head in heads
        for start in range(0, last, step)
    ]


def _piece(
    op: str,
    x: Array,
    mask: Array | None,
    weights: Array | None,
    axes: tuple[int, ...],
    result: np.dtype[Any],
) -> tuple[Array, Array | None]:
    """The results of one piece."""
    if weights is not None:
        n = math.prod(x.shape[i] for i in axes)
        rows, by = (np.array(a, np.float64, order="C").reshape(-1, n) for a in (x, weights))
        if mask is not None:
            by[~mask.reshape(-1, n)] = 0.0
        return _weighted(rows, by, result)
    if mask is not None:
        x = np.where(mask, x, -np.inf)
    value = _copied(op, x, axes, result)
    if mask is not None and op != LOGSUMEXP:
        nothing = ~mask.any(axis=axes, keepdims=True)
        if nothing.any():
            np.copyto(value, 0.0 if op == SOFTMAX else -np.inf, where=nothing)
    return value, None


def _copied(op: str, x: Array, axes: tuple[int, ...], result: np.dtype[Any]) -> Array:
    """One op on a copy of x, in this thread; in place where it can be.

    The copy is laid out as x is, if kernels walk it so: what is contiguous is copied as such. Else
    its lanes are rows.
    """
    kind = result if _reads(result) or result.itemsize > 2 else np.dtype(np.float32)
    launch = None
    for order in ("K", "C"):
        copy = np.empty_like(x, kind, order, subok=False)
        steps = None if op == LOGSUMEXP else copy.strides
        launch = _launch(op, copy.shape, copy.strides, kind, axes, False, steps, _place(copy), True)
        if launch is not None:
            break
    np.copyto(copy, x, casting="unsafe")
    lanes = copy.shape[: copy.ndim - len(axes)]
    if launch is None:
        rows = _plain.run(op, copy.reshape(math.prod(lanes), -1))
        return rows.reshape(lanes if op == LOGSUMEXP else copy.shape)
    out = copy if op != LOGSUMEXP else np.empty(launch.shape, launch.result)
    launch.with_threads(copy, out, 1)
    if op != LOGSUMEXP:
        return copy
    return (out if launch.transpose is None else out.transpose(launch.transpose)).reshape(lanes)


def _weighted(x: Array, weights: Array, result: np.dtype[Any]) -> tuple[Array, Array]:
    """Logsumexp of rows with weights, and the sign of the sum."""
    hidden = weights == 0.0
    x[hidden] = -np.inf
    weights[x == -np.inf] = 0.0
    m, s, c = _weighted_pairs(x, weights)
    o = _plain.operations(_scalars.WEIGHTED["float64"])
    value, sign = _scalars.log_weighted(o, m, s, c)
    empty = hidden.all(axis=1)
    value[empty], sign[empty] = -np.inf, 0.0
    odd = ~empty & ~(np.isfinite(m) & (np.isfinite(value) | (sign == 0)))
    if odd.any():  # infinities: the direct sum knows their rules
        direct = (weights[odd] * np.exp(x[odd])).sum(axis=1)
        value[odd], sign[odd] = np.log(np.abs(direct)), np.sign(direct)
    return value.astype(result), sign.astype(result)


def _weighted_pairs(x: Array, weights: Array) -> tuple[Array, Array, Array]:
    lanes, n = x.shape
    if not kernels.COMPILES:
        return _plain.pairs(_plain.operations(_scalars.WEIGHTED["float64"]), x, weights)
    call = _weighted_call(lanes, n)
    pairs = np.empty((3, lanes), np.float64)
    call(x, pairs, weights, 1)
    return pairs[0], pairs[1], pairs[2]


@functools.lru_cache(maxsize=64)
def _weighted_call(lanes: int, n: int) -> Call:
    job = kernels.Job(kernels.PAIRS, "float64", "float64", "along", weighted=True)
    steps = {"x_outer": 8 * n, "x_row": 8, "out_plane": 8 * lanes}
    return _call(job, (lanes, n, 1), n, 8 * n, 0, steps)


# -- dtypes that only SciPy knows -----------------------------------------------------------------


def _scipy(
    op: str,
    x: Array,
    axes: tuple[int, ...],
    mask: Array | None,
    out: Array | None,
    weights: Array | None,
    keepdims: bool,
    return_sign: bool,
) -> Any:
    """Complex and longdouble: SciPy's own function, with the arguments that it lacks."""
    from scipy import special

    with np.errstate(all="ignore"):
        if mask is not None:
            x = np.where(mask, x, -np.inf)
        sign = None
        if op == LOGSUMEXP and x.size:
            value, sign = special.logsumexp(x, axes, weights, keepdims, True)
            if not return_sign:
                value = special.logsumexp(x, axes, weights, keepdims)
        elif op == LOGSUMEXP:
            value = np.full(_semantics.result_shape(op, x.shape, axes, keepdims), -np.inf, x.dtype)
            sign = np.zeros_like(value)
        else:
            value = getattr(special, op)(x, axis=axes) if x.size else x.copy()
            if mask is not None:
                empty = ~mask.any(axis=axes, keepdims=True)
                value = np.where(empty, 0.0 if op == SOFTMAX else -np.inf, value).astype(x.dtype)
        if out is not None:
            _semantics.check_out(out, np.shape(value), np.asarray(value).dtype)
            np.copyto(out, value, casting="same_kind")
            value = out
    return (value, sign) if return_sign else value
