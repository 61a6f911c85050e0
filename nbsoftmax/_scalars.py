"""The mathematics of softmax on one page, written once for every machine that runs it.

The terms of a lane (one vector along the reduced axis) are ``e^(x_i - shift)`` times a power of
two, both fixed by ``m = max x_i`` in `scale`, in a unit that a machine may choose; the shift is 0
unless m is huge.  The lane is summarised by the pair ``(m, s + c)``: its maximum and the sum of all
terms but one largest.  A sum is kept in two parts: ``c`` collects what rounding took from ``s``.
Kernels only decide in which order numbers meet.

Two ideas carry the accuracy:

* The maximum enters as an integer exponent and is never subtracted (unless it is so large that
  ``x * log2(e)`` has no fraction bits left), so ``x - m`` is not rounded.  The bias keeps small
  terms normal numbers: a result underflows once, gradually, in the last multiplication.
* The largest terms are counted, not summed, and the logarithm is taken of ``1 + rest``: so a lane
  dominated by one element keeps its small part.  (softmax needs the whole sum, which is cheaper;
  so does logsumexp, unless it is near 0.)

Every function takes ``o``, the operations of one machine: LLVM's (``_llvm.Arithmetic``) or NumPy's
(``_plain.Operations``).  A value knows ``+ - * /`` and comparisons; ``o`` has the rest.

Results of 16 bits do not show what is lost at 2^-16. Theirs (`HALF`) are terms and sums that are no
better, and cost half as much.

Edge cases are repaired once per lane, in `scale` and the functions below it, never per element:
NaN passes through every step and makes the sum NaN; a maximum of +-inf is scaled like a number, its
own elements being counted and not summed, and what it means is said at the end.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Value = Any  # an LLVM vector or a NumPy array; both know the arithmetic operators
Operations = Any


@dataclass(frozen=True)
class Real:
    """The constants of one floating-point format."""

    name: str
    itemsize: int
    mantissa: int  # stored bits
    one_exponent: int  # the exponent field of 1.0
    round: float  # adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits
    bias: int  # binary exponent given to the largest term
    clamp: int  # terms below 2^-clamp of the largest are as good as 0, even summed 2^30 times
    exact: float  # below it, k * ln2_hi is exact in a fused multiply-add
    log2e: float
    ln2_hi: float
    ln2_lo: float
    ln2_short: float  # few enough bits that an exponent times it is exact
    ln2_rest: float
    exp: tuple[float, ...]  # e^r = 1 + r + r^2 * (exp[0] + exp[1] r + ...), |r| <= ln(2)/2/roots
    log: tuple[float, ...]  # 2 atanh(z) = 2z + z^3 * (log[0] + log[1] z^2 + ...)
    # Else terms and sums are good to 2^-16, and 2^f = exp[0] + exp[1] f + ...
    precise: bool = True
    roots: int = 1  # of two, that the machine looks up: unit 2^(j / roots) for 0 <= j < roots
    unit: float = 1.0  # all terms are so many times as large; chosen so that the roots round well
    log_unit: float = 0.0

    @property
    def origin(self) -> float:
        """What the exponent of the largest term, with its bias, is added to."""
        return self.bias + (self.round / self.roots + self.one_exponent if self.precise else 0.0)

    @property
    def exponent_shift(self) -> int:
        """How far the bits of such a sum are from where a number has them."""
        return self.mantissa - (self.roots.bit_length() - 1)

    @property
    def start(self) -> float:
        """What a sum begins with: more than any term, if keeping what rounds off wants that."""
        return 2.0 ** (self.bias + 1) if self.precise else 0.0


# The polynomials of exp are minimax for the relative error, with 1 + r kept exact:
# 0.08 / 2^24 at degree 6 for float32, 0.09 / 2^53 at degree 11 for float64.
FLOAT32 = Real(
    name="float32",
    itemsize=4,
    mantissa=23,
    one_exponent=127,
    round=12582912.0,
    bias=64,
    clamp=180,
    exact=2.0**20,
    log2e=1.4426950216293335,
    ln2_hi=0.6931471824645996,
    ln2_lo=-1.9046542121259336e-09,
    ln2_short=0.693145751953125,
    ln2_rest=1.42860677e-06,
    exp=(
        0.4999999403953552,
        0.1666651964187622,
        0.04166839271783829,
        0.008368778973817825,
        0.0013814526610076427,
    ),
    log=tuple(2 / (2 * k + 3) for k in range(5)),
)
FLOAT64 = Real(
    name="float64",
    itemsize=8,
    mantissa=52,
    one_exponent=1023,
    round=6755399441055744.0,
    bias=200,
    clamp=1150,
    exact=2.0**40,
    log2e=float.fromhex("0x1.71547652b82fep+0"),
    ln2_hi=float.fromhex("0x1.62e42fefa39efp-1"),
    ln2_lo=float.fromhex("0x1.abc9e3b39803fp-56"),
    ln2_short=float.fromhex("0x1.62e42fee00000p-1"),
    ln2_rest=float.fromhex("0x1.a39ef35793c76p-33"),
    exp=tuple(
        float.fromhex(c)
        for c in (
            "0x1.000000000000ap-1",
            "0x1.55555555554f9p-3",
            "0x1.55555555507fdp-5",
            "0x1.1111111127e6ap-7",
            "0x1.6c16c1844820cp-10",
            "0x1.a01a0129b507cp-13",
            "0x1.a01999b5c6b67p-16",
            "0x1.71df263b45059p-19",
            "0x1.28adc707585cbp-22",
            "0x1.ad7ed348e90f6p-26",
        )
    ),
    log=tuple(2 / (2 * k + 3) for k in range(11)),
)
# For machines that look up as many roots of two as a vector has elements, in one instruction:
# 3 and 4 multiplications fewer, and better: 0.03 / 2^24 at degree 3, 0.03 / 2^53 at degree 7. In
# their unit no root is further than 0.27 / 2^24 or 0.03 / 2^53 from a number.
ROOTED = {
    "float32": dataclasses.replace(
        FLOAT32,
        roots=16,
        unit=float.fromhex("0x1.084921cf1627ep+0"),
        log_unit=float.fromhex("0x1.04f0edc427a7ep-5"),
        exact=2.0**19,
        exp=(0.5000161528587341, 0.166667178273201),
    ),
    "float64": dataclasses.replace(
        FLOAT64,
        roots=8,
        unit=float.fromhex("0x1.0a0214ba8d3fep+0"),
        log_unit=float.fromhex("0x1.3a2891d0fae8dp-5"),
        exp=tuple(
            float.fromhex(c)
            for c in (
                "0x1.000000000010bp-1",
                "0x1.555555555512fp-3",
                "0x1.555555480958cp-5",
                "0x1.11111125e1b55p-7",
                "0x1.6c1cbeb7b0cc2p-10",
                "0x1.a01638c6efe81p-13",
            )
        ),
    ),
}
# For results of 16 bits: 2^-18.4 at degree 4.
HALF = dataclasses.replace(
    FLOAT32,
    exp=(
        1.0,
        0.6931241750717163,
        0.24024099111557007,
        0.05590658262372017,
        0.009582838043570518,
    ),
    precise=False,
)
# Weights may be as large as numbers get, so the terms keep out of their way.
WEIGHTED = {
    "float32": dataclasses.replace(FLOAT32, bias=0, clamp=120),
    "float64": dataclasses.replace(FLOAT64, bias=0, clamp=1000),
}


@dataclass(frozen=True)
class Scale:
    """How the terms of one lane are scaled: fixed by its maximum alone."""

    shift: Value  # to be subtracted from x before exp; 0 unless the maximum is huge
    near: Value  # the maximum less the shift
    floor: Value  # smaller inputs are treated as this one
    magic: Value  # added to x * log2(e): if precise, rounds it and makes it an exponent field


def scale(o: Operations, m: Value) -> Scale:
    """The scale of a lane with maximum ``m``; an empty or all ``-inf`` lane is scaled as 0."""
    real = o.real
    zero = o.const(0.0)
    m = o.where(m == o.const(-float("inf")), zero, m)
    small = abs(m) < o.const(real.exact)
    shift = o.where(small, zero, m)
    near = o.where(small, m, zero)
    top = o.fma(near, o.const(real.log2e), o.const(real.round)) - o.const(real.round)
    floor = (top - o.const(real.clamp)) * o.const(real.ln2_hi)
    magic = o.const(real.origin) - top
    return Scale(shift, near, floor, magic)


def shifted(o: Operations, x: Value, m: Value, by: Scale) -> Value:
    """``x - shift``; what equals m becomes ``near``, for a maximum of inf too. NaN stays NaN."""
    return o.where(x == m, by.near, x - by.shift)


def with_shift(
    o: Operations, m: Value, by: Scale, then: Callable[[Callable[[Value], Value]], Any]
) -> Any:
    """What ``then(shift)`` makes: a ``shift`` that does nothing, unless the maximum is huge."""
    small = abs(m) < o.const(o.real.exact)
    return o.usually(small, lambda: then(lambda x: x), lambda: then(lambda x: shifted(o, x, m, by)))


def horner(o: Operations, x: Value, coefficients: tuple[float, ...]) -> Value:
    """``coefficients[0] + coefficients[1] x + ...``."""
    total = o.const(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = o.fma(total, x, o.const(c))
    return total


@functools.cache
def roots_of_two(real: Real) -> tuple[tuple[int, float], ...]:
    """Each ``unit 2^(j / roots)``, rounded, as the bits of its mantissa; and the relative rest."""
    bits = 4 * real.mantissa
    numerator, denominator = real.unit.as_integer_ratio()
    found = []
    for j in range(real.roots):
        power = (numerator**real.roots << j + bits * real.roots) // denominator**real.roots
        for _ in range(real.roots.bit_length() - 1):
            power = math.isqrt(power)
        below = bits - real.mantissa
        rounded = (power + (1 << below - 1)) >> below
        exact = rounded << below
        found.append((rounded - (1 << real.mantissa), (power - exact) / exact))
    return tuple(found)


def _reduced(o: Operations, x: Value, by: Scale) -> tuple[Value, Value, Value]:
    """t, q and r: ``x = k ln 2 + r`` and ``e^r = 1 + q r``.

    t holds k, in steps of a root, with the lane's bias.
    """
    real = o.real
    y = o.larger(by.floor, x)  # this order keeps a NaN in x
    t = o.fma(y, o.const(real.log2e), by.magic)
    k = t - by.magic
    r = o.fma(k, o.const(-real.ln2_lo), o.fma(k, o.const(-real.ln2_hi), y))
    return t, o.fma(horner(o, r, real.exp), r, o.const(1.0)), r


def negative(o: Operations, x: Value) -> Value:
    """-x: from -0, which is the same for a 0 too, and part of the next instruction."""
    return o.const(-0.0) - x


def _power(o: Operations, t: Value) -> Value:
    # To be multiplied with: an addition to exponent bits would turn some NaNs into numbers.
    return o.root_of_two(t) if o.real.roots > 1 else o.power_of_two(t)


def _before_rounding(
    o: Operations, x: Value, by: Scale, weight: Value | None
) -> tuple[Value, Value, Value, Value | None, Value | None]:
    """What a term is: ``a b + c``, with c about as large as it; times a factor if there is one.

    And what a root's rounding took, in units of a, if there are roots.
    """
    t, q, r = _reduced(o, x, by)
    power = _power(o, t)
    if o.real.roots > 1:
        return power, q * r, power, weight, o.rest_of_root(t)
    return q, r, o.const(1.0), power if weight is None else power * weight, None


def exp(
    o: Operations, x: Value, by: Scale, skip: Value | None = None, weight: Value | None = None
) -> Value:
    """``2^(bias - top) e^x`` for a shifted ``x <= m`` or NaN; -inf gives as good as 0.

    Within 0.6 ulp, with roots 0.7. 0 where ``skip`` holds.
    """
    if o.real.precise:
        a, b, c, factor, _ = _before_rounding(o, x, by, weight)
        term = o.fma(a, b, c)
    else:
        term, factor = o.exp2(o.fma(x, o.const(o.real.log2e), by.magic)), weight
    term = term if factor is None else term * factor
    return term if skip is None else o.where(skip, o.const(0.0), term)


def exp2(o: Operations, t: Value) -> Value:
    """``2^t`` where no instruction makes it; less than 2^(bias - clamp) is as good as 0."""
    real = o.real
    to_field = o.const(real.round + real.one_exponent)
    t = o.larger(o.const(float(real.bias - real.clamp)), t)  # this order keeps a NaN in t
    field = t + to_field
    return horner(o, t - (field - to_field), real.exp) * o.power_of_two(field)


def exp_two_parts(
    o: Operations,
    x: Value,
    by: Scale,
    low: Value,
    skip: Value | None = None,
    weight: Value | None = None,
) -> tuple[Value, Value]:
    """`exp`, bit for bit, and ``low`` plus what was rounded away, if that counts."""
    if not o.real.precise:
        return exp(o, x, by, skip, weight), low
    a, b, c, factor, rest = _before_rounding(o, x, by, weight)
    term = o.fma(a, b, c)
    lost = o.fma(a, b, c - term)
    if rest is not None:
        lost = o.fma(a, rest, lost)
    if factor is None:
        lower = lost + low
    else:
        term, lower = term * factor, o.fma(lost, factor, low)
    if skip is not None:
        term, lower = o.where(skip, o.const(0.0), term), o.where(skip, low, lower)
    return term, lower


def largest(o: Operations, m: Value) -> tuple[Value, Value]:
    """The largest term of a lane in two parts."""
    by = scale(o, m)
    return exp_two_parts(o, by.near, by, o.const(0.0))


def exp_product(o: Operations, x: Value, by: Scale) -> tuple[Value, Value]:
    """`exp` as a product of two numbers, as good as the rounded one, if terms are precise.

    It differs from that one only if there are roots.
    """
    t, q, r = _reduced(o, x, by)
    return o.fma(q, r, o.const(1.0)), _power(o, t)


def two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """``a + b`` rounded, and the exact rest (Knuth)."""
    t = a + b
    other = t - a
    return t, (a - (t - other)) + (b - other)


def fast_two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """`two_sum` at half the price, for ``|a| >= |b|`` or an a of 0 (Dekker)."""
    t = a + b
    return t, b - (t - a)


def add(s: Value, c: Value, term: Value) -> tuple[Value, Value]:
    """Push one term to the sum ``s + c``."""
    s, rest = two_sum(s, term)
    return s, c + rest


def add_to_more(s: Value, c: Value, term: Value) -> tuple[Value, Value]:
    """`add` at half the price, for ``|s| >= |term|`` or a sum of 0."""
    s, rest = fast_two_sum(s, term)
    return s, c + rest


def add_exp(o: Operations, s: Value, c: Value, x: Value, by: Scale) -> tuple[Value, Value]:
    """Push the term of x to a sum that is larger: as a product, so that nobody has to round it."""
    if not o.real.precise:
        return s + exp(o, x, by), c
    p, power = exp_product(o, x, by)
    total = o.fma(p, power, s)
    return total, c + o.fma(p, power, s - total)


def add_one(
    o: Operations, s: Value, c: Value, term: Value, to_more: bool = False
) -> tuple[Value, Value]:
    """Push one of an element's terms: plainly, if they are not precise."""
    if not o.real.precise:
        return s + term, c
    return add_to_more(s, c, term) if to_more else add(s, c, term)


