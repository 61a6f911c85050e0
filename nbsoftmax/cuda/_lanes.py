"""The numbers of lanes in one thread's registers, and the algebra of pairs: what threads compute.

A lane's pair is ``(m, count, s, c)``: its maximum, how many elements equal it, and the sum of the
other terms in two parts (`_scalars`). With weights ``count`` is their sum, and a fifth part has
what decides alone: NaN or an infinity if there is one.

Functions take ``o``, the machine (`_prims`), and lists of its numbers.
"""

from collections.abc import Callable
from typing import Any

from .. import _scalars
from .._semantics import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from ._jobs import Group, Values

INFINITY = float("inf")
Shift = Callable[[Any], Any]


def maximum(o: Any, values: Values) -> Any:
    """The largest number. NaNs are passed over: the sum keeps them."""
    m = o.const(-INFINITY)
    for x in values:
        m = o.maximum_number(x, m)
    return m


def larger(o: Any, p: Values, q: Values) -> Values:
    return [o.maximum_number(a, b) for a, b in zip(p, q, strict=True)]


def terms(o: Any, values: Values, m: Any) -> Values:
    by = _scalars.scale(o, m)

    def made(shift: Shift) -> Values:
        return [_scalars.exp(o, shift(x), by) for x in values]

    return list(_scalars.with_shift(o, m, by, made))


def total(o: Any, values: Values, m: Any, keep: bool) -> Values:
    """The sum of the terms in two parts, and the terms if they are to be kept: then rounded."""
    by, start = _scalars.scale(o, m), o.const(o.real.start)

    def added(shift: Shift) -> Values:
        s, c = start, o.const(0.0)
        terms = []
        for x in values:
            if keep:
                terms.append(_scalars.exp(o, shift(x), by))
                s, c = _scalars.add_one(o, s, c, terms[-1], to_more=True)
            else:
                s, c = _scalars.add_exp(o, s, c, shift(x), by)
        return [s - start, c, *terms]

    return list(_scalars.with_shift(o, m, by, added))


def add_totals(o: Any, group: Group, totals: list[Values]) -> list[Values]:
    """Totals joined of all threads of a group."""
    if not o.real.precise:  # then there is no second part
        sums = o.reduce(group, _each_added, [s for s, _ in totals])
        return [[s, o.const(0.0)] for s in sums]
    return each_pair(o.reduce(group, _merged_totals, [part for pair in totals for part in pair]), 2)


def _each_added(o: Any, p: Values, q: Values) -> Values:
    return [a + b for a, b in zip(p, q, strict=True)]


def _merged_totals(o: Any, p: Values, q: Values) -> Values:
    joined: Values = []
    for i in range(0, len(p), 2):
        joined += _scalars.merge(p[i], p[i + 1], q[i], q[i + 1])
    return joined


def rest(o: Any, m: Any, total: Values, additions: int) -> Values:
    """The sum of all terms but one largest from that of all, and 1 where it is not good enough."""
    s, c = total
    s, c = _scalars.without_one(o, m, s, c, products=True)
    times = o.const(float(additions))
    return [s, c, _scalars.is_small(o, m, s, _scalars.hidden(o, times, times))]


def logsumexp(o: Any, m: Any, total: Values) -> Values:
    """Logsumexp from the sum of all terms, and 1 where that is not good enough."""
    value = _scalars.logsumexp_of_all(o, m, *total)
    return [value, _scalars.is_near_zero(o, m, value)]


def push(o: Any, pair: Values, values: Values, m: Any, weights: Values | None = None) -> Values:
    """A pair of maximum ``m`` with more numbers, none above it."""
    by = _scalars.scale(o, m)
    one, zero = o.const(1.0), o.const(0.0)

    def pushed(shift: Shift) -> Values:
        _, count, s, c, *decides = pair
        before = s, c
        if not o.real.precise:  # plain sums are of these numbers alone
            s = c = zero
        for i, x in enumerate(values):
            weight = one if weights is None else weights[i]
            equal = x == m
            term, c = _scalars.exp_two_parts(o, shift(x), by, c, equal, weights and weight)
            s, c = _scalars.add_one(o, s, c, term)
            count = count + o.where(equal, weight, zero)
            if weights is not None:
                decides = [decides[0] + _decisive(o, x, weight)]
        if not o.real.precise:
            s, c = _scalars.merge(*before, s, c)
        return [count, s, c, *decides]

    return [m, *_scalars.with_shift(o, m, by, pushed)]


def _decisive(o: Any, x: Any, weight: Any) -> Any:
    """What an element says of its lane's weighted sum alone; else 0."""
    zero, infinity = o.const(0.0), o.const(INFINITY)
    infinite = (x == infinity) | (abs(weight) == infinity)
    nan = o.where(x == x, zero, x) + o.where(weight == weight, zero, weight)
    return o.where(infinite, weight * infinity, nan)


def empty(o: Any, parts: int) -> Values:
    """The pair of no numbers."""
    return [o.const(-INFINITY)] + [o.const(0.0)] * (parts - 1)


