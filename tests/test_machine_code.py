"""What LLVM made of the kernels: hot loops of packed instructions and nothing else.

A loop is hot if it computes exp, which it shows by its many fused multiply-adds, and nothing of a
lane or a chunk, which it would show by a division or a lock.
"""

import functools
import platform
import re

import llvmlite.binding
import pytest
from numba import config

from nbsoftmax import _cpu_kernels as kernels

from .cases import OPS

FEATURES = llvmlite.binding.get_host_cpu_features()
X86 = platform.machine() in ("x86_64", "AMD64")

pytestmark = pytest.mark.skipif(
    not X86 or not FEATURES.get("fma") or config.CPU_NAME is not None or config.DISABLE_JIT,
    reason="reads the assembly of x86 with FMA, compiled for this machine",
)

REGISTER = "zmm" if FEATURES.get("avx512f") else "ymm"
EXP_FMAS = 6  # at least: the reduction and the polynomial

PACKED_FMA = re.compile(r"\bvfn?m(?:add|sub)\w*p[sd]\b")
SCALAR = re.compile(r"\bv?(?:add|sub|mul|div|max|min|sqrt|fn?m(?:add|sub)\d+|u?comi)s[sd]\b")
DIVISION = re.compile(r"\b(?:v?div\w+|lock)\b")
LABEL = re.compile(r"^(\.?L\w+):")
JUMP = re.compile(r"^\s+j\w+\s+(\.?L\w+)\s*$")
SYMBOL = re.compile(r"\bmovabsq\s+\$([A-Za-z_]\w*)")

PANELS = {"along": 4, "across": 4, "short": 1}


def jobs():
    for op in OPS:
        for dtype in ("float32", "float64"):
            for walk, panel in PANELS.items():
                yield kernels.Job(op, dtype, dtype, walk, panel)
                yield kernels.Job(op, dtype, dtype, walk, panel, runs=True)
            yield kernels.Job(op, dtype, dtype, "short", dealt=3)
            yield kernels.Job(op, dtype, dtype, "short", 2)
            yield kernels.Job(op, dtype, dtype, "along", lanes=4)
            yield kernels.Job(op, dtype, dtype, "along", 3, lanes=6)
            yield kernels.Job(op, dtype, dtype, "across", 1)
            yield kernels.Job(op, dtype, dtype, "across", 1, kernels.BY_LINES, masked=True)
            yield kernels.Job(op, dtype, dtype, "across", 1, kernels.PAST_CACHE, wraps=True)
        for dtype in ("float16", "bfloat16"):
            yield kernels.Job(op, dtype, dtype, "along")
    for dtype in ("float32", "float64"):
        for op in (kernels.PAIRS, kernels.PAIRS_LOGSUMEXP, kernels.APPLY_SOFTMAX):
            yield kernels.Job(op, dtype, dtype, "along")
            yield kernels.Job(op, dtype, dtype, "across")
            yield kernels.Job(op, dtype, dtype, "along", runs=True)
    yield kernels.Job(kernels.PAIRS, "float64", "float64", "along", weighted=True)
    yield kernels.Job("softmax", "int32", "float64", "along")


JOBS = list(jobs())


def job_id(job):
    past = "" if job.stores == kernels.IN_CACHE else f"-{job.stores}"
    past += f"-{job.lanes}_lanes" if job.lanes > 1 else ""
    past += f"-{job.dealt}_dealt" if job.dealt else ""
    kind = past + "-masked" * job.masked + "-wraps" * job.wraps
    kind += "-weighted" * job.weighted + "-runs" * job.runs
    return f"{job.op}-{job.source}-{job.walk}-{job.panel}{kind}"


@functools.cache
def body(job):
    """The instructions of the kernel's function: not those of its Python wrapper."""
    dispatcher = kernels.dispatcher(job, cache=False)
    signature = kernels.signature(job)
    dispatcher.compile(signature)
    lines, inside = [], False
    for line in dispatcher.inspect_asm(signature).splitlines():
        if re.match(r"^_ZN\w*_cpu_kernels\w*:", line) and "cpython" not in line:
            inside = True
        elif line.startswith(".Lfunc_end") and inside:
            return lines
        elif inside:
            lines.append(line)
    raise AssertionError("no kernel in the assembly")


def innermost_loops(lines):
    """Ranges of lines that a jump closes and that hold no other loop."""
    labels, loops = {}, []
    for i, line in enumerate(lines):
        if found := LABEL.match(line):
            labels[found[1]] = i
        elif (found := JUMP.match(line)) and found[1] in labels:
            loops.append((labels[found[1]], i))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return ["\n".join(lines[low : high + 1]) for low, high in inner]


def hot_loops(job):
    hot = [
        loop
        for loop in innermost_loops(body(job))
        if len(PACKED_FMA.findall(loop)) >= EXP_FMAS and not DIVISION.search(loop)
    ]
    assert hot, "no loop computes exp"
    return hot


@pytest.mark.parametrize("job", JOBS, ids=job_id)
def test_hot_loops_are_packed(job):
    for loop in hot_loops(job):
        assert REGISTER in loop
        assert not SCALAR.findall(loop)
        assert "gather" not in loop
        assert "scatter" not in loop
        assert "call" not in loop


@pytest.mark.parametrize("job", JOBS, ids=job_id)
def test_kernel_calls_nothing_but_the_allocator(job):
    """No exp of a library, no fma in software, no conversion of half precision by a helper."""
    calls = [line for line in body(job) if re.search(r"\bcall", line)]
    symbols = {name for line in body(job) for name in SYMBOL.findall(line)}
    assert symbols in ({"malloc", "free"}, set())
    assert len(calls) == len(symbols)


@pytest.mark.parametrize("stores", [kernels.IN_CACHE, kernels.PAST_CACHE])
@pytest.mark.parametrize("walk", ["along", "across"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_stores_past_the_cache_are_that(op, dtype, walk, stores):
    job = kernels.Job(op, dtype, dtype, walk, stores=stores)
    found = re.findall(r"\bv?movnt\w+", "\n".join(hot_loops(job)))
    assert bool(found) == (stores == kernels.PAST_CACHE)


@pytest.mark.parametrize("stores", [kernels.IN_CACHE, kernels.BY_LINES])
@pytest.mark.parametrize("walk", ["short", "beside", "across"])
def test_lines_leave_past_the_cache_too(walk, stores):
    job = kernels.Job("softmax", "float32", "float32", walk, 1 if walk == "short" else 4, stores)
    assert ("vmovnt" in "\n".join(body(job))) == (stores == kernels.BY_LINES)
