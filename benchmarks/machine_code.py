"""The machine code of the CUDA kernels: compiled for every architecture, counted, held to bounds.

python benchmarks/machine_code.py                  # the table; exit status 1 if a bound is broken
python benchmarks/machine_code.py --keep cubins    # leaves the machine code there too
python benchmarks/machine_code.py --architectures 90
python benchmarks/machine_code.py --share 2        # half of it: each kernel for some of them

Needs no driver and no device; the packages are those of the extras cu12 and cu13, and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import sass
from nbsoftmax._formats import FORMATS
from nbsoftmax.cuda import _compile, _run
from nbsoftmax.cuda._device import CLUSTERS
from nbsoftmax.cuda._jobs import Elements, Job

ARCHITECTURES = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))

# Arrays that meet each regime: op, dtype, shape folded to (outer, n, inner). What a call on such an
# array launches is what is compiled here.
ROWS = (10, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 131072, 10**6)
CASES: tuple[tuple[str, str, tuple[int, int, int]], ...] = (
    *(("softmax", "float32", (4096, n, 1)) for n in ROWS),
    *(("softmax", dtype, (4096, n, 1)) for dtype in ("float16", "bfloat16") for n in (1024, 32768)),
    *(("softmax", "float64", (4096, n, 1)) for n in (256, 1024, 8192, 16384)),
    ("softmax", "float32", (1, 2**26, 1)),
    *(("log_softmax", "float32", (4096, n, 1)) for n in (256, 4096, 32768)),
    ("log_softmax", "float64", (4096, 4096, 1)),
    *(("logsumexp", "float32", (4096, n, 1)) for n in (10, 256, 4096, 32768, 131072)),
    ("logsumexp", "float32", (1, 2**26, 1)),
    *(("logsumexp", dtype, (4096, 4096, 1)) for dtype in ("float64", "bfloat16")),
    ("softmax", "float32", (4096, 1021, 1)),  # rows that begin anywhere
    *(("softmax", "float32", (64, n, 1024)) for n in (3, 16, 64, 256, 512, 4096)),
    *(("softmax", dtype, (64, 64, 1024)) for dtype in ("float64", "bfloat16")),
    ("softmax", "float32", (1024, 64, 250)),
    *(("logsumexp", "float32", (64, n, 1024)) for n in (64, 4096)),
    *(("log_softmax", "bfloat16", (64, n, 1024)) for n in (16, 128, 256, 400)),
    *(("logsumexp", "float16", (64, n, 1024)) for n in (64, 400)),
    *(("log_softmax", "float64", (64, n, 1024)) for n in (64, 256)),
    *(("log_softmax", "float64", (4096, n, 1)) for n in (1024, 4096)),
    *(("log_softmax", "float32", (64, n, 1024)) for n in (256, 512)),
    ("log_softmax", "bfloat16", (4096, 65536, 1)),
)
ELEMENTS = (
    Elements("int64", "float64", 2),
    Elements("float32", "float32", 3, "bool", 0.0, -float("inf")),
    Elements("float64", "bfloat16", 2),
    Elements("float16", "float16", 1, "float32", 0.0, -float("inf")),
    Elements("float32", "float32", 1, native=False),
)
# What a thread may lay aside for want of registers: in what it usually does (5 registers are
# the most, of 1,024 threads with 32 numbers each of float32 logsumexp), and anywhere, for there
# are long ways that are hardly ever taken (a second sum, maxima that are huge; most where they
# begin with 32 numbers of each thread held: 136 bytes of bfloat16 log_softmax in a cluster).
USUALLY_LOCAL = 10  # loads and stores
SPILLED = 136  # bytes
DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F\.F64|MUFU\.\w+64H")


@dataclass(frozen=True)
class Code:
    """What a cubin holds."""

    registers: int
    spilled: int  # bytes
    local: int  # loads and stores
    usually_local: int  # of them, in the common case
    wide_loads: int  # of 128 bits
    wide_stores: int
    doubles: int
    instructions: int


def jobs_of(op: str, dtype: str, shape: tuple[int, int, int]) -> list[Job]:
    """List the kernels that a call on an array of its own launches."""
    size = FORMATS[dtype].itemsize
    _, n, inner = shape
    strides = n * inner * size, inner * size, size
    call = _run._call(op, shape, strides, dtype, 1, False, 0, None, 0, True)
    if call is None:
        raise ValueError(f"no kernel takes {shape} as it lies")
    return [step.job for step in call.steps]


@dataclass(frozen=True)
class Fused:
    """A kernel of examples/fused_cuda.py, which calls the device functions."""

    name: str

    def compiled(self, architecture: tuple[int, int]) -> tuple[bytes, str]:
        """Compile it for arrays of float32; return what `_compile.compile_` does."""
        from numba.cuda import types
        from numba.cuda.np.numpy_support import from_dtype
        from numba.cuda.random import xoroshiro128p_dtype

        def array(element: Any, ndim: int) -> Any:
            return types.Array(element, ndim, "C")

        real, states = types.float32, from_dtype(xoroshiro128p_dtype)
        arguments = {
            "attention_weights": (array(real, 2), array(types.bool_, 2), real, array(real, 2)),
            "sample_tokens": (array(real, 2), real, array(states, 1), array(types.int64, 1),
                              array(real, 1)),
        }[self.name]  # fmt: skip
        module = _example()
        kernel = getattr(module, self.name).py_func
        return _compile.machine_code(kernel, arguments, module.THREADS, architecture, True)


@cache
def _example() -> Any:
    """Import the example as a module."""
    file = Path(__file__).parent.parent / "examples" / "fused_cuda.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Kernel = Job | Elements | Fused


def jobs() -> list[Kernel]:
    """List the kernels of all cases, each once."""
    found: dict[Kernel, None] = {}
    for case in CASES:
        found.update(dict.fromkeys(jobs_of(*case)))
    row = _run._call("logsumexp", (9, 99), (792, 8), "float64", 1, False, 0, None, 0, True, True)
    assert row is not None
    found.update(dict.fromkeys(step.job for step in row.steps))
    return [*found, *ELEMENTS, Fused("attention_weights"), Fused("sample_tokens")]


def disassembled(
    job: Kernel, architecture: tuple[int, int], keep: Path
) -> tuple[list[sass.Instruction], str]:
    """Compile a kernel; return its instructions, and what the assembler says of it."""
    if isinstance(job, Fused):
        cubin, said = job.compiled(architecture)
    else:
        cubin, said = _compile.compile_(job, architecture, report=True)
    file = keep / f"{job.name}.sm{architecture[0]}{architecture[1]}.cubin"
    file.write_bytes(cubin)
    (function,) = sass.disassemble(file).values()
    return function, said


def read(job: Kernel, architecture: tuple[int, int], keep: Path) -> Code:
    """Compile a kernel and count what its machine code holds."""
    function, said = disassembled(job, architecture, keep)
    count = Counter(instruction.opcode for instruction in function)

    def number(pattern: str) -> int:
        return sum(n for name, n in count.items() if re.match(pattern, name))

    return Code(
        sass.registers(said),
        sass.spilled(said),
        number(r"LDL|STL"),
        sum(i.opcode.startswith(("LDL", "STL")) for i in sass.common_case(function).instructions),
        number(r"LDG.*\.128"),
        number(r"STG.*\.128"),
        sum(n for name, n in count.items() if DOUBLE.match(name)),
        sum(n for name, n in count.items() if name != "NOP"),
    )


def broken(job: Kernel, code: Code) -> list[str]:
    """Say which bounds a kernel's machine code does not keep."""
    said = []
    if code.spilled > SPILLED or code.usually_local > USUALLY_LOCAL:
        said.append(
            f"{code.spilled} bytes spilled, {code.local} local accesses, "
            f"{code.usually_local} in the common case"
        )
    if isinstance(job, Job):
        real = job.real.itemsize
        if real == 4 and code.doubles:
            said.append(f"{code.doubles} float64 instructions for {job.source}")
        wide = job.access * job.form.itemsize == 16
        if wide and job.stage != "merge" and code.wide_loads < job.vectors:
            said.append(f"{code.wide_loads} loads of 128 bits instead of {job.vectors}")
        writes = job.op != "logsumexp" and job.stage in ("whole", "apply")
        if writes and wide and code.wide_stores < job.vectors:
            said.append(f"{code.wide_stores} stores of 128 bits instead of {job.vectors}")
        # So many threads of a block must fit the registers of a multiprocessor at once.
        if code.registers * job.group.block > 65536:
            said.append(f"{code.registers} registers for {job.group.block} threads")
    return said


