"""How numbers lie in memory: each format's load and store, and what it is computed in."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

from . import _scalars
from ._llvm import FLOATS, Arithmetic, Vector
from ._simd import Emitter


@dataclass(frozen=True)
class Format:
    """One element type in memory. ``kind`` is NumPy's: b, i, u, f; V for bfloat16."""

    name: str
    kind: str
    itemsize: int

    @property
    def real(self) -> _scalars.Real:
        """Half precision is computed in float32, as well as it shows, and integers in float64."""
        if self.kind not in "fV":
            return _scalars.FLOAT64
        return {2: _scalars.HALF, 4: _scalars.FLOAT32, 8: _scalars.FLOAT64}[self.itemsize]

    @property
    def may_be_huge(self) -> bool:
        """Whether a maximum of this format may need a shift."""
        if self.kind in "iub":
            return 2.0 ** (8 * self.itemsize) > self.real.exact
        return self.name != "float16"

    @property
    def element(self) -> ir.Type:
        """One element in memory, as LLVM sees it."""
        return FLOATS[self.name] if self.kind == "f" else ir.IntType(8 * self.itemsize)

    def load(
        self, o: Emitter, address: ir.Value, mask: Vector | None = None, fill: float = 0.0
    ) -> Vector:
        raw = o.load_raw(address, o.shaped(self.element), mask)
        value = self.widen(o, raw)
        if mask is not None and fill != 0.0:
            value = o.where(mask, value, o.const(fill))
        return value

    def load_parts(
        self, o: Emitter, addresses: list[ir.Value], count: ir.Value, fill: float
    ) -> Vector:
        """A vector of as many parts as addresses, each ``fill`` from ``count`` elements on."""
        mask = o.live(count, len(addresses))
        size = o.width // len(addresses)
        one = Vector(o, o.part(mask.value, 0, size))
        kind = ir.VectorType(self.element, size)
        raw = o.together([o.load_raw(address, kind, one) for address in addresses])
        return o.where(mask, self.widen(o, raw), o.const(fill))

    def store_part(
        self, o: Emitter, address: ir.Value, value: Vector, count: ir.Value, first: int, size: int
    ) -> None:
        """Up to ``count`` of so many elements of a vector, from ``first`` on."""
        raw = o.part(self.narrow(o, value), first, size)
        o.store_raw(address, raw, Vector(o, o.part(o.live(count).value, 0, size)))

    def widen(self, o: Arithmetic, raw: ir.Value) -> Vector:
        """What was loaded, as it is computed with."""
        if self.kind == "i":
            return Vector(o, o.b.sitofp(raw, o.type))
        if self.kind in "ub":
            return Vector(o, o.b.uitofp(raw, o.type))
        if self.kind == "V":
            bits = o.b.shl(o.b.zext(raw, o.integer_type), o.integers(16))
            return Vector(o, o.b.bitcast(bits, o.type))
        return Vector(o, raw if self.itemsize == o.real.itemsize else o.b.fpext(raw, o.type))

    def store(
        self,
        o: Emitter,
        address: ir.Value,
        value: Vector,
        mask: Vector | None = None,
        past_cache: bool = False,
    ) -> None:
        o.store_raw(address, self.narrow(o, value), mask, past_cache)

    def narrow(self, o: Arithmetic, value: Vector) -> ir.Value:
        """A computed value as it is stored."""
        if self.kind == "V":
            return self._round_to_bfloat16(o, value)
        if self.itemsize != o.real.itemsize:
            return o.b.fptrunc(value.value, o.shaped(self.element))
        return value.value

    def _round_to_bfloat16(self, o: Arithmetic, value: Vector) -> ir.Value:
        """To nearest, ties to even.

        A NaN among bfloat16 numbers has zeros where this adds, and stays one.
        """
        b, half = o.b, o.integers(16)
        bits = b.bitcast(value.value, o.integer_type)
        odd = b.and_(b.lshr(bits, half), o.integers(1))
        bits = b.add(b.add(bits, o.integers(0x7FFF)), odd)
        return b.trunc(b.lshr(bits, half), o.shaped(self.element))


_NATIVE = [Format(np.dtype(c).name, np.dtype(c).kind, np.dtype(c).itemsize) for c in "?bhilBHILefd"]
BFLOAT16 = Format("bfloat16", "V", 2)
FORMATS = {f.name: f for f in [*_NATIVE, BFLOAT16]}


def of(dtype: np.dtype[Any]) -> Format | None:
    """The format of a dtype in native byte order, or None where no kernel reads it."""
    return FORMATS.get(dtype.name) if dtype.isnative else None
