"""Inputs, shapes, layouts and error budgets: said once, for the tests and the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

OPS = ("softmax", "log_softmax", "logsumexp")
FLOATS = ("float32", "float64")

# The promise, in ulp: of the result, and for logsumexp of max(|result|, |max a|).
BUDGET_ULP = {"softmax": 3.0, "log_softmax": 3.0, "logsumexp": 1.5}

# float16 and bfloat16 are computed in float32 to about 2^-17 and rounded once: half an ulp of the
# result's own format, and so many of float32's.
ROUNDING_ULP, BEFORE_ROUNDING_ULP = 0.5, 128.0

# With weights the contract gives no figure: each term is rounded once more, by b * exp(a - max).
WEIGHTED_BUDGET_ULP = 4.0

INF, NAN = np.inf, np.nan


# ------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class Trap:
    """A lane, and its answers where they can be written down: a number stands for all of a lane.

    An answer that is None is left to the oracle and its budget.
    """

    row: Callable[[Any], list[float]]  # given np.finfo of the format
    softmax: Any = None
    log_softmax: Any = None
    logsumexp: Any = None

    def lane(self, dtype) -> np.ndarray:
        dtype = np.dtype(dtype)
        info = np.finfo(np.float32 if dtype.name == "bfloat16" else dtype)
        with np.errstate(over="ignore"):
            return np.array(self.row(info), dtype=np.float64).astype(dtype)

    def answer(self, op):
        return getattr(self, op)


def _spoiled(row, logsumexp):
    return Trap(lambda f: row, NAN, NAN, logsumexp)


def _hard(row):
    return Trap(row if callable(row) else lambda f: row)


VALUES = {
    # One number spoils its lane.
    "nan_first": _spoiled([NAN, 1.0, 2.0], NAN),
    "nan_middle": _spoiled([1.0, NAN, 2.0], NAN),
    "nan_last": _spoiled([1.0, 2.0, NAN], NAN),
    "nan_alone": _spoiled([NAN], NAN),
    "nan_beside_plus_inf": _spoiled([INF, NAN, 0.0], NAN),
    "plus_inf_beside_nan": _spoiled([0.0, NAN, INF], NAN),
    "nan_beside_minus_inf": _spoiled([-INF, NAN, -INF], NAN),
    "plus_inf": _spoiled([1.0, INF, -3.0], INF),
    "plus_inf_alone": _spoiled([INF], INF),
    "plus_inf_twice": _spoiled([INF, 0.0, INF], INF),
    "both_infinities": _spoiled([-INF, INF, 5.0], INF),
    "only_plus_inf": _spoiled([INF] * 5, INF),
    "only_minus_inf": _spoiled([-INF] * 3, -INF),
    "minus_inf_alone": _spoiled([-INF], -INF),
    # Some -inf weigh nothing.
    "some_minus_inf": Trap(lambda f: [0.0, -INF, 0.0], [0.5, 0, 0.5]),
    "one_above_minus_inf": Trap(lambda f: [-INF, -7.25, -INF], [0, 1, 0], [-INF, 0, -INF], -7.25),
    "minus_inf_first": _hard([-INF, 1.0, 2.0, 3.0]),
    "minus_inf_last": _hard([1.0, 2.0, 3.0, -INF]),
    # Exact by symmetry or by underflow.
    "one_number": Trap(lambda f: [12.5], 1, 0, 12.5),
    "one_huge_number": Trap(lambda f: [float(f.max)], 1, 0, np.float64),
    "two_equal": Trap(lambda f: [-3.5, -3.5], 0.5),
    "four_zeros": Trap(lambda f: [0.0] * 4, 0.25),
    "zeros_of_both_signs": Trap(lambda f: [-0.0, 0.0], 0.5),
    "saturated": Trap(lambda f: [1000.0, 1.0], [1, 0], [0, -999], 1000),
    "spread_1400": Trap(lambda f: [-700.0, 700.0], [0, 1], [-1400, 0], 700),
    # A lane that one element dominates: the rest must not be lost in 1 + rest.
    "one_dominates": _hard([0.0, -40.0]),
    "one_dominates_after": _hard([-40.0, 0.0]),
    "one_dominates_offset": _hard([40.0, 0.0]),
    "one_dominates_many": _hard([0.0] + [-30.0, -31.5, -35.0] * 5),
    "rest_is_subnormal": _hard(lambda f: [0.0, float(np.log(f.tiny)) - 3.0]),
    "rest_is_smallest": _hard(lambda f: [0.0] * 8 + [1.0 - float(np.log(f.smallest_subnormal))]),
    "rest_vanishes": _hard([0.0, -5000.0]),
    "log_close_to_zero": _hard([-0.6931471805599453, -0.6931471805599453]),
    "answer_close_to_zero": _hard([-1.0, -0.45867514538708193]),
    # x - max must not be rounded, or not rounded away.
    "offset_1e6": _hard([1e6, 1e6 + 0.5, 1e6 - 0.125, 1e6 + 1.0]),
    "offset_minus_1e6": _hard([-1e6, -1e6 + 0.5, -1e6 - 0.125]),
    "offset_1e4": _hard([1e4 + 0.1, 1e4 + 0.7, 1e4 - 3.3, 1e4]),
    "far_apart": _hard([90.0, -0.1, 0.3, 33.3, -80.0]),
    "steps_of_a_third": _hard([i / 3.0 for i in range(-60, 60)]),
    "wide_steps": _hard([i * 7.7 for i in range(-90, 90)]),
    # Results among the subnormal numbers, and just off them.
    "subnormal_results_32": _hard([0.0] + [-86.0 - i / 2 for i in range(40)]),
    "subnormal_results_64": _hard([0.0] + [-707.0 - i for i in range(42)]),
    "subnormal_input": _hard(lambda f: [float(f.smallest_subnormal), -float(f.tiny) / 2, 0.0]),
    # Beyond the reach of a shift that multiplies by log2(e) first, and at the ends of the range.
    "below_2_20": _hard([2.0**20 - 1, 2.0**20 - 2, -(2.0**20) + 1]),
    "above_2_20": _hard([2.0**20 + 1, 2.0**20, 2.0**20 + 3]),
    "minus_2_20": _hard([-(2.0**20) - 1, -(2.0**20), -(2.0**20) - 4]),
    "above_2_24": _hard([2.0**24 + 2, 2.0**24, 2.0**24 + 6]),
    "above_2_40": _hard([2.0**40 + 1, 2.0**40 + 0.5, 2.0**40 - 0.25]),
    "minus_2_40": _hard([-(2.0**40) - 1, -(2.0**40) - 0.5, -(2.0**40) + 0.25]),
    "above_2_60": _hard([2.0**60, 2.0**60 + 512, 2.0**60 - 256]),
    "small_beside_huge": _hard([2.0**41, 1.0, -1.0, 2.0**41 + 1]),
    "minus_huge_beside_small": _hard([0.25, -(2.0**50), 0.5, -(2.0**21)]),
    "two_at_the_top": _hard(lambda f: [float(f.max), float(f.max), 1.0]),
    "close_to_the_top": _hard(lambda f: [float(f.max) / 2, float(f.max) / 3, -float(f.max) / 3]),
    "difference_overflows": _hard(lambda f: [float(f.max), -float(f.max)]),
    "two_at_the_bottom": _hard(lambda f: [float(f.min), float(f.min)]),
    "bottom_beside_minus_inf": _hard(lambda f: [float(f.min), -INF]),
}

# A number that is hard wherever it stands, put at every position of a lane.
SPECIALS = {
    "nan": NAN,
    "plus_inf": INF,
    "minus_inf": -INF,
    "dominating": 60.0,
    "dominating_by_far": 3000.0,
    "vanishing": -3000.0,
    "beyond_2_20": 2.0**21,
    "minus_2_20": -(2.0**21),
}

# Lengths about the widths of vectors, and of groups of vectors.
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 129, 255, 257)


def draw(shape, dtype="float64", seed=0, spread=12.0, offset=300.0) -> np.ndarray:
    """Numbers that need a stable softmax: every lane, along any axis, has an exp that overflows or
    underflows in float32, and the offset changes from place to place.
    """
    rng = np.random.default_rng([seed, *np.atleast_1d(np.asarray(shape, dtype=np.int64))])
    x = rng.normal(0.0, spread, shape)
    x += offset * rng.choice([-1.0, -0.5, 0.5, 1.0])
    for dim in range(np.ndim(x)):
        step = [1] * np.ndim(x)
        step[dim] = np.shape(x)[dim]
        x = x + rng.normal(0.0, spread, step)
    return np.asarray(x).astype(dtype)


# Named distributions of long lanes: each is a reason for a sum or a shift to lose digits.
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "normal_10": lambda rng, n: rng.normal(0, 10, n),
    "nearly_equal": lambda rng, n: rng.uniform(0, 0.01, n),
    "constant": lambda rng, n: np.full(n, 0.1),
    "offset_1e6": lambda rng, n: 1e6 + rng.normal(0, 3, n),
    "spread_1400": lambda rng, n: rng.uniform(-700, 700, n),
    "descending": lambda rng, n: -np.linspace(0, 60, n),
    "ascending": lambda rng, n: np.linspace(-60, 0, n),
    "one_dominates": lambda rng, n: np.where(np.arange(n) == n // 2, 20.0, rng.normal(-20, 1, n)),
    "subnormal_results": lambda rng, n: np.where(np.arange(n) == 0, 0.0, rng.uniform(-750, -80, n)),
    "heavy_tail": lambda rng, n: 30 * rng.standard_cauchy(n).clip(-1e5, 1e5),
    "beyond_2_21": lambda rng, n: 2.0**21 + rng.normal(0, 4, n),
}


# ------------------------------------------------------------------------------- shapes


def _axes_of(ndim):
    """Every set of axes of an array: None, ints of both signs, tuples in several orders, ()."""
    yield None
    yield ()
    yield from range(ndim)
    yield from range(-ndim, 0)
    for size in range(1, ndim + 1):
        for axes in itertools.combinations(range(ndim), size):
            yield axes
            if size > 1:
                yield axes[::-1]
                yield (axes[1] - ndim, axes[0], *axes[2:])


SHORT_ROWS = tuple(((37, n), -1) for n in range(1, 71))
SHORT_COLUMNS = tuple(((n, 37), 0) for n in (*range(1, 20), 31, 32, 33, 63, 64, 65))
FEW_COLUMNS = tuple(((41, inner), 0) for inner in (*range(1, 20), 31, 33, 63, 64, 65, 127, 129))
EVERY_AXIS = tuple(
    (shape, axis)
    for shape in ((11,), (5, 7), (3, 4, 5), (2, 3, 4, 5), (2, 1, 3, 2, 4))
    for axis in _axes_of(len(shape))
)
LONG_ROWS = (
    ((1000,), 0),
    ((1023,), -1),
    ((4097,), None),
    ((3, 1000), 1),
    ((2, 10007), -1),
    ((5, 4099), -1),
    ((1, 70001), 1),
    ((300, 333), None),
)
LONG_COLUMNS = (
    ((1000, 3), 0),
    ((4099, 17), 0),
    ((513, 257), 0),
    ((30011, 1), 0),
    ((3, 700, 5), 1),
    ((2, 129, 300), 1),
    ((7, 33, 65), (0, 1)),
    ((7, 33, 65), (0, 2)),
    ((1001, 4), 0),
    ((2, 1003, 3), 1),
    ((501, 6), 0),
    ((4, 50, 3, 60), (1, 3)),
    ((4, 50, 3, 60), (3, 1)),
    ((50, 4, 60, 33), (0, 2)),
    ((9, 7, 33, 5, 40), (2, 0)),
    ((3, 3, 40, 2, 70), (2, 4)),
)
MANY_LANES = (
    ((5000, 3), -1),
    ((2048, 16), -1),
    ((1031, 24), -1),
    ((3, 5003), 0),
    ((500, 2, 9), 1),
)
SIZE_ONE = (((1, 1, 1), 1), ((1, 9, 1), 1), ((9, 1, 4), 1), ((1, 1), None), ((), None), ((), ()))
SHAPES = (
    *EVERY_AXIS,
    *SHORT_ROWS,
    *SHORT_COLUMNS,
    *FEW_COLUMNS,
    *LONG_ROWS,
    *LONG_COLUMNS,
    *MANY_LANES,
    *SIZE_ONE,
)

# Enough of them to meet every layout and every regime.
SOME_SHAPES = (
    ((23,), 0),
    ((13, 29), 1),
    ((13, 29), 0),
    ((13, 29), None),
    ((67, 10), -1),
    ((3, 1500), -1),
    ((500, 33), 0),
    ((5, 6, 35), 2),
    ((5, 36, 7), 1),
    ((5, 6, 35), 0),
    ((5, 6, 35), (0, 2)),
    ((5, 6, 35), (2, 1)),
    ((2, 3, 4, 9), (1, 2)),
    ((4, 5, 6, 9), (0, 2)),
    ((4, 3, 5, 21), (1, 3)),
    ((2, 3, 4, 3, 9), (1, 3)),
)

EMPTY_SHAPES = ((0,), (0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 1, 2), (3, 2, 0), (1, 0, 2, 0))


def case_id(case) -> str:
    shape, axis = case
    return f"{'x'.join(map(str, shape)) or '0d'}-{str(axis).replace(' ', '')}"


# ------------------------------------------------------------------------------- regimes

# Name -> thresholds of `nbsoftmax._plan.Limits` that bring small inputs into it.
_NEVER = 1 << 60
_NEVER_TURNED = {"short_float32_elements": 0, "short_float64_elements": 0}
_NEVER_BESIDE = {"beside_float32_elements": 0, "beside_float64_elements": 0}
_CUT = {
    **_NEVER_BESIDE,
    "paired_rows": 0,
    "lane_bytes": 200,
    "few_lanes_bytes": 200,
    "block_bytes": 200,
    "panel_bytes": 500,
    "few_panels_bytes": 500,
    "panel_block_bytes": 500,
}
_IN_PIECES = {
    **_NEVER_TURNED,
    "serial_bytes": 0,
    "wake_bytes": 0,
    "chunk_bytes": 1,
    "chunk_items": 1,
    "packed_bytes": 1,
}
REGIMES: dict[str, dict[str, int]] = {
    "default": {},
    "whole_lanes": {
        **_NEVER_TURNED,
        **_NEVER_BESIDE,
        "lane_bytes": _NEVER,
        "few_lanes_bytes": _NEVER,
        "panel_bytes": _NEVER,
        "few_panels_bytes": _NEVER,
        "far_bytes": _NEVER,
    },
    "blocks": _CUT,
    "in_pieces": _IN_PIECES,
    "past_cache": {"past_cache_bytes": 0, "wrapped_vectors": 0, "paired_rows": 0},
    "beside_past_cache": {**_NEVER_TURNED, "past_cache_bytes": 0},
    "packed": {
        "taking_turns_elements": _NEVER,
        "odd_turns_rows": _NEVER,
        "narrow_elements": _NEVER,
        "packed_bytes": 300,
    },
    "blocks_in_pieces_past_cache": {**_IN_PIECES, **_CUT, "past_cache_bytes": 0,
                                    "narrow_elements": 0},
}  # fmt: skip


# ------------------------------------------------------------------------------- layouts


def _strided(x):
    base = np.zeros([2 * n for n in x.shape], x.dtype)
    view = base[(slice(None, None, 2),) * x.ndim]
    view[...] = x
    return view


def _reversed(x):
    every = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[every])[every]


def _padded(before, after, dim):
    def pad(x):
        shape = list(x.shape)
        shape[dim] += before + after
        base = np.full(shape, np.nan if x.dtype.kind in "fV" else 1).astype(x.dtype)
        index = [slice(None)] * x.ndim
        index[dim] = slice(before, before + x.shape[dim])
        view = base[tuple(index)]
        view[...] = x
        return view

    return pad


def _apart_in_the_second_axis(x):
    """Neither the first two axes nor the last two are one."""
    if x.ndim < 3:
        return _padded(0, 5, -1)(x)
    return _padded(1, 2, 1)(_padded(0, 3, -1)(x))


def _reversed_second_axis(x):
    every = (slice(None), slice(None, None, -1)) if x.ndim > 1 else slice(None, None, -1)
    return np.ascontiguousarray(x[every])[every]


def _unaligned(x):
    raw = bytearray(x.nbytes + 1)
    view = np.frombuffer(raw, dtype=x.dtype, count=x.size, offset=1).reshape(x.shape)
    view[...] = x
    return view


def _rotated(x):
    """Neither C nor Fortran order: the first axis is the fastest but one."""
    if x.ndim < 3:
        return np.asfortranarray(x)
    order = (1, *range(2, x.ndim), 0)
    back = np.argsort(order)
    return np.ascontiguousarray(x.transpose(order)).transpose(back)


def _broadcast(dim):
    def spread(x):
        index = [slice(None)] * x.ndim
        index[dim] = slice(0, 1)
        return np.broadcast_to(x[tuple(index)], x.shape)

    return spread


def _windows(x):
    """Rows that overlap in memory."""
    n = x.shape[-1]
    flat = np.lib.stride_tricks.sliding_window_view(np.resize(x, x.size // n + n), n)
    return flat[: x.size // n].reshape(x.shape) if x.ndim < 3 else flat[0] + np.zeros_like(x)


def _readonly(x):
    x = np.array(x)
    x.flags.writeable = False
    return x


def _with_axes(layout):
    """An array without axes has one layout only."""
    return lambda x: layout(x) if x.ndim else np.array(x)


# Name -> a function that gives an array of the same shape and, broadcast and windows aside, the
# same values in another memory layout.
_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "c": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "rotated": _rotated,
    "strided": _strided,
    "strided_in_the_last_axis": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
    "reversed": _reversed,
    "row_pitched": _padded(0, 5, -1),
    "row_pitched_shifted": _padded(3, 2, -1),
    "pitched_in_the_first_axis": _padded(1, 1, 0),
    "apart_in_the_second_axis": _apart_in_the_second_axis,
    "reversed_second_axis": _reversed_second_axis,
    "pitched_fortran": lambda x: _padded(0, 3, -1)(x.T).T,
    "byte_swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": _unaligned,
    "broadcast_first_axis": _broadcast(0),
    "broadcast_last_axis": _broadcast(-1),
    "overlapping_windows": _windows,
    "read_only": _readonly,
}
LAYOUTS = {name: _with_axes(layout) for name, layout in _LAYOUTS.items()}


def aligned_at(shape, dtype, offset, boundary=4096) -> np.ndarray:
    """An uninitialised C-ordered array that starts `offset` bytes past a multiple of `boundary`."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 2 * boundary, np.uint8)
    start = -raw.ctypes.data % boundary + offset
    return raw[start : start + nbytes].view(dtype).reshape(shape)
