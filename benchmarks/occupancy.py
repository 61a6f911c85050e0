"""How many blocks reside, what they have in flight, and which tiles follow: a model of GPUs.

Reads what nvcc_table.py counted (results/nvcc.json); compiles nothing, and no GPU has confirmed it.

*Residence.* A multiprocessor takes as many blocks as its registers, threads, blocks and shared
memory allow. *Flight.* A block asks for its numbers, waits `LATENCY`, and then has instructions to
carry out that keep the multiprocessor busy for some time. So it waits for the share
``latency / (latency + busy)`` of its life, and of all bytes that resident threads ask for before
they use the first, that share is in flight. *Budget.* While the bytes of a number pass through
memory, each pipe can carry out so many instructions; the pipe that takes longest says how many of
its mix a kernel may have. *Need.* By Little's law bandwidth x latency bytes in flight keep memory
busy; a copy reads half of them, and a kernel beyond its budget as much less as it is slower.

*Tiles.* Of those that hold a lane of a power of two exactly (`Tiles.candidates`) the plan should
have the one of fewest instructions for a number, of those that keep `BLOCKS` blocks resident and
enough bytes in flight on every architecture, if any does (`Tiles.preferred`).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbsoftmax._formats import FORMATS
from nbsoftmax.cuda import _plan
from results import load

WARP = 32
LINE = 128  # bytes; neighbouring threads should read whole ones
# Seconds from a load to its bytes while memory is busy, on every GPU. An estimate: an idle memory
# answers a pointer chase in a third to two thirds of that. The bytes in flight that CUB wants on
# each multiprocessor (tuning of DeviceTransform: 16 KiB on A100, 32 on H100, 64 on B200) are those
# of 0.9, 1.3 and 1.2 microseconds at the bandwidths below.
LATENCY = 1e-6
BLOCKS = 2  # one computes while the other waits
# Numbers of shared memory for each warp and column of a block: more than any kernel exchanges.
EXCHANGED = 8


@dataclass(frozen=True)
class Gpu:
    """One GPU of an architecture: its multiprocessors, from the tables that NVIDIA publishes.

    What a multiprocessor holds stands in "Technical Specifications per Compute Capability" of the
    CUDA C++ Programming Guide, results a cycle in "Throughput of Native Arithmetic Instructions"
    there; the rest in the GPU's data sheet, the clock as what its peak of float32 takes. Integer
    products, of which some make half as many, count as float32 ones.
    """

    name: str
    count: int  # of multiprocessors
    clock: float  # boost, Hz
    bandwidth: float  # bytes a second
    threads: int
    blocks: int
    shared: int  # KiB, of which a block has `reserved` taken for itself
    fma: int  # results a cycle
    double: int
    alu: int = 64  # compare, minimum, select, shift, logic: 64 on all of them
    mufu: int = 16
    shuffle: int = 32
    issue: int = 4 * WARP  # four schedulers, an instruction of a warp each
    reserved: int = 1
    registers: int = 65536
    granularity: int = 8  # registers of a thread come in multiples: 256 for a warp

    def resident(self, registers: int, threads: int, shared: int = 0) -> int:
        """Blocks that a multiprocessor holds at once, of so many threads and bytes."""
        each = -(-registers // self.granularity) * self.granularity
        # Each scheduler has a quarter of the registers, for whole warps.
        warps = -(-threads // (4 * WARP)) * 4
        memory = self.shared * 1024 // (shared + self.reserved * 1024) if shared else self.blocks
        bounds = self.registers // (each * WARP * warps), self.threads // threads, memory
        return min(self.blocks, *bounds)

    def needed(self, reads: float) -> float:
        """Bytes in flight that keep a multiprocessor's part of the memory busy reading so much."""
        return self.bandwidth * LATENCY / self.count * reads

    def cycles(self, pipes: dict[str, float]) -> float:
        """Cycles for a number whose thread carries out so many instructions, by pipe."""
        each = {pipe: pipes.get(pipe, 0) for pipe in ("fma", "double", "alu", "mufu", "shuffle")}
        bound = max(count / getattr(self, pipe) for pipe, count in each.items())
        return max(bound, sum(pipes.values()) / self.issue)

    def allowed(self, moved: float) -> float:
        """Cycles in which memory moves the bytes of a number."""
        return moved * self.count * self.clock / self.bandwidth


