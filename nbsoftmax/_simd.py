"""The mathematics on vectors of one full register, and what kernels ask of their memory.

A vector always holds 64 bytes of numbers; LLVM splits it on hardware with narrower registers.
Explicit vectors and not Numba's auto-vectoriser, which can neither be told to store past the cache
nor to interleave the passes over several lanes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from llvmlite import ir
from numba.core import cgutils

from . import _scalars
from ._llvm import I8, I32, I64, Arithmetic, Vector

VECTOR_BYTES = 64
Part = tuple[Vector, ...]
Join = Callable[[Part, Part], Part]


class Variable:
    """A value that changes inside loops; LLVM turns it into a register."""

    def __init__(self, o: "Emitter", start: Vector) -> None:
        self.o = o
        self.pointer = cgutils.alloca_once(o.b, start.value.type)
        self.set(start)

    def get(self) -> Vector:
        return Vector(self.o, self.o.b.load(self.pointer))

    def set(self, value: Vector) -> None:
        self.o.b.store(value.value, self.pointer)


class Emitter(Arithmetic):
    """What kernels ask of a machine; of some ``vectors`` in one, for what is done to all alike."""

    def __init__(self, builder: ir.IRBuilder, real: _scalars.Real, vectors: int = 1) -> None:
        super().__init__(builder, real, vectors * VECTOR_BYTES // real.itemsize)

    def spread(self, count: ir.Value) -> Vector:
        """A number counted at run time, in every element."""
        return Vector(self, self._in_every_element(self.b.sitofp(count, self.element)))

    def _in_every_element(self, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.width), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        zero = ir.Constant(ir.VectorType(I32, self.width), None)
        return self.b.shuffle_vector(first, undefined, zero)

    def any(self, mask: Vector) -> ir.Value:
        """Whether a mask holds anywhere."""
        bits = ir.IntType(self.width)
        return self.b.icmp_unsigned("!=", self.b.bitcast(mask.value, bits), ir.Constant(bits, 0))

    def root_of_two(self, t: Vector) -> Vector:
        """2^k, in its unit, for a sum whose low bits are k in steps of a root plus the bias.

        The roots stand in a vector, an element each: AVX-512 looks them up.
        """
        shift = self.real.exponent_shift
        index = self.b.bitcast(t.value, self.integer_type)
        # Shifted, the number of the root is in the mantissa.
        offsets = [
            bits - (j << shift) for j, (bits, _) in enumerate(_scalars.roots_of_two(self.real))
        ]
        offset = self._looked_up(index, offsets, self.integer, "i")
        bits = self.b.add(self.b.shl(index, self.integers(shift)), offset)
        return Vector(self, self.b.bitcast(bits, self.type))

    def rest_of_root(self, t: Vector) -> Vector:
        """What rounding took from the root that `root_of_two` looks up, relative."""
        index = self.b.bitcast(t.value, self.integer_type)
        rests = [rest for _, rest in _scalars.roots_of_two(self.real)]
        return Vector(self, self._looked_up(index, rests, self.element, "f"))

    def _looked_up(
        self, index: ir.Value, numbers: Sequence[float], element: ir.Type, kind: str
    ) -> ir.Value:
        """The numbers that the low bits of each index say, of as many as one register holds."""
        count, size = len(numbers), {4: "s", 8: "d"}[self.real.itemsize]
        table = ir.Constant(ir.VectorType(element, count), numbers)
        indices = ir.VectorType(self.integer, count)
        function = cgutils.get_or_insert_function(
            self.b.module,
            ir.FunctionType(table.type, [table.type, indices]),
            f"llvm.x86.avx512.permvar.{size}{kind}.512",
        )
        parts = [self.part(index, first, count) for first in range(0, self.width, count)]
        return self.together([self.b.call(function, [table, part]) for part in parts])

    # -- across the elements of one vector ------------------------------------------------------

    def shuffle(self, a: Vector, b: Vector, index: Sequence[int]) -> Vector:
        mask = ir.Constant(ir.VectorType(I32, len(index)), [ir.Constant(I32, i) for i in index])
        return Vector(self, self.b.shuffle_vector(a.value, b.value, mask))

    def _halves(self, distance: int) -> tuple[list[int], list[int]]:
        """Of two vectors, the elements of both in turn that `_joined` keeps, and their partners."""
        w, d = self.width, distance
        low = [i if not i & d else w + i - d for i in range(w)]
        high = [i + d if not i & d else w + i for i in range(w)]
        return low, high

    def joined(self, parts: list[Part], join: Join) -> list[Part]:
        """Join the elements of each part in one: element i is of part i, and so on again."""
        distance = 1
        while len(parts) > 1:
            low, high = self._halves(distance)
            parts = [
                join(
                    *(
                        tuple(self.shuffle(x, y, index) for x, y in zip(*pair, strict=True))
                        for index in (low, high)
                    )
                )
                for pair in zip(parts[::2], parts[1::2], strict=True)
            ]
            distance *= 2
        return self.joined_in_turn(parts, join, distance)

    def joined_in_turn(self, parts: list[Part], join: Join, lanes: int) -> list[Part]:
        """Join all elements of a lane, which are ``lanes`` apart in the parts, laid in a row.

        All of them become the same bits if ``join`` does not ask which comes first.
        """
        distance = len(parts) * self.width // 2
        while distance >= lanes:
            rings = list(zip(*parts, strict=True))
            further = [
                tuple(self._from(ring, u * self.width + distance) for ring in rings)
                for u in range(len(parts))
            ]
            parts = [join(*pair) for pair in zip(parts, further, strict=True)]
            distance //= 2
        return parts

    def _from(self, vectors: Sequence[Vector], first: int) -> Vector:
        """A vector that begins at element ``first`` of some that follow each other in a ring."""
        u, start = divmod(first, self.width)
        index = [start + i for i in range(self.width)]
        return self.shuffle(vectors[u % len(vectors)], vectors[(u + 1) % len(vectors)], index)

    def in_turn(self, value: Vector, lanes: int, first: int) -> Vector:
        """Its first ``lanes`` elements again and again, from number ``first`` of them on."""
        return self.shuffle(value, value, [(first + i) % lanes for i in range(self.width)])

    def transpose(self, rows: list[Vector]) -> list[Vector]:
        """A square of numbers held in registers: element j of row i becomes element i of row j.

        Of fewer rows than a vector has elements, several squares side by side.
        """
        step = 1
        while step < len(rows):
            done = list(rows)
            low, high = self._halves(step)
            for i in range(len(rows)):
                if not i & step:
                    done[i] = self.shuffle(rows[i], rows[i + step], low)
                    done[i + step] = self.shuffle(rows[i], rows[i + step], high)
            rows, step = done, 2 * step
        return rows

    def dealt(self, vectors: list[Vector]) -> list[Vector]:
        """As many vectors, one behind the other, to the columns of rows of as many numbers."""
        n, w = len(vectors), self.width
        return [self._picked(vectors, [r * n + j for r in range(w)]) for j in range(n)]

    def gathered(self, columns: list[Vector]) -> list[Vector]:
        """What `dealt` dealt."""
        n, w = len(columns), self.width
        numbers = [[v * w + e for e in range(w)] for v in range(n)]
        return [self._picked(columns, [i % n * w + i // n for i in chosen]) for chosen in numbers]

    def _picked(self, vectors: list[Vector], elements: list[int]) -> Vector:
        """A vector of these elements of some, counted through all."""
        w, found = self.width, vectors[0]
        for v, vector in enumerate(vectors[1:], 1):
            kept = [i % w for i in elements] if v == 1 else range(w)  # what is in its place stays
            index = [
                w + i % w if i // w == v else place for i, place in zip(elements, kept, strict=True)
            ]
            found = self.shuffle(found, vector, index)
        return found

    # -- memory ---------------------------------------------------------------------------------

    def int64(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def live(self, count: ir.Value, parts: int = 1) -> Vector:
        """The mask of the first ``count`` elements, or of those of each of so many parts."""
        kind = ir.VectorType(I64 if self.width == 8 else I32, self.width)
        if self.width != 8:
            count = self.b.trunc(count, I32)
        counts, size = self._in_every_element(count), self.width // parts
        index = ir.Constant(kind, [ir.Constant(kind.element, i % size) for i in range(self.width)])
        return Vector(self, self.b.icmp_signed("<", index, counts))

    def part(self, raw: ir.Value, first: int, size: int) -> ir.Value:
        """So many elements of a vector of any kind."""
        if size == raw.type.count:
            return raw
        index = ir.Constant(
            ir.VectorType(I32, size), [ir.Constant(I32, first + i) for i in range(size)]
        )
        return self.b.shuffle_vector(raw, raw, index)

    def together(self, parts: list[ir.Value]) -> ir.Value:
        """Vectors of any kind one behind the other in one."""
        whole = len(parts) * parts[0].type.count
        while len(parts) > 1:
            size = 2 * parts[0].type.count
            index = ir.Constant(
                ir.VectorType(I32, size), [ir.Constant(I32, i) for i in range(size)]
            )
            if len(parts) % 2:
                parts = [*parts, ir.Constant(parts[0].type, ir.Undefined)]
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.b.shuffle_vector(a, b, index) for a, b in pairs]
        return self.part(parts[0], 0, whole)

    def at(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.b.inttoptr(address, kind.as_pointer())

    def load_raw(self, address: ir.Value, kind: ir.VectorType, mask: Vector | None) -> ir.Value:
        """Plain memory to a vector; masked-out elements are 0 and not touched."""
        if mask is None:
            instruction = self.b.load(self.at(address, kind))
            instruction.align = 1
            return instruction
        name = f"llvm.masked.load.v{kind.count}{_suffix(kind.element)}.p0"
        pointer = self.at(address, kind)
        types = [pointer.type, I32, mask.value.type, kind]
        function = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(kind, types), name)
        zero = ir.Constant(kind, None)
        return self.b.call(function, [pointer, ir.Constant(I32, 1), mask.value, zero])

    def store_raw(
        self, address: ir.Value, value: ir.Value, mask: Vector | None, past_cache: bool = False
    ) -> None:
        kind = value.type
        if mask is not None:
            name = f"llvm.masked.store.v{kind.count}{_suffix(kind.element)}.p0"
            pointer = self.at(address, kind)
            types = [kind, pointer.type, I32, mask.value.type]
            function = cgutils.get_or_insert_function(
                self.b.module, ir.FunctionType(ir.VoidType(), types), name
            )
            self.b.call(function, [value, pointer, ir.Constant(I32, 1), mask.value])
            return
        instruction = self.b.store(value, self.at(address, kind))
        instruction.align = 1
        if past_cache:
            # Past the cache wants whole aligned vectors; the caller sees to that.
            instruction.align = kind.count * _bytes(kind.element)
            one = self.b.module.add_metadata([ir.Constant(I32, 1)])
            instruction.set_metadata("nontemporal", one)

    def load(self, address: ir.Value, mask: Vector | None = None) -> Vector:
        return Vector(self, self.load_raw(address, self.type, mask))

    def store(self, address: ir.Value, value: Vector, mask: Vector | None = None) -> None:
        self.store_raw(address, value.value, mask)

    def prefetch(self, address: ir.Value, to_write: bool = False) -> None:
        """Into the second-level cache."""
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(I32, v) for v in (int(to_write), 2, 1)]
        self.b.call(function, [self.at(address, I8), *flags])

    @contextlib.contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        with cgutils.for_range_slice(self.b, start, stop, self.int64(step), I64, inc=True) as (
            i,
            _,
        ):
            yield i


def _bytes(element: ir.Type) -> int:
    if isinstance(element, ir.IntType):
        return element.width // 8
    return {"half": 2, "float": 4, "double": 8}[str(element)]


def _suffix(element: ir.Type) -> str:
    letter = "i" if isinstance(element, ir.IntType) else "f"
    return f"{letter}{8 * _bytes(element)}"
