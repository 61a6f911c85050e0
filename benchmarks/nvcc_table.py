"""The machine code of our kernels beside that of reference.cu, the same kernels written by hand.

python benchmarks/nvcc_table.py                          # the tables, and results/nvcc.json
python benchmarks/nvcc_table.py --architectures 90 --opcodes
python benchmarks/nvcc_table.py --check                  # the results of reference.cu, on the host

Needs nvcc and a C++ compiler besides what machine_code.py needs, and no device. Instructions for a
number are those that a thread carries out in the common case (sass.py says how it is found, with
one rule for both sides) over the numbers that it loads meanwhile; in kernels that walk a lane tile
by tile they are those of one turn, and what stands beside the loop is counted apart.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import sass
from machine_code import ARCHITECTURES, disassembled, jobs_of
from nbsoftmax import _check, _machine, _scalars
from nbsoftmax._formats import FORMATS
from nbsoftmax.cuda._jobs import Job

HERE = Path(__file__).parent
RESULT = HERE / "results" / "nvcc.json"
# So that products are fused with sums only where it is written.
OPTIONS = ("-O3", "-std=c++17", "-fmad=false")

# Stage, op, dtype, shape folded to (outer, n, inner).
REGIMES: tuple[tuple[str, str, str, tuple[int, int, int]], ...] = (
    *(
        ("whole", op, "float32", (4096, n, 1))
        for n in (64, 1024, 4096, 32768)
        for op in _check.FUNCTIONS
    ),
    ("whole", "softmax", "float64", (4096, 4096, 1)),
    ("whole", "softmax", "bfloat16", (4096, 4096, 1)),
    ("pairs", "softmax", "float32", (1, 10**6, 1)),
    ("apply", "softmax", "float32", (1, 10**6, 1)),
    ("apply", "log_softmax", "float32", (1, 10**6, 1)),
    *(("whole", op, "float32", (64, 64, 1024)) for op in _check.FUNCTIONS),
)
SIDES = ("ours", "nvcc")
ELEMENTS = {"float32": "float", "float64": "double", "bfloat16": "bfloat16"}
# What float is to be, decided once for all that is compiled together: a folder of its own.
FOLDERS = {"full": ("float32", "float64"), "half": ("bfloat16",)}
ARGUMENTS = {
    "whole": "const char* x, char* out, int64_t outer, int n, int64_t inner, int64_t x_outer, "
    "int64_t x_n, int64_t out_outer, int64_t out_n",
    "pairs": "const char* x, {real}* out, int64_t outer, int64_t n, int64_t x_outer, "
    "unsigned chunks, int64_t length",
    "apply": "const char* x, const {real}* pairs_, char* out, int64_t outer, int64_t n, "
    "int64_t x_outer, int64_t out_outer, unsigned chunks, int64_t length",
}


def constants(folder: str) -> str:
    """Write the constants of _scalars as C++."""
    single = _scalars.HALF if folder == "half" else _scalars.FLOAT32
    lines = ["#pragma once", "template <class R> struct Constants;"]
    for real, kind, suffix in ((single, "float", "f"), (_scalars.FLOAT64, "double", "")):
        number = np.dtype(real.name).type

        def literal(value: float, number: Any = number, suffix: str = suffix) -> str:
            return float(number(value)).hex() + suffix

        half_root = number(math.sqrt(0.5)).view(f"i{real.itemsize}")
        lines.append(f"template <> struct Constants<{kind}> {{")
        lines.append(f"    using Bits = int{8 * real.itemsize}_t;")
        lines.append(f"    static constexpr Bits half_root = {half_root};")
        for name in ("mantissa", "one_exponent", "bias", "clamp"):
            lines.append(f"    static constexpr int {name} = {getattr(real, name)};")
        lines.append(f"    static constexpr bool precise = {str(real.precise).lower()};")
        logs = ("log2e", "ln2_hi", "ln2_lo", "ln2_short", "ln2_rest")
        for name in ("start", "origin", "round", "exact", *logs):
            value = literal(getattr(real, name))
            lines.append(f"    static constexpr {kind} {name} = {value};")
        lines.append(f"    static constexpr {kind} unit = {literal(2.0**-real.mantissa)};")
        for name in ("exp", "log"):
            values = getattr(real, name)
            listed = ", ".join(literal(value) for value in values)
            lines.append(f"    static constexpr int {name}s = {len(values)};")
            lines.append(f"    BOTH static constexpr {kind} {name}(int i) {{")
            lines.append(f"        constexpr {kind} c[] = {{{listed}}};")
            lines.append("        return c[i];\n    }")
        lines.append("};")
    return "\n".join(lines) + "\n"


def wrapped(
    name: str, stage: str, op: str, source: str, tile: tuple[object, ...], on_host: bool = False
) -> str:
    """Write a kernel of reference.cu with its name; on the host, a function of all its blocks."""
    element = ELEMENTS[source]
    given = ARGUMENTS[stage].format(real="double" if source == "float64" else "float")
    passed = ", ".join(re.findall(r"(\w+)(?:,|$)", given))
    shape = f"Tile<{element}, {', '.join(str(part).lower() for part in tile)}>"
    op = "" if stage == "pairs" else f"{op.upper()}, "
    call = f"{stage}<{op}{shape}>"
    if on_host:
        return (
            f'extern "C" void {name}(unsigned blocks, {given}) {{\n'
            f"    launch({shape}::G::block, blocks, [=](int thread, unsigned block) {{\n"
            f"        {call}(thread, block, {passed});\n    }});\n}}\n"
        )
    return (
        f'extern "C" __global__ void __launch_bounds__({shape}::G::block) {name}({given}) {{\n'
        f"    {call}(threadIdx.x, blockIdx.x, {passed});\n}}\n"
    )


def kernels() -> dict[str, Job]:
    """List the regimes' jobs by name."""
    found = {}
    for stage, op, dtype, shape in REGIMES:
        (job,) = (job for job in jobs_of(op, dtype, shape) if job.stage == stage)
        found[f"{op}_{stage}_{dtype}_{'x'.join(map(str, shape))}"] = job
    return found


