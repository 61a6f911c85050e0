"""Which regime serves which array: a golden table, and the folds that need no copy."""

import dataclasses
import itertools

import numpy as np
import pytest

from nbsoftmax import _plan, _semantics

from . import cases

MIB = 1 << 20


def regime_of(shape, axis, dtype, op="softmax", layout="c"):
    """The regime's name, for an array of this geometry; nothing of that size is allocated."""
    dtype = np.dtype(dtype)
    strides = np.broadcast_to(np.zeros((), dtype), shape).strides
    strides = np.cumprod([dtype.itemsize, *shape[:0:-1]])[::-1]
    if layout == "fortran":
        strides = np.cumprod([dtype.itemsize, *shape[:-1]])
    if layout == "strided":
        strides = strides * 2
    if layout == "pitched":
        strides = np.cumprod([dtype.itemsize, *(n + 5 for n in shape[:0:-1])])[::-1]
    axes = _semantics.normalize_axis(axis, len(shape))
    size = dtype.itemsize
    fold = _semantics.fold(tuple(shape), tuple(map(int, strides)), None, axes, size, size, True)
    if fold is None:
        return "packed"
    compute = max(4, size)
    in_runs = fold.by_n.run < fold.n
    dense = fold.dense(size, size)
    plan = _plan.plan(op, fold.outer, fold.n, fold.inner, compute, size, in_runs, dense=dense)
    if plan.walk == "packed":
        return "packed"
    turns = "+turns" if plan.lanes > 1 else ""
    runs = "+runs" if in_runs or fold.by_outer.run < fold.outer else ""
    blocks = "+blocks" if plan.blocks(fold.n * plan.lanes) > 1 else ""
    pairs = "+pairs" if plan.walk == "short" and plan.panel == 2 else ""
    return plan.walk + pairs + turns + runs + blocks + ("+past_cache" if plan.past_cache else "")


GOLDEN = [
    # shape, axis, dtype, regime of softmax
    ((8, 8), -1, "float32", "short"),
    ((100_000, 10), -1, "float32", "short+pairs"),
    ((127, 10), -1, "float32", "short"),
    ((128, 32), -1, "float64", "short+pairs"),
    ((128, 33), -1, "float32", "short"),
    ((1_000_000, 16), -1, "float32", "short+pairs+past_cache"),
    ((1_000_000, 16), -1, "float64", "short+pairs+past_cache"),
    ((1000, 64), -1, "float32", "short"),
    ((1000, 192), -1, "float32", "beside"),
    ((1000, 640), -1, "float32", "beside"),
    ((100_000, 640), -1, "float32", "beside+past_cache"),
    ((1000, 1300), -1, "float32", "along"),
    ((1000, 32), -1, "float64", "short+pairs"),
    ((1000, 112), -1, "float64", "beside"),
    ((1000, 320), -1, "float64", "beside"),
    ((1000, 650), -1, "float64", "along"),
    ((7, 320), -1, "float64", "along"),
    ((1000, 10), -1, "float16", "short+pairs"),
    ((7, 10), -1, "float32", "along"),
    ((8, 10), -1, "float32", "short"),
    ((128, 1281), -1, "float32", "along"),
    ((1000,), 0, "float64", "along"),
    ((4096, 4096), -1, "float32", "along+past_cache"),
    ((4096, 4096), 1, "float64", "along+past_cache"),
    ((1, 16 * MIB), -1, "float32", "along+blocks+past_cache"),
    ((16 * MIB,), None, "float64", "along+blocks+past_cache"),
    ((4, 100_000), -1, "float32", "along+blocks"),
    ((64, 40_000), -1, "float32", "along"),
    ((64, 60_000), -1, "float32", "along+past_cache"),
    ((32, 70_000), -1, "float32", "along"),
    ((32, 262_144), -1, "float32", "along+past_cache"),
    ((32, 262_145), -1, "float32", "along+blocks+past_cache"),
    ((64, 70_000), -1, "float64", "along+past_cache"),
    ((64, 140_000), -1, "float64", "along+blocks+past_cache"),
    ((4096, 4096), 0, "float32", "across+past_cache"),
    ((8192, 4096), 0, "float32", "across+past_cache"),
    ((8193, 4096), 0, "float32", "across+blocks+past_cache"),
    ((100, 1000), 0, "float32", "across"),
    ((1024, 64, 256), 1, "float32", "across+past_cache"),
    ((32, 64, 256), 1, "float64", "across"),
    ((1000, 3), 0, "float32", "along+turns"),
    ((63, 3), 0, "float32", "across"),
    ((1000, 12), 0, "float32", "along+turns"),
    ((1000, 7), 0, "float32", "across"),
    ((1000, 12), 0, "float64", "across"),
    ((1000, 4), 0, "float32", "along+turns"),
    ((1000, 8), 0, "float32", "along+turns"),
    ((1000, 8), 0, "float64", "across"),
    ((4, 4), 0, "float32", "along+turns"),
    ((4, 3), 0, "float32", "across"),
    ((20_000, 2), 0, "float32", "along+turns+blocks"),
    ((100, 100_000, 2), 1, "float32", "along+turns+past_cache"),
    ((20, 30, 40), (0, 1), "float32", "across"),
    ((40, 50, 40), (0, 1), "float32", "across+blocks"),
    ((20, 30, 40), (1, 2), "float32", "along"),
    ((20, 30, 40), (0, 2), "float32", "along+runs"),
    ((64, 32, 64, 32), (0, 2), "float32", "across+runs+past_cache"),
    ((32, 32, 64, 32), (0, 2), "float32", "across+runs"),
    ((64, 32, 64, 32), (0, 2), "float64", "across+runs+past_cache"),
    ((64, 32, 64, 32), (1, 3), "float32", "along+runs"),
    ((64, 32, 64, 32), (1, 3), "float64", "along+runs"),  # parts of vectors cannot go past
    ((512, 8, 64, 32), (0, 2), "float32", "across+runs+blocks+past_cache"),
    ((64, 64, 28, 28), (0, 2, 3), "float32", "along+runs"),
    ((64, 64, 56, 56), (0, 2, 3), "float32", "along+runs"),
    ((64, 64, 80, 80), (0, 2, 3), "float32", "along+runs+blocks"),
    ((100, 2, 100, 8), (1, 3), "float32", "packed"),
    ((64, 32, 64, 3), (0, 2), "float32", "across+runs"),
    ((4, 5, 6, 7, 8, 9), (0, 2, 4), "float32", "packed"),
    ((20, 30, 40), None, "float32", "along+blocks"),
    ((20, 30, 40), (), "float32", "across"),
]