def merge(s: Value, c: Value, s2: Value, c2: Value) -> tuple[Value, Value]:
    """Join two sums of the same scale; the bits do not depend on which comes first."""
    s, rest = two_sum(s, s2)
    return s, (c + c2) + rest


def rescaled(o: Operations, m: Value, whole: Value, s: Value, c: Value) -> tuple[Value, Value]:
    """A sum s + c that is scaled for ``m``, scaled for ``whole >= m``; 0 if either is infinite.

    Multiplied by a power of two, and so without rounding, unless one of the two scales has a shift.
    In two steps: the ratio may be smaller than any number, and its product with the sum not.
    """
    real, own, by = o.real, scale(o, m), scale(o, whole)
    lowest = o.const(2.0 * (1 - real.one_exponent))
    k = o.larger(lowest, by.magic - own.magic)
    half = o.fma(k, o.const(0.5), o.const(real.round)) - o.const(real.round)
    zero_power = o.const(real.round + real.one_exponent)
    powers = [o.power_of_two(part + zero_power) for part in (half, k - half)]

    def ratio() -> list[Value]:
        down = o.const(2.0**-real.bias)
        return [down, exp(o, m - by.shift, by) / (largest(o, m)[0] * down)]

    exact, limit = o.const(real.exact), o.const(float("inf"))
    first, second = o.usually((abs(m) < exact) & (abs(whole) < exact), lambda: powers, ratio)
    finite = (abs(m) < limit) & (abs(whole) < limit)
    second = o.where(finite, second, o.const(0.0))
    return s * first * second, c * first * second