def figures(job: Job, function: list[sass.Instruction], said: str) -> dict[str, Any]:
    """Count what one kernel's machine code does."""
    case = sass.common_case(function)
    numbers = sum(case.loads) // job.form.itemsize
    if numbers < job.vectors * job.width:
        raise RuntimeError(f"{job.name} loads {numbers} numbers in its common case")
    return {
        "registers": sass.registers(said),
        "spilled": sass.spilled(said),
        "widest_load": max(case.loads),
        "typical_load": Counter(case.loads).most_common(1)[0][0],
        "loads": len(case.loads),
        "loads_ahead": case.ahead,
        "numbers": numbers,
        "per_number": round(len(case.instructions) / numbers, 3),
        "beside_the_loop": case.beside,
        "pipes": {pipe: round(count / numbers, 3) for pipe, count in case.pipes.most_common()},
        "opcodes": {name: round(count / numbers, 3) for name, count in case.opcodes.most_common()},
    }


def column(architecture: tuple[int, int], keep: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Count all kernels of both sides for one architecture."""
    made = kernels()
    name = f"sm_{architecture[0]}{architecture[1]}"
    functions, said = {}, {}
    for folder in FOLDERS:
        source, cubin = keep / folder / "kernels.cu", keep / folder / f"{name}.cubin"
        command = ["nvcc", *OPTIONS, f"-arch={name}", f"-I{HERE}", f"-I{source.parent}", "-cubin"]
        command += ["-Xptxas", "-v", "-o", str(cubin), str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(run.stderr)
        functions |= sass.disassemble(cubin)
        parts = re.split(r"Compiling entry function '(\w+)'", run.stderr)
        said |= dict(zip(parts[1::2], parts[2::2], strict=True))
    return {
        kernel: {
            "ours": figures(job, *disassembled(job, architecture, keep)),
            "nvcc": figures(job, functions[kernel], said[kernel]),
        }
        for kernel, job in made.items()
    }


def prepare(keep: Path) -> None:
    """Write what nvcc reads."""
    for folder, dtypes in FOLDERS.items():
        lines = ['#include "reference.cu"\n']
        for name, job in kernels().items():
            group = job.group
            tile = (job.along, group.across, group.deep, group.together, job.vectors)
            if job.source in dtypes:
                lines.append(wrapped(name, job.stage, job.op, job.source, tile))
        write(keep / folder, "kernels.cu", lines)


def write(folder: Path, name: str, lines: list[str]) -> Path:
    """Write a source file, and its constants beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "constants.h").write_text(constants(folder.name), encoding="utf-8")
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


