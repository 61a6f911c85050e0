"""The three public functions: signatures, documentation, one line of body each."""

from typing import Any

from ._cpu import run
from ._semantics import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX


def softmax(x: Any, axis: Any = None, *, where: Any = None, out: Any = None, dtype: Any = None) -> Any:
    """Softmax."""
    return run(SOFTMAX, x, axis, where, out, dtype)


def log_softmax(
    x: Any, axis: Any = None, *, where: Any = None, out: Any = None, dtype: Any = None
) -> Any:
    """Log softmax."""
    return run(LOG_SOFTMAX, x, axis, where, out, dtype)


def logsumexp(
    a: Any,
    axis: Any = None,
    b: Any = None,
    keepdims: bool = False,
    return_sign: bool = False,
    *,
    where: Any = None,
    out: Any = None,
    dtype: Any = None,
) -> Any:
    """Log of the sum of exponentials."""
    return run(
        LOGSUMEXP,
        a,
        axis,
        where,
        out,
        dtype,
        b=b,
        keepdims=keepdims,
        return_sign=return_sign,
        name="a",
    )
