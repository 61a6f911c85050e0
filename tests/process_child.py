"""What every child process of the process-safety tests computes, and how it judges the result.

A folder of inputs and results is prepared once in a process with default settings, where the
results are held to the contract's ulp budgets.  Every other process computes the same things under
its own conditions and expects the same bits: the contract promises them for every run and every
number of threads.
"""

import functools
import os
import sys
from pathlib import Path

import numpy as np

# name: shape, dtype, axis.  All but the last are large enough to be shared among threads.
CASES = {
    "rows": ((2000, 1000), "float32", -1),
    "columns": ((64, 64, 1000), "float64", 1),
    "one_lane": ((1, 5_000_000), "float32", 1),
    "fewer_rows": ((300, 1000), "float64", -1),
    "fewer_columns": ((30, 100, 100), "float32", 1),
    "tiny": ((3, 5), "float64", 0),
}
LARGE = ("rows", "columns", "one_lane")
FEWER = ("fewer_rows", "fewer_columns", "tiny")
FUNCTIONS = ("softmax", "log_softmax", "logsumexp")
ULP_BUDGET = {"softmax": 3.0, "log_softmax": 3.0, "logsumexp": 1.5}


def folder():
    return Path(os.environ["PROCESS_TESTS_FOLDER"])


@functools.cache
def load(name):
    return np.load(folder() / f"{name}.npy")


def make_input(case):
    """Values that overflow a softmax without its shift; a few of them -inf."""
    shape, dtype, _ = CASES[case]
    rng = np.random.default_rng(len(case))
    x = (10 * rng.standard_normal(shape) + 900).astype(dtype)
    x[rng.random(shape) < 1e-4] = -np.inf
    return x


def reference(x, axis, b=None, where=True):
    """The three results in a wider format, and the sign of the sum; reduced axes are kept.

    The shift keeps the small part of a lane that one element dominates.
    """
    from scipy import special

    wide = np.where(where, x, -np.inf).astype(np.longdouble if x.dtype.itemsize > 4 else np.float64)
    largest = wide.max(axis, keepdims=True)
    largest[np.isneginf(largest)] = 0
    rest, sign = special.logsumexp(wide - largest, axis, b, keepdims=True, return_sign=True)
    log = np.full_like(wide, -np.inf)
    np.subtract(wide - largest, rest, out=log, where=np.isfinite(wide))
    return {"softmax": np.exp(log), "log_softmax": log, "logsumexp": largest + rest, "sign": sign}


def library():
    """The package, which shares its work even while other tests keep all cores busy."""
    import nbsoftmax

    nbsoftmax._cores.LOOK_NS = 1 << 62
    return nbsoftmax


def call(function, case):
    _, _, axis = CASES[case]
    return getattr(library(), function)(load(case), axis=axis)


def ulps(function, case, got):
    """The worst error of `got`, in the unit of the function's budget."""
    want = load(f"{case}.{function}.want")
    unit = np.abs(want.astype(got.dtype))
    if function == "logsumexp":
        unit = np.maximum(unit, np.abs(load(case).max(CASES[case][2])))
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite]), f"{function} of {case}: infinities differ"
    error = np.abs(got[finite] - want[finite]) / np.spacing(unit[finite])
    return float(error.max(initial=0))


def check_one(function, case, same_bits=True):
    """Compute one result, compare it; the process id tells the caller where that happened."""
    got = call(function, case)
    kept = load(f"{case}.{function}")
    assert (got.dtype, got.shape) == (kept.dtype, kept.shape)
    if np.array_equal(got, kept):
        return os.getpid()
    differ = int((got != kept).sum())
    worst = ulps(function, case, got)
    message = f"{function} of {case}: {differ} of {got.size} differ, worst error {worst:.3g} ulp"
    assert worst <= ULP_BUDGET[function], message
    assert not same_bits, message + ": right, but not the bits of an ordinary process"
    print("note:", message)
    return os.getpid()


def check_case(case):
    for function in FUNCTIONS:
        check_one(function, case)
    return os.getpid()


def check(cases=LARGE):
    for case in cases:
        check_case(case)


def prepare():
    for case, (_, _, axis) in CASES.items():
        x = make_input(case)
        np.save(folder() / f"{case}.npy", x)
        wanted = reference(x, axis)
        for function in FUNCTIONS:
            got = call(function, case)
            np.save(folder() / f"{case}.{function}.want.npy", wanted[function].reshape(got.shape))
            np.save(folder() / f"{case}.{function}.npy", got)
            worst = ulps(function, case, got)
            print(f"{function} of {case}: {worst:.3f} ulp")
            assert worst <= ULP_BUDGET[function], f"{function} of {case}: {worst} ulp"


if __name__ == "__main__":
    sys.exit(prepare())
