"""Tests whose bodies run in a process of their own, with `fake_driver.c` in the driver's place."""

import collections
import contextlib
import ctypes
import functools
import gc
import importlib.util
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from . import process_parent

SOURCE = Path(__file__).with_suffix(".c")
CHILD = Path(__file__).with_name("fake_driver_child.py")
LEGACY, PER_THREAD = 1, 2


# -- the parent's side ----------------------------------------------------------------------------


def _missing():
    if not sys.platform.startswith("linux"):
        return "the stand-in for the driver is for Linux"
    if shutil.which("gcc") is None:
        return "gcc is missing"
    for package in ("cuda.core", "cuda.bindings", "numba_cuda"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{package} is missing"
    return None


MISSING = _missing()
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=MISSING or "nothing is missing"),
]


@functools.cache
def _folder():
    """The driver, compiled; an empty folder instead of it; a cache of kernels."""
    place = tempfile.TemporaryDirectory(prefix="nbsoftmax-tests-")
    folder = Path(place.name)
    for name in ("driver", "none", "cache"):
        (folder / name).mkdir()
    library = folder / "driver" / "libcuda.so.1"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return place, folder


def run_child(module, name, driver="driver", cache="cache", **changes):
    _, folder = _folder()
    libraries = filter(None, (str(folder / driver), os.environ.get("LD_LIBRARY_PATH")))
    env = process_parent.environment(
        LD_LIBRARY_PATH=os.pathsep.join(libraries),
        NUMBA_CACHE_DIR=str(folder / cache),
        **changes,
    )
    return process_parent.run(CHILD, module, name, env=env)


BODIES = {}
COMPILED = set()  # names of those that take real kernels; others take stand-ins


def in_child(*others, compiled=False, **settings):
    """Make a function's body a test that runs in a child process; after the ``others``, if any."""

    def decorate(body):
        names = [function.__name__ for function in (*others, body)]
        BODIES.update(zip(names, (*others, body), strict=True))
        COMPILED.update(names if compiled else ())
        kernels = {} if compiled else {"cache": "stand-ins"}

        def test():
            for name in names:
                run_child(body.__module__, name, **{**kernels, **settings})

        test.__name__ = test.__qualname__ = body.__name__
        return test

    return decorate


# -- the child's side: the fake driver ------------------------------------------------------------


@functools.cache
def fake():
    """The stand-in, in the child process."""
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_memory.restype = ctypes.c_uint64
    library.fake_memory.argtypes = ctypes.c_int, ctypes.c_size_t
    library.fake_records.restype = ctypes.c_char_p
    library.fake_fail.argtypes = ctypes.c_char_p, ctypes.c_long, ctypes.c_int
    library.cuInit(0)  # as whoever makes arrays or streams has done
    return library


def clear():
    gc.collect()
    fake().fake_clear()


def records():
    gc.collect()
    seen = json.loads(fake().fake_records(), object_hook=lambda d: types.SimpleNamespace(**d))
    seen.calls = collections.Counter(vars(seen.calls))
    seen.live = [block for block in seen.blocks if block.freed_on is None]
    return seen


def launches():
    return records().launches


def fail(function, n, code):
    fake().fake_fail(function.encode(), n, code)


def current():
    """The calling thread's current device, or None."""
    number = ctypes.c_int()
    return None if fake().cuCtxGetDevice(ctypes.byref(number)) else number.value


def make_current(device):
    context = ctypes.c_void_p()
    assert not fake().cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    assert not fake().cuCtxSetCurrent(context)


def make_stream(device=0):
    before = current()
    make_current(device)
    stream = ctypes.c_void_p()
    assert not fake().cuStreamCreate(ctypes.byref(stream), 0)
    if before is None:
        fake().cuCtxSetCurrent(None)
    else:
        make_current(before)
    return stream.value


def strides_of(shape, itemsize):
    steps = itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=itemsize)
    return tuple(steps)[::-1] if shape else ()


class Array:
    """An array of nobody's: it has the interface and nothing else."""

    def __init__(self, shape, dtype="f4", device=0, stream=None, strides=None, address=None):
        dtype = np.dtype(dtype)
        if address is None:
            size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
            address = fake().fake_memory(device, size) if size else 0
            assert address or not size
        self.__cuda_array_interface__ = {
            "shape": tuple(shape),
            "strides": strides,
            "typestr": dtype.str,
            "data": (address, False),
            "stream": stream,
            "version": 3,
        }

    @property
    def address(self):
        return self.__cuda_array_interface__["data"][0]


