"""Time the three functions on the current GPU: against a copy, and against other libraries.

python benchmarks/gpu.py                     # at most 8 minutes -> results/gpu.json
python benchmarks/gpu.py --quick             # small arrays, a minute: does everything run?
python benchmarks/gpu.py --dry-run           # the cases, their order and their bytes; needs no GPU
python benchmarks/gpu.py --probe             # versions, and one small call: is all there?
python benchmarks/gpu.py --library host --quick   # this script on NumPy arrays: needs no GPU

A sample is some calls between two CUDA events, queued behind copies that keep the GPU busy until
the host has queued them all: what is timed is the GPU, not the host. Each call reads the next of
several arrays, together 3 times as large as the L2 cache. All contenders take turns, in another
order in each round; the figures are medians and quartiles over the rounds.

The yardstick is a copy of the same bytes on the device, timed in the same rounds. For logsumexp,
which writes next to nothing, it is the sum of the array if that reads faster than the copy reads
and writes. What a contender computes is compared with float64 first; if it is wrong, it is not
timed. The first cases are the most important ones: those that the time does not suffice for are
reported as dropped.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import importlib
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import special

RESULT = Path(__file__).parent / "results" / "gpu.json"
METHOD = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]

Array = np.ndarray[Any, Any]
Call = Callable[[int], Any]  # given the number of the call, which decides what it reads
Report = dict[str, Any]
Around = Callable[[], contextlib.AbstractContextManager[object]]


class Lacks(Exception):
    """The contender is not installed or knows no such call; the message is the reason."""


# -- cases ----------------------------------------------------------------------------------------

OPS = ("softmax", "logsumexp", "log_softmax")


class Format(NamedTuple):
    """A dtype: bytes of an element, distance of 1 to the next number, smallest normal number."""

    itemsize: int
    eps: float
    tiny: float
    tolerance: int  # units of eps by which results of one function may differ


FORMATS = {
    "float32": Format(4, 2.0**-23, 2.0**-126, 2000),
    "float64": Format(8, 2.0**-52, 2.0**-1022, 10_000),
    "float16": Format(2, 2.0**-10, 2.0**-14, 8),
    "bfloat16": Format(2, 2.0**-7, 2.0**-126, 8),
}

PUBLISHED = (4096, 1024, 32_768, 65_536, 262_144, 256, 16_384)  # lengths of others' tables
LENGTHS = (1000, 4093, 131_072, 50_257, 128, 64, 10)  # and what they leave out
SOME_LENGTHS = (1000, 4096, 4093, 32_768, 131_072)  # for the other dtypes
SHORT = tuple(range(2, 9))
SHORT_ROWS = 2**20
HUGE = 2**26
ACROSS = (((4096, 4096), 0), ((1024, 64, 256), 1), ((64, 1024, 64), 1))
BYTES, LONG_BYTES, LONG = 2**27, 2**28, 65_536  # of an array, and of one with rows from LONG on
QUICK = 16  # times smaller


@dataclass(frozen=True)
class Case:
    """A function, and the array and axis that it is timed on."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    compiled: bool = False  # torch.compile too, which takes seconds to compile

    def __str__(self) -> str:
        """Name it as people would."""
        return f"{self.op} {self.dtype} {self.shape} axis {self.axis}"

    @property
    def place(self) -> int:
        """The axis, counted from the front."""
        return self.axis % len(self.shape)

    @property
    def n(self) -> int:
        """Length of a lane."""
        return self.shape[self.place]

    @property
    def items(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape without the axis."""
        return self.shape[: self.place] + self.shape[self.place + 1 :]

    @property
    def result_shape(self) -> tuple[int, ...]:
        """What the function returns."""
        return self.kept if self.op == "logsumexp" else self.shape

    @property
    def read_bytes(self) -> int:
        """Bytes of the array."""
        return self.items * FORMATS[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the array and of the result: each is moved once at best."""
        return self.read_bytes + math.prod(self.result_shape) * FORMATS[self.dtype].itemsize


def rows_of(n: int, dtype: str, smaller: int = 1) -> tuple[int, int]:
    """Return the shape of an array with rows of `n` that is larger than any cache."""
    bytes_ = (LONG_BYTES if n >= LONG else BYTES) // smaller
    return max(1, bytes_ // (n * FORMATS[dtype].itemsize)), n


def cases() -> Iterator[Case]:
    """Yield all cases, the most important ones first."""
    for op in ("softmax", "logsumexp"):
        yield from _float32(op, compiled=True)
    for dtype in ("bfloat16", "float16", "float64"):
        yield from _other(dtype, "softmax")
    yield from _float32("log_softmax", compiled=False)
    for op, n in itertools.product(OPS, SHORT):
        yield Case(op, "float32", (SHORT_ROWS, n), -1)
    for op, dtype in itertools.product(("logsumexp", "log_softmax"), FORMATS):
        if dtype != "float32":
            yield from _other(dtype, op)


def _float32(op: str, compiled: bool) -> Iterator[Case]:
    for n in PUBLISHED:
        yield Case(op, "float32", rows_of(n, "float32"), -1, compiled)
    for shape, axis in ACROSS:
        yield Case(op, "float32", shape, axis, compiled)
    for n in LENGTHS:
        yield Case(op, "float32", rows_of(n, "float32"), -1)
    yield Case(op, "float32", (1, HUGE), -1)


def _other(dtype: str, op: str) -> Iterator[Case]:
    for n in SOME_LENGTHS:
        yield Case(op, dtype, rows_of(n, dtype), -1)
    for shape, axis in ACROSS[:2]:
        yield Case(op, dtype, shape, axis)


def quick_cases() -> Iterator[Case]:
    """Yield a few small cases that lead through everything there is."""
    for op in OPS:
        for n in (1000, 4093, 65_536):
            yield Case(op, "float32", rows_of(n, "float32", QUICK), -1, n == 1000)
        yield Case(op, "float32", (512, 512), 0)
        yield Case(op, "float32", (64, 64, 64), 1)
    yield Case("softmax", "float32", (1, HUGE // QUICK), -1)
    yield Case("softmax", "float32", (SHORT_ROWS // QUICK, 5), -1)
    for dtype in ("float64", "float16", "bfloat16"):
        yield Case("softmax", dtype, rows_of(1000, dtype, QUICK), -1)


# -- array libraries ------------------------------------------------------------------------------


class Library(Protocol):
    """What makes and copies arrays on the device, and takes the time there."""

    name: str

    def normal(self, items: int, dtype: str) -> Any:
        """Return new numbers of N(0, 10): softmax must be stable to get them right."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a new contiguous array."""

    def fill(self, out: Any, value: float) -> None:
        """Set all elements."""

    def copy(self, out: Any, x: Any) -> None:
        """Copy an array of the same shape."""

    def sum(self, x: Any) -> Any:
        """Read an array."""

    def event(self) -> Any:
        """Return a new event, which has `record()`."""

    def microseconds(self, start: Any, end: Any) -> float:
        """Return the time between two recorded events."""

    def synchronize(self) -> None:
        """Wait for the device."""


class Torch:
    """PyTorch."""

    name = "torch"

    def __init__(self) -> None:
        self.torch = imported("torch")
        if not self.torch.cuda.is_available():
            raise Lacks("torch sees no GPU")
        self.device = "cuda"
        self._generator = self.torch.Generator(self.device).manual_seed(7)

    def normal(self, items: int, dtype: str) -> Any:
        """Return new numbers of N(0, 10)."""
        return self.empty((items,), dtype).normal_(0, 10, generator=self._generator)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a new array."""
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=self.device)

    def fill(self, out: Any, value: float) -> None:
        """Set all elements."""
        out.fill_(value)

    def copy(self, out: Any, x: Any) -> None:
        """Copy an array."""
        out.copy_(x)

    def sum(self, x: Any) -> Any:
        """Read an array."""
        return x.sum()

    def event(self) -> Any:
        """Return a new event."""
        return self.torch.cuda.Event(enable_timing=True)

    def microseconds(self, start: Any, end: Any) -> float:
        """Return the time between two events."""
        return 1e3 * start.elapsed_time(end)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.torch.cuda.synchronize()


class CuPy:
    """CuPy, where there is no PyTorch."""

    name = "CuPy"

    def __init__(self) -> None:
        self.cupy = imported("cupy")
        if not self.cupy.cuda.is_available():
            raise Lacks("CuPy sees no GPU")
        self._generator = self.cupy.random.default_rng(7)

    def normal(self, items: int, dtype: str) -> Any:
        """Return new numbers of N(0, 10)."""
        made = self.empty((items,), dtype)
        made[...] = 10 * self._generator.standard_normal(items, np.float32)
        return made

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a new array."""
        return self.cupy.empty(shape, _numpy_dtype(dtype))

    def fill(self, out: Any, value: float) -> None:
        """Set all elements."""
        out.fill(value)

    def copy(self, out: Any, x: Any) -> None:
        """Copy the bytes; indexing would start a kernel, which is no faster."""
        out.data.copy_from_device_async(x.data, x.nbytes)

    def sum(self, x: Any) -> Any:
        """Read an array."""
        return x.sum()

    def event(self) -> Any:
        """Return a new event."""
        return self.cupy.cuda.Event()

    def microseconds(self, start: Any, end: Any) -> float:
        """Return the time between two events."""
        return 1e3 * self.cupy.cuda.get_elapsed_time(start, end)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.cupy.cuda.Device().synchronize()


class Numba:
    """Numba's own device arrays, where there is nothing else."""

    name = "Numba"

    def __init__(self) -> None:
        self.cuda = imported("numba.cuda")
        if not self.cuda.is_available():
            raise Lacks("Numba sees no GPU")

    def normal(self, items: int, dtype: str) -> Any:
        """Return new numbers of N(0, 10)."""
        return self.cuda.to_device(_normal(items, dtype))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a new array."""
        return self.cuda.device_array(shape, _numpy_dtype(dtype))

    def fill(self, out: Any, value: float) -> None:
        """Set all elements, from the host."""
        out.copy_to_device(np.full(out.shape, value, out.dtype))

    def copy(self, out: Any, x: Any) -> None:
        """Copy an array."""
        out.copy_to_device(x)

    def sum(self, x: Any) -> Any:
        """Tell that there is nothing that reads an array."""
        raise Lacks("Numba has no fast sum of a device array")

    def event(self) -> Any:
        """Return a new event."""
        return self.cuda.event()

    def microseconds(self, start: Any, end: Any) -> float:
        """Return the time between two events."""
        return 1e3 * self.cuda.event_elapsed_time(start, end)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.cuda.synchronize()


class HostEvent:
    """A moment on the host's clock."""

    seconds = 0.0

    def record(self) -> None:
        """Note the time."""
        self.seconds = time.perf_counter()


class Host:
    """NumPy arrays and the host's clock: to check this script where there is no GPU."""

    name = "host"

    def normal(self, items: int, dtype: str) -> Any:
        """Return new numbers of N(0, 10)."""
        return _normal(items, dtype)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a new array."""
        return np.empty(shape, _numpy_dtype(dtype))

    def fill(self, out: Any, value: float) -> None:
        """Set all elements."""
        out.fill(value)

    def copy(self, out: Any, x: Any) -> None:
        """Copy an array."""
        np.copyto(out, x)

    def sum(self, x: Any) -> Any:
        """Read an array."""
        return x.sum()

    def event(self) -> Any:
        """Return a new event."""
        return HostEvent()

    def microseconds(self, start: Any, end: Any) -> float:
        """Return the time between two events."""
        return 1e6 * (end.seconds - start.seconds)

    def synchronize(self) -> None:
        """Do nothing: nothing is queued."""


LIBRARIES: dict[str, Callable[[], Library]] = {
    "torch": Torch,
    "cupy": CuPy,
    "numba": Numba,
    "host": Host,
}


def library_of(name: str | None) -> Library:
    """Return the named library, or the first that is installed and sees a GPU."""
    reasons = []
    for each in [name] if name else [each for each in LIBRARIES if each != "host"]:
        try:
            return LIBRARIES[each]()
        except Lacks as error:
            reasons.append(str(error))
    raise SystemExit(f"no arrays on a GPU: {'; '.join(reasons)}")


def imported(name: str) -> Any:
    """Return a module, or raise `Lacks` with the reason why there is none."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library that does not fit the driver fails in many ways
        reason = str(error).strip().partition("\n")[0]
        raise Lacks(f"import {name}: {type(error).__name__}: {reason}") from None


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        return np.dtype(imported("ml_dtypes").bfloat16)
    return np.dtype(name)


def _normal(items: int, dtype: str) -> Array:
    values = 10 * np.random.default_rng(7).standard_normal(items, np.float32)
    return values.astype(_numpy_dtype(dtype))


# -- the arrays of a case -------------------------------------------------------------------------

CACHES = 3  # the arrays that are read in turn are so many times the L2 cache
APART = 512  # bytes: every array starts where a new one would


@dataclass(frozen=True)
class Arrays:
    """What the calls of a case read in turn, and where those with out= write to."""

    library: Library
    x: list[Any]
    out: list[Any]


class Pool:
    """Memory for the arrays of all cases, so that none has to wait for new random numbers."""

    def __init__(self, library: Library, all_cases: list[Case], cache: int) -> None:
        self.library, self.cache = library, cache
        self._items = {
            dtype: max(self._count(c) * self._pitch(c) for c in all_cases if c.dtype == dtype)
            for dtype in {case.dtype for case in all_cases}
        }
        self._dtype, self._memory = "", (None, None)

    def arrays(self, case: Case) -> Arrays:
        """Return the arrays of a case."""
        if self._dtype != case.dtype:
            self._memory = (None, None)  # freed before there is more
            items = self._items[case.dtype]
            x, out = (
                self.library.normal(items, case.dtype),
                self.library.empty((items,), case.dtype),
            )
            self._dtype, self._memory = case.dtype, (x, out)
        x, out = self._memory
        return Arrays(
            self.library,
            self._cut(x, case, case.shape),
            self._cut(out, case, case.result_shape),
        )

    def _cut(self, memory: Any, case: Case, shape: tuple[int, ...]) -> list[Any]:
        pitch, items = self._pitch(case), math.prod(shape)
        starts = [i * pitch for i in range(self._count(case))]
        return [memory[start : start + items].reshape(shape) for start in starts]

    def _count(self, case: Case) -> int:
        return max(2, math.ceil(CACHES * self.cache / case.read_bytes))

    def _pitch(self, case: Case) -> int:
        """Elements from the start of one array to the start of the next."""
        return math.ceil(case.read_bytes / APART) * APART // FORMATS[case.dtype].itemsize


# -- contenders -----------------------------------------------------------------------------------


def _nbsoftmax(case: Case, arrays: Arrays) -> Call:
    function, x = getattr(imported("nbsoftmax"), case.op), arrays.x
    return lambda i: function(x[i % len(x)], axis=case.axis)


def _nbsoftmax_out(case: Case, arrays: Arrays) -> Call:
    function, x, out = getattr(imported("nbsoftmax"), case.op), arrays.x, arrays.out
    return lambda i: function(x[i % len(x)], axis=case.axis, out=out[i % len(x)])


def _torch_of(arrays: Arrays) -> Any:
    if arrays.library.name != "torch":
        raise Lacks(f"needs torch tensors; the arrays are {arrays.library.name}'s")
    return imported("torch")


def _torch(case: Case, arrays: Arrays) -> Call:
    function, x = getattr(_torch_of(arrays), case.op), arrays.x
    return lambda i: function(x[i % len(x)], case.axis)


def _torch_compile(case: Case, arrays: Arrays) -> Call:
    torch, x = _torch_of(arrays), arrays.x
    # What was compiled for other cases counts towards a limit, past which nothing is compiled.
    torch.compiler.reset()
    function = torch.compile(
        lambda tensor: getattr(torch, case.op)(tensor, case.axis), dynamic=False
    )
    return lambda i: function(x[i % len(x)])


def _cupy(case: Case, arrays: Arrays) -> Call:
    cupy = imported("cupy")
    if arrays.library.name == "host":
        raise Lacks("needs arrays on a GPU")
    if case.dtype == "bfloat16":
        raise Lacks("not timed on bfloat16")
    special_functions = importlib.import_module("cupyx.scipy.special")
    function = getattr(special_functions, case.op, None) or _formula(cupy, case.op)
    take = cupy.asarray if arrays.library.name == "Numba" else cupy.from_dlpack
    x = arrays.x if arrays.library.name == "CuPy" else [take(each) for each in arrays.x]
    return lambda i: function(x[i % len(x)], axis=case.axis)


def _formula(xp: Any, op: str) -> Callable[..., Any]:
    def softmax(x: Any, axis: int) -> Any:
        e = xp.exp(x - x.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    def log_softmax(x: Any, axis: int) -> Any:
        d = x - x.max(axis=axis, keepdims=True)
        return d - xp.log(xp.exp(d).sum(axis=axis, keepdims=True))

    def logsumexp(x: Any, axis: int) -> Any:
        top = x.max(axis=axis, keepdims=True)
        return xp.log(xp.exp(x - top).sum(axis=axis)) + top.squeeze(axis)

    formulas = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}
    return formulas[op]


REGISTERS = 2**18  # bytes: the registers of a multiprocessor, and with them the longest row
TILE = 1024  # numbers of a program's short rows


@functools.cache
def _triton_kernel() -> Any:
    """Return the kernel: a program holds one row, or several short ones, in registers."""
    global tl  # where Triton's compiler looks the name up
    triton = imported("triton")
    tl = imported("triton.language")

    @triton.jit
    def kernel(
        x_ptr,
        out_ptr,
        rows,
        n,
        OP: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DOUBLE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < n)[None, :]
        place = row[:, None] * n + column[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=float("-inf"))
        if not DOUBLE:
            x = x.to(tl.float32)
        top = tl.max(x, axis=1)
        below = x - top[:, None]
        e = tl.exp(below)
        total = tl.sum(e, axis=1)
        if OP == "softmax":
            tl.store(out_ptr + place, e / total[:, None], mask=inside)
        elif OP == "log_softmax":
            tl.store(out_ptr + place, below - tl.log(total)[:, None], mask=inside)
        else:
            tl.store(out_ptr + row, top + tl.log(total), mask=row < rows)

    return kernel


class Tile(NamedTuple):
    """How the Triton kernel is launched."""

    rows: int  # of a program
    columns: int
    warps: int


def triton_tile(case: Case) -> Tile:
    """Return the tile that holds rows of a case."""
    if case.place != len(case.shape) - 1:
        raise Lacks("the kernel takes the last axis only")
    columns = 1 << (case.n - 1).bit_length()
    if columns * max(4, FORMATS[case.dtype].itemsize) > REGISTERS:
        raise Lacks(f"a row of {case.n} does not fit the registers")
    warps = 32 if columns >= 32_768 else 16 if columns >= 8192 else 8 if columns >= 2048 else 4
    return Tile(max(1, TILE // columns), columns, warps)


def _triton_out(case: Case, arrays: Arrays) -> Call:
    _torch_of(arrays)
    tile, kernel = triton_tile(case), _triton_kernel()
    rows, x, out = case.items // case.n, arrays.x, arrays.out
    launch = kernel[(-(-rows // tile.rows),)]

    def call(i: int) -> Any:
        to = out[i % len(x)]
        launch(
            x[i % len(x)],
            to,
            rows,
            case.n,
            OP=case.op,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DOUBLE=case.dtype == "float64",
            num_warps=tile.warps,
        )
        return to

    return call


def _quack(case: Case, arrays: Arrays) -> Call:
    _torch_of(arrays)
    if case.op != "softmax" or case.place != 1 or len(case.shape) != 2:
        raise Lacks("QuACK has softmax along the last of two axes only")
    if case.dtype == "float64":
        raise Lacks("QuACK has no float64")
    # The package has a function of the same name as the module.
    function, x = imported("quack.softmax").softmax, arrays.x
    return lambda i: function(x[i % len(x)])


# "out=": writes to arrays in use; the others return a new one.
CONTENDERS: dict[str, Callable[[Case, Arrays], Call]] = {
    "nbsoftmax": _nbsoftmax,
    "nbsoftmax out=": _nbsoftmax_out,
    "torch": _torch,
    "torch.compile": _torch_compile,
    "CuPy": _cupy,
    "Triton out=": _triton_out,
    "QuACK": _quack,
}
# What has to be there for a contender besides nbsoftmax's own needs.
NEEDS = {
    "torch": ("torch",),
    "torch.compile": ("torch", "triton"),
    "CuPy": ("cupy",),
    "Triton out=": ("torch", "triton"),
    "QuACK": ("torch", "quack.softmax"),
}
OURS = "nbsoftmax"
COPY, SUM = "copy", "sum"


def missing(library: Library) -> dict[str, str]:
    """Return the contenders that cannot take part at all, each with the reason."""
    found = {}
    for name, modules in NEEDS.items():
        try:
            if library.name != "torch" and "torch" in modules:
                raise Lacks(f"needs torch tensors; the arrays are {library.name}'s")
            for module in modules:
                imported(module)
        except Lacks as error:
            found[name] = str(error)
    return found


# -- right or wrong -------------------------------------------------------------------------------

CHECKED_ITEMS = 4096  # of all lanes together, roughly
CHECKED_LANES = (4, 128)  # at least and at most
PIECE = 2**16  # elements that fit a cache of the host


class Reference:
    """Some lanes of a case, computed in float64."""

    def __init__(self, case: Case, x: Any) -> None:
        self.case = case
        lanes = math.prod(case.kept)
        least, most = CHECKED_LANES
        count = min(lanes, max(least, min(most, CHECKED_ITEMS // case.n)))
        rng = np.random.default_rng(11)
        some = np.unique(np.append(rng.integers(0, lanes, count), [0, lanes - 1]))
        places = np.transpose(np.unravel_index(some, case.kept))
        self._lanes = [tuple(lane) for lane in places.tolist()]
        # Of a lane longer than a piece, elements all over it.
        self._some = np.linspace(0, case.n - 1, min(case.n, PIECE)).astype(int)
        held = self._lanes_of(x, case.shape)
        self._lse = np.array([_logsumexp(lane) for lane in held])
        self._x = held[:, self._some]

    def wrong(self, result: Any) -> str | None:
        """Say how a result differs from this, if by more than rounding."""
        case, form = self.case, FORMATS[self.case.dtype]
        if tuple(result.shape) != case.result_shape:
            return f"a result of shape {tuple(result.shape)}"
        got = self._lanes_of(result, case.result_shape)
        got = got if case.op == "logsumexp" else got[:, self._some]
        want = self._want()
        near = form.tolerance * form.eps
        # Results may be flushed to 0; logarithms near 0 have no digits of their own.
        floor = 8 * form.tiny if case.op == "softmax" else near
        bad = ~np.isclose(got, want, rtol=near, atol=floor)
        if not bad.any():
            return None
        first = tuple(np.argwhere(bad)[0])
        return f"{bad.mean():.0%} of the results are wrong, as {got[first]} for {want[first]}"

    def _want(self) -> Array:
        if self.case.op == "logsumexp":
            return self._lse
        result = self._x - self._lse[:, None]
        return np.exp(result) if self.case.op == "softmax" else result

    def _lanes_of(self, array: Any, shape: tuple[int, ...]) -> Array:
        """Return these lanes of an array on the device, or their numbers if it has no lanes."""
        copy = getattr(array, "copy_to_host", None)  # Numba
        array = array if copy is None else copy()
        whole = (slice(None),) if len(shape) == len(self.case.shape) else ()
        at = self.case.place
        index = [lane[:at] + whole + lane[at:] for lane in self._lanes]
        return np.array([to_numpy(array[each]) for each in index])


def to_numpy(array: Any) -> Array:
    """Return the numbers of any library's array, in float64."""
    if hasattr(array, "cpu"):  # torch, which knows how to widen bfloat16
        return array.double().cpu().numpy()
    return np.asarray(array.get() if hasattr(array, "get") else array).astype(np.float64)


def _logsumexp(lane: Array) -> float:
    """Return the reference, a piece of the lane at a time."""
    pieces = np.array_split(lane, math.ceil(lane.size / PIECE))
    return special.logsumexp([special.logsumexp(piece) for piece in pieces])


# -- time -----------------------------------------------------------------------------------------

ROUNDS = (7, 30)  # at least and at most
CASE_SECONDS = 0.3
SAMPLE_US = 300.0
SAMPLE_CALLS = 16  # at most
BUSY_US = 500.0
BUSY_BYTES = 2**27


class Times(NamedTuple):
    """Microseconds of a call: on the device, with quartiles, and on the host to queue it."""

    median_us: float
    low_us: float
    high_us: float
    host_us: float
    calls: int  # of a sample
    rounds: int


class Clock:
    """Takes samples on the device, all behind work that lets the host get ahead."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._numbers = itertools.count()
        items = 1 if library.name == "host" else BUSY_BYTES // 4
        self._from, self._to = library.normal(items, "float32"), library.empty((items,), "float32")
        self._copies = 1
        if library.name != "host":
            warm = [self._copy_us() for _ in range(50)]
            self._copies = math.ceil(BUSY_US / np.median(warm))

    def _copy_us(self) -> float:
        start, end = self.library.event(), self.library.event()
        start.record()
        self.library.copy(self._to, self._from)
        end.record()
        self.library.synchronize()
        return self.library.microseconds(start, end)

    def _queue(self, call: Call, calls: int) -> tuple[Any, Any, float]:
        """Queue a sample; return its events and the host's microseconds for a call."""
        for _ in range(self._copies):
            self.library.copy(self._to, self._from)
        start, end = self.library.event(), self.library.event()
        numbers = [next(self._numbers) for _ in range(calls)]
        start.record()
        began = time.perf_counter()
        for i in numbers:
            call(i)
        host = time.perf_counter() - began
        end.record()
        return start, end, 1e6 * host / calls

    def _calls(self, call: Call) -> int:
        """Return how many calls make a sample."""
        start, end, _ = self._queue(call, 2)
        self.library.synchronize()
        each = self.library.microseconds(start, end) / 2
        return int(np.clip(math.ceil(SAMPLE_US / max(each, 1e-3)), 1, SAMPLE_CALLS))

    def measure(
        self,
        calls: dict[str, Call],
        seconds: float = CASE_SECONDS,
        around: dict[str, Around] | None = None,
    ) -> dict[str, Times]:
        """Time all calls in turn; each within its own surroundings, if it has any."""
        around = around or {}
        nothing: Around = contextlib.nullcontext
        counts, samples = {}, {}
        for name, call in calls.items():
            with around.get(name, nothing)():
                counts[name], samples[name] = self._calls(call), []
        stop = time.perf_counter() + seconds
        names, least, most = list(calls), *ROUNDS
        for turn in range(most):
            if turn >= least and time.perf_counter() > stop:
                break
            first = turn % len(names)
            queued = []
            for name in names[first:] + names[:first]:
                with around.get(name, nothing)():
                    if name in around:
                        calls[name](next(self._numbers))  # what is remembered is another's
                    queued.append((name, *self._queue(calls[name], counts[name])))
            self.library.synchronize()
            for name, start, end, host in queued:
                us = self.library.microseconds(start, end) / counts[name]
                samples[name].append((us, host))
        return {name: _times(samples[name], counts[name]) for name in calls}


def _times(samples: list[tuple[float, float]], calls: int) -> Times:
    device, host = np.array(samples).T
    low, median, high = np.percentile(device, (25, 50, 75))
    figures = (float(median), float(low), float(high), float(np.median(host)))
    return Times(*(round(figure, 3) for figure in figures), calls, len(samples))


def ready(
    case: Case, arrays: Arrays, makers: dict[str, Callable[[Case, Arrays], Call]]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls whose results are right, and why the others are not timed."""
    reference = Reference(case, arrays.x[0])
    calls, reasons = {}, {}
    for name, make in makers.items():
        arrays.library.fill(arrays.out[0], math.nan)
        try:
            call = make(case, arrays)
            result = call(0)
            arrays.library.synchronize()
            wrong = reference.wrong(result)
            call(1)
        except Exception as error:  # whatever a library raises is its reason
            wrong = _reason(error)
        if wrong is None:
            calls[name] = call
        else:
            reasons[name] = wrong
    return calls, reasons


def _reason(error: Exception) -> str:
    text = (str(error).strip() or "no message").partition("\n")[0][:300]
    return text if isinstance(error, Lacks) else f"{type(error).__name__}: {text}"


def yardsticks(case: Case, arrays: Arrays) -> dict[str, Call]:
    """Return a copy of the bytes of a case and a read of them."""
    library, x = arrays.library, arrays.x
    # logsumexp's own results are small: whatever has room for x, as another case's out has.
    to = arrays.out if case.op != "logsumexp" else [library.empty(case.shape, case.dtype)]
    calls: dict[str, Call] = {COPY: lambda i: library.copy(to[i % len(to)], x[i % len(x)])}
    with contextlib.suppress(Exception):  # a library that has no sum of a dtype
        library.sum(x[0])
        calls[SUM] = lambda i: library.sum(x[i % len(x)])
    return calls


def rates(case: Case, times: dict[str, Times]) -> dict[str, float]:
    """Return GB/s of all that was timed, counting what each has to read and to write."""
    bytes_ = {COPY: 2 * case.read_bytes, SUM: case.read_bytes}
    return {name: bytes_.get(name, case.bytes) / t.median_us / 1e3 for name, t in times.items()}


def limit(case: Case, gb_per_s: dict[str, float]) -> str:
    """Name the yardstick: for logsumexp the sum, if it reads faster than the copy moves bytes."""
    names = [COPY] if case.op != "logsumexp" else [n for n in (COPY, SUM) if n in gb_per_s]
    return max(names, key=lambda name: gb_per_s[name])


def figures(case: Case, times: dict[str, Times]) -> list[Report]:
    """Return a row for each contender."""
    gb_per_s = rates(case, times)
    yardstick = limit(case, gb_per_s)
    about = {key: value for key, value in asdict(case).items() if key != "compiled"}
    return [
        {
            **about,
            "contender": name,
            **t._asdict(),
            "gb_per_s": round(gb_per_s[name], 1),
            "share_of_copy": round(gb_per_s[name] / gb_per_s[yardstick], 4),
            "yardstick": yardstick,
        }
        for name, t in times.items()
    ]


def time_case(case: Case, pool: Pool, clock: Clock, absent: dict[str, str]) -> Report:
    """Check and time all contenders on one case."""
    arrays = pool.arrays(case)
    makers = {
        name: make
        for name, make in CONTENDERS.items()
        if name not in absent and (case.compiled or name != "torch.compile")
    }
    calls, reasons = ready(case, arrays, makers)
    times = clock.measure({**yardsticks(case, arrays), **calls})
    about = {key: value for key, value in asdict(case).items() if key != "compiled"}
    not_timed = [{**about, "contender": n, "reason": why} for n, why in reasons.items()]
    return {"rows": figures(case, times), "not_timed": not_timed}


# -- the host's part of a call --------------------------------------------------------------------

HOST_SHAPE = (512, 512)  # 1 MB
HOST_CALLS, HOST_ROUNDS = 100, 25


def host_times(library: Library, absent: dict[str, str]) -> list[Report]:
    """Time calls that are queued without waiting, as a program makes them: 1 MB each."""
    found = []
    for op in ("softmax", "logsumexp"):
        case = Case(op, "float32", HOST_SHAPE, -1)
        pool = Pool(library, [case], 0)
        makers = {name: make for name, make in CONTENDERS.items() if name not in absent}
        calls, _ = ready(case, pool.arrays(case), makers)
        found += [
            {"op": op, "dtype": "float32", "shape": HOST_SHAPE, "axis": -1, **row}
            for row in _host_rounds(library, calls)
        ]
    return found


def _host_rounds(library: Library, calls: dict[str, Call]) -> Iterator[Report]:
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(HOST_ROUNDS):
            for name, call in calls.items():
                library.synchronize()
                start = time.perf_counter()
                for i in range(HOST_CALLS):
                    call(i)
                queued = time.perf_counter() - start
                library.synchronize()
                samples[name].append((queued, time.perf_counter() - start))
    finally:
        gc.enable()
    for name, taken in samples.items():
        low, median, high = np.percentile(1e6 * np.array(taken) / HOST_CALLS, (25, 50, 75), axis=0)
        yield {
            "contender": name,
            "call_us": round(median[0], 3),
            "low_us": round(low[0], 3),
            "high_us": round(high[0], 3),
            "with_wait_us": round(median[1], 3),
        }


# -- the machine ----------------------------------------------------------------------------------

PACKAGES = (
    *("numpy", "numba", "llvmlite", "numba-cuda", "cuda-core", "cuda-bindings", "nvidia-nvvm"),
    *("nvidia-nvjitlink", "ml_dtypes", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "cupy"),
    *("quack-kernels", "nvidia-cutlass-dsl", "scipy"),
)


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {"Python": platform.python_version()}
    with contextlib.suppress(Lacks):
        found["nbsoftmax"] = imported("nbsoftmax").__version__
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def gpu() -> Report:
    """Describe the current GPU, as the driver does."""
    driver = imported("cuda.bindings.driver")
    attributes = driver.CUdevice_attribute
    _answer(driver.cuInit(0))
    device = _answer(driver.cuDeviceGet(0))

    def attribute(name: str) -> int:
        which = getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_answer(driver.cuDeviceGetAttribute(which, device)))

    cuda = int(_answer(driver.cuDriverGetVersion()))
    return {
        "gpu": _answer(driver.cuDeviceGetName(256, device)).partition(b"\0")[0].decode(),
        "architecture": f"sm_{attribute('COMPUTE_CAPABILITY_MAJOR')}"
        f"{attribute('COMPUTE_CAPABILITY_MINOR')}",
        "multiprocessors": attribute("MULTIPROCESSOR_COUNT"),
        "l2_bytes": attribute("L2_CACHE_SIZE"),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "driver": _driver(),
    }


def _answer(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise Lacks(f"the driver answers {status.name}")
    return values[0] if values else None


def _driver() -> str | None:
    """Return the driver's own version, which its interface does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip()


def machine(library: Library) -> Report:
    """Describe what the figures were taken on."""
    device = {"gpu": None, "l2_bytes": 2**20} if library.name == "host" else gpu()
    return {
        **device,
        "host": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "arrays": library.name,
        "versions": versions(),
    }


# -- is all there? --------------------------------------------------------------------------------

WHEELS = (
    "numpy>=2.4,<2.5",
    "numba>=0.68,<0.69",
    "llvmlite>=0.50,<0.51",
    "numba-cuda>=0.30.4,<0.31",
)
ADVICE = f"""nbsoftmax's kernels are compiled by numba-cuda 0.30, which needs NumPy before 2.5.
With a network:     pip install {" ".join(f"'{each}'" for each in WHEELS)} cuda-core
Without a network:  on a machine that has one, for this one's Python,
    pip download --only-binary=:all: --python-version {sys.version_info[0]}.{sys.version_info[1]} \
--platform manylinux_2_28_x86_64 \\
        --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
--platform manylinux2014_x86_64 \\
        --no-deps -d wheels {" ".join(f"'{each}'" for each in WHEELS)}
  carry the folder; here
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site
  The same way, what else the lines above say is missing: cuda-core, cuda-bindings,
  nvidia-nvjitlink; nvidia-nvvm, or a CUDA toolkit with CUDA_HOME pointing to it."""


def probe(library_name: str | None) -> int:
    """Print the versions and make one small call; return an exit status."""
    found = versions()
    for name, version in found.items():
        print(f"{name:20} {version}")
    fits = _fits(found)
    try:
        library = library_of(library_name)
        for name, value in machine(library).items():
            if name != "versions":
                print(f"{name:20} {value}")
        for name, reason in missing(library).items():
            print(f"{name:20} missing: {reason}")
        case = Case("softmax", "float32", (64, 1000), -1)
        arrays = Pool(library, [case], 0).arrays(case)
        _, reasons = ready(case, arrays, {OURS: _nbsoftmax})
    except SystemExit as error:  # no library sees a GPU, perhaps because none is here
        print(f"nbsoftmax cannot be timed: {error}" + ("" if fits else f"\n{ADVICE}"))
        return 1
    if reasons:
        print(f"nbsoftmax cannot be timed: {reasons[OURS]}\n{ADVICE}")
        return 1
    print("nbsoftmax computes on this GPU what it should")
    return 0


def _fits(found: dict[str, str]) -> bool:
    """Say whether numba-cuda is there and can work with this NumPy; else print why not."""
    numpy_, numba_cuda = (_numbers(found.get(name, "0")) for name in ("numpy", "numba-cuda"))
    if numba_cuda == (0,):
        print("numba-cuda is not installed")
        return False
    if numba_cuda < (0, 31) and numpy_ >= (2, 5):
        print(f"NumPy {found['numpy']} is too new for numba-cuda {found['numba-cuda']}")
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    parts = itertools.takewhile(str.isdigit, version.split("."))
    return tuple(map(int, parts))


# -- all cases ------------------------------------------------------------------------------------


def new_report(library: Library) -> Report:
    """Return a report without figures."""
    return {
        "machine": machine(library),
        "method": " ".join(METHOD.split()),
        "missing": missing(library),
        "rows": [],
        "not_timed": [],
        "host": [],
        "dropped": [],
    }


def write(report: Report, path: Path) -> None:
    """Write a report; an earlier one stays whole until this one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".part")
    new.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def run(all_cases: list[Case], library: Library, minutes: float, path: Path) -> Report:
    """Time the cases in their order while there is time; write the report after each."""
    stop = time.perf_counter() + 60 * minutes
    report = new_report(library)
    for name, reason in report["missing"].items():
        print(f"not here: {name}: {reason}", flush=True)
    clock, pool = Clock(library), Pool(library, all_cases, report["machine"]["l2_bytes"])
    report["host"] = host_times(library, report["missing"])
    for row in report["host"]:
        print(f"{row['op']} of 1 MB, {row['contender']}: {row['call_us']:.1f} us a call")
    for number, case in enumerate(all_cases):
        if time.perf_counter() > stop:
            report["dropped"] = [str(each) for each in all_cases[number:]]
            break
        try:
            found = time_case(case, pool, clock, report["missing"])
        except Exception as error:  # such as memory that is not there
            found = {"rows": [], "not_timed": [{"case": str(case), "reason": _reason(error)}]}
        for key, rows in found.items():
            report[key] += rows
        print(line(case, found), flush=True)
        write(report, path)
        if not _answers(library):
            report["stopped"] = f"the GPU does not answer any more after {case}"
            print(report["stopped"])
            break
    write(report, path)
    return report


def _answers(library: Library) -> bool:
    """Say whether the device still works: after a fault in a kernel nothing on it does."""
    try:
        library.synchronize()
    except Exception:
        return False
    return True


def line(case: Case, found: Report) -> str:
    """Return a line with the share of the yardstick that each contender reaches."""
    cells = [str(case) + ":"]
    for row in found["rows"]:
        share = f"{100 * row['share_of_copy']:.0f}%"
        cells.append(f"{row['contender']} {row['gb_per_s']:.0f} GB/s {share},")
    for row in found["not_timed"]:
        if row.get("contender", OURS).startswith(OURS):
            cells.append(f"NOT TIMED: {row.get('contender', '')} {row['reason']}")
    return " ".join(cells).rstrip(",")


def failed(report: Report) -> list[Report]:
    """Return what nbsoftmax itself could not do, or did wrongly."""
    return [r for r in report["not_timed"] if r.get("contender", OURS).startswith(OURS)]


def main() -> int:
    """Time what the arguments say; return an exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few small arrays")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no case after that time")
    parser.add_argument("--json", type=Path, default=RESULT, help="file for the figures")
    parser.add_argument("--library", choices=LIBRARIES, help="whose arrays; else the first found")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    parser.add_argument("--probe", action="store_true", help="say whether all is there")
    arguments = parser.parse_args()
    if arguments.probe:
        return probe(arguments.library)
    chosen = [c for c in (quick_cases if arguments.quick else cases)() if arguments.only in str(c)]
    if arguments.dry_run:
        for number, case in enumerate(chosen):
            print(f"{number:4}  {case.bytes / 1e6:7.1f} MB  {case}")
        return 0
    library = library_of(arguments.library)
    report = run(chosen, library, arguments.minutes, arguments.json)
    print(f"{arguments.json}: {len(report['rows'])} rows; {len(report['dropped'])} cases dropped")
    for case in report["dropped"]:
        print(f"dropped: {case}")
    return 1 if failed(report) or "stopped" in report else 0


if __name__ == "__main__":
    sys.exit(main())