def versions() -> dict[str, str]:
    """Name the compilers."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V([\d.]+)", said)
    packages = ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvdisasm")
    return {"nvcc": release[1] if release else "unknown"} | {
        package: metadata.version(package) for package in packages
    }


def _row(of: dict[str, Any]) -> Iterator[str]:
    """Yield the cells of one kernel."""
    pipes = of["pipes"]
    yield str(of["registers"])
    yield str(of["spilled"])
    yield f"{of['widest_load']}, {of['typical_load']}"
    yield f"{of['loads_ahead']} of {of['loads']}"
    yield f"{of['per_number']:.1f}"
    for pipe in ("fma", "double", "alu"):
        yield f"{pipes.get(pipe, 0):.1f}"
    others = sum(count for pipe, count in pipes.items() if pipe not in ("fma", "double", "alu"))
    yield f"{others:.1f}"
    yield str(of["beside_the_loop"] or "")


def show(report: dict[str, dict[str, dict[str, dict[str, Any]]]], opcodes: bool) -> None:
    """Print a table for each architecture."""
    console = Console(width=150)
    head = ("registers", "spilled", "bytes a load", "ahead", "per number")
    head += ("fma", "double", "alu", "other", "beside")
    for name, made in report.items():
        table = Table("kernel", "", *head, title=name)
        for kernel, sides in made.items():
            for side in SIDES:
                table.add_row(kernel if side == "ours" else "", side, *_row(sides[side]))
        console.print(table)
    if opcodes:
        for name, made in report.items():
            for kernel, sides in made.items():
                print(f"\n{kernel} {name}")
                counts = [sides[side]["opcodes"] for side in SIDES]
                for opcode in dict.fromkeys(opcode for count in counts for opcode in count):
                    ours, theirs = (count.get(opcode, 0.0) for count in counts)
                    if max(ours, theirs) >= 0.1:
                        print(f"  {opcode:10} {ours:6.2f} {theirs:6.2f} {ours - theirs:+6.2f}")


# -- are the results of reference.cu right? --------------------------------------------------------

HELD = 1024  # numbers of a lane that a tile holds
CHUNKS = 4
ITEMS = 2000  # of each input
# Groups of threads: across, deep and together of rows and of columns.
GROUPS = {
    "alone": ((1, 1, 1), (1, 1, 1)),
    "part of a warp": ((1, 8, 4), (8, 4, 1)),
    "block": ((1, 64, 2), (4, 64, 1)),
}


def host(keep: Path, group: str) -> dict[str, ctypes.CDLL]:
    """Compile reference.cu for the host: a library for each dtype."""
    rows, columns = GROUPS[group]
    found = {}
    for folder, source in ((f, source) for f, sources in FOLDERS.items() for source in sources):
        lines = ['#include "reference.cu"\n']
        tile = True, *rows, HELD // rows[1] * FORMATS[source].itemsize // 16
        chunk = True, *rows, 1
        for op in _check.FUNCTIONS:
            lines.append(wrapped(f"{op}_rows_{source}", "whole", op, source, tile, True))
            across = False, *columns, HELD // columns[1]
            lines.append(wrapped(f"{op}_columns_{source}", "whole", op, source, across, True))
            if op != "logsumexp":
                lines.append(wrapped(f"{op}_apply_{source}", "apply", op, source, chunk, True))
        lines.append(wrapped(f"pairs_{source}", "pairs", "", source, chunk, True))
        written = write(keep / folder, "host.cpp", lines)
        library = keep / f"{source}_{group.split()[0]}.so"
        command = ["g++", "-O2", "-std=c++20", "-march=native", "-ffp-contract=off", "-w"]
        command += ["-shared", "-pthread", "-fPIC", f"-I{HERE}", f"-I{written.parent}"]
        subprocess.run([*command, "-o", str(library), str(written)], check=True)
        found[source] = ctypes.CDLL(str(library))
    return found


def on_host(
    libraries: dict[str, ctypes.CDLL], group: str, way: str, op: str, x: Any, axis: int
) -> Any:
    """Run the host's build of reference.cu on lanes along an axis of a 2-d array."""
    source, size = x.dtype.name, x.itemsize
    width = 16 // size
    # Filled up to whole vectors, with what adds nothing.
    more = [(0, -count % width) for count in x.shape]
    padded = np.pad(x, more, constant_values=-np.inf)
    out = np.empty_like(padded)
    rows, columns = padded.shape
    pitch = columns * size
    (_, deep, together), (across, *_) = GROUPS[group]

    def call(name: str, blocks: int, *arguments: Any) -> None:
        given = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
        getattr(libraries[source], f"{name}_{source}")(blocks, *map(ctypes.c_int64, given))

    reduces = op == "logsumexp"
    if axis == 0:
        result = np.empty(columns, x.dtype) if reduces else out
        shape = 1, rows, columns, 0, pitch, 0, pitch
        call(f"{op}_columns", -(-columns // (width * across)), padded, result, *shape)
        return result[: x.shape[1]] if reduces else out[: len(x), : x.shape[1]]
    if way == "whole" or reduces:
        result = np.empty(rows, x.dtype) if reduces else out
        step = size if reduces else pitch
        shape = rows, columns, 1, pitch, size, step, size
        call(f"{op}_rows", -(-rows // together), padded, result, *shape)
        return result[: len(x)] if reduces else out[: len(x), : x.shape[1]]
    tile = deep * width
    length = max(1, columns // tile // CHUNKS) * tile
    chunks = -(-columns // length)
    blocks = -(-rows // together) * chunks
    pairs = np.empty((4, chunks, rows), FORMATS[source].real.name)
    call("pairs", blocks, padded, pairs, rows, columns, pitch, chunks, length)
    shape = rows, columns, pitch, pitch, chunks, length
    call(f"{op}_apply", blocks, padded, pairs, out, *shape)
    return out[: len(x), : x.shape[1]]


def narrow(ways: dict[str, dict[str, Any]]) -> int:
    """Count the ops that are not right for bfloat16, whose results lie half a step from exact."""
    rng = np.random.default_rng(22)
    x = (10 * rng.standard_normal((64, 200))).astype(ml_dtypes.bfloat16)
    exact = _check.exact(x, _check.widest())
    wrong = 0
    for way, functions in ways.items():
        for op, function in functions.items():
            want = getattr(exact, op)
            error = abs(function(x, axis=-1).astype(want.dtype) - want)
            worst = float((error / np.ldexp(1.0, np.frexp(want)[1] - 8)).max())
            wrong += worst > 0.51
            print(f"bfloat16 {op:12} {way}: {worst:.3f} {'WRONG' if worst > 0.51 else ''}")
    return wrong


def check(keep: Path) -> int:
    """Compare reference.cu with exact results, by the measure that nbsoftmax is held to."""
    wide = _check.widest()
    ways = {}
    for group in GROUPS:
        libraries = host(keep, group)
        for way in ("whole", "chunks"):
            functions = {
                op: functools.partial(on_host, libraries, group, way, op) for op in _check.FUNCTIONS
            }
            ways[f"{way}, {group}"] = functions
    wrong = 0
    for dtype in ("float32", "float64"):
        for name, x in _check.hard_inputs(dtype, ITEMS, HELD):
            for row in _check.compare(name, x, wide, ways):
                bad = max(row.ulp.values()) > _check.LIMIT_ULP[row.function]
                wrong += bad
                figures = ", ".join(f"{way} {ulp:.2f}" for way, ulp in row.ulp.items())
                print(f"{name} {dtype} {row.function}: {figures}{' WRONG' if bad else ''}")
    wrong += narrow(ways)
    for special in _check.SPECIALS:
        lane = np.array(special.lane)
        if lane.dtype != np.float64 or not lane.size:
            continue
        for way, functions in ways.items():
            for op, function in functions.items():
                got = np.squeeze(function(lane[None], axis=-1), 0)
                if not np.array_equal(got, getattr(special, op), equal_nan=True):
                    wrong += 1
                    print(f"{special.name}: {op} by {way} is {got} WRONG")
    print(f"{wrong} wrong")
    return bool(wrong)


def main() -> int:
    """Print the tables and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", help="such as 80,90; leaves the file as it is")
    parser.add_argument("--opcodes", action="store_true", help="print each kernel's opcodes, too")
    parser.add_argument("--keep", type=Path, help="folder for sources and machine code")
    parser.add_argument("--check", action="store_true", help="only check reference.cu's results")
    options = parser.parse_args()
    chosen = ARCHITECTURES
    if options.architectures:
        numbers = [int(a) for a in options.architectures.split(",")]
        chosen = tuple((a // 10, a % 10) for a in numbers)
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(2) as processes:
        keep = options.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        if options.check:
            return check(keep)
        prepare(keep)
        columns = list(processes.map(column, chosen, [keep] * len(chosen)))
    names = [f"sm_{major}{minor}" for major, minor in chosen]
    report = dict(zip(names, columns, strict=True))
    show(report, options.opcodes)
    if not options.architectures:
        machine = _machine.machine() | {"nvcc_options": " ".join(OPTIONS)}
        machine["versions"] |= versions()
        text = json.dumps({"machine": machine, "code": report}, indent=1, allow_nan=False)
        RESULT.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