def interface(array):
    return types.SimpleNamespace(**array.__cuda_array_interface__)


def device_of(address):
    number = ctypes.c_int()
    attribute = 9  # device ordinal
    assert not fake().cuPointerGetAttribute(
        ctypes.byref(number), attribute, ctypes.c_uint64(address)
    )
    return number.value


class ForeignStream:
    def __init__(self, handle):
        self.handle_ = handle

    def __cuda_stream__(self):
        return 0, self.handle_


def stand_in(job, architecture, report=False):
    """Instead of a compiled kernel: a cubin with its name and the size of its parameters."""
    name = "_Z" + re.sub(r"\W", "_", job.name)
    count = sum(1 if n is None else n for n in job.integers)
    notes = struct.pack("<BBH", 3, 0x19, 8 * count)  # the size of all parameters
    names = f"\0.text.{name}\0.nv.info.{name}\0.names\0".encode()
    starts = [names.index(b"." + part) for part in (b"text", b"nv.info", b"names")]
    sizes = [0, len(notes), len(names)]
    offsets = [64, 64, 64 + len(notes)]
    kinds = [1, 0x70000000, 3]
    sections = [bytes(64)] + [
        struct.pack("<IIQQQQIIQQ", start, kind, 0, 0, offset, size, 0, 0, 1, 0)
        for start, kind, offset, size in zip(starts, kinds, offsets, sizes, strict=True)
    ]
    major, minor = architecture
    after = 64 + len(notes) + len(names)
    header = b"\x7fELF\2\1\1\x33\7" + bytes(7)
    header += struct.pack(
        *("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, after, 10 * major + minor, 64, 0, 0, 64, 4, 3)
    )
    return header + notes + names + b"".join(sections), ""


def stand_in_for_the_compiler():
    from nbsoftmax.cuda import _compile

    _compile.compile_ = stand_in


def variety():
    """Calls that go different ways through the backend, with the number of results of each."""
    from nbsoftmax import log_softmax, logsumexp, softmax

    x, long = Array((30, 1000)), Array((2, 300_000))
    mask, weights = Array((30, 1000), "?"), Array((30, 1000))
    turned = Array((1000, 30), strides=(4, 4000))
    counts, swapped = Array((30, 1000), "i4"), Array((30, 1000), ">f4")
    out = Array((30, 1000), "f8")
    return {
        "rows": (lambda **k: softmax(x, axis=-1, **k), 1),
        "columns": (lambda **k: log_softmax(x, axis=0, **k), 1),
        "all axes": (lambda **k: logsumexp(x, **k), 1),
        "long lanes": (lambda **k: softmax(long, axis=-1, **k), 1),
        "long lanes reduced": (lambda **k: logsumexp(long, axis=-1, **k), 1),
        "turned": (lambda **k: softmax(turned, axis=0, **k), 1),
        "masked": (lambda **k: softmax(x, axis=-1, where=mask, **k), 1),
        "weighted": (lambda **k: logsumexp(x, axis=-1, b=weights, return_sign=True, **k), 2),
        "integers": (lambda **k: softmax(counts, axis=-1, **k), 1),
        "swapped": (lambda **k: softmax(swapped, axis=-1, **k), 1),
        "dtype": (lambda **k: softmax(x, axis=-1, dtype="float64", **k), 1),
        "out": (lambda **k: softmax(x, axis=-1, out=out, **k), 0),
        "in place": (lambda **k: softmax(x, axis=-1, out=x, **k), 0),
    }


@contextlib.contextmanager
def raises(kinds, *words):
    """An exception whose message has these words."""
    with pytest.raises(kinds) as caught:
        yield caught
    message = str(caught.value).lower()
    for word in words:
        assert word.lower() in message, f"no {word!r} in {caught.value!r}"


def at_once(functions):
    """Call functions in as many threads, which change often; the first error if there is one."""
    barrier, errors = threading.Barrier(len(functions)), []

    def work(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(function,)) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def run_body(name):
    """In the child process, in which the test's module is imported."""
    if name not in COMPILED:
        stand_in_for_the_compiler()
    gc.freeze()  # collections look at what is made from now on
    BODIES[name]()