@pytest.mark.parametrize(("shape", "axis", "dtype", "regime"), GOLDEN, ids=str)
def test_golden_table(shape, axis, dtype, regime):
    assert regime_of(shape, axis, dtype) == regime


def test_logsumexp_puts_rows_twice_as_long_together():
    for shape, dtype in (((1000, 128), "float32"), ((1000, 64), "float64")):
        assert regime_of(shape, -1, dtype) == "beside"
        assert regime_of(shape, -1, dtype, op="logsumexp") == "short"
    for shape, dtype in (((1000, 1280), "float32"), ((1000, 640), "float64")):
        assert regime_of(shape, -1, dtype) == "along"
        assert regime_of(shape, -1, dtype, op="logsumexp") == "beside"


def test_logsumexp_stores_too_little_to_bypass_the_cache():
    for shape, axis, dtype, regime in GOLDEN:
        found = regime_of(shape, axis, dtype, op="logsumexp")
        usual = regime.replace("+past_cache", "")
        if (found, usual) != ("beside", "along"):  # rows twice as long
            assert found.replace("+blocks", "") == usual.replace("+blocks", "")


@pytest.mark.parametrize(
    ("shape", "regime"),
    [
        ((4096, 4096), "across+blocks"),
        ((4096, 1024), "across"),  # is in cache
        ((512, 20_000), "across"),  # is one block
    ],
)
def test_logsumexp_cuts_columns_of_what_lies_in_memory(shape, regime):
    assert regime_of(shape, 0, "float32", op="logsumexp") == regime


@pytest.mark.parametrize(
    ("layout", "axis", "regime"),
    [
        ("fortran", 0, "beside"),  # a lane of 100
        ("fortran", 1, "across"),
        ("pitched", 1, "short"),
        ("pitched", 0, "across"),
        ("strided", 1, "packed"),
        ("strided", 0, "packed"),
        ("pitched", None, "along+runs"),
    ],
)
def test_layouts_that_fold_as_they_lie(layout, axis, regime):
    """No copy for Fortran order and for rows with a pitch; strided lanes are copied in pieces."""
    assert regime_of((100, 50), axis, "float32", layout=layout) == regime


# Regime of cases.REGIMES -> what it must make of at least one of the shapes that tests use.
REACHED = {
    "default": {"short", "along", "across"},
    "whole_lanes": {"along", "across"},
    "blocks": {
        "short+pairs",
        "along+blocks",
        "across+blocks",
        "along+runs+blocks",
        "across+runs+blocks",
    },
    "in_pieces": {"beside", "along", "across"},
    "past_cache": {"short+pairs+past_cache", "along+past_cache", "across+past_cache"},
    "beside_past_cache": {"beside+past_cache", "along+past_cache", "across+past_cache"},
    "packed": {"packed", "along"},
    "blocks_in_pieces_past_cache": {"along+blocks+past_cache", "across+blocks+past_cache"},
}


