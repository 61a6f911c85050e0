"""Memory for large results, kept for the next one when its array is gone.

Fresh memory costs three times what softmax does: the system clears every page of it.  So what a
result leaves is kept, and marked as free to take (`MADV_FREE`): the system has it back as soon as
it is short of memory, and until then the next result of that size finds its pages still there.
"""

import contextlib
import math
import mmap
import threading
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

HUGE_PAGE_BYTES = 2 * 1024 * 1024  # sizes are whole ones
FREE = getattr(mmap, "MADV_FREE", None)
KEEPS = FREE is not None

_kept: list[mmap.mmap] = []
# Never waited for: a block may be dropped by the garbage collector while its own thread holds it.
_changing = threading.Lock()


class _Block:
    """The memory of one array; when the last view of it is gone, it may be kept."""

    def __init__(self, memory: mmap.mmap, most: int) -> None:
        self.memory, self.most = memory, most
        self.__array_interface__ = np.frombuffer(memory, np.uint8).__array_interface__

    def __del__(self, free: Any = FREE, kept: Any = _kept, changing: Any = _changing) -> None:
        # Of this module, the closing interpreter may have left nothing but these arguments.
        if len(self.memory) > self.most or not changing.acquire(blocking=False):
            return
        try:
            self.memory.madvise(free)
            kept.append(self.memory)
            while sum(len(memory) for memory in kept) > self.most:
                del kept[0]
        except OSError:  # a system that does not know how
            kept.clear()
        finally:
            changing.release()


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], align: int, kept: tuple[int, int]) -> Array:
    """A new array whose memory begins at a multiple of ``align`` bytes.

    What arrays of more bytes than the first of ``kept`` leave is kept, up to the second in all.
    """
    least, most = kept
    size = math.prod(shape) * dtype.itemsize
    whole = -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    if KEEPS and least < size and whole <= most:
        with contextlib.suppress(OSError):  # NumPy says better what is missing
            block = np.asarray(_Block(_found(whole) or _mapped(whole), most))
            return block[:size].view(dtype).reshape(shape)
    memory = np.empty(size + align, np.uint8)
    start = -memory.__array_interface__["data"][0] % align
    return memory[start : start + size].view(dtype).reshape(shape)


def _found(size: int) -> mmap.mmap | None:
    """Kept memory of this size."""
    if not _changing.acquire(blocking=False):
        return None
    try:
        for i, memory in enumerate(_kept):
            if len(memory) == size:
                return _kept.pop(i)
        return None
    finally:
        _changing.release()


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
