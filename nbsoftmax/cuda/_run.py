"""The CUDA backend: fold, plan, launch; packing of what does not fold. It never synchronises."""

import contextlib
import functools
import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _semantics
from .._formats import FORMATS
from .._semantics import LOGSUMEXP, SOFTMAX
from . import _arrays, _device, _plan
from ._arrays import View
from ._jobs import SIMULATED, Elements, Group, Job

INFINITY = float("inf")
ADDRESSES = {  # the first arguments of each stage's kernel
    "whole": ("x", "out"),
    "pairs": ("x", "weights", "pairs", "signs"),
    "reduce": ("x", "weights", "out", "signs"),
    "apply": ("x", "pairs", "out", "signs"),
    "merge": ("x", "pairs", "out", "signs"),
}


@dataclass(frozen=True)
class Step:
    """A kernel that waits for addresses."""

    job: Job
    units: int
    names: tuple[str, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """All that is known before the data: made once for each geometry."""

    steps: tuple[Step, ...]
    scratch: int  # bytes
    order: tuple[int, ...]  # of a new result's axes, slowest first
    shape: tuple[int, ...]
    prepared: dict[int, list[Any]] = field(default_factory=dict)  # for each device

    def run(self, device: Any, x: int, out: int, weights: int = 0, signs: int = 0) -> None:
        """Queue all steps."""
        ready = self.prepared.get(device.number)
        if ready is None:
            ready = self.prepared[device.number] = [
                (device.prepared(step.job, step.units), _picked(step.names), step.numbers)
                for step in self.steps
            ]
        if self.scratch:
            with device.scratch(self.scratch) as pairs:
                for kernel, picked, numbers in ready:
                    device.launch(kernel, picked((x, weights, out, signs, pairs)) + numbers)
        else:
            for kernel, picked, numbers in ready:
                device.launch(kernel, picked((x, weights, out, signs, 0)) + numbers)


def _picked(names: tuple[str, ...]) -> Any:
    """A function that picks a kernel's addresses out of all."""
    order = "x", "weights", "out", "signs", "pairs"
    return operator.itemgetter(*(order.index(name) for name in names))


@functools.lru_cache(maxsize=1024)
def _call(
    op: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    format_: str,
    axis: Any,
    keepdims: bool,
    at: int,
    out_strides: tuple[int, ...] | None,
    out_at: int,
    clusters: bool,
    weighted: bool = False,
) -> Call | None:
    """How to run ``op`` on an array as it lies; None if no kernel can.

    ``at`` and ``out_at`` say where the arrays start within a vector.
    """
    axes = _semantics.normalize_axis(axis, len(shape))
    form = FORMATS[format_]
    if 0 in shape or form.kind not in "fV":
        return None
    size = form.itemsize
    fold = _semantics.fold(shape, strides, out_strides, axes, size, size)
    if fold is None:
        return None
    reduces = op == LOGSUMEXP
    outer, n, inner, x_outer = fold.outer, fold.n, fold.inner, fold.by_outer.x
    if weighted:  # always rows; those of one number would fold as columns
        (outer, n), inner, x_outer = shape, 1, strides[0]
    plan = _plan.plan(op, outer, n, inner, size, form.real.itemsize, clusters, weighted)
    x_n, out_n = (size, size) if inner == 1 else (fold.by_n.x, fold.by_n.out)
    out_outer = inner * size if reduces else fold.by_outer.out
    row = (n if plan.along else inner) * size
    steps = () if plan.along else (x_n,)
    access = _plan.access(plan.width, size, at, row, x_outer if outer > 1 else 0, *steps)
    steps = () if plan.along else (out_n,)
    out_access = _plan.access(plan.width, size, out_at, row, out_outer if outer > 1 else 0, *steps)
    group = Group(plan.across, plan.deep, plan.clusters, plan.items)

    def step(stage: str, units: int, *numbers: int) -> Step:
        held = plan.width, plan.vectors, access, 1 if reduces else out_access
        job = Job(stage, op, format_, format_, plan.along, group, *held, weighted)
        return Step(job, units, ADDRESSES[stage], numbers)

    units = plan.units(outer, inner)
    folded = outer, n, inner, x_outer, x_n
    cut = plan.chunks, plan.length
    scratch = 0
    if not plan.chunks:
        made = [step("whole", units, *folded, out_outer, out_n)]
    elif reduces and plan.chunks == 1:
        made = [step("reduce", units, *folded, out_outer, *cut)]
    else:
        parts = 5 if weighted else 4
        scratch = parts * plan.chunks * outer * inner * form.real.itemsize
        last = "merge" if reduces else "apply"
        made = [
            step("pairs", units * plan.chunks, *folded, 0, *cut),
            step(last, units * (1 if reduces else plan.chunks), *folded, out_outer, out_n, *cut),
        ]
    final = _semantics.result_shape(op, shape, axes, keepdims)
    left = [i for i in range(len(shape)) if not reduces or keepdims or i not in axes]
    order = tuple(left.index(i) for i in fold.order if i in left)
    return Call(tuple(made), scratch, order, final)


_plan.on_change(_call.cache_clear)


# -- the three functions --------------------------------------------------------------------------


def run(
    op: str,
    x: Any,
    axis: Any,
    where: Any = None,
    out: Any = None,
    dtype: Any = None,
    stream: Any = None,
    *,
    b: Any = None,
    keepdims: bool = False,
    return_sign: bool = False,
    name: str = "x",
) -> Any:
    """One of the three functions on one device array."""
    keepdims = bool(keepdims)
    asked = None if stream is None else _device.stream_number(stream)
    a = _arrays.view(x, name, asked or _arrays.LEGACY)
    device = _device.of(a, asked, name)
    entered = device.enter()
    try:
        plain = where is None and b is None and dtype is None and not return_sign and a.native
        if plain and (axis is None or type(axis) is int):
            if out is None:
                geometry = op, a.shape, a.strides, a.format, axis, keepdims, a.address % 16
                call = _call(*geometry, None, 0, device.clusters)
                if call is not None:
                    return _new(call, device, x, a)
            else:
                to = _arrays.view(out, "out", device.stream_number)
                device.lend(a, to)
                if _direct(op, a, axis, keepdims, device, to):
                    return out
        request = _Request(op, x, a, device, keepdims, name)
        return request.answer(axis, where, out, dtype, b, bool(return_sign))
    finally:
        if entered:
            device.leave()


def _new(call: Call, device: Any, x: Any, a: View) -> Any:
    """A result of the caller's kind, being filled."""
    kind = _arrays.kind_of(x)
    made = kind.new(x, call.shape, a.format, call.order, device)
    address = kind.address(made)  # of fresh memory, which begins on a vector
    if SIMULATED:
        device.lend(a, kind.view(made, "out", 0))
    call.run(device, a.address, address)
    return _arrays.delivered(made)


def _direct(op: str, a: View, axis: Any, keepdims: bool, device: Any, to: View) -> bool:
    """Straight from and to the arrays as they lie, if a kernel can."""
    if op != LOGSUMEXP and to.shape != a.shape:
        return False
    geometry = op, a.shape, a.strides, a.format, axis, keepdims, a.address % 16
    strides = None if op == LOGSUMEXP else to.strides
    call = _call(*geometry, strides, to.address % 16, device.clusters)
    if call is None or not _fills(call, device, to, a):
        return False
    call.run(device, a.address, to.address)
    return True


def _fills(call: Call, device: Any, to: View, a: View) -> bool:
    """Whether a call fills this array as it would a new one, or x in its place."""
    if to.format != a.format or not (to.native and to.writable):
        return False
    reduces = call.steps[0].job.op == LOGSUMEXP
    if not _as_new(to.shape, to.strides, to.itemsize, call.shape, call.order if reduces else None):
        return False
    same = a.address == to.address and a.strides == to.strides
    return (same or _apart(a, to)) and _device.number(to, "out") == device.number


@functools.lru_cache(maxsize=1024)
def _as_new(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    expected: tuple[int, ...],
    order: tuple[int, ...] | None,
) -> bool:
    """Whether an array has a result's shape, no memory twice and, if given, its axes' order."""
    if shape != expected or any(step == 0 < n - 1 for n, step in zip(shape, strides, strict=True)):
        return False
    as_new = strides if order is None else _arrays.contiguous(shape, order, itemsize)
    steps = zip(shape, strides, as_new, strict=True)
    return all(n == 1 or step == other for n, step, other in steps)


def _result_format(format_: str) -> str:
    return format_ if FORMATS[format_].kind in "fV" else "float64"


class _Request:
    """A call whose every argument is looked at."""

    def __init__(self, op: str, x: Any, a: View, device: Any, keepdims: bool, name: str) -> None:
        self.op, self.x, self.a, self.device = op, x, a, device
        self.keepdims, self.name = keepdims, name
        self.scratch = contextlib.ExitStack()

    def answer(self, axis: Any, where: Any, out: Any, dtype: Any, b: Any, return_sign: bool) -> Any:
        with self.scratch:
            return self._answer(axis, where, out, dtype, b, return_sign)

    def _answer(
        self, axis: Any, where: Any, out: Any, dtype: Any, b: Any, return_sign: bool
    ) -> Any:
        op, a = self.op, self.a
        self.device.lend(a)
        chosen = None if dtype is None else _semantics.chosen_dtype(dtype).name
        weights = None if b is None else self._weights(b)
        self.axes = _semantics.normalize_axis(axis, len(self.a.shape))
        mask = None if where is None else self._mask(where)
        result = _result_format(a.format)
        if weights is not None and not isinstance(b, (bool, int, float)):
            result = _common_format(result, _result_format(weights.format))
        self.result = result = chosen or result
        self.shape = _semantics.result_shape(op, self.a.shape, self.axes, self.keepdims)
        to = None if out is None else self._out(out)
        made = signs = None
        if to is None:
            made, to = self._new(result)
        self.device.lend(*(v for v in (to, mask, weights) if v is not None))
        signs_to = None
        if return_sign:
            signs, signs_to = self._new(result)
            self.device.lend(signs_to)
        self._fill(to, signs_to, mask, weights, return_sign)
        answer = out if made is None else _arrays.delivered(made)
        return answer if signs is None else (answer, _arrays.delivered(signs))

    # The arguments.

    def _number(self, value: float, format_: str) -> View:
        """A number as an array without axes."""
        held = self._scratch((), format_)
        self._constant(held, value)
        return held

    def _weights(self, b: Any) -> View:
        if isinstance(b, (bool, int, float)):
            return _broadcast(self._number(float(b), "float64"), self.a.shape)
        weights = self._beside(b, "b")
        try:
            shape = np.broadcast_shapes(self.a.shape, weights.shape)
        except ValueError:
            raise ValueError(
                f"b of shape {weights.shape} does not broadcast with a of shape {self.a.shape}"
            ) from None
        self.a = _broadcast(self.a, shape)
        return _broadcast(weights, shape)

    def _mask(self, where: Any) -> View:
        if isinstance(where, (bool, np.bool_)):
            return _broadcast(self._number(float(where), "float32"), self.a.shape)
        mask = self._beside(where, "where")
        if mask.format != "bool":
            raise TypeError(f"where must be boolean, not of dtype {mask.format}")
        try:
            return _broadcast(mask, self.a.shape)
        except ValueError:
            raise ValueError(
                f"where of shape {mask.shape} cannot be broadcast to the input's shape "
                f"{self.a.shape}"
            ) from None

    def _beside(self, array: Any, name: str) -> View:
        seen = _arrays.view(array, name, self.device.stream_number)
        here, there = self.device.number, _device.number(seen, name)
        if here != there and (seen.address or seen.device is not None):
            raise ValueError(f"{name} lies on device {there}, {self.name} on device {here}")
        return seen

    def _out(self, out: Any) -> View:
        to = self._beside(out, "out")
        if to.shape != self.shape:
            raise ValueError(f"out has shape {to.shape}, but the result has shape {self.shape}")
        if FORMATS[to.format].kind not in "fV":
            raise TypeError(
                f"out has dtype {to.format}, to which a result of {self.result} cannot be cast"
            )
        if not to.writable:
            raise ValueError("out is read-only")
        return to

    def _new(self, format_: str) -> tuple[Any, View]:
        kind = _arrays.kind_of(self.x)
        order = tuple(range(len(self.shape)))
        made = kind.new(self.x, self.shape, format_, order, self.device)
        return made, _arrays.view(made, "out", self.device.stream_number)

    # The work.

    def _fill(
        self, to: View, signs: View | None, mask: View | None, weights: View | None, signed: bool
    ) -> None:
        a = self.a
        if not _arrays.size_of(self.shape):
            return
        if not a.size:
            self._constant(to, -INFINITY)
            if signs is not None:
                self._constant(signs, -1.0)  # SciPy's word for an empty sum
            return
        if weights is not None or signed:
            self._weighted(to, signs, mask, weights)
            return
        native = a.native and to.native and a.format == self.result == to.format
        if mask is None and native:
            same = (a.address, a.strides) == (to.address, to.strides)
            apart = a if same or _apart(a, to) else self._moved(a)
            if _direct(self.op, apart, self.axes, self.keepdims, self.device, to):
                return
        self._packed(to, mask)

    def _moved(self, a: View) -> View:
        """A copy that is walked like the original, so that it gives the same bits."""
        order = sorted(range(len(a.shape)), key=lambda i: -abs(a.strides[i]))
        copy = self._scratch(a.shape, a.format)
        copy = copy._replace(strides=_arrays.contiguous(a.shape, tuple(order), a.itemsize))
        self._copy(a, copy)
        return copy

    def _rows(self, view: View) -> View:
        """An array with the kept axes first, the reduced ones last."""
        kept = tuple(i for i in range(len(view.shape)) if i not in self.axes)
        order = kept + self.axes
        return view._replace(
            shape=tuple(view.shape[i] for i in order),
            strides=tuple(view.strides[i] for i in order),
        )

    def _lanes(self, to: View) -> View:
        """A result in the order of `_rows`."""
        if self.op != LOGSUMEXP:
            return self._rows(to)
        if self.keepdims:
            kept = [i for i in range(len(to.shape)) if i not in self.axes]
            to = to._replace(
                shape=tuple(to.shape[i] for i in kept),
                strides=tuple(to.strides[i] for i in kept),
            )
        return to

    def _packed(self, to: View, mask: View | None) -> None:
        a, op = self._rows(self.a), self.op
        x = self._scratch(a.shape, self.result)
        rows_mask = None if mask is None else self._rows(mask)
        self._copy(a, x, rows_mask, fill=-INFINITY)
        lanes, _ = self._counts()
        y = x if op != LOGSUMEXP else self._scratch((lanes,), self.result)
        self._on_rows(op, x, y)
        hidden = None
        if rows_mask is not None and op != LOGSUMEXP:
            # A lane without anything visible is the one whose sum of visible ones is empty.
            seen = self._scratch(a.shape, "float16")
            self._copy(rows_mask, seen, rows_mask, fill=-INFINITY)
            hidden = self._scratch((lanes,), "float16")
            self._on_rows(LOGSUMEXP, seen, hidden)
        target = self._lanes(to)
        y = y._replace(shape=target.shape, strides=_natural(target.shape, y.itemsize))
        if hidden is not None:
            kept = len(self.a.shape) - len(self.axes)
            strides = _natural(target.shape[:kept], 2) + (0,) * len(self.axes)
            hidden = hidden._replace(shape=target.shape, strides=strides)
        self._copy(y, target, hidden, above=-INFINITY, fill=0.0 if op == SOFTMAX else -INFINITY)

    def _weighted(
        self, to: View, signs: View | None, mask: View | None, weights: View | None
    ) -> None:
        a = self._rows(self.a)
        x, by = self._scratch(a.shape, "float64"), self._scratch(a.shape, "float64")
        rows_mask = None if mask is None else self._rows(mask)
        self._copy(a, x, rows_mask, fill=-INFINITY)
        if weights is None:
            self._constant(by, 1.0)
            if rows_mask is not None:
                self._copy(by, by, rows_mask, fill=0.0)
        else:
            self._copy(self._rows(weights), by, rows_mask, fill=0.0)
        lanes, _ = self._counts()
        y, sign = self._scratch((lanes,), "float64"), self._scratch((lanes,), "float64")
        self._on_rows(LOGSUMEXP, x, y, by.address, sign.address)
        target = self._lanes(to)
        strides = _natural(target.shape, 8)
        y, sign = (v._replace(shape=target.shape, strides=strides) for v in (y, sign))
        if signs is None:  # the logarithm of a negative sum is no number
            self._copy(y, target, sign, above=-0.5, fill=float("nan"))
        else:
            self._copy(y, target)
            self._copy(sign, self._lanes(signs))

    def _counts(self) -> tuple[int, int]:
        """How many lanes there are, and how long they are."""
        n = _arrays.size_of(tuple(self.a.shape[i] for i in self.axes))
        return self.a.size // n, n

    def _on_rows(self, op: str, x: View, y: View, weights: int = 0, signs: int = 0) -> None:
        (lanes, n), size = self._counts(), x.itemsize
        strides = n * size, size
        out_strides = None if op == LOGSUMEXP else strides
        geometry = op, (lanes, n), strides, x.format, 1, False, 0, out_strides, 0
        call = _call(*geometry, self.device.clusters, bool(weights))
        assert call is not None
        call.run(self.device, x.address, y.address, weights, signs)

    def _scratch(self, shape: tuple[int, ...], format_: str) -> View:
        """Contiguous memory until the end of the call."""
        size = FORMATS[format_].itemsize
        count = _arrays.size_of(shape) * size
        address = self.scratch.enter_context(self.device.scratch(max(1, count)))
        return View(address, shape, _natural(shape, size), format_, size, self.device.number, None)

    def _constant(self, to: View, value: float) -> None:
        """Fill an array: nothing in it is visible."""
        self._copy(to, to, to._replace(native=True), above=INFINITY, fill=value)

    def _copy(
        self, x: View, to: View, mask: View | None = None, above: float = 0.0, fill: float = 0.0
    ) -> None:
        """``to[...] = where(mask > above, x, fill)``, with a change of dtype."""
        beside = to if mask is None else mask
        shape, steps = _coalesced(x.shape, (x.strides, beside.strides, to.strides))
        job = Elements(
            x.format,
            to.format,
            len(shape),
            None if mask is None else mask.format,
            above,
            fill,
            x.native,
            to.native,
        )
        count = x.size
        addresses = x.address, beside.address, to.address
        arguments = (*addresses, count, *shape, *steps[0], *steps[1], *steps[2])
        kernel = self.device.prepared(job, -(-count // job.group.block))
        self.device.launch(kernel, arguments)


# -- strides --------------------------------------------------------------------------------------


def _natural(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return _arrays.contiguous(shape, None, itemsize)


def _broadcast(view: View, shape: tuple[int, ...]) -> View:
    """A view as NumPy would broadcast it."""
    if np.broadcast_shapes(view.shape, shape) != shape:
        raise ValueError
    extra = len(shape) - len(view.shape)
    sizes = (1,) * extra + view.shape
    strides = (0,) * extra + view.strides
    steps = (0 if size == 1 else step for size, step in zip(sizes, strides, strict=True))
    return view._replace(shape=shape, strides=tuple(steps))


def _apart(a: View, b: View) -> bool:
    """Whether two arrays have no memory in common, as far as their ends tell."""
    return a.extent[1] <= b.extent[0] or b.extent[1] <= a.extent[0]


def _coalesced(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Fewer and longer axes that walk the same elements of several arrays in the same order."""
    sizes: list[int] = []
    steps: list[list[int]] = []
    for size, *step in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if sizes and all(before == size * s for before, s in zip(steps[-1], step, strict=True)):
            sizes[-1] *= size
            steps[-1] = list(step)
        else:
            sizes.append(size)
            steps.append(list(step))
    if not sizes:
        sizes, steps = [1], [[0] * len(strides)]
    return tuple(sizes), list(zip(*steps, strict=True))


def _common_format(a: str, b: str) -> str:
    """The format in which both are exact, as NumPy promotes."""
    if a == b:
        return a
    if "bfloat16" in (a, b):
        return "float64" if "float64" in (a, b) else "float32"
    return np.result_type(np.dtype(a), np.dtype(b)).name
