"""The same functions on CUDA device arrays, and device functions for users' own kernels.

Loaded when first asked for: arrays need none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._in_kernels import (
        State,
        empty_state,
        finish_log_softmax,
        finish_logsumexp,
        finish_softmax,
        log_softmax,
        log_softmax_row,
        logsumexp,
        logsumexp_row,
        merge,
        push,
        reduce,
        softmax,
        softmax_row,
    )

__all__ = [
    "State",
    "empty_state",
    "finish_log_softmax",
    "finish_logsumexp",
    "finish_softmax",
    "log_softmax",
    "log_softmax_row",
    "logsumexp",
    "logsumexp_row",
    "merge",
    "push",
    "reduce",
    "softmax",
    "softmax_row",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import _in_kernels
    except ImportError as error:
        raise ImportError(
            f"nbsoftmax.cuda.{name} needs numba-cuda: pip install 'nbsoftmax[cu13]' "
            "(for drivers of CUDA 12: cu12)"
        ) from error
    return getattr(_in_kernels, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