@pytest.mark.parametrize("regime", cases.REGIMES)
def test_regimes_of_the_tests_lead_where_they_say(regime):
    with _plan.using(**cases.REGIMES[regime]):
        found = {regime_of(shape, axis, "float32") for shape, axis in cases.SOME_SHAPES}
    assert REACHED[regime] <= found


def test_using_puts_the_limits_back():
    before = _plan.LIMITS
    with _plan.using(block_bytes=64):
        assert _plan.LIMITS.block_bytes == 64
    assert before is _plan.LIMITS
    with pytest.raises(KeyError), _plan.using(block_bytes=64):
        raise KeyError
    assert before is _plan.LIMITS
    with pytest.raises(TypeError), _plan.using(no_such_limit=1):
        pass
    assert before is _plan.LIMITS


def test_limits_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _plan.LIMITS.block_bytes = 1


@pytest.mark.parametrize(("outer", "n", "inner"), [(1, 2000, 64), (3, 30_000, 1)])
def test_few_lanes_are_cut_where_threads_share_them(outer, n, inner):
    assert _plan.plan("softmax", outer, n, inner, 4, 4).blocks(n) > 1
    assert _plan.plan("softmax", outer, n, inner, 4, 4, alone=True).blocks(n) == 1


SIZES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100, 1000, 4097, 70_000, 10**7, 10**9)


@pytest.mark.parametrize("regime", cases.REGIMES)
def test_every_geometry_has_a_plan(regime):
    """A walk that exists, blocks that cover the lane, rows turned only where they fit."""
    with _plan.using(**cases.REGIMES[regime]) as limits:
        for op, outer, n, inner in itertools.product(("softmax", "logsumexp"), *[SIZES] * 3):
            for itemsize, runs in itertools.product((4, 8), (False, True)):
                plan = _plan.plan(op, outer, n, inner, itemsize, itemsize, runs)
                assert plan.walk in {"along", "beside", "across", "short", "packed"}
                if plan.walk == "packed":
                    assert 1 < inner < limits.narrow_elements or (runs and inner == 1 and n <= 96)
                    continue
                assert plan.block >= 1
                assert (plan.blocks(n) - 1) * plan.block < n <= plan.blocks(n) * plan.block
                assert (plan.walk == "across") == (inner > 1)
                assert plan.walk != "short" or (n <= 384 and not runs)
                if runs and plan.walk == "along":
                    assert plan.block == n or plan.block % (64 // itemsize) == 0


def test_fold_sees_the_elements_it_should():
    """Every fold without a copy, played back with its steps, finds each lane's own elements."""
    layouts = ("c", "fortran", "row_pitched", "reversed", "broadcast_first_axis")
    for (shape, axis), layout in itertools.product(cases.EVERY_AXIS, layouts):
        x = cases.LAYOUTS[layout](np.arange(np.prod(shape), dtype=np.int64).reshape(shape))
        axes = _semantics.normalize_axis(axis, x.ndim)
        for runs in (False, True):
            fold = _semantics.fold(x.shape, x.strides, None, axes, 8, 8, runs)
            if fold is None:
                continue
            assert fold.outer * fold.n * fold.inner == x.size
            sizes, steps = [], []
            for count, by in ((fold.outer, fold.by_outer), (fold.n, fold.by_n)):
                assert runs or by.run == count
                sizes += [count // by.run, by.run]
                steps += [by.run * by.x + by.x_jump, by.x]
            view = np.lib.stride_tricks.as_strided(x, (*sizes, fold.inner), (*steps, 8))
            view = view.reshape(fold.outer, fold.n, fold.inner)
            kept = [i for i in fold.order if i not in axes]
            lanes = x.transpose([*kept, *[i for i in fold.order if i in axes]]).reshape(-1, fold.n)
            np.testing.assert_array_equal(view.transpose(0, 2, 1).reshape(-1, fold.n), lanes)


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (1, 3), None, ()])
def test_runs_leave_results_in_c_order(axis):
    """As packing does: who has a fold of one axis each keeps it, and its order."""
    for layout in ("c", "fortran", "rotated", "row_pitched", "pitched_in_the_first_axis"):
        x = cases.LAYOUTS[layout](np.zeros((4, 5, 6, 7)))
        axes = _semantics.normalize_axis(axis, x.ndim)
        plain, runs = (
            _semantics.fold(x.shape, x.strides, None, axes, 8, 8, runs) for runs in (False, True)
        )
        assert runs == plain if plain is not None else runs is None or runs.order == (0, 1, 2, 3)
