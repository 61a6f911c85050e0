"""Accuracy: hard inputs, the exact answers, and how many ulp a result lies from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.special

import nbsoftmax

Array = np.ndarray[Any, Any]
Function = Callable[..., Any]

nan, inf = float("nan"), float("inf")

FUNCTIONS = ("softmax", "log_softmax", "logsumexp")
# The contract: the worst error, in ulp, for float32 and float64 lanes of up to 10^7 finite values.
LIMIT_ULP = {"softmax": 3.0, "log_softmax": 3.0, "logsumexp": 1.5}


class Wide(NamedTuple):
    """Arithmetic with more digits than float64: the few operations that the reference needs."""

    name: str
    array: Callable[[Array], Array]
    exp: Callable[[Array], Array]
    log1p: Callable[[Array], Array]
    exponent: Callable[[Array], Array]  # e of r = f * 2**e with 0.5 <= |f| < 1, as frexp
    items: int  # of one input: as many as take well under a second


def longdouble() -> Wide:
    """NumPy's longdouble: 64 bits of significand on x86."""
    return Wide(
        "np.longdouble",
        lambda x: x.astype(np.longdouble),
        np.exp,
        np.log1p,
        lambda r: np.frexp(r)[1],
        1_000_000,
    )


def multiprecision() -> Wide:
    """Take mpmath with 150 bits, for platforms whose longdouble is a double. Slow."""
    import mpmath

    mp = mpmath.mp.clone()
    mp.prec = 150

    def each(function: Callable[[Any], Any]) -> Callable[[Array], Array]:
        ufunc: Callable[[Array], Array] = np.frompyfunc(function, 1, 1)
        return ufunc

    return Wide(
        "mpmath, 150 bits",
        each(lambda v: mp.mpf(float(v))),
        each(mp.exp),
        each(mp.log1p),
        lambda r: each(lambda v: mp.frexp(v)[1])(r).astype(int),
        10_000,
    )


def widest() -> Wide:
    """Take longdouble where it has at least 11 bits more than float64, else mpmath."""
    return longdouble() if np.finfo(np.longdouble).nmant >= 63 else multiprecision()


class Exact(NamedTuple):
    """The three exact results of lanes (m, n), and each lane's largest element."""

    softmax: Array
    log_softmax: Array
    logsumexp: Array
    largest: Array


def exact(x: Array, wide: Wide) -> Exact:
    """Compute the three functions of finite lanes `x` of shape (m, n)."""
    w = wide.array(x if x.dtype.kind == "f" else x.astype(np.float64))
    top = w.max(axis=-1, keepdims=True)
    # TwoSum: what the difference rounds away is 0.25 ulp of a float64 result at |x| = 700.
    d = w - top
    back = d + top
    lost = (w - back) + (back - top - d)
    e = wide.exp(d) * (1 + lost)
    rest = e.copy()
    # The largest element is the 1 in log1p, so that it cannot swallow what the others add.
    np.put_along_axis(rest, w.argmax(axis=-1)[:, None], wide.array(np.zeros((1, 1))), axis=-1)
    s = rest.sum(axis=-1, keepdims=True)
    log_s = wide.log1p(s)
    return Exact(e / (1 + s), (d - log_s) + lost, (top + log_s)[:, 0], top[:, 0])


def worst_ulp(got: Array, want: Array, scale: Array, wide: Wide) -> float:
    """Return the largest |got - want|, in units of the last place that `scale` has in got's dtype.

    Results that are not finite count as infinitely wrong.
    """
    if not np.isfinite(got).all():
        return inf
    info = np.finfo(got.dtype)
    # Below the smallest normal number the spacing stays that of the smallest normal.
    least = int(info.minexp) + 1
    e = np.where(scale == 0, least, np.maximum(wide.exponent(scale), least))
    spacing = wide.array(np.ldexp(1.0, e - 1 - int(info.nmant)))
    return float((abs(wide.array(got) - want) / spacing).max())


