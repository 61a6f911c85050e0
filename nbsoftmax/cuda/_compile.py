"""Kernels as cubins: compiled once for each architecture, without a driver, and kept on disk."""

import contextlib
import functools
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ._jobs import Elements, Job

Architecture = tuple[int, int]
_compiling = threading.RLock()


class Cubin(NamedTuple):
    """Machine code of one kernel."""

    code: bytes
    symbol: bytes


def cubin(job: Job | Elements, architecture: Architecture) -> Cubin:
    """From the disk, or compiled now (0.3 s)."""
    key = f"{job.name}_sm{architecture[0]}{architecture[1]}_{_stamp()}"
    cache = _cache()
    code = None if cache is None else cache.get(key)
    if code is None or not _complete(code):
        code = compile_(job, architecture)[0]
        if cache is not None:
            with contextlib.suppress(OSError):  # a full disk is no reason to fail
                cache[key] = code
    return Cubin(code, _symbol(code))


@functools.cache
def _cache() -> Any:
    """The folder of cubins; None where none can be made."""
    from cuda.core.utils import FileStreamProgramCache

    try:
        return FileStreamProgramCache(_folder(), max_size_bytes=256 * 2**20)
    except OSError:
        return None


def _folder() -> Path:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "nbsoftmax-cubins"
    home = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "nbsoftmax" / "cubins"


@functools.cache
def _stamp() -> str:
    """Of all that shapes machine code: our sources and the compilers' versions."""
    here = Path(__file__).parent
    files = [here / f"_{name}.py" for name in ("compile", "jobs", "kernels", "lanes", "prims")]
    files += [here.parent / f"_{name}.py" for name in ("formats", "llvm", "scalars", "simd")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    for package in ("numba-cuda", "llvmlite", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{package} {metadata.version(package)}".encode())
    return digest.hexdigest()[:24]


def compile_(
    job: Job | Elements, architecture: Architecture, report: bool = False
) -> tuple[bytes, str]:
    """A cubin, and what the assembler says of it if ``report``. Needs neither driver nor device.

    For an architecture that the compiler does not know, that of the nearest one before it: devices
    run the code of earlier ones of their generation.
    """
    major, newest = architecture
    for minor in range(newest, -1, -1):
        try:
            return _compiled(job, (major, minor), report)
        except (RuntimeError, ValueError) as error:  # the compiler's errors are of both kinds
            reason = error
    raise RuntimeError(
        f"no kernel can be compiled for compute capability {major}.{newest}: {reason}"
    )


def _compiled(job: Job | Elements, architecture: Architecture, report: bool) -> tuple[bytes, str]:
    from numba.cuda import types

    from . import _kernels

    arguments = [
        types.int64 if count is None else types.UniTuple(types.int64, count)
        for count in job.integers
    ]
    with _compiling:  # what a kernel calls is entered in Numba's registries
        kernel = _kernels.kernel(job)
        return machine_code(kernel, arguments, job.group.block, architecture, report, job.resident)


def machine_code(
    kernel: Callable[..., None],
    arguments: Sequence[Any],
    block: int,
    architecture: Architecture,
    report: bool = False,
    resident: int = 1,
) -> tuple[bytes, str]:
    """What `compile_` gives, of any kernel that Numba takes, for blocks of so many threads.

    So many of which can reside in a multiprocessor.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda

    with _compiling, _without_a_device(architecture):
        ltoir, _ = cuda.compile(
            kernel,
            tuple(arguments),
            device=False,
            abi="numba",
            cc=architecture,
            output="ltoir",
            launch_bounds=(block, resident) if resident > 1 else block,
        )
        options = LinkerOptions(
            arch=f"sm_{architecture[0]}{architecture[1]}",
            link_time_optimization=True,
            ptxas_options=["-v"] if report else None,
        )
        linker = Linker(ObjectCode.from_ltoir(ltoir), options=options)
        return bytes(linker.link("cubin").code), linker.get_info_log() if report else ""


@contextlib.contextmanager
def _without_a_device(architecture: Architecture) -> Iterator[None]:
    """Numba asks the current device, which may not exist, how to compile device functions."""
    from numba.cuda import dispatcher

    class Device:
        compute_capability = architecture

    def current() -> Any:  # other threads may be at work with kernels of their own
        return Device() if threading.get_ident() == compiling else before()

    compiling = threading.get_ident()
    before = dispatcher.get_current_device
    dispatcher.get_current_device = current
    try:
        yield
    finally:
        dispatcher.get_current_device = before


def _symbol(code: bytes) -> bytes:
    """The kernel's name in its cubin, mangled by Numba."""
    names = set(re.findall(rb"\.text\.(_Z\w+)\x00", code))
    if len(names) != 1:
        raise RuntimeError(f"a cubin with the kernels {sorted(names)} instead of one")
    return bytes(names.pop())


def _complete(code: bytes) -> bool:
    """Whether all of a file's sections are there; they are listed at its end."""
    if len(code) < 64 or not code.startswith(b"\x7fELF"):
        return False
    start, size, count = (
        int.from_bytes(code[i:j], "little") for i, j in ((40, 48), (58, 60), (60, 62))
    )
    return start + size * count <= len(code)
