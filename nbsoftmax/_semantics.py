"""The contract as code: axes, dtypes, shapes and what an argument must be. Knows no compiler."""

import math
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
class Steps:
    """Where the elements of an index lie: so many bytes apart, and after each run a jump more."""

    run: int  # all of them, if the index is of one axis
    x: int
    out: int
    x_jump: int = 0
    out_jump: int = 0

    def in_vectors(self, width: int) -> "Steps":
        """The same for runs of whole vectors, whose last elements are not there."""
        gap = -self.run % width
        x_jump, out_jump = self.x_jump - gap * self.x, self.out_jump - gap * self.out
        return Steps(self.run + gap, self.x, self.out, x_jump, out_jump)


@dataclass(frozen=True)
class Fold:
    """Any array and axes seen as ``(outer, n, inner)``; inner lies side by side.

    ``order`` is the order of the axes in which x was folded; a new result is laid out in it.
    """

    order: tuple[int, ...]
    outer: int
    n: int
    inner: int
    by_outer: Steps
    by_n: Steps

    def dense(self, itemsize: int, out_itemsize: int | None) -> bool:
        """Whether rows of neighbouring lanes have no gaps between them, in x and in out if any."""
        steps = [(self.by_n.x, itemsize)]
        if out_itemsize is not None:
            steps.append((self.by_n.out, out_itemsize))
        return self.by_n.run == self.n and all(step == self.inner * size for step, size in steps)

    def whole(self, itemsize: int, out_itemsize: int | None) -> bool:
        """Whether there are no gaps at all."""
        steps = [(self.by_outer.x, itemsize)]
        if out_itemsize is not None:
            steps.append((self.by_outer.out, out_itemsize))
        plane = self.n * self.inner
        follow = self.by_outer.run == self.outer and all(
            step == plane * size for step, size in steps
        )
        return follow and self.dense(itemsize, out_itemsize)


def fold(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...] | None,
    axes: tuple[int, ...],
    itemsize: int,
    out_itemsize: int,
    runs: bool = False,
) -> Fold | None:
    """The fold that needs no copy, or None. ``out_strides`` is None for a result yet to be made.

    Without ``runs``, outer and n are of one axis each. With them, they may be of two where nothing
    else folds; a new result is then in C order, as where nothing folds at all.
    """
    natural = tuple(range(len(shape)))
    by_stride = tuple(sorted(natural, key=lambda i: -abs(strides[i])))
    ways = [(natural, False), (by_stride, False)]
    if runs:
        ways += [(natural, True)] if out_strides is None else [(natural, True), (by_stride, True)]
    for order, in_runs in dict.fromkeys(ways):
        steps = out_strides if out_strides is not None else _contiguous(shape, order, out_itemsize)
        groups = _groups(shape, strides, steps, order, axes)
        folded = _fold_groups(order, groups, itemsize, out_itemsize, in_runs)
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


# Whether each group of axes is reduced; all else needs runs.
_OF_ONE_AXIS_EACH: tuple[list[bool], ...] = (
    [],
    [False],
    [True],
    [True, False],
    [False, True],
    [False, True, False],
)


def _fold_groups(
    order: tuple[int, ...],
    groups: list[tuple[bool, int, int, int]],
    itemsize: int,
    out_itemsize: int,
    runs: bool,
) -> Fold | None:
    kinds = [reduced for reduced, *_ in groups]
    if not runs and kinds not in _OF_ONE_AXIS_EACH:
        return None
    kept, lane = (
        [(size, x, out) for reduced, size, x, out in groups if reduced == wanted]
        for wanted in (False, True)
    )
    # Side by side are the elements of a lane, or else neighbouring lanes; if nothing is reduced,
    # lanes of one element.
    if kinds and kinds[-1]:
        inner, *side_by_side = 1, *lane[-1][1:]
    else:
        inner, *side_by_side = kept.pop() if kept else (1, itemsize, out_itemsize)
    if side_by_side != [itemsize, out_itemsize]:
        return None
    by_outer, by_n = _steps(kept), _steps(lane)
    if by_outer is None or by_n is None:
        return None
    outer, n = (math.prod(size for size, *_ in axes) for axes in (kept, lane))
    return Fold(order, outer, n, inner, by_outer, by_n)


def _steps(axes: list[tuple[int, int, int]]) -> Steps | None:
    """The steps of an index that is of no more than two axes: (size, stride, out stride)."""
    if len(axes) > 2:
        return None
    run, x, out = axes[-1] if axes else (1, 0, 0)
    if len(axes) < 2:
        return Steps(run, x, out)
    count, x_outer, out_outer = axes[0]
    if count * run * run >= 1 << 62:
        return None  # a kernel's division by the run would not be exact
    return Steps(run, x, out, x_outer - run * x, out_outer - run * out)
