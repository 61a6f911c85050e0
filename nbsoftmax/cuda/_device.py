"""The device that runs a call: its stream, its scratch memory, its kernels."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ._arrays import LEGACY, PER_THREAD, View
from ._kernels import Elements, Job, kernel
from ._prims import SIMULATED, lent

INSTALL = "pip install 'nbsoftmax[cu13]' (or cu12, for drivers of CUDA 12)"
CLUSTERS = (9, 0)  # architectures that have thread-block clusters, and later ones


class Device:
    """One GPU and one stream of it."""

    def __init__(self, number: int, stream_number: int) -> None:
        self.number, self.stream_number = number, stream_number
        self._core = _core_device(number)
        self.stream = _stream(number, stream_number)
        self.architecture = tuple(self._core.compute_capability)

    @property
    def clusters(self) -> bool:
        return self.architecture >= CLUSTERS

    def memory(self, size: int) -> Any:
        """A buffer from the device's pool, made and freed in the order of the stream."""
        return self._core.memory_resource.allocate(size, stream=self.stream)

    def launch(
        self, job: Job | Elements, units: int, arguments: Sequence[int], extents: object = None
    ) -> None:
        """Queue a kernel with so many blocks, or clusters of them."""
        from cuda.core import launch

        launch(self.stream, _config(job, units), _loaded(job, self.number), *arguments)

    @contextlib.contextmanager
    def scratch(self, size: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """The address and extent of memory for the kernels of one call."""
        buffer = self.memory(size)
        try:
            yield int(buffer.handle), (0, 0)
        finally:
            buffer.close(self.stream)


class SimulatedDevice:
    """Numba's simulator, whose device memory is the host's."""

    clusters, number, stream_number = True, 0, 0

    def launch(
        self,
        job: Job | Elements,
        units: int,
        arguments: Sequence[int],
        extents: Sequence[tuple[int, int]],
    ) -> None:
        from numba import cuda

        with lent(extents):
            cuda.jit(kernel(job))[units, (job.block, job.group.blocks)](*_grouped(job, arguments))

    @contextlib.contextmanager
    def scratch(self, size: int) -> Iterator[tuple[int, tuple[int, int]]]:
        memory = np.full(size // 8 + 3, np.nan)
        address = -(-memory.ctypes.data // 16) * 16
        yield address, (address, address + size)


def _grouped(job: Job | Elements, arguments: Sequence[int]) -> Iterator[Any]:
    """A kernel's arguments, some of which are several integers."""
    left = iter(arguments)
    for count in job.integers:
        yield next(left) if count is None else tuple(itertools.islice(left, count))


def of(x: View, stream: Any) -> Any:
    """The device on which x lies, with the stream that was asked for or that x carries."""
    if SIMULATED:
        return SimulatedDevice()
    return _device(number(x), stream_number(stream) or x.stream or LEGACY)


def number(x: View) -> int:
    """The device on which an array lies."""
    return x.device if x.device is not None else _device_of_pointer(x.address)


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
    return Device(number, stream)


def _core_device(number: int) -> Any:
    try:
        from cuda.core import Device as CoreDevice
    except ImportError as error:
        raise ImportError(f"arrays on a CUDA device need cuda-core: {INSTALL}") from error
    device = CoreDevice(number)
    with _current(device):
        pass  # its context exists from now on
    return device


@contextlib.contextmanager
def _current(device: Any) -> Iterator[None]:
    """Make a device the current one for a while; the caller's is left as it was."""
    before = device.set_current()
    try:
        yield
    finally:
        if before is not None:
            device.set_current(before)


def _stream(number: int, stream: int) -> Any:
    from cuda.core import LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM, Stream

    if stream == LEGACY:
        return LEGACY_DEFAULT_STREAM
    return PER_THREAD_DEFAULT_STREAM if stream == PER_THREAD else Stream.from_handle(stream)


@functools.lru_cache(maxsize=1024)
def _config(job: Job | Elements, units: int) -> Any:
    from cuda.core import LaunchConfig

    blocks = job.group.blocks
    return LaunchConfig(grid=units, block=job.block, cluster=blocks if blocks > 1 else None)


@functools.lru_cache(maxsize=1024)
def _loaded(job: Job | Elements, number: int) -> Any:
    """A kernel on a device."""
    from cuda.core import ObjectCode

    from . import _compile

    device = _core_device(number)
    made = _compile.cubin(job, tuple(device.compute_capability))
    with _current(device):
        return ObjectCode.from_cubin(made.code).get_kernel(made.symbol)


def _device_of_pointer(address: int) -> int:
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, number = driver.cuPointerGetAttribute(attribute, address)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"{address:#x} is no address on a CUDA device: {status.name}")
    return int(number)
