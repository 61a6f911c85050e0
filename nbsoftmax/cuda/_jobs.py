"""What a kernel is: whose numbers its threads hold, and what is done to them. Knows no compiler."""

from dataclasses import dataclass
from typing import Any

from numba import config

from .. import _scalars
from .._formats import FORMATS, Format
from .._semantics import SOFTMAX

SIMULATED = bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]
WARP = 32
# A multiprocessor has registers for so many threads that take float32 logarithms of rows, at least:
# as many as do for 32 numbers. Left alone, the assembler takes half as many again here and there.
RESIDENT_THREADS = 768
Values = list[Any]


@dataclass(frozen=True)
class Group:
    """The threads that hold one item: ``across`` neighbours, then lanes, then warps, then blocks.

    Neighbours hold different lanes of the array; all others hold parts of the same ones.
    """

    across: int
    deep: int  # threads behind each other, of one block
    blocks: int = 1  # a cluster's
    together: int = 1  # groups of a block
    row_of_threads: bool = True  # whether the block has one dimension only

    @property
    def threads(self) -> int:
        return self.across * self.deep

    @property
    def block(self) -> int:
        """Threads of a block."""
        return self.threads * self.together

    @property
    def meets(self) -> bool:
        """Whether any threads hold the same lanes."""
        return self.deep * self.blocks > 1

    @property
    def within_warp(self) -> bool:
        return self.blocks == 1 and self.threads <= WARP

    @property
    def lanes(self) -> int:
        return min(self.deep, WARP // self.across)

    @property
    def warps(self) -> int:
        return self.deep // self.lanes


@dataclass(frozen=True)
class Job:
    """One kernel: everything that shapes its machine code."""

    stage: str  # whole, pairs, reduce, apply, merge
    op: str
    source: str  # formats of x and of the result
    result: str
    along: bool  # lanes are rows; else columns
    group: Group
    width: int  # neighbouring numbers that a thread holds
    vectors: int  # how many times
    access: int  # numbers that x lets it read at once
    out_access: int
    weighted: bool = False

    @property
    def form(self) -> Format:
        return FORMATS[self.source]

    @property
    def out_form(self) -> Format:
        return FORMATS[self.result]

    @property
    def resident(self) -> int:
        """Blocks that shall find room in a multiprocessor together."""
        logarithms = self.stage == "whole" and self.op != SOFTMAX
        bound = logarithms and self.along and self.real.itemsize == 4
        return -(-RESIDENT_THREADS // self.group.block) if bound else 1

    @property
    def lanes(self) -> int:
        """How many lanes a thread holds numbers of."""
        return 1 if self.along else self.width

    @property
    def real(self) -> _scalars.Real:
        return _scalars.WEIGHTED[self.source] if self.weighted else self.form.real

    @property
    def parts(self) -> int:
        """Numbers of a pair."""
        return 5 if self.weighted else 4

    @property
    def pair_form(self) -> Format:
        return FORMATS[self.real.name]

    @property
    def deep(self) -> int:
        """Threads behind each other along the lanes, in all blocks that share them."""
        return self.group.deep * self.group.blocks

    @property
    def advance(self) -> int:
        """Lane elements from one of a thread's vectors to its next."""
        return self.deep * self.width if self.along else self.deep

    @property
    def tile(self) -> int:
        """Lane elements of one tile."""
        return self.advance * self.vectors

    def split(self, values: Values) -> list[Values]:
        """A thread's numbers by lane."""
        return [values] if self.along else [values[k :: self.width] for k in range(self.width)]

    def together(self, lanes: list[Values]) -> Values:
        """Numbers by lane in the order in which a thread holds them."""
        return (
            lanes[0] if self.along else [v for vector in zip(*lanes, strict=True) for v in vector]
        )

    @property
    def integers(self) -> list[int | None]:
        """How many integers each argument of the kernel is; None for a bare one."""
        return [None] * {"whole": 9, "apply": 13, "merge": 13}.get(self.stage, 12)

    @property
    def name(self) -> str:
        letter = "r" if self.along else "c"
        shape = f"{self.group.across}x{self.group.deep}x{self.group.blocks}"
        held = f"{self.vectors}x{self.width}a{self.access}a{self.out_access}b{self.group.block}"
        op = f"weighted_{self.op}" if self.weighted else self.op
        return f"{op}_{self.stage}_{self.source}_{self.result}_{letter}{shape}_{held}"


ONE_BLOCK = Group(1, 256)


@dataclass(frozen=True)
class Elements:
    """A kernel that copies any array to any other, with another dtype, hiding what a mask hides."""

    source: str
    result: str
    dims: int
    mask: str | None = None  # format; visible is what is larger than `above`
    above: float = 0.0
    fill: float = 0.0  # for the hidden
    native: bool = True  # byte order of the source, and of the result
    result_native: bool = True
    group: Group = ONE_BLOCK

    @property
    def name(self) -> str:
        hides = f"{self.mask}_above_{self.above}_else_{self.fill}" if self.mask else "all"
        swapped = f"{'' if self.native else 'swapped'}{'' if self.result_native else 'swaps'}"
        return f"elements_{self.source}_{self.result}_{self.dims}_{hides}{swapped}"

    @property
    def stage(self) -> str:
        return "elements"

    @property
    def resident(self) -> int:
        return 1

    @property
    def integers(self) -> list[int | None]:
        """How many integers each argument of the kernel is; None for a bare one."""
        return [None] * 4 + [self.dims] * 4
