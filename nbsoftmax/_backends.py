"""Which backend serves an array: asked of everything that is no NumPy array."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _cpu
from ._semantics import on_cuda

# Whom a backend serves, its module, and what it needs. First that holds wins; the CPU takes all
# else. Modules are imported when they are needed.
BACKENDS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        on_cuda,
        ".cuda._run",
        "arrays on a CUDA device need numba-cuda and cuda-core: "
        "pip install 'nbsoftmax[cu13]' (for drivers of CUDA 12: cu12)",
    ),
)


def serving(x: Any, stream: Any) -> Any:
    """The `run` of the backend that serves an array."""
    if type(x) is not np.ndarray:
        for serves, module, needs in BACKENDS:
            if serves(x):
                run = _loaded(module, needs)
                return run if stream is None else functools.partial(run, stream=stream)
    if stream is not None:
        raise TypeError("stream is for arrays on a CUDA device only")
    return _cpu.run


@functools.cache
def _loaded(module: str, needs: str) -> Any:
    """A backend's own `run`."""
    try:
        return importlib.import_module(module, __package__).run
    except ImportError as error:
        raise ImportError(f"{needs} ({error})") from error
