"""The contract as code: axes, dtypes, shapes and what an argument must be. Knows no compiler."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

SOFTMAX, LOG_SOFTMAX, LOGSUMEXP = "softmax", "log_softmax", "logsumexp"

Array = np.ndarray[Any, Any]
FLOATS = ("float16", "float32", "float64")
DLPACK_CUDA = (2, 13)  # its numbers for CUDA's memory, and what CUDA manages


def normalize_axis(axis: Any, ndim: int) -> tuple[int, ...]:
    """The reduced axes in increasing order."""
    if axis is None:
        return tuple(range(ndim))
    single = not isinstance(axis, tuple)
    try:
        axes = [operator.index(a) for a in ((axis,) if single else axis)]
    except TypeError:
        raise TypeError(f"axis must be None, an int or a tuple of ints, not {axis!r}") from None
    if ndim == 0 and single and axes[0] in (0, -1):  # as NumPy's own reductions of a scalar
        return ()
    for a in axes:
        if not -ndim <= a < ndim:
            raise np.exceptions.AxisError(a, ndim, "axis")
    axes = sorted(a % ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis names an axis twice: {axis!r}")
    return tuple(axes)


def real_dtype(dtype: np.dtype[Any], name: str) -> np.dtype[Any] | None:
    """The dtype that an argument of this dtype is computed as; None if only SciPy can."""
    if dtype.kind == "f" and dtype.itemsize <= 8:
        return np.dtype(dtype.name)
    if dtype.kind in "biu":
        return np.dtype(np.float64)
    if dtype.name == "bfloat16":
        return dtype
    if dtype.kind in "fc":
        return None
    raise TypeError(f"{name} must hold numbers, not dtype {dtype}")


def chosen_dtype(dtype: Any) -> np.dtype[Any]:
    """The argument ``dtype``, checked."""
    try:
        chosen: np.dtype[Any] = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype is not a dtype: {error}") from None
    if chosen.name not in FLOATS or not chosen.isnative:
        raise TypeError(f"dtype must be float16, float32 or float64, not {chosen}")
    return chosen


def on_cuda(array: Any) -> bool:
    """Whether an array lies on a CUDA device, whatever library made it."""
    if type(array).__module__.partition(".")[0] == "torch":
        return bool(array.is_cuda)  # whose interface raises where a gradient is required
    if hasattr(array, "__cuda_array_interface__") or hasattr(array, "__cuda_ndarray__"):
        return True
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and device()[0] in DLPACK_CUDA


def as_array(value: Any, name: str) -> Array:
    """The argument as a plain array of the host."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost: pass {name}.data and where=~mask"
        )
    if not isinstance(value, np.ndarray) and on_cuda(value):
        raise TypeError(f"{name} lies on a CUDA device, but the input does not")
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not an array: {error}") from None


def result_shape(
    op: str, shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool
) -> tuple[int, ...]:
    if op != LOGSUMEXP:
        return shape
    if keepdims:
        return tuple(1 if i in axes else size for i, size in enumerate(shape))
    return tuple(size for i, size in enumerate(shape) if i not in axes)


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, not {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, but the result has shape {shape}")
    if not np.can_cast(dtype, out.dtype, "same_kind"):
        raise TypeError(f"out has dtype {out.dtype}, to which a result of {dtype} cannot be cast")
    if not out.flags.writeable:
        raise ValueError("out is read-only")


def check_where(where: Any, shape: tuple[int, ...]) -> Array:
    """The argument ``where``, broadcast to the input's shape."""
    mask = as_array(where, "where")
    if mask.dtype != np.bool_:
        raise TypeError(f"where must be boolean, not of dtype {mask.dtype}")
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"where of shape {mask.shape} cannot be broadcast to the input's shape {shape}"
        ) from None


@dataclass(frozen=True)
class Fold:
    """Any array and axes seen as ``(outer, n, inner)``; strides in bytes.

    ``order`` is the order of the axes in which x was folded; a new result is laid out in it.
    """

    order: tuple[int, ...]
    outer: int
    n: int
    inner: int
    x_outer: int
    x_n: int
    out_outer: int
    out_n: int


def fold(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...] | None,
    axes: tuple[int, ...],
    itemsize: int,
    out_itemsize: int,
) -> Fold | None:
    """The fold that needs no copy, or None. ``out_strides`` is None for a result yet to be made."""
    natural = tuple(range(len(shape)))
    by_stride = tuple(sorted(natural, key=lambda i: -abs(strides[i])))
    for order in dict.fromkeys((natural, by_stride)):
        steps = out_strides if out_strides is not None else _contiguous(shape, order, out_itemsize)
        groups = _groups(shape, strides, steps, order, axes)
        folded = _fold_groups(order, groups, itemsize, out_itemsize)
        if folded is not None:
            return folded
    return None


def _contiguous(shape: tuple[int, ...], order: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [0] * len(shape), itemsize
    for i in reversed(order):
        strides[i], step = step, step * shape[i]
    return tuple(strides)


def _groups(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    order: tuple[int, ...],
    axes: tuple[int, ...],
) -> list[tuple[bool, int, int, int]]:
    """Neighbouring axes that walk on as one: (reduced, size, stride, out stride)."""
    groups: list[tuple[bool, int, int, int]] = []
    for i in order:
        size, step, out_step, reduced = shape[i], strides[i], out_strides[i], i in axes
        if size == 1:
            continue
        if groups:
            before, count, outer_step, outer_out = groups[-1]
            if before == reduced and (outer_step, outer_out) == (size * step, size * out_step):
                groups[-1] = (reduced, count * size, step, out_step)
                continue
        groups.append((reduced, size, step, out_step))
    return groups


def _fold_groups(
    order: tuple[int, ...],
    groups: list[tuple[bool, int, int, int]],
    itemsize: int,
    out_itemsize: int,
) -> Fold | None:
    kinds = [reduced for reduced, *_ in groups]
    one = (False, 1, 0, 0)
    if kinds in ([], [False]):  # nothing is reduced: lanes of one element, side by side
        groups = [one, (True, 1, 0, 0), groups[0] if groups else (False, 1, itemsize, out_itemsize)]
    elif kinds in ([True], [True, False]):
        groups = [one, *groups]
    elif kinds not in ([False, True], [False, True, False]):
        return None
    (_, outer, x_outer, out_outer), (_, n, x_n, out_n) = groups[:2]
    inner, last, out_last = 1, x_n, out_n
    if len(groups) == 3:
        _, inner, last, out_last = groups[2]
    if (last, out_last) != (itemsize, out_itemsize):
        return None
    return Fold(order, outer, n, inner, x_outer, x_n, out_outer, out_n)
