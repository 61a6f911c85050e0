"""Device arrays of every library: what they are, and new ones of the same kind.

An array that offers no more than ``__cuda_array_interface__`` or DLPack is served too; its results
are `DeviceArray`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .._formats import FORMATS
from .._semantics import on_cuda
from ._jobs import SIMULATED

LEGACY, PER_THREAD = 1, 2  # streams that have a number instead of an address


class View(NamedTuple):
    """An array on a device. Strides are in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    format: str
    itemsize: int
    device: int | None  # None: where its memory lies is for the driver to say
    stream: int | None  # on which its contents are made; None: it does not say
    writable: bool = True
    native: bool = True  # byte order

    @property
    def size(self) -> int:
        return size_of(self.shape)

    @property
    def extent(self) -> tuple[int, int]:
        """First byte, and byte after the last."""
        low, high = _span(self.shape, self.strides, self.itemsize)
        return self.address + low, self.address + high


@functools.lru_cache(maxsize=1024)
def _span(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """`View.extent` of an array at 0."""
    if 0 in shape:
        return 0, 0
    ends = [(n - 1) * step for n, step in zip(shape, strides, strict=True)]
    low = sum(end for end in ends if end < 0)
    return low, sum(end for end in ends if end > 0) + itemsize


def size_of(shape: tuple[int, ...]) -> int:
    """How many elements an array has."""
    size = 1
    for n in shape:
        size *= n
    return size


@functools.lru_cache(maxsize=1024)
def contiguous(
    shape: tuple[int, ...], order: tuple[int, ...] | None, itemsize: int
) -> tuple[int, ...]:
    """Strides of memory without gaps, its axes in ``order``, slowest first."""
    strides, step = [0] * len(shape), itemsize
    for axis in reversed(range(len(shape)) if order is None else order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


@dataclass(frozen=True)
class Kind:
    """How one library's arrays are looked at and made."""

    # (array, name of the argument, stream that is going to read it)
    view: Callable[[Any, str, int], View]
    # (like, shape, format, order of its axes from the slowest on, `_device.Device`)
    new: Callable[[Any, tuple[int, ...], str, tuple[int, ...], Any], Any]
    # of what `new` made
    address: Callable[[Any], int]


def kind_of(array: Any) -> Kind:
    """The library of an array."""
    return _kind_of_module(type(array).__module__.partition(".")[0])


@functools.cache
def _kind_of_module(module: str) -> Kind:
    return {
        "numba": Kind(_numba_view, _numba_new, _interface_address),
        "torch": Kind(_torch_view, _torch_new, lambda tensor: int(tensor.data_ptr())),
        "cupy": Kind(_interface_view, _cupy_new, _interface_address),
        "jax": Kind(_dlpack_view, _jax_new, _own_address),
        "jaxlib": Kind(_dlpack_view, _jax_new, _own_address),
    }.get(module, Kind(_interface_view, _other_new, _own_address))


def view(array: Any, name: str, stream: int = LEGACY) -> View:
    """An argument as an array on a device, ready for a stream to use it."""
    try:
        seen = kind_of(array).view(array, name, stream)
    except (AttributeError, BufferError, NotImplementedError) as error:
        raise TypeError(
            f"{name} must be an array on a CUDA device, as the others are, not "
            f"{type(array).__name__}: {error}"
        ) from None
    if _off_its_multiples(seen.address % 16, seen.strides, seen.itemsize):
        raise ValueError(
            f"{name} must lie on multiples of its {seen.itemsize} bytes, not at "
            f"{seen.address:#x} with the strides {seen.strides}"
        )
    return seen


@functools.lru_cache(maxsize=1024)
def _off_its_multiples(at: int, strides: tuple[int, ...], itemsize: int) -> bool:
    return any(count % itemsize for count in (at, *strides))


# -- __cuda_array_interface__ ---------------------------------------------------------------------


def _interface_view(array: Any, name: str, stream: int) -> View:
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        return _dlpack_view(array, name, stream)
    if interface.get("mask") is not None:
        raise TypeError(f"{name} is masked, and its mask would be lost: pass where=")
    format_, itemsize, native = _typestr(interface["typestr"], name)
    shape = tuple(interface["shape"])
    address, readonly = interface["data"]
    strides = interface.get("strides")
    strides = contiguous(shape, None, itemsize) if strides is None else tuple(strides)
    carried = interface.get("stream")
    return View(
        address or 0, shape, strides, format_, itemsize, None, carried, not readonly, native
    )


@functools.lru_cache(maxsize=64)
def _typestr(typestr: str, name: str) -> tuple[str, int, bool]:
    """The format in which an argument lies in memory, its itemsize, whether in native order."""
    dtype = np.dtype(typestr)
    return _format(dtype, name), dtype.itemsize, dtype.isnative


def _format(dtype: np.dtype[Any], name: str) -> str:
    """The name of the format in which an argument lies in memory."""
    known = dtype.newbyteorder("=").name
    if known in FORMATS:
        return known
    if dtype.kind in "fc":
        raise TypeError(f"{name} of dtype {dtype} is not supported on a CUDA device")
    raise TypeError(f"{name} must hold numbers, not dtype {dtype}")


def _interface_address(array: Any) -> int:
    if SIMULATED:
        return int(array._ary.__array_interface__["data"][0])
    return int(array.__cuda_array_interface__["data"][0] or 0)


# -- DLPack ---------------------------------------------------------------------------------------


def _dlpack_view(array: Any, name: str, stream: int) -> View:
    from cuda.core.utils import StridedMemoryView

    if not on_cuda(array):
        raise AttributeError("no device memory")
    try:
        seen = StridedMemoryView.from_dlpack(array, stream_ptr=stream)
    except NotImplementedError as error:
        raise TypeError(f"{name} has a dtype that is not supported: {error}") from None
    itemsize = seen.dtype.itemsize
    shape = tuple(seen.shape)
    steps = seen.strides
    strides = (
        contiguous(shape, None, itemsize)
        if steps is None
        else tuple(step * itemsize for step in steps)
    )
    format_ = _format(np.dtype(seen.dtype), name)
    writable = not seen.readonly
    return View(seen.ptr, shape, strides, format_, itemsize, seen.device_id, None, writable)


# -- PyTorch --------------------------------------------------------------------------------------


def _torch_view(tensor: Any, name: str, reader: int) -> View:
    import torch

    if not tensor.is_cuda:
        raise AttributeError(f"its device is {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{name} requires a gradient, which would be lost: pass {name}.detach()")
    format_ = str(tensor.dtype).rpartition(".")[2]
    if format_ not in FORMATS:
        raise TypeError(f"{name} of dtype {tensor.dtype} is not supported")
    itemsize = FORMATS[format_].itemsize
    device = tensor.device.index
    stream = _torch_stream(device)
    strides = tuple(step * itemsize for step in tensor.stride())
    shape = tuple(tensor.shape)
    return View(tensor.data_ptr(), shape, strides, format_, itemsize, device, stream)


def _torch_stream(device: int) -> int:
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream) or LEGACY


def _torch_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], device: Any
) -> Any:
    import torch

    dtype, sizes = getattr(torch, format_), [shape[i] for i in order]
    if device.stream_number == _torch_stream(like.device.index):
        base = torch.empty(sizes, dtype=dtype, device=like.device)
    else:  # its memory must not be used again before that stream is done with it
        other = torch.cuda.ExternalStream(device.stream_number, like.device)
        with torch.cuda.stream(other):
            base = torch.empty(sizes, dtype=dtype, device=like.device)
    return base.permute([order.index(i) for i in range(len(shape))])


