"""Device arrays of every library: what they are, and new ones of the same kind.

An array that offers no more than ``__cuda_array_interface__`` or DLPack is served too; its results
are `DeviceArray`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._backends import on_cuda
from .._formats import FORMATS
from ._prims import SIMULATED

LEGACY, PER_THREAD = 1, 2  # streams that have a number instead of an address


@dataclass(frozen=True)
class View:
    """An array on a device. Strides are in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    format: str
    device: int | None  # None: where its memory lies is for the driver to say
    stream: int | None  # on which its contents are made; None: it does not say
    writable: bool
    native: bool = True  # byte order

    @property
    def itemsize(self) -> int:
        return FORMATS[self.format].itemsize

    @property
    def size(self) -> int:
        return size_of(self.shape)

    @property
    def extent(self) -> tuple[int, int]:
        """First byte, and byte after the last."""
        if not self.size:
            return self.address, self.address
        ends = [(n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(end for end in ends if end < 0)
        return low, self.address + sum(end for end in ends if end > 0) + self.itemsize


def size_of(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def contiguous(shape: tuple[int, ...], order: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides of memory without gaps, its axes in ``order``, slowest first."""
    strides, step = [0] * len(shape), itemsize
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


@dataclass(frozen=True)
class Kind:
    """How one library's arrays are looked at and made."""

    view: Callable[[Any, str], View]
    # (like, shape, format, order of its axes from the slowest on, stream)
    new: Callable[[Any, tuple[int, ...], str, tuple[int, ...], int | None], Any]


def kind_of(array: Any) -> Kind:
    """The library of an array."""
    return _kind_of_module(type(array).__module__.partition(".")[0])


@functools.cache
def _kind_of_module(module: str) -> Kind:
    return {
        "numba": Kind(_numba_view, _numba_new),
        "torch": Kind(_torch_view, _torch_new),
        "cupy": Kind(_interface_view, _cupy_new),
        "jax": Kind(_dlpack_view, _jax_new),
        "jaxlib": Kind(_dlpack_view, _jax_new),
    }.get(module, Kind(_interface_view, _other_new))


def view(array: Any, name: str) -> View:
    """An argument as an array on a device."""
    try:
        return kind_of(array).view(array, name)
    except (AttributeError, BufferError, NotImplementedError) as error:
        raise TypeError(
            f"{name} must be an array on a CUDA device, as the others are, not "
            f"{type(array).__name__}: {error}"
        ) from None


# -- __cuda_array_interface__ ---------------------------------------------------------------------


def _interface_view(array: Any, name: str) -> View:
    if not hasattr(array, "__cuda_array_interface__"):
        return _dlpack_view(array, name)
    interface = array.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError(f"{name} is masked, and its mask would be lost: pass where=")
    dtype = np.dtype(interface["typestr"])
    if len(interface.get("descr") or ()) > 1:
        dtype = np.dtype(interface["descr"])
    shape = tuple(interface["shape"])
    address, readonly = interface["data"]
    strides = interface.get("strides")
    return View(
        address or 0,
        shape,
        contiguous(shape, tuple(range(len(shape))), dtype.itemsize)
        if strides is None
        else tuple(strides),
        _format(dtype, name),
        None,
        interface.get("stream"),
        not readonly,
        dtype.isnative,
    )


def _format(dtype: np.dtype[Any], name: str) -> str:
    """The name of the format in which an argument lies in memory."""
    known = dtype.newbyteorder("=").name
    if known in FORMATS:
        return known
    if dtype.kind in "fc":
        raise TypeError(f"{name} of dtype {dtype} is not supported on a CUDA device")
    raise TypeError(f"{name} must hold numbers, not dtype {dtype}")


# -- DLPack ---------------------------------------------------------------------------------------


def _dlpack_view(array: Any, name: str) -> View:
    from cuda.core.utils import StridedMemoryView

    if not on_cuda(array):
        raise AttributeError("no device memory")
    try:
        seen = StridedMemoryView.from_dlpack(array, stream_ptr=-1)
    except NotImplementedError as error:
        raise TypeError(f"{name} has a dtype that is not supported: {error}") from None
    itemsize = seen.dtype.itemsize
    shape = tuple(seen.shape)
    steps = seen.strides
    return View(
        seen.ptr,
        shape,
        contiguous(shape, tuple(range(len(shape))), itemsize)
        if steps is None
        else tuple(step * itemsize for step in steps),
        _format(np.dtype(seen.dtype), name),
        seen.device_id,
        None,
        not seen.readonly,
    )


# -- PyTorch --------------------------------------------------------------------------------------


def _torch_view(tensor: Any, name: str) -> View:
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
    stream = torch.cuda.current_stream(device).cuda_stream
    strides = tuple(step * itemsize for step in tensor.stride())
    shape = tuple(tensor.shape)
    return View(tensor.data_ptr(), shape, strides, format_, device, stream or LEGACY, True)


def _torch_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], stream: int | None
) -> Any:
    import torch

    dtype = getattr(torch, format_)
    base = torch.empty([shape[i] for i in order], dtype=dtype, device=like.device)
    return base.permute([order.index(i) for i in range(len(shape))])


# -- CuPy, JAX and what is left -------------------------------------------------------------------


def _cupy_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], stream: int | None
) -> Any:
    import cupy

    with cupy.cuda.Device(like.device.id):
        base = cupy.empty([shape[i] for i in order], _dtype(format_))
    return base.transpose([order.index(i) for i in range(len(shape))])


