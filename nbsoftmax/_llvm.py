"""The mathematics compiled: what `_scalars` asks of a machine, as LLVM instructions."""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import cgutils

from . import _scalars

I8 = ir.IntType(8)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
FLOATS = {"float16": ir.HalfType(), "float32": ir.FloatType(), "float64": ir.DoubleType()}


class Vector:
    """An LLVM vector, or number, with the operators that the mathematics is written in."""

    __slots__ = ("o", "value")

    def __init__(self, o: "Arithmetic", value: ir.Value) -> None:
        self.o = o
        self.value = value

    def __add__(self, other: "Vector") -> "Vector":
        return Vector(self.o, self.o.b.fadd(self.value, other.value))

    def __sub__(self, other: "Vector") -> "Vector":
        return Vector(self.o, self.o.b.fsub(self.value, other.value))

    def __mul__(self, other: "Vector") -> "Vector":
        return self.o.product(self, other)

    def __truediv__(self, other: "Vector") -> "Vector":
        return self.o.quotient(self, other)

    def __and__(self, other: "Vector") -> "Vector":
        return Vector(self.o, self.o.b.and_(self.value, other.value))

    def __or__(self, other: "Vector") -> "Vector":
        return Vector(self.o, self.o.b.or_(self.value, other.value))

    def _compare(self, how: str, other: "Vector") -> "Vector":
        return Vector(self.o, self.o.b.fcmp_ordered(how, self.value, other.value))

    def __lt__(self, other: "Vector") -> "Vector":
        return self._compare("<", other)

    def __gt__(self, other: "Vector") -> "Vector":
        return self._compare(">", other)

    def __eq__(self, other: object) -> "Vector":  # type: ignore[override]
        assert isinstance(other, Vector)
        return self._compare("==", other)

    __hash__ = None  # type: ignore[assignment]

    def __abs__(self) -> "Vector":
        return self.o.magnitude(self)


class Arithmetic:
    """Operations on vectors of ``width`` numbers; of 1: on numbers."""

    def __init__(self, builder: ir.IRBuilder, real: _scalars.Real, width: int = 1) -> None:
        self.b = builder
        self.real = real
        self.width = width
        self.element = FLOATS[real.name]
        self.integer = ir.IntType(8 * real.itemsize)
        self.type = self.shaped(self.element)
        self.integer_type = self.shaped(self.integer)

    def shaped(self, element: ir.Type) -> ir.Type:
        """The type of as many elements as a value has."""
        return element if self.width == 1 else ir.VectorType(element, self.width)

    def _everywhere(self, element: ir.Type, value: float) -> ir.Constant:
        one = ir.Constant(element, value)
        return one if self.width == 1 else ir.Constant(self.shaped(element), [one] * self.width)

    # -- arithmetic that operators do not cover -------------------------------------------------

    def const(self, value: float) -> Vector:
        return Vector(self, self._everywhere(self.element, value))

    def integers(self, value: int) -> ir.Constant:
        return self._everywhere(self.integer, value)

    def where(self, condition: Vector, a: Vector, b: Vector) -> Vector:
        return Vector(self, self.b.select(condition.value, a.value, b.value))

    def larger(self, a: Vector, b: Vector) -> Vector:
        """``a if a > b else b``: a NaN in ``b`` is kept, one in ``a`` is lost. One instruction."""
        return self.where(a > b, a, b)

    def usually(
        self,
        condition: Vector,
        usual: Callable[[], Sequence[Vector]],
        otherwise: Callable[[], Sequence[Vector]],
    ) -> Sequence[Vector]:
        """What ``usual`` gives where the condition holds, else what ``otherwise`` gives."""
        return [self.where(condition, a, b) for a, b in zip(usual(), otherwise(), strict=True)]

    def product(self, a: Vector, b: Vector) -> Vector:
        return Vector(self, self.b.fmul(a.value, b.value))

    def quotient(self, a: Vector, b: Vector) -> Vector:
        return Vector(self, self.b.fdiv(a.value, b.value))

    def magnitude(self, a: Vector) -> Vector:
        return self.call("llvm.fabs", [a])

    def call(self, name: str, arguments: Sequence[Vector]) -> Vector:
        kind = ir.FunctionType(self.type, [self.type] * len(arguments))
        shape = "" if self.width == 1 else f"v{self.width}"
        name = f"{name}.{shape}f{8 * self.real.itemsize}"
        function = cgutils.get_or_insert_function(self.b.module, kind, name)
        return Vector(self, self.b.call(function, [a.value for a in arguments]))

    def fma(self, a: Vector, b: Vector, c: Vector) -> Vector:
        # Without the hardware instruction this becomes a call of libm's fma: slow, same bits.
        return self.call("llvm.fma", [a, b, c])

    def power_of_two(self, t: Vector) -> Vector:
        """2^k where the low bits of ``t`` are k plus the exponent bias."""
        bits = self.b.shl(
            self.b.bitcast(t.value, self.integer_type), self.integers(self.real.mantissa)
        )
        return Vector(self, self.b.bitcast(bits, self.type))

    def exp2(self, t: Vector) -> Vector:
        return _scalars.exp2(self, t)

    def split_exponent(self, u: Vector) -> tuple[Vector, Vector]:
        """``u = 2^k f`` with f in [sqrt(1/2), sqrt(2)), for a positive normal number."""
        half_root = {23: 0x3F3504F3, 52: 0x3FE6A09E667F3BCD}[self.real.mantissa]
        mantissa = self.integers(self.real.mantissa)
        bits = self.b.bitcast(u.value, self.integer_type)
        k = self.b.ashr(self.b.sub(bits, self.integers(half_root)), mantissa)
        fraction = self.b.bitcast(self.b.sub(bits, self.b.shl(k, mantissa)), self.type)
        return Vector(self, self.b.sitofp(k, self.type)), Vector(self, fraction)

    def times_power_of_two(self, a: Vector, k: Vector) -> Vector:
        """``2^k a`` for an exponent k of a normal number."""
        shifted = k + self.const(self.real.round + self.real.one_exponent)
        return a * self.power_of_two(shifted)