def _without_terms(o: Operations, m: Value, s: Value) -> Value:
    """Where m is infinite and the lane holds no NaN: m alone says what the results are."""
    return (abs(m) == o.const(float("inf"))) & (s == s)


def with_equals(o: Operations, m: Value, count: Value, s: Value, c: Value) -> tuple[Value, Value]:
    """The pair's sum: the terms below the largest, s + c, and all but one of the ``count`` largest.

    0 for an infinite m, unless the lane holds a NaN.
    """
    return with_largest(o, m, count - o.const(1.0), s, c)


def with_largest(o: Operations, m: Value, times: Value, s: Value, c: Value) -> tuple[Value, Value]:
    """The sum s + c and so many times the largest term; 0 for an infinite m, NaN for a NaN."""
    term, low = largest(o, m)
    product = times * term
    rest = o.fma(times, term, negative(o, product))
    total, c = add(product, o.fma(times, low, c + rest), s)
    infinite = _without_terms(o, m, s)
    zero = o.const(0.0)
    return o.where(infinite, zero, total), o.where(infinite, zero, c)


def without_one(o: Operations, m: Value, s: Value, c: Value, products: bool) -> tuple[Value, Value]:
    """The pair's sum from that of all terms; 0 for an infinite m, unless the lane holds a NaN.

    The terms were pushed as ``products``, or rounded.
    """
    zero = o.const(0.0)
    term, low = largest(o, m)[0], zero
    if products and o.real.roots > 1:
        by = scale(o, m)
        p, power = exp_product(o, by.near, by)
        term = p * power
        low = o.fma(p, power, zero - term)
    rest, lost = two_sum(s, zero - term)
    infinite = _without_terms(o, m, s)
    return o.where(infinite, zero, rest), o.where(infinite, zero, c + (lost - low))


