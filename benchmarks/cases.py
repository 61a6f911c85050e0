"""The arrays that are timed: shapes, axes and dtypes, and why each is there."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nbsoftmax import _check, _timing

Array = np.ndarray[Any, Any]

OPS = _check.FUNCTIONS
SMALL_ITEMS = 17  # along an axis where nothing is timed


@dataclass(frozen=True)
class Regime:
    """An array's shape, the axis to reduce, and what it asks of the code."""

    shape: tuple[int, ...]
    axis: int | tuple[int, ...]
    why: str
    pitch: int = 0  # elements between the end of a row and the start of the next
    dtypes: tuple[str, ...] = _timing.DTYPES

    def __str__(self) -> str:
        """Name it as people would: its shape and its axis."""
        pitch = f", row pitch {self.shape[-1] + self.pitch}" if self.pitch else ""
        return f"{self.shape}, axis {self.axis}{pitch}"

    @property
    def id(self) -> str:
        """The same without blanks and brackets, to choose it by with -k."""
        axis = "_".join(map(str, self.axis)) if isinstance(self.axis, tuple) else self.axis
        pitch = f"-pitch{self.pitch}" if self.pitch else ""
        return f"{'x'.join(map(str, self.shape))}-axis{axis}{pitch}"

    def small(self) -> Regime:
        """Return an array of the same kind that takes no time."""
        return replace(self, shape=tuple(min(size, SMALL_ITEMS) for size in self.shape))


# Why the main job's arrays are what they are. The table itself is the package's.
_WHY = {
    ((4096, 4096), -1): "rows of 16 or 32 KB, far more than the caches hold: bound by memory",
    ((4096, 4096), 0): "the same across the rows",
    ((1024, 64, 256), 1): "a middle axis: slabs that fit the cache",
    ((1, 2**24), -1): "one lane, longer than any cache, for all cores",
    ((2**20, 16), -1): "a million rows of one or two vectors",
    ((100_000, 10), -1): "the classes of a small classifier, in cache",
    ((128, 1000), -1): "ImageNet logits: one batch, in cache",
    ((1000, 1000), 0): "columns in cache",
    ((8, 8), -1): "nothing to compute: what a call costs",
}
SHARED = tuple(
    Regime(*case, _WHY.get((case.shape, case.axis), "the main job times it"))
    for case in _timing.CASES
)
_HALF = ("float16", "bfloat16")
MORE = (
    Regime((1000, 4099), -1, "an odd length: every row starts elsewhere in a vector"),
    Regime((1009, 4001), 0, "columns of an odd number, across rows that lie askew"),
    Regime((1000, 4000), -1, "a row pitch, as x[:, :4000] of a wider array has", pitch=96),
    Regime((32, 50_257), -1, "the vocabulary of a language model: long rows, and few"),
    Regime((4, 8, 256, 512), -1, "attention scores: four dimensions"),
    Regime((64, 32, 32, 64), (1, 2), "two neighbouring axes, walked as one"),
    Regime((64, 32, 64, 32), (0, 2), "axes that are not neighbours: in runs"),
    Regime((8, 16, 8, 64, 64), 2, "five dimensions; a short middle axis"),
    Regime((3, 1_000_000), 0, "three long rows, reduced across"),
    Regime((256, 4096), -1, "half precision: half the memory, the same arithmetic", dtypes=_HALF),
    Regime((4096, 256), 0, "half precision across the rows", dtypes=_HALF),
    Regime((1000, 1000), -1, "bytes, which are computed in float64", dtypes=("uint8",)),
)
REGIMES = SHARED + MORE

# Time against n at a constant number of elements; lanes longer than that are one row.
SWEEP_ITEMS = 2**22
_DECADES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 3000, 10_000, 30_000, 100_000, 300_000)
SWEEP_LENGTHS = (*_DECADES, 1_000_000, 3_000_000, 10_000_000)
SWEEP_OPS = ("softmax", "logsumexp")
SWEEP_PEERS = ("nbsoftmax out=", "torch out=", "SciPy")


def sweep(n: int, axis: int) -> Regime:
    """Lanes of `n` elements: the last axis, or the first of (n, inner)."""
    lanes = max(1, SWEEP_ITEMS // n)
    return Regime((n, lanes) if axis == 0 else (lanes, n), axis, "time against n")


# More threads help most where exp binds, and least where memory does.
THREAD_REGIMES = (
    Regime((4096, 4096), -1, "float32: memory binds; float64: exp"),
    Regime((512, 1000), -1, "in cache: exp binds"),
    Regime((4096, 1024), 0, "across"),
)

# Peak memory: temporary arrays must be so large that the system takes them back when freed.
MEMORY_OPS = ("softmax", "logsumexp")
MEMORY_REGIMES = (
    Regime((4096, 4096), -1, "along rows", dtypes=("float32",)),
    Regime((4096, 4096), 0, "across rows", dtypes=("float32",)),
    Regime((64, 512, 64, 8), (0, 2), "axes apart", dtypes=("float32",)),
)


def dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype, or ml_dtypes' for bfloat16."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def array(regime: Regime, dtype_name: str) -> Array:
    """Make the array: N(0, 10), so that results need a stable softmax."""
    *outer, n = regime.shape
    pitched = (*outer, n + regime.pitch)
    values = _values(math.prod(pitched)).reshape(pitched)[..., :n]
    made = np.empty(pitched, dtype(dtype_name))[..., :n]
    # Bytes hold no negative numbers: 100 is in the middle of what they hold.
    made[...] = values + 100 if made.dtype.kind == "u" else values
    return made


@functools.lru_cache(maxsize=1)
def _values(items: int) -> Array:
    return 10 * np.random.default_rng(7).standard_normal(items, np.float32)
