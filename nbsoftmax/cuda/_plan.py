"""The regimes on a GPU as data: which tiles hold a folded array, and how it is launched.

Never a function of addresses or of the number of multiprocessors: the tiles decide the order of
summation, and results must not depend on where arrays lie or who computes them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .._semantics import LOGSUMEXP

VECTOR_BYTES = 16  # the widest access of a thread


@dataclass(frozen=True)
class Limits:
    """Where one regime gives way to the next."""

    # Rows: (threads, vectors of each), shortest first. Threads until they read whole lines of 128
    # bytes, then numbers, as many as a thread may hold, then threads again: what a thread does once
    # is then shared by the most numbers. benchmarks/occupancy.py says so, and what resides.
    rows: tuple[tuple[int, int], ...] = (
        *((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (8, 8), (16, 4), (16, 8), (32, 4)),
        *((32, 8), (64, 4), (64, 8), (128, 4), (128, 8), (256, 4), (256, 8), (512, 4), (512, 8)),
        *((1024, 4), (1024, 8)),
    )
    # Blocks of a cluster (sm_90 and later) that share a row longer than that, of the last size.
    clusters: tuple[int, ...] = (2, 4, 8)
    # Columns: (threads behind each other, rows of each).
    columns: tuple[tuple[int, int], ...] = (
        *((1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (8, 4), (8, 8)),
        *((16, 4), (16, 8), (32, 4), (32, 8), (64, 4), (128, 2), (64, 8), (128, 4)),
    )
    # Neighbouring threads beside each other: 128 bytes of every row, where there are so many.
    across: int = 8
    # Numbers that a thread may hold: more would not leave registers for what else it needs.
    held_float32: int = 32
    held_float64: int = 16
    # Nor may a block hold more than this, whose threads share 65,536 registers: of float64, which
    # takes two for each number, and of columns of float32 and of 16-bit numbers, each of which has
    # sums of its own.
    block_float64: int = 4096
    block_columns_float32: int = 16384
    block_columns_float16: int = 8192
    # Tiles of longer lanes.
    long_rows: tuple[int, int] = (256, 4)
    long_columns: tuple[int, int] = (32, 4)
    # A block is at least so many threads.
    block: int = 128
    # Lanes are cut until there are so many blocks (a few for each multiprocessor of the largest
    # GPUs), but none into chunks of less than so many tiles.
    blocks: int = 1024
    chunk_tiles: int = 4


LIMITS = Limits()
_when_changed: list[Callable[[], object]] = []


def on_change(forget: Callable[[], object]) -> None:
    """Have ``forget`` called when the limits change: for whoever remembers plans."""
    _when_changed.append(forget)


@contextlib.contextmanager
def using(**changes: object) -> Iterator[Limits]:
    """Other limits for a while: for tests that lead small arrays into every regime.

    For all threads: none may be at work when they change.
    """
    global LIMITS
    before = LIMITS
    LIMITS = dataclasses.replace(before, **changes)  # type: ignore[arg-type]
    for forget in _when_changed:
        forget()
    try:
        yield LIMITS
    finally:
        LIMITS = before
        for forget in _when_changed:
            forget()


@dataclass(frozen=True)
class Plan:
    """How a folded array is held."""

    along: bool
    across: int  # threads beside each other
    deep: int  # threads behind each other
    clusters: int  # blocks that share a tile
    vectors: int
    width: int
    block: int  # threads
    chunks: int = 0  # of each lane; 0: a tile holds it
    length: int = 0  # lane elements of a chunk

    @property
    def items(self) -> int:
        """Tiles of a block."""
        return self.block // (self.across * self.deep)

    def units(self, outer: int, inner: int) -> int:
        """Blocks, or clusters of them, for one part of all lanes."""
        panels = 1 if self.along else -(-inner // (self.across * self.width))
        return -(-outer * panels // self.items)


def plan(
    op: str,
    outer: int,
    n: int,
    inner: int,
    itemsize: int,
    compute_itemsize: int,
    cluster: bool,
    weighted: bool = False,
) -> Plan:
    """The regime of an array folded to ``(outer, n, inner)``. First line that holds wins."""
    limits = LIMITS
    width = VECTOR_BYTES // itemsize
    held = {4: limits.held_float32, 8: limits.held_float64}[compute_itemsize]
    if inner == 1:
        most = limits.block_float64 if compute_itemsize == 8 else 1024 * held
        sizes = [
            (deep, v) for deep, v in limits.rows if v * width <= held and deep * v * width <= most
        ]
        for deep, vectors in sizes:
            if deep * vectors * width >= n:
                shape = Plan(True, 1, deep, 1, vectors, width, max(deep, limits.block))
                return dataclasses.replace(shape, chunks=1, length=n) if weighted else shape
        deep, vectors = sizes[-1]
        for blocks in limits.clusters if cluster and op != LOGSUMEXP else ():
            if deep * vectors * width * blocks >= n:
                return Plan(True, 1, deep, blocks, vectors, width, deep)
        deep, vectors = limits.long_rows
        shape = Plan(True, 1, deep, 1, min(vectors, held // width), width, deep)
        return _cut(shape, outer, n, inner, deep * shape.vectors * width)
    width = min(width, 1 << (inner.bit_length() - 1))
    across = min(limits.across, 1 << (-(-inner // width) - 1).bit_length())
    most = {
        2: limits.block_columns_float16,
        4: limits.block_columns_float32,
        8: limits.block_float64,
    }[itemsize]
    for deep, vectors in limits.columns:
        numbers = vectors * width
        if deep * vectors >= n and numbers <= held and across * deep * numbers <= most:
            block = max(deep * across, limits.block)
            return Plan(False, across, deep, 1, vectors, width, block)
    deep, vectors = limits.long_columns
    shape = Plan(False, across, deep, 1, vectors, width, max(deep * across, limits.block))
    return _cut(shape, outer, n, inner, deep * shape.vectors)


def _cut(shape: Plan, outer: int, n: int, inner: int, tile: int) -> Plan:
    """Lanes longer than a tile, in chunks."""
    tiles = -(-n // tile)
    wanted = -(-LIMITS.blocks // shape.units(outer, inner))
    chunks = max(1, min(wanted, tiles // LIMITS.chunk_tiles))
    each = -(-tiles // chunks)
    return dataclasses.replace(shape, chunks=-(-tiles // each), length=each * tile)


def access(width: int, itemsize: int, *bytes_: int) -> int:
    """How many neighbouring numbers may be read at once: all these bytes are multiples of them."""
    while width > 1 and any(count % (width * itemsize) for count in bytes_):
        width //= 2
    return width