# -- CuPy, JAX and what is left -------------------------------------------------------------------


def _cupy_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], device: Any
) -> Any:
    import cupy

    with cupy.cuda.Device(like.device.id):
        if device.stream_number == (cupy.cuda.get_current_stream().ptr or LEGACY):
            base = cupy.empty([shape[i] for i in order], _dtype(format_))
        else:  # its memory must not be used again before that stream is done with it
            with cupy.cuda.ExternalStream(device.stream_number):
                base = cupy.empty([shape[i] for i in order], _dtype(format_))
    return base.transpose([order.index(i) for i in range(len(shape))])


def _jax_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], device: Any
) -> Any:
    made = _other_new(like, shape, format_, tuple(range(len(shape))), device)
    made.library = "jax"
    return made


def delivered(array: Any) -> Any:
    """A finished result as its caller wants it."""
    if getattr(array, "library", None) != "jax":
        return array
    import jax

    return jax.dlpack.from_dlpack(array)


@functools.cache
def _dtype(format_: str) -> np.dtype[Any]:
    if format_ == "bfloat16":
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return found
    return np.dtype(format_)


class DeviceArray:
    """Memory on a CUDA device, for any library to take over.

    Attributes
    ----------
    shape : tuple of ints
    dtype : dtype
    """

    def __init__(
        self,
        buffer: Any,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        format_: str,
        device: Any,
    ) -> None:
        self.buffer, self.shape, self.strides, self.device = buffer, shape, strides, device
        self.dtype = _dtype(format_)
        self.library: str | None = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.kind == "V":
            raise AttributeError("bfloat16 has no name in this interface: use DLPack")
        return {
            "shape": self.shape,
            "strides": self.strides,
            "typestr": self.dtype.str,
            "data": (_own_address(self), False),
            "stream": self.device.stream_number,
            "version": 3,
        }

    def _view(self) -> Any:
        from cuda.core.utils import StridedMemoryView

        steps = tuple(step // self.dtype.itemsize for step in self.strides)
        return StridedMemoryView.from_buffer(self.buffer, self.shape, steps, dtype=self.dtype)

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        taker = LEGACY if stream is None else stream
        if taker not in (-1, self.device.stream_number):
            self.device.order(taker)
        return self._view().__dlpack__(stream=-1, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.buffer.device_id  # DLPack's number for CUDA


def _other_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], device: Any
) -> Any:
    itemsize = FORMATS[format_].itemsize
    buffer = device.memory(max(1, size_of(shape) * itemsize))
    return DeviceArray(buffer, shape, contiguous(shape, order, itemsize), format_, device)


def _own_address(array: DeviceArray) -> int:
    return int(array.buffer.handle) if size_of(array.shape) else 0


# -- Numba's arrays, the simulator's among them ---------------------------------------------------


def _numba_view(array: Any, name: str, stream: int) -> View:
    if not getattr(array, "__cuda_ndarray__", False):
        raise AttributeError("it lies on no device")
    if not SIMULATED:
        return _interface_view(array, name, stream)
    held = array._ary
    place = held.__array_interface__["data"][0]
    format_, writable = _format(held.dtype, name), held.flags.writeable
    native = held.dtype.isnative
    return View(place, held.shape, held.strides, format_, held.itemsize, 0, None, writable, native)


def _numba_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], device: Any
) -> Any:
    from numba import cuda

    dtype = _dtype(format_)
    if SIMULATED:
        base = np.empty([shape[i] for i in order], dtype)
        return type(like)(base.transpose([order.index(i) for i in range(len(shape))]))
    strides = contiguous(shape, order, dtype.itemsize)
    stream = device.stream_number
    on = cuda.external_stream(stream) if stream > PER_THREAD else 0
    return cuda.device_array(shape, dtype, strides=strides, stream=on)
