"""How numbers lie in memory: each format's load and store, and what it is computed in."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

from . import _scalars
from ._simd import FLOATS, Emitter, Vector


@dataclass(frozen=True)
class Format:
    """One element type in memory. ``kind`` is NumPy's: b, i, u, f; V for bfloat16."""

    name: str
    kind: str
    itemsize: int

    @property
    def real(self) -> _scalars.Real:
        """Half precision is computed in float32, integers in float64."""
        return _scalars.FLOAT32 if self.kind in "fV" and self.itemsize < 8 else _scalars.FLOAT64

    @property
    def may_be_huge(self) -> bool:
        """Whether a maximum of this format may need a shift."""
        if self.kind in "iub":
            return 2.0 ** (8 * self.itemsize) > self.real.exact
        return self.name != "float16"

    def _memory(self, o: Emitter) -> ir.VectorType:
        element = FLOATS[self.name] if self.kind == "f" else ir.IntType(8 * self.itemsize)
        return ir.VectorType(element, o.width)

    def load(
        self, o: Emitter, address: ir.Value, mask: Vector | None = None, fill: float = 0.0
    ) -> Vector:
        raw = o.load_raw(address, self._memory(o), mask)
        value = self._widen(o, raw)
        if mask is not None and fill != 0.0:
            value = o.where(mask, value, o.const(fill))
        return value

    def _widen(self, o: Emitter, raw: ir.Value) -> Vector:
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
        raw = value.value
        if self.kind == "V":
            raw = self._round_to_bfloat16(o, value)
        elif self.itemsize != o.real.itemsize:
            raw = o.b.fptrunc(raw, self._memory(o))
        o.store_raw(address, raw, mask, past_cache)

    def _round_to_bfloat16(self, o: Emitter, value: Vector) -> ir.Value:
        """To nearest, ties to even.

        A NaN among bfloat16 numbers has zeros where this adds, and stays one.
        """
        b, half = o.b, o.integers(16)
        bits = b.bitcast(value.value, o.integer_type)
        odd = b.and_(b.lshr(bits, half), o.integers(1))
        bits = b.add(b.add(bits, o.integers(0x7FFF)), odd)
        return b.trunc(b.lshr(bits, half), self._memory(o))


_NATIVE = [Format(np.dtype(c).name, np.dtype(c).kind, np.dtype(c).itemsize) for c in "?bhilBHILefd"]
BFLOAT16 = Format("bfloat16", "V", 2)
FORMATS = {f.name: f for f in [*_NATIVE, BFLOAT16]}


def of(dtype: np.dtype[Any]) -> Format | None:
    """The format of a dtype in native byte order, or None where no kernel reads it."""
    return FORMATS.get(dtype.name) if dtype.isnative else None
