"""The device that runs a call: its stream, its scratch memory, its kernels."""

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import (
    LEGACY_DEFAULT_STREAM,
    PER_THREAD_DEFAULT_STREAM,
    GraphMemoryResource,
    LaunchConfig,
    ObjectCode,
    Stream,
    launch,
)
from cuda.core import Device as CoreDevice

from ._arrays import LEGACY, PER_THREAD, View
from ._jobs import SIMULATED, Elements, Job

CLUSTERS = (9, 0)  # architectures that have thread-block clusters, and later ones
_loading = threading.RLock()


class Device:
    """One GPU and one stream of it."""

    def __init__(self, number: int, stream_number: int) -> None:
        self.number, self.stream_number = number, stream_number
        self._core = _core_device(number)
        self.stream = _stream(stream_number)
        self.architecture = tuple(self._core.compute_capability)
        self.clusters = self.architecture >= CLUSTERS
        self._context = int(_context(number))
        self._pool = self._core.memory_resource

    def enter(self) -> bool:
        """Make this device the thread's current one, if it is not; whether it was not.

        A stream that is a number is one of the current device.
        """
        if int(driver.cuCtxGetCurrent()[1]) == self._context:
            return False
        driver.cuCtxPushCurrent(_context(self.number))
        return True

    def leave(self) -> None:
        """Undo `enter`."""
        driver.cuCtxPopCurrent()

    def memory(self, size: int, scratch: bool = False) -> Any:
        """A buffer from the device's pool, made and freed in the order of the stream.

        While the stream is captured it is the graph's own, which comes and goes with every launch:
        good for scratch, and for no result.
        """
        try:
            return self._pool.allocate(size, stream=self.stream)
        except RuntimeError:  # cuda.core's for a stream that is captured, among others
            if not self._is_captured():
                raise
        if not scratch:
            raise RuntimeError("a CUDA graph has no memory for a new result: pass out=")
        return GraphMemoryResource(self.number).allocate(size, stream=self.stream)

    def _is_captured(self) -> bool:
        """Whether what is queued becomes a part of a graph."""
        _, status = driver.cuStreamIsCapturing(self.stream.handle)
        return bool(status == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE)

    def lend(self, *views: View) -> None:
        """Nothing to do: the driver knows what memory a kernel may touch."""

    def prepared(self, job: Job | Elements, units: int) -> tuple[Any, Any]:
        """A kernel on this device, to be launched with so many blocks, or clusters of them."""
        return _config(job, units), _loaded(job, self.number)

    def launch(self, prepared: tuple[Any, Any], arguments: Sequence[int]) -> None:
        """Queue a kernel."""
        launch(self.stream, *prepared, *arguments)

    def order(self, stream_number: int) -> None:
        """Have another stream wait for what is queued on this one."""
        entered = self.enter()
        try:
            _stream(stream_number).wait(self.stream)
        finally:
            if entered:
                self.leave()

    @contextlib.contextmanager
    def scratch(self, size: int) -> Iterator[int]:
        """The address of memory for the kernels of one call."""
        buffer = self.memory(size, scratch=True)
        try:
            yield int(buffer.handle)
        finally:
            buffer.close(self.stream)