def hard_inputs(dtype: Any, items: int, length: int) -> Iterator[tuple[str, Array]]:
    """Yield (name, lanes): about `items` numbers of each kind that naive code gets wrong.

    Lanes have 1000 elements; pairs have 2, those that one dominates 64, a long row `length`.
    """
    rng = np.random.default_rng(20)
    info = np.finfo(dtype)
    shape = (items // 1000, 1000)

    saturated = rng.uniform(-1, 1, (items // 64, 64))
    rows = np.arange(len(saturated))
    saturated[rows, rng.integers(0, 64, len(rows))] += rng.uniform(5, 200, len(rows))

    # exp(x - max) between the smallest subnormal and the smallest normal number
    subnormal = rng.uniform(np.log(info.smallest_subnormal), np.log(info.tiny), shape)
    subnormal[:, 500] = 0

    for name, x in (
        ("N(0, 1)", rng.standard_normal(shape)),
        ("pairs of N(0, 1)", rng.standard_normal((items // 2, 2))),
        ("N(0, 10)", 10 * rng.standard_normal(shape)),
        ("1e6 + N(0, 1)", 1e6 + rng.standard_normal(shape)),
        ("U(-700, 700)", rng.uniform(-700, 700, shape)),
        ("one dominates", saturated),
        ("subnormal results", subnormal),
        ("long N(0, 1)", rng.standard_normal((1, length))),
        ("long U(0, 0.01)", rng.uniform(0, 0.01, (1, length))),
    ):
        yield name, x.astype(dtype)


@dataclass(frozen=True)
class Accuracy:
    """The worst errors of one function on one input, in ulp, by library."""

    input: str
    dtype: str
    function: str
    ulp: dict[str, float]

    @property
    def kept(self) -> bool:
        """Whether nbsoftmax is within its promise."""
        return self.ulp["nbsoftmax"] <= LIMIT_ULP[self.function]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them: no figure where a result was not finite."""
        ulp = {library: u if u < inf else None for library, u in self.ulp.items()}
        return vars(self) | {"ulp": ulp}


def compare(
    name: str, x: Array, wide: Wide, libraries: dict[str, dict[str, Function]]
) -> Iterator[Accuracy]:
    """Yield each function's worst ulp on the lanes of `x` (m, n), one figure for each library.

    The lanes are given once as rows and once as columns, which other kernels walk.
    """
    want = exact(x, wide)
    columns = np.ascontiguousarray(x.T)
    for function in FUNCTIONS:
        answer: Array = getattr(want, function)
        scale = abs(answer)
        if function == "logsumexp":
            # Where the result cancels to near 0, its own ulp asks for digits that x does not have.
            scale = np.maximum(scale, abs(want.largest))
        ulp = {}
        for library, functions in libraries.items():
            try:
                with np.errstate(all="ignore"):
                    by_rows = np.asarray(functions[function](x, axis=-1))
                    by_columns = np.asarray(functions[function](columns, axis=0)).T
                ulp[library] = max(worst_ulp(g, answer, scale, wide) for g in (by_rows, by_columns))
            except Exception:
                if library == "nbsoftmax":
                    raise
                ulp[library] = inf  # another library's refusal is no answer
        yield Accuracy(name, str(x.dtype), function, ulp)


def functions_of(module: Any) -> dict[str, Function]:
    """Pick the three functions of a module by name."""
    return {name: getattr(module, name) for name in FUNCTIONS}


def libraries() -> dict[str, dict[str, Function]]:
    """Return the two libraries that the main job compares: nbsoftmax, then SciPy."""
    return {"nbsoftmax": functions_of(nbsoftmax), "SciPy": functions_of(scipy.special)}


class Special(NamedTuple):
    """A lane whose results are known exactly: the contract's, which SciPy does not always share."""

    name: str
    lane: Any
    softmax: Sequence[float]
    log_softmax: Sequence[float]
    logsumexp: float


SPECIALS = (
    Special("a NaN", [0.0, nan, 1.0], [nan] * 3, [nan] * 3, nan),
    Special("+inf", [0.0, inf], [nan] * 2, [nan] * 2, inf),
    Special("NaN and +inf", [nan, inf], [nan] * 2, [nan] * 2, nan),
    Special("two +inf", [inf, inf], [nan] * 2, [nan] * 2, inf),
    Special("only -inf", [-inf, -inf], [nan] * 2, [nan] * 2, -inf),
    Special("some -inf", [0.0, -inf], [1, 0], [0, -inf], 0),
    Special("one element", [3.5], [1], [0], 3.5),
    Special("huge spread", [1e300, -1e300], [1, 0], [0, -2e300], 1e300),
    Special("largest numbers", [1.7e308, -1.7e308], [1, 0], [0, -inf], 1.7e308),
    Special("bool", [True], [1], [0], 1),
    Special("no element", [], [], [], -inf),
)


class SpecialValues(NamedTuple):
    """Which of the special results are wrong, and where SciPy has another one."""

    wrong: list[str]
    scipy_differs: list[str]
    looked_at: int = len(SPECIALS) * len(FUNCTIONS)


def special_values() -> SpecialValues:
    """Compare the results that are known exactly with nbsoftmax's and with SciPy's."""
    unequal: dict[str, list[str]] = {library: [] for library in libraries()}
    for special in SPECIALS:
        for function in FUNCTIONS:
            for library, functions in libraries().items():
                try:
                    with np.errstate(all="ignore"):
                        got = functions[function](np.array(special.lane), axis=-1)
                    same = np.array_equal(got, getattr(special, function), equal_nan=True)
                except Exception:  # an answer like any other: SciPy refuses bool
                    same = False
                if not same:
                    unequal[library].append(f"{function} of {special.name}")
    return SpecialValues(unequal["nbsoftmax"], unequal["SciPy"])
