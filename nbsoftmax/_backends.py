"""Which backend serves an array: asked of everything that is no NumPy array."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _cpu

CUDA = (2, 13)  # DLPack's device types: CUDA, and its managed memory


def on_cuda(array: Any) -> bool:
    """Whether an array lies on a CUDA device, whatever library made it."""
    if hasattr(array, "__cuda_array_interface__") or hasattr(array, "__cuda_ndarray__"):
        return True
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and not isinstance(array, np.ndarray) and device()[0] in CUDA


# First that holds wins; the last takes all else. Modules are imported when they are needed.
BACKENDS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (on_cuda, "nbsoftmax.cuda._run", "numba-cuda and cuda-core"),
)
INSTALL = "pip install 'nbsoftmax[cu13]' (for drivers of CUDA 12: cu12)"


def run(op: str, x: Any, *arguments: Any, stream: Any = None, **keywords: Any) -> Any:
    """One of the three functions on any array."""
    if type(x) is not np.ndarray:
        for serves, module, needs in BACKENDS:
            if serves(x):
                try:
                    backend = importlib.import_module(module)
                except ImportError as error:
                    raise ImportError(
                        f"arrays on a CUDA device need {needs}: {INSTALL} ({error})"
                    ) from error
                return backend.run(op, x, *arguments, stream=stream, **keywords)
    if stream is not None:
        raise TypeError("stream is for arrays on a CUDA device only")
    return _cpu.run(op, x, *arguments, **keywords)