def hidden(o: Operations, additions: Value, to_one: Value) -> Value:
    """The rest, in largest terms, in which a sum hides half a rounding of it, or less.

    Each of so many additions leaves up to two roundings of the largest term in c, which rounds them
    as often as something is added to it: ``to_one`` sum, of a segment or of segments. If sums are
    not precise, those themselves round.
    """
    if o.real.precise:
        return additions * to_one * o.const(2.0**-o.real.mantissa)
    return to_one * o.const(2.0**-8)


def is_small(o: Operations, m: Value, s: Value, least: Value) -> Value:
    """1 where the pair's sum is less than ``least`` largest terms or NaN, else 0."""
    zero, one = o.const(0.0), o.const(1.0)
    small = o.where(s > least * largest(o, m)[0], zero, one)
    return o.where(_without_terms(o, m, s), zero, small)


NEAR_ZERO = 1.0  # for maxima, and results beside them; there logsumexp shows what others hide


def rounded_terms(o: Operations, m: Value) -> Value:
    """The rest, in largest terms, from which on rounded terms do for logsumexp.

    Their error counts only in results below 1, so not beside a larger maximum; and a rest of 1.75
    largest terms has a logarithm of 1.
    """
    if not o.real.precise:
        return o.const(0.0)
    return o.where(abs(m) < o.const(NEAR_ZERO), o.const(1.75), o.const(0.0))