def column(architecture: tuple[int, int], keep: Path, share: int) -> list[Code | None]:
    """Compile kernels for one architecture; None for those that it cannot run, or not its share."""
    turn = ARCHITECTURES.index(architecture) if architecture in ARCHITECTURES else 0

    def skipped(i: int, job: Kernel) -> bool:
        clusters = isinstance(job, Job) and job.group.blocks > 1
        return (i + turn) % share != 0 or (clusters and architecture < CLUSTERS)

    return [
        None if skipped(i, job) else read(job, architecture, keep) for i, job in enumerate(jobs())
    ]


def main() -> int:
    """Print the table, and which bounds are broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder for the cubins")
    parser.add_argument("--architectures", help="such as 80,90", default="")
    parser.add_argument(
        "--share", type=int, default=1,
        help="compile one in so many kernels for each architecture, others for the next",
    )  # fmt: skip
    options = parser.parse_args()
    chosen = ARCHITECTURES
    if options.architectures:
        numbers = [int(a) for a in options.architectures.split(",")]
        chosen = tuple((a // 10, a % 10) for a in numbers)
    names = [f"sm_{major}{minor}" for major, minor in chosen]
    table = Table("kernel", *names)
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor() as processes:
        keep = options.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        count = len(chosen)
        columns = list(processes.map(column, chosen, [keep] * count, [options.share] * count))
    failures = []
    for job, *codes in zip(jobs(), *columns, strict=True):
        cells = []
        for name, code in zip(names, codes, strict=True):
            if code is None:
                cells.append("-")
                continue
            wide = f"{code.wide_loads}+{code.wide_stores} wide"
            spilled = f", {code.usually_local}/{code.local} spills" if code.local else ""
            cells.append(f"{code.registers} r, {wide}, {code.instructions} i{spilled}")
            failures += [f"{job.name} {name}: {line}" for line in broken(job, code)]
        table.add_row(job.name, *cells)
    Console(width=200).print(table)
    print(
        "r: registers of a thread; wide: loads + stores of 128 bits; i: instructions; "
        "spills: local accesses in the common case / anywhere"
    )
    for line in failures:
        print(f"BROKEN {line}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