def raised(o: Any, pair: Values, whole: Any) -> Values:
    """A pair as part of a lane with the maximum ``whole``."""
    m, count, s, c, *decides = pair
    same = m == whole
    by = _scalars.scale(o, whole)
    term = _scalars.exp(o, m - by.shift, by)
    product = count * term
    rest = o.fma(count, term, _scalars.negative(o, product))
    s2, c2 = _scalars.rescaled(o, m, whole, s, c)
    sum_, low = _scalars.add(product, rest + c2, s2)
    zero = o.const(0.0)
    return [
        whole,
        o.where(same, count, zero),
        o.where(same, s, sum_),
        o.where(same, c, low),
        *decides,
    ]


def grown(o: Any, pair: Values, values: Values, weights: Values | None = None) -> Values:
    """A pair with any more numbers."""
    m = o.maximum_number(maximum(o, values), pair[0])
    return push(o, raised(o, pair, m), values, m, weights)


def each_pair(pairs: Values, parts: int) -> list[Values]:
    return [pairs[i : i + parts] for i in range(0, len(pairs), parts)]


def add_pairs(o: Any, parts: int, p: Values, q: Values) -> Values:
    """Pairs of the same maxima, joined."""
    joined: Values = []
    for one, other in zip(each_pair(p, parts), each_pair(q, parts), strict=True):
        joined += [one[0], *add_sums(o, parts - 1, one[1:], other[1:])]
    return joined


def add_sums(o: Any, parts: int, p: Values, q: Values) -> Values:
    """`add_pairs` without the maxima."""
    joined: Values = []
    for one, other in zip(each_pair(p, parts), each_pair(q, parts), strict=True):
        s, c = _scalars.merge(one[1], one[2], other[1], other[2])
        decides = [a + b for a, b in zip(one[3:], other[3:], strict=True)]
        joined += [one[0] + other[0], s, c, *decides]
    return joined


def join(o: Any, parts: int, p: Values, q: Values) -> Values:
    """Any pairs, joined."""
    joined: Values = []
    for one, other in zip(each_pair(p, parts), each_pair(q, parts), strict=True):
        m = o.maximum_number(one[0], other[0])
        joined += add_pairs(o, parts, raised(o, one, m), raised(o, other, m))
    return joined


def shared(o: Any, group: Group, parts: int, pairs: Values) -> Values:
    """Pairs joined of all threads of a group; each of them gets the same."""
    pairs_ = each_pair(pairs, parts)
    maxima = o.reduce(group, larger, [pair[0] for pair in pairs_])
    same: Values = []
    for pair, m in zip(pairs_, maxima, strict=True):
        same += raised(o, pair, m)
    return reduced(o, group, parts, same)


def reduced(o: Any, group: Group, parts: int, pairs: Values) -> Values:
    """`shared` for pairs whose maxima are the same in all threads."""
    pairs_ = each_pair(pairs, parts)
    sums = o.reduce(
        group,
        lambda o, p, q: add_sums(o, parts - 1, p, q),
        [part for pair in pairs_ for part in pair[1:]],
    )
    made: Values = []
    for pair, rest in zip(pairs_, each_pair(sums, parts - 1), strict=True):
        made += [pair[0], *rest]
    return made


def finish(o: Any, op: str, pair: Values) -> Values:
    """What the results of a lane need of its pair; for logsumexp, the result."""
    m, count, s, c = pair
    return finish_rest(o, op, m, *_scalars.with_equals(o, m, count, s, c))


def finish_rest(o: Any, op: str, m: Any, s: Any, c: Any) -> Values:
    """`finish` from the sum of all terms but one largest."""
    if op == SOFTMAX:
        return [m, *_scalars.reciprocal(o, m, *_scalars.whole(o, m, s, c))]
    if op == LOGSUMEXP:
        return [_scalars.logsumexp(o, m, s, c)]
    return [m, _scalars.log_sum(o, m, s, c)[0]]


def finish_weighted(o: Any, pair: Values) -> Values:
    """The logarithm of the magnitude of a lane's weighted sum, and its sign."""
    m, count, s, c, decides = pair
    zero, one, infinity = o.const(0.0), o.const(1.0), o.const(INFINITY)
    s, c = _scalars.with_largest(o, m, count, s, c)
    value, sign = _scalars.log_weighted(o, m, s, c)
    nothing = m == o.const(-INFINITY)
    value, sign = o.where(nothing, m, value), o.where(nothing, zero, sign)
    # 0 leaves it as it is; a NaN is neither.
    calm = decides == zero
    direction = o.where(decides > zero, one, o.where(decides < zero, o.const(-1.0), decides))
    return [
        o.where(calm, value, o.where(abs(decides) == infinity, infinity, decides)),
        o.where(calm, sign, direction),
    ]


def answers(o: Any, op: str, values: Values, needs: Values) -> Values:
    """A lane's results from its numbers."""
    m = needs[0]
    if op == SOFTMAX:
        return [_scalars.softmax(o, term, *needs[1:]) for term in terms(o, values, m)]
    return [_scalars.log_softmax(x, m, needs[1]) for x in values]


NEEDS = {SOFTMAX: 3, LOG_SOFTMAX: 2, LOGSUMEXP: 1}  # numbers