def whole(o: Operations, m: Value, s: Value, c: Value) -> tuple[Value, Value]:
    """The sum of all terms from that of all but one largest."""
    return add(largest(o, m)[0], c, s)


def reciprocal(o: Operations, m: Value, s: Value, c: Value) -> tuple[Value, Value]:
    """``1 / (s + c)`` of the whole sum in two parts; NaN if m is infinite."""
    total, rest = fast_two_sum(s, c)
    high = o.const(1.0) / total
    low = high * (o.fma(negative(o, high), total, o.const(1.0)) - high * rest)
    return o.where(abs(m) == o.const(float("inf")), o.const(float("nan")), high), low


def softmax(o: Operations, term: Value, high: Value, low: Value) -> Value:
    """One result from its term and the lane's `reciprocal`."""
    if not o.real.precise:
        return term * high
    return o.fma(term, high, term * low)


def log_softmax(x: Value, m: Value, log: Value) -> Value:
    """One result from its input and the lane's `log_sum`; NaN wherever m is infinite."""
    return (x - m) - log


def log1p(o: Operations, y: Value, y_low: Value) -> tuple[Value, Value]:
    """``log(1 + y + y_low)`` for ``y > -1`` in two parts; relative error 0.7 ulp. NaN stays NaN.

    With ``1 + y = 2^k (1 + f)``: ``k ln 2 + f - (f^2/2 - z (f^2/2 + R(z)))``, ``z = f / (2 + f)``.
    """
    u, rest = two_sum(o.const(1.0), y)
    k, fraction = o.split_exponent(u)
    near = k == o.const(0.0)
    f = o.where(near, y, fraction - o.const(1.0))
    rest = o.where(near, y_low, o.times_power_of_two(rest + y_low, negative(o, k)))
    return _log(o, k, f, rest)