GPUS = {
    "sm_75": Gpu("T4", 40, 1.59e9, 320e9, 1024, 16, 64, fma=64, double=2, reserved=0),
    "sm_80": Gpu("A100 80 GB SXM", 108, 1.41e9, 2039e9, 2048, 32, 164, fma=64, double=32),
    "sm_90": Gpu("H100 SXM", 132, 1.98e9, 3350e9, 2048, 32, 228, fma=128, double=64),
    "sm_100": Gpu("B200", 148, 1.965e9, 8000e9, 2048, 32, 228, fma=128, double=64),
    "sm_120": Gpu("RTX 5090", 170, 2.41e9, 1792e9, 1536, 24, 100, fma=128, double=2),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel of nvcc.json on one GPU."""

    gpu: Gpu
    op: str
    stage: str
    form: str
    plan: _plan.Plan
    code: dict[str, Any]  # what was counted

    @property
    def reads(self) -> float:
        """The share of its traffic that is read; results of logsumexp are few."""
        return 1.0 if self.op == "logsumexp" or self.stage == "pairs" else 0.5

    @property
    def ahead(self) -> int:
        """Bytes that a thread asks for before it uses the first."""
        return int(self.code["loads_ahead"] * self.code["typical_load"])

    @property
    def asked(self) -> int:
        """Bytes that a thread asks for in all; all at once, if the assembler lets it."""
        return int(self.code["numbers"]) * FORMATS[self.form].itemsize

    @property
    def needed(self) -> float:
        """Bytes in flight that the kernel's speed takes: that of memory, or of its instructions."""
        return self.gpu.needed(self.reads) * min(1.0, self.budget / self.code["per_number"])

    @property
    def blocks(self) -> int:
        """Resident blocks."""
        return self.gpu.resident(self.code["registers"], self.plan.block, shared(self.plan))

    def flight(self, ahead: float) -> float:
        """Bytes in flight on a multiprocessor whose threads ask for so many each."""
        busy = self.code["numbers"] * self.plan.block * self.cycles / self.gpu.clock
        return self.blocks * self.plan.block * ahead * LATENCY / (LATENCY + busy)

    @property
    def cycles(self) -> float:
        """Cycles of a multiprocessor for a number."""
        return self.gpu.cycles(self.code["pipes"])

    @property
    def budget(self) -> float:
        """Instructions for a number, in the kernel's own mix, that take as long as its bytes."""
        allowed = self.gpu.allowed(FORMATS[self.form].itemsize / self.reads)
        return float(self.code["per_number"] * allowed / self.cycles)


def shared(plan: _plan.Plan) -> int:
    """Bytes of shared memory of a block: at most."""
    columns = 1 if plan.along else plan.across * plan.width
    return plan.block // WARP * columns * EXCHANGED * 8 if plan.block > WARP else 0


def planned(op: str, form: str, shape: tuple[int, int, int]) -> _plan.Plan:
    """Return what the plan has for an array."""
    size, real = FORMATS[form].itemsize, FORMATS[form].real.itemsize
    return _plan.plan(op, *shape, size, real, cluster=False)


def parts(name: str) -> tuple[str, str, str, tuple[int, int, int]]:
    """Split a kernel's name in nvcc.json: op, stage, dtype, and the shape it was planned for."""
    op, stage, form, text = name.rsplit("_", 3)
    outer, n, inner = map(int, text.split("x"))
    return op, stage, form, (outer, n, inner)


def kernels(report: dict[str, Any]) -> dict[str, dict[str, Kernel]]:
    """Read the kernels of nvcc.json, for each architecture."""
    found: dict[str, dict[str, Kernel]] = {}
    for architecture, made in report["code"].items():
        for name, sides in made.items():
            op, stage, form, shape = parts(name)
            plan = planned(op, form, shape)
            if sides["ours"]["numbers"] != plan.vectors * plan.width:
                raise RuntimeError(f"{name} has another tile now: run benchmarks/nvcc_table.py")
            each = Kernel(GPUS[architecture], op, stage, form, plan, sides["ours"])
            found.setdefault(architecture, {})[name] = each
    return found


# -- tiles that were not compiled ------------------------------------------------------------------


def held(plan: _plan.Plan) -> int:
    """Numbers of a thread."""
    return plan.vectors * plan.width


def work(plan: _plan.Plan) -> list[float]:
    """Count what a thread has to do, each of which costs so many instructions.

    Once; for each number; for each lane that it has numbers of; for each of those, whenever two
    halves of the lane's threads meet; and where several warps do.
    """
    lanes = 1 if plan.along else plan.width
    warps = max(1, plan.deep * plan.across // WARP)
    return [1, held(plan), lanes, lanes * math.log2(plan.deep), lanes * (warps > 1)]


class Tiles:
    """What tiles cost that were not compiled, from some that were: of one dtype, rows or columns.

    Instructions: what each part of `work` costs is solved for from float32 softmax; the numbers of
    other dtypes then cost what makes their own kernel right. Registers: those that are not numbers'
    lie on the line through the rows of fewest and of most numbers a thread; each kernel has as many
    for a number as makes it right.
    """

    def __init__(self, report: dict[str, Any], form: str, along: bool) -> None:
        self.form, self.along = form, along
        self.measured: list[tuple[Kernel, Any, float]] = []  # kernel, costs of work, base registers
        for made in kernels(report).values():
            whole = [k for k in made.values() if k.stage == "whole"]
            known = [k for k in whole if (k.op, k.form) == ("softmax", "float32")]
            counts = [k.code["per_number"] * held(k.plan) for k in known]
            costs = np.linalg.lstsq([work(k.plan) for k in known], counts)[0]
            # The largest blocks have registers that are rationed.
            free = [k for k in whole if (k.form, k.plan.along) == (form, along)]
            free = [k for k in free if BLOCKS * k.plan.block <= k.gpu.threads]
            rows = sorted((held(k.plan), k.code["registers"]) for k in known if k.plan.along)
            (few, least), (many, most) = rows[0], max(r for r in rows if r[0] == rows[-1][0])
            base = least - few * (most - least) / (many - few)
            for k in free:
                if held(k.plan) == max(held(k.plan) for k in free):
                    own = costs.copy()
                    rest = np.dot(costs, work(k.plan)) - costs[1] * held(k.plan)
                    own[1] = (k.code["per_number"] * held(k.plan) - rest) / held(k.plan)
                    self.measured.append((k, own, base))

    def instructions(self, plan: _plan.Plan, n: int) -> float:
        """Instructions for a number of a softmax of lanes of `n`, a mean over the architectures."""
        found = [np.dot(own, work(plan)) for k, own, _ in self.measured if k.op == "softmax"]
        lanes = 1 if plan.along else plan.width
        return float(np.mean(found)) * plan.deep / (n * lanes)

    def keeps(self, plan: _plan.Plan) -> bool:
        """Say whether enough blocks reside, and have enough in flight, on every architecture."""
        for k, own, base in self.measured:
            share = held(plan) / held(k.plan)
            registers = base + (k.code["registers"] - base) * share
            registers = min(math.ceil(registers), k.gpu.registers // plan.block)
            per_number = np.dot(own, work(plan)) / held(plan)
            pipes = {p: c * per_number / k.code["per_number"] for p, c in k.code["pipes"].items()}
            code = {"registers": registers, "numbers": held(plan), "per_number": per_number}
            tile = dataclasses.replace(k, plan=plan, code=code | {"pipes": pipes})
            if tile.blocks < BLOCKS or tile.flight(tile.asked) < tile.needed:
                return False
        return True

    def candidates(self, n: int) -> Iterator[_plan.Plan]:
        """Yield the tiles that hold a lane of a power of two, with no thread or number too many."""
        limits, size = _plan.LIMITS, FORMATS[self.form].itemsize
        width = _plan.VECTOR_BYTES // size
        most = {2: limits.block_columns_float16, 4: limits.block_columns_float32}
        block = most.get(size, limits.block_float64) if size == 8 or not self.along else 2**20
        across = 1 if self.along else limits.across
        for vectors in (1, 2, 4, 8, 16):
            deep = max(1, n // (vectors * width if self.along else vectors))
            room = deep * vectors * (width if self.along else 1)
            lines = not self.along or deep * _plan.VECTOR_BYTES >= min(LINE, n * size)
            numbers = vectors * width
            fits = numbers <= (limits.held_float64 if size == 8 else limits.held_float32)
            if room == max(n, width if self.along else 1) and lines and fits:
                threads = max(deep * across, limits.block)
                if deep * across <= 1024 and deep * across * numbers <= block:
                    yield _plan.Plan(self.along, across, deep, 1, vectors, width, threads)

    def preferred(self, n: int) -> _plan.Plan | None:
        """Return the tile that the model prefers, if any holds such a lane."""
        found = list(self.candidates(n))
        good = [plan for plan in found if self.keeps(plan)]
        return min(good or found, key=lambda plan: self.instructions(plan, n), default=None)


INNER = 1024  # columns beside each other
LENGTHS = tuple(2**k for k in range(16))
FORMS = ("float32", "float64", "bfloat16")


def choices(report: dict[str, Any]) -> Iterator[tuple[Tiles, int, _plan.Plan, _plan.Plan]]:
    """Yield for all lengths that tiles hold: what the model prefers, and what the plan has."""
    for along in (True, False):
        for form in FORMS:
            tiles = Tiles(report, form, along)
            for n in LENGTHS if tiles.measured else ():
                wanted = tiles.preferred(n)
                if wanted is not None:
                    yield tiles, n, wanted, planned("softmax", form, (1, n, 1 if along else INNER))


def main() -> int:
    """Print the tiles; exit status 1 if the plan has others than the model."""
    differ = 0
    for tiles, n, wanted, has in choices(load("nvcc")):
        same = wanted == has
        differ += not same
        for plan in (wanted,) if same else (wanted, has):
            kind = f"{'rows' if plan.along else 'columns'} of {n} {tiles.form}"
            print(
                f"{kind:26} {plan.deep:4} x {plan.vectors}, {tiles.instructions(plan, n):.1f} "
                f"instructions, {'keeps' if tiles.keeps(plan) else 'below'} "
                f"{'' if same else 'the model' if plan is wanted else 'THE PLAN'}"
            )
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