class SimulatedDevice:
    """Numba's simulator, whose device memory is the host's."""

    clusters, number, stream_number = True, 0, 0

    def __init__(self) -> None:
        self._lent: list[tuple[int, int]] = []

    def enter(self) -> bool:
        """Nothing to do: there is no other device."""
        return False

    def lend(self, *views: View) -> None:
        """Let the kernels of this call touch arrays, and nothing else."""
        self._lent += [view.extent for view in views]

    def prepared(self, job: Job | Elements, units: int) -> tuple[Any, Any]:
        return job, units

    def launch(self, prepared: tuple[Any, Any], arguments: Sequence[int]) -> None:
        from numba import cuda

        from ._kernels import kernel
        from ._prims import lent

        job, units = prepared
        with lent(self._lent):
            run = cuda.jit(kernel(job))[units, (job.group.block, job.group.blocks)]
            run(*_grouped(job, arguments))

    @contextlib.contextmanager
    def scratch(self, size: int) -> Iterator[int]:
        memory = np.full(size // 8 + 3, np.nan)
        address = -(-memory.ctypes.data // 16) * 16
        self._lent.append((address, address + size))
        yield address


def _grouped(job: Job | Elements, arguments: Sequence[int]) -> Iterator[Any]:
    """A kernel's arguments, some of which are several integers."""
    left = iter(arguments)
    for count in job.integers:
        yield next(left) if count is None else tuple(itertools.islice(left, count))


def of(x: View, asked: int | None, name: str) -> Any:
    """The device on which x lies, with the stream that was asked for or that x carries."""
    if SIMULATED:
        return SimulatedDevice()
    return _device(number(x, name), asked or x.stream or LEGACY)


def number(x: View, name: str) -> int:
    """The device on which an array lies."""
    return x.device if x.device is not None else _device_of_pointer(x.address, name)


def stream_number(stream: Any) -> int | None:
    """The argument ``stream`` as a number or address; 0 is the default stream."""
    if stream is None:
        return None
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1]) or LEGACY
    for name in ("cuda_stream", "ptr", "handle"):  # PyTorch, CuPy, Numba
        held = getattr(stream, name, None)
        if held is not None:
            return int(getattr(held, "value", held) or 0) or LEGACY
    if isinstance(stream, (int, np.integer)) and not isinstance(stream, bool):
        return int(stream) or LEGACY
    raise TypeError(
        f"stream must be an int or an object with __cuda_stream__, not {type(stream).__name__}"
    )


@functools.lru_cache(maxsize=64)
def _device(number: int, stream: int) -> Device:
    with _beside_captures():
        return Device(number, stream)


@contextlib.contextmanager
def _beside_captures() -> Iterator[None]:
    """Have what is no part of a graph done at once, though this or another thread captures one.

    Else a capture refuses, and is ended by, what a first call does: loading a kernel, looking at
    the pool's settings.
    """
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    status, before = driver.cuThreadExchangeStreamCaptureMode(mode)
    try:
        yield
    finally:
        if status == driver.CUresult.CUDA_SUCCESS:
            driver.cuThreadExchangeStreamCaptureMode(before)


def _core_device(number: int) -> Any:
    device = CoreDevice(number)
    with _current(device):
        pass  # its context exists from now on
    return device


@contextlib.contextmanager
def _current(device: Any) -> Iterator[None]:
    """Make a device the current one for a while; the caller's is left as it was."""
    driver.cuCtxPushCurrent(_context(device.device_id))
    try:
        device.set_current()
        yield
    finally:
        driver.cuCtxPopCurrent()


@functools.cache
def _context(number: int) -> Any:
    """The context that all libraries share on a device."""
    status, context = driver.cuDevicePrimaryCtxRetain(number)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA device {number} cannot be used: {status.name}")
    return context


def _stream(number: int) -> Any:
    if number == LEGACY:
        return LEGACY_DEFAULT_STREAM
    return PER_THREAD_DEFAULT_STREAM if number == PER_THREAD else Stream.from_handle(number)


def _config(job: Job | Elements, units: int) -> Any:
    blocks = job.group.blocks
    return LaunchConfig(grid=units, block=job.group.block, cluster=blocks if blocks > 1 else None)


@functools.lru_cache(maxsize=1024)
def _loaded(job: Job | Elements, number: int) -> Any:
    """A kernel on a device: loaded once for all threads. None waits for what is there.

    cuda.core unloads none, though it be forgotten here: a graph may have it.
    """
    with _loading:
        return _load(job, number)


@functools.lru_cache(maxsize=1024)
def _load(job: Job | Elements, number: int) -> Any:
    from . import _compile

    with _beside_captures():
        device = _core_device(number)
        made = _compile.cubin(job, tuple(device.compute_capability))
        with _current(device):
            return ObjectCode.from_cubin(made.code).get_kernel(made.symbol)


def _device_of_pointer(address: int, name: str) -> int:
    success = driver.CUresult.CUDA_SUCCESS
    if not address:  # nothing lies there, on whatever device
        status, number = driver.cuCtxGetDevice()
        return int(number) if status == success else 0
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, number = driver.cuPointerGetAttribute(attribute, address)
    if status == driver.CUresult.CUDA_ERROR_NOT_INITIALIZED:
        raise RuntimeError(f"no CUDA device can be used: {status.name}")
    if status != success:
        raise ValueError(f"{name} lies at {address:#x}, no address on a CUDA device: {status.name}")
    return int(number)