def log(o: Operations, u: Value, u_low: Value) -> tuple[Value, Value]:
    """``log(u + u_low)`` for a positive normal u in two parts; absolute error below 1 ulp of 1."""
    k, fraction = o.split_exponent(u)
    rest = o.times_power_of_two(u_low, negative(o, k))
    return _log(o, k, fraction - o.const(1.0), rest)


def _log(o: Operations, k: Value, f: Value, rest: Value) -> tuple[Value, Value]:
    """``log 2^k (1 + f + rest)`` for ``1 + f`` in [sqrt(1/2), sqrt(2)) in two parts."""
    high, low, tail = _log_parts(o, k, f, rest / (o.const(1.0) + f))
    high, low2 = fast_two_sum(high, tail)
    return high, low + low2


def _log_parts(o: Operations, k: Value, f: Value, rest: Value) -> tuple[Value, Value, Value]:
    """``k ln 2 + log(1 + f) + rest`` in three parts: ``k ln2_short + f`` in two, and a tail."""
    real = o.real
    half_square = o.const(0.5) * f * f
    z = f / (o.const(2.0) + f)
    square = z * z
    tail = z * o.fma(square, horner(o, square, real.log), half_square)
    tail = tail + o.fma(k, o.const(real.ln2_rest), rest)
    high, low = fast_two_sum(k * o.const(real.ln2_short), f)
    return high, low, tail - half_square


