"""The three public functions: signatures, documentation, one line of body each."""

from typing import Any

from ._backends import serving
from ._semantics import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX


def softmax(
    x: Any,
    axis: Any = None,
    *,
    where: Any = None,
    out: Any = None,
    dtype: Any = None,
    stream: Any = None,
) -> Any:
    r"""Softmax along one axis, several axes or the whole array.

    .. math:: \mathrm{softmax}(x)_i = \frac{e^{x_i}}{\sum_j e^{x_j}}

    Parameters
    ----------
    x : array_like
        Numbers of any shape.  float32 and float64 give their own dtype; float16 and bfloat16 too,
        computed in float32; integers and booleans give float64; complex and longdouble go to SciPy.
        Any strides and any byte order.
    axis : None, int or tuple of ints, optional
        The axes along which the results sum to 1.  None, the default, means all of them.
    where : array_like of bool, optional
        Broadcastable to ``x``.  False hides an element: it is not looked at and its result is 0.
    out : ndarray, optional
        Receives the result and is returned.  It has the shape of ``x`` and a dtype to which the
        result can be cast (``same_kind``), and may be ``x`` itself or overlap it.
    dtype : dtype, optional
        float16, float32 or float64: convert ``x`` to it, compute and return in it.
    stream : int or object with ``__cuda_stream__``, optional
        For arrays on a CUDA device: where the work is queued, instead of on the array's own stream.

    Returns
    -------
    ndarray or NumPy scalar
        Same shape as ``x``; a scalar for a scalar.

    Raises
    ------
    numpy.exceptions.AxisError
        ``axis`` is out of range.
    ValueError
        ``axis`` names an axis twice, ``where`` does not broadcast, or ``out`` has another shape or
        is read-only.
    TypeError
        ``axis`` is no int, ``where`` not boolean, or a dtype not usable.

    Notes
    -----
    Error: at most 3 ulp of the result, for any finite input and any length up to 10**7; subnormal
    results included.  0.52 ulp for float16 and bfloat16.  A lane (one vector along ``axis``) that
    holds a NaN or +inf, or only -inf, is NaN throughout.

    Memory: ``x`` is read once (twice where a lane does not fit the cache) and the result written
    once; at most one lane or tile per thread besides.  Arrays that no kernel walks as they lie,
    such as strided lanes, byte-swapped data or ``where``, are copied a piece at a time.

    The same input gives the same bits for every number of threads (`numba.set_num_threads`).

    References
    ----------
    P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax
    functions", IMA Journal of Numerical Analysis 41 (2021) 2311-2330.

    Examples
    --------
    >>> import numpy as np
    >>> from nbsoftmax import softmax
    >>> softmax(np.array([[0.0, 0.0], [1000.0, 0.0]]), axis=1)
    array([[0.5, 0.5],
           [1. , 0. ]])
    >>> softmax(np.array([1, 1, 7]), where=[True, True, False])
    array([0.5, 0.5, 0. ])
    """
    return serving(x, stream)(SOFTMAX, x, axis, where, out, dtype)


def log_softmax(
    x: Any,
    axis: Any = None,
    *,
    where: Any = None,
    out: Any = None,
    dtype: Any = None,
    stream: Any = None,
) -> Any:
    r"""Logarithm of softmax, without the loss that taking it afterwards would have.

    .. math:: \mathrm{log\_softmax}(x)_i = x_i - \log \sum_j e^{x_j}

    Parameters
    ----------
    x : array_like
        Numbers of any shape; dtypes as in `softmax`.
    axis : None, int or tuple of ints, optional
        The axes that are summed over.  None, the default, means all of them.
    where : array_like of bool, optional
        Broadcastable to ``x``.  False hides an element: it is not looked at and its result is -inf.
    out : ndarray, optional
        As in `softmax`.
    dtype : dtype, optional
        As in `softmax`.
    stream : int or object with ``__cuda_stream__``, optional
        As in `softmax`.

    Returns
    -------
    ndarray or NumPy scalar
        Same shape as ``x``; a scalar for a scalar.

    Raises
    ------
    numpy.exceptions.AxisError, ValueError, TypeError
        As `softmax`.

    Notes
    -----
    Error: at most 3 ulp of the result; 0.52 ulp for float16 and bfloat16.  A lane dominated by one
    element keeps its small part, where SciPy returns 0.  A lane that holds a NaN or +inf, or only
    -inf, is NaN.

    Memory: as `softmax`.

    References
    ----------
    P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax
    functions", IMA Journal of Numerical Analysis 41 (2021) 2311-2330.

    Examples
    --------
    >>> import numpy as np
    >>> from nbsoftmax import log_softmax
    >>> log_softmax(np.array([40.0, 0.0]))
    array([-4.24835426e-18, -4.00000000e+01])
    """
    return serving(x, stream)(LOG_SOFTMAX, x, axis, where, out, dtype)


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
    stream: Any = None,
) -> Any:
    r"""Logarithm of the sum of exponentials, weighted if asked.

    .. math:: \mathrm{logsumexp}(a, b) = \log \sum_i b_i e^{a_i}

    Parameters
    ----------
    a : array_like
        Numbers of any shape; dtypes as in `softmax`.
    axis : None, int or tuple of ints, optional
        The axes that are summed over.  None, the default, means all of them.
    b : array_like, optional
        Real weights, broadcast together with ``a``; they may be negative.  A weight of 0 hides an
        element, even an infinite one or a NaN.
    keepdims : bool, optional
        Leave the summed axes in the result, with length 1.
    return_sign : bool, optional
        Return the logarithm of the magnitude of the sum, and its sign.  Without it a negative sum
        gives NaN.
    where : array_like of bool, optional
        Broadcastable to ``a`` (and ``b``).  False hides an element: it is not looked at.
    out : ndarray, optional
        Receives the result and is returned; shape of the result, dtype as in `softmax`.
    dtype : dtype, optional
        As in `softmax`.
    stream : int or object with ``__cuda_stream__``, optional
        As in `softmax`.

    Returns
    -------
    res : ndarray or NumPy scalar
        A scalar when all axes are summed.
    sign : ndarray or NumPy scalar
        Only with ``return_sign``: 1 or -1; 0 for a sum of zeros; NaN where ``res`` is NaN; for an
        axis of length 0 -1, as in SciPy.

    Raises
    ------
    numpy.exceptions.AxisError, ValueError, TypeError
        As `softmax`; also for a ``b`` that does not broadcast or holds no numbers.

    Notes
    -----
    Error: at most 1.5 ulp of ``max(|result|, max|a|)`` for positive weights; 0.52 ulp for float16
    and bfloat16.

    A lane with a NaN gives NaN, one with +inf gives +inf; an empty one, a fully hidden one and one
    of -inf give -inf, for any shape and axis.

    Memory: ``a`` is read once, and copied a piece at a time in the cases listed at `softmax` and
    with ``b``.

    References
    ----------
    P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax
    functions", IMA Journal of Numerical Analysis 41 (2021) 2311-2330.

    Examples
    --------
    >>> import numpy as np
    >>> from nbsoftmax import logsumexp
    >>> float(logsumexp([1000.0, 1000.0]))
    1000.6931471805599
    >>> float(logsumexp(np.array([0.0, -40.0])))
    4.248354255291589e-18
    >>> value, sign = logsumexp([1.0, 2.0], b=[1.0, -1.0], return_sign=True)
    >>> float(value), float(sign)
    (1.5413248546129181, -1.0)
    """
    return serving(a, stream)(
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