def _jax_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], stream: int | None
) -> Any:
    made = _other_new(like, shape, format_, tuple(range(len(shape))), stream)
    made.library = "jax"
    return made


def delivered(array: Any) -> Any:
    """A finished result as its caller wants it."""
    if getattr(array, "library", None) != "jax":
        return array
    import jax

    return jax.dlpack.from_dlpack(array)


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
        stream: int,
    ) -> None:
        self.buffer, self.shape, self.strides, self.stream = buffer, shape, strides, stream
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
            "data": (int(self.buffer.handle), False),
            "stream": self.stream,
            "version": 3,
        }

    def _view(self) -> Any:
        from cuda.core.utils import StridedMemoryView

        steps = tuple(step // self.dtype.itemsize for step in self.strides)
        return StridedMemoryView.from_buffer(self.buffer, self.shape, steps, dtype=self.dtype)

    def __dlpack__(self, **options: Any) -> Any:
        return self._view().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.buffer.device_id  # DLPack's number for CUDA


def _other_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], stream: int | None
) -> Any:
    from . import _device

    itemsize = FORMATS[format_].itemsize
    at = _device.of(view(like, "x"), stream)
    buffer = at.memory(size_of(shape) * itemsize)
    return DeviceArray(buffer, shape, contiguous(shape, order, itemsize), format_, at.stream_number)


# -- Numba's arrays, the simulator's among them ---------------------------------------------------


def _numba_view(array: Any, name: str) -> View:
    if not getattr(array, "__cuda_ndarray__", False):
        raise AttributeError("it lies on no device")
    if not SIMULATED:
        return _interface_view(array, name)
    held = array._ary
    place = held.__array_interface__["data"][0]
    format_, writable = _format(held.dtype, name), held.flags.writeable
    native = held.dtype.isnative
    return View(place, held.shape, held.strides, format_, 0, None, writable, native)


def _numba_new(
    like: Any, shape: tuple[int, ...], format_: str, order: tuple[int, ...], stream: int | None
) -> Any:
    from numba import cuda

    dtype = _dtype(format_)
    if SIMULATED:
        base = np.empty([shape[i] for i in order], dtype)
        return type(like)(base.transpose([order.index(i) for i in range(len(shape))]))
    strides = contiguous(shape, order, dtype.itemsize)
    on = cuda.external_stream(stream) if stream and stream > PER_THREAD else 0
    return cuda.device_array(shape, dtype, strides=strides, stream=on)