def ratio_to_largest(o: Operations, m: Value, s: Value, c: Value) -> tuple[Value, Value]:
    """The pair's sum over its largest term, in two parts."""
    term, low = largest(o, m)
    inverse = o.const(1.0) / term
    y = s * inverse  # a rounding more than a quotient, which the low part takes back
    return y, ((o.fma(negative(o, y), term, s) + c) - y * low) * inverse


def log_sum(o: Operations, m: Value, s: Value, c: Value) -> tuple[Value, Value]:
    """``log sum e^(x_i - m)`` of a pair in two parts; NaN where m is +inf, 0 where it is -inf."""
    log, low = log1p(o, *ratio_to_largest(o, m, s, c))
    return o.where(m == o.const(float("inf")), o.const(float("nan")), log), low


def logsumexp(o: Operations, m: Value, s: Value, c: Value) -> Value:
    """The lane's logsumexp from its pair."""
    log, low = log_sum(o, m, s, c)
    total, rest = two_sum(m, log)
    # An infinite maximum is its own answer unless the sum is NaN; two_sum would make inf - inf.
    infinite = _without_terms(o, m, s)
    return o.where(infinite, m, total + (rest + low))


def logsumexp_of_all(o: Operations, m: Value, s: Value, c: Value) -> Value:
    """The lane's logsumexp from the sum of all its terms, the largest too, pushed by `add_exp`.

    Half the work of `logsumexp`; but up to `NEAR_ZERO` the sum hides what its logarithm shows.
    """
    real, by = o.real, scale(o, m)
    term, c = exp_two_parts(o, by.near, by, c)  # what was rounded off the largest is not lost
    if real.roots > 1:
        p, power = exp_product(o, by.near, by)
        c = c + o.fma(negative(o, p), power, term)
    total = s + c
    low = c - (total - s)
    power, fraction = o.split_exponent(total)
    f = fraction - o.const(1.0)
    # Good to a few percent, for a low part that is a rounding.
    inverse = o.fma(f, f - o.const(1.0), o.const(1.0))
    rest = o.times_power_of_two(low, negative(o, power)) * inverse
    k = (o.const(real.origin - real.bias) - by.magic) + power
    high, low, tail = _log_parts(o, k, f, rest)
    if real.log_unit:
        tail = tail - o.const(real.log_unit)
    product = k * o.const(real.ln2_short)  # is rounded where the maximum is large
    low = low + o.fma(k, o.const(real.ln2_short), negative(o, product))
    return o.where(_without_terms(o, m, s), m, by.shift + (high + (low + tail)))


def is_near_zero(o: Operations, m: Value, value: Value) -> Value:
    """1 where `logsumexp_of_all` does not do, or is NaN, else 0."""
    far = o.larger(abs(m), abs(value)) > o.const(NEAR_ZERO)
    return o.where(far, o.const(0.0), o.const(1.0))


def log_weighted(o: Operations, m: Value, s: Value, c: Value) -> tuple[Value, Value]:
    """``log |sum|`` and the sign of a lane's weighted sum, all terms in s + c; m is finite."""
    zero, one = o.const(0.0), o.const(1.0)
    total = s + c
    negative, empty = total < zero, total == zero
    s, c = o.where(negative, zero - s, s), o.where(negative, zero - c, c)
    u, low = ratio_to_largest(o, m, s, c)
    # Weights may make it less than a normal number.
    power = o.real.one_exponent // 2
    tiny = u < o.const(2.0 ** (2 - o.real.one_exponent + 1))
    more = o.const(2.0**power)
    high, rest = log(o, o.where(tiny, u * more, u), o.where(tiny, low * more, low))
    shift = o.where(tiny, o.const(-float(power)), zero)
    rest = o.fma(shift, o.const(o.real.ln2_rest), rest)
    high, lost = two_sum(o.fma(shift, o.const(o.real.ln2_short), high), rest)
    value, rest = two_sum(m, high)
    value = o.where(empty, o.const(-float("inf")), value + (rest + lost))
    sign = o.where(negative, o.const(-1.0), o.where(empty, zero, one))
    return value, o.where(total == total, sign, total)
