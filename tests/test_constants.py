"""The constants of exp are as good as `_scalars` says, in exact arithmetic."""

import mpmath
import pytest

from nbsoftmax import _scalars

pytestmark = pytest.mark.usefixtures("precision")

REALS = (_scalars.FLOAT32, _scalars.FLOAT64, *_scalars.ROOTED.values())


@pytest.fixture(name="precision")
def _precision():
    with mpmath.workprec(300):
        yield


def name(real: _scalars.Real) -> str:
    return f"{real.name}-{real.roots}"


def rounding(real: _scalars.Real) -> mpmath.mpf:
    """The relative error of a number, at most."""
    return mpmath.mpf(2) ** -(real.mantissa + 1)


@pytest.mark.parametrize("real", REALS, ids=name)
def test_polynomial(real):
    half = mpmath.log(2) / 2 / real.roots
    limit = 0.03 if real.roots > 1 else 0.09
    for i in range(-500, 501):
        r = half * i / 500
        value = 1 + r + sum(c * r**k for k, c in enumerate(real.exp, 2))
        assert abs(value / mpmath.exp(r) - 1) < limit * rounding(real)


@pytest.mark.parametrize("real", _scalars.ROOTED.values(), ids=name)
def test_roots_are_nearly_numbers(real):
    limit = {"float32": 0.27, "float64": 0.03}[real.name]
    roots = _scalars.roots_of_two(real)
    assert len(roots) == real.roots
    for j, (bits, rest) in enumerate(roots):
        exact = real.unit * mpmath.mpf(2) ** (mpmath.mpf(j) / real.roots)
        number = 1 + mpmath.ldexp(bits, -real.mantissa)
        assert abs(exact / number - 1 - rest) < 2 * rounding(real) ** 2
        assert abs(rest) < limit * rounding(real)


@pytest.mark.parametrize("real", REALS, ids=name)
def test_logarithms(real):
    assert real.log_unit == float(mpmath.log(real.unit))
    ln2 = mpmath.log(2)
    for high, low in ((real.ln2_hi, real.ln2_lo), (real.ln2_short, real.ln2_rest)):
        assert abs(ln2 - high - low) < rounding(real) * abs(low)
