"""Device functions: softmax, log_softmax and logsumexp inside users' own ``@cuda.jit`` kernels.

Each is a signature with its documentation, and a *maker*: a function that makes what kernels run
for arguments of certain kinds, in the subset of Python that Numba compiles. In Numba's simulator
the same code runs on numbers.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .. import _scalars
from .._formats import FORMATS
from .._semantics import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from . import _lanes
from ._jobs import SIMULATED, Group, Job
from ._kernels import Functions, in_registers
from ._prims import device_function, lifted, thread_number

MOST_THREADS = 1024
AT_ONCE = 4  # numbers of a row in memory that a thread asks for before it uses the first

F = TypeVar("F", bound=Callable[..., Any])
Maker = Callable[..., Callable[..., Any]]


class State(NamedTuple):
    """What is known of the numbers seen so far: a running logsumexp.

    Its sum is that of :math:`e^{x_i}` over all numbers below the largest, in two parts, scaled by
    what the largest alone decides. To be made by `empty_state`, `push`, `merge` and `reduce` only,
    and read by the functions that begin with ``finish``.

    Attributes
    ----------
    m
        The largest number; -inf where there is none.
    count
        How many numbers equal it.
    s, c
        The sum of the others' terms, and what rounding took from it.
    """

    m: Any
    count: Any
    s: Any
    c: Any


# -- what the arguments are -----------------------------------------------------------------------


class _Kind(NamedTuple):
    """What of an argument decides which code a kernel runs."""

    real: Any = None  # what its numbers are computed in; None of a constant
    numbers: int = 0  # how many there are, in a tuple; 0: one, by itself
    value: Any = None  # of a constant


def _real(dtype: str, name: str) -> _scalars.Real:
    form = FORMATS.get(dtype)
    if form is None or form.kind == "V":
        raise TypeError(f"{name} must hold float16, float32, float64 or integers, not {dtype}")
    return FORMATS[form.real.name].real  # results are in registers: float32's, to the last bit


def _of_several(dtypes: list[str], name: str) -> _Kind:
    """Of a tuple: the widest decides."""
    if not dtypes:
        raise TypeError(f"{name} must hold at least one number")
    reals = [_real(dtype, name) for dtype in dtypes]
    return _Kind(max(reals, key=lambda real: real.itemsize), len(dtypes))


def _kind(name: str, value: Any) -> _Kind:
    """Of a Python value, in the simulator."""
    if name == "threads":
        return _Kind(value=value)
    if isinstance(value, tuple):
        return _of_several([np.asarray(v).dtype.name for v in value], name)
    if name == "dtype":
        return _Kind(_real(np.dtype(value).name, name))
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    return _Kind(_real(dtype.name, name))


def _kind_of_type(name: str, kind: Any) -> _Kind:
    """Of a Numba type, when a kernel is compiled."""
    from numba.cuda import types

    if name == "threads":
        return _Kind(value=kind.literal_value if isinstance(kind, types.Literal) else None)
    kind = types.unliteral(kind)
    if isinstance(kind, types.BaseTuple):
        return _of_several([str(types.unliteral(k)) for k in kind], name)
    if name == "dtype":
        return _Kind(_real(str(getattr(kind, "dtype", kind)), name))
    return _Kind(_real(str(kind.dtype if isinstance(kind, types.Array) else kind), name))


def _for_kernels(maker: Maker) -> Callable[[F], F]:
    """A public function whose calls run what ``maker`` makes for the kinds of their arguments."""
    made = functools.cache(maker)

    def decorate(public: F) -> F:
        signature = inspect.signature(public)

        def chosen(look: Callable[[str, Any], _Kind], args: Any, kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            run = made(**{name: look(name, value) for name, value in given.items()})
            run.__signature__ = signature
            return run

        @functools.wraps(public)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not hasattr(threading.current_thread(), "threadIdx"):
                raise RuntimeError(f"{public.__name__} is for kernels, of numba.cuda.jit, to call")
            return chosen(_kind, args, kwargs)(*args, **kwargs)

        def typed(*args: Any, **kwargs: Any) -> Any:
            try:
                return chosen(_kind_of_type, args, kwargs)
            except TypeError as error:
                raise TypingError(f"{public.__name__}: {error}") from None

        if not SIMULATED:
            from numba.cuda.core.errors import TypingError
            from numba.cuda.extending import overload

            typed.__signature__ = signature
            overload(call, prefer_literal=True)(typed)
        return call  # type: ignore[return-value]

    return decorate


# -- makers: what a kernel runs for arguments of certain kinds ------------------------------------

PARTS = len(State._fields)


def _group(threads: _Kind) -> Group:
    """Those that share a lane; a block may hold as many groups as it can have threads for."""
    deep = threads.value
    if type(deep) is not int or not 1 <= deep <= MOST_THREADS or deep & (deep - 1):
        said = "a variable" if deep is None else repr(deep)
        raise TypeError(
            f"threads must be a constant, a power of two of up to {MOST_THREADS}, not {said}"
        )
    return Group(1, deep, together=MOST_THREADS // deep, row_of_threads=False)


@functools.cache
def _functions(op: str, real: _scalars.Real, threads: _Kind, numbers: int) -> Functions:
    """Those of a lane held by so many threads, of each so many numbers."""
    group = _group(threads)
    return Functions(Job("whole", op, real.name, real.name, True, group, 1, numbers, 1, 1))


@functools.cache
def _numbers(real: _scalars.Real, count: int) -> Callable[..., Any]:
    """A tuple of any numbers as one of the real's."""

    def same(o: Any, values: Any) -> Any:
        return values

    return lifted(same, real, count, converts=True)


def _held(op: str) -> Maker:
    """One op on a lane in registers."""

    def maker(values: _Kind, threads: _Kind) -> Callable[..., Any]:
        count = max(values.numbers, 1)
        results = in_registers(_functions(op, values.real, threads, count))
        numbers = _numbers(values.real, count)

        def one(values: Any, threads: int) -> Any:
            return results(numbers((values,)), 0)[0]

        def one_of_many(values: Any, threads: int) -> Any:
            return results(numbers(values), 0)[0]

        def many(values: Any, threads: int) -> Any:
            return results(numbers(values), 0)

        if not values.numbers:
            return one
        return one_of_many if op == LOGSUMEXP else many

    return maker


def _walked(op: str, real: _scalars.Real, threads: _Kind) -> tuple[Any, Any]:
    """The two walks over a lane in memory: to its pair, and to its results."""
    f, step = _functions(op, real, threads, AT_ONCE), threads.value
    no_pairs, push_tile, share_pairs, apply = f.no_pairs, f.push_tile, f.share_pairs, f.apply
    number, tile = np.dtype(real.name).type, AT_ONCE * step
    least = number(-np.inf)

    @device_function
    def at(x: Any, i: int) -> Any:
        return number(x[i]) if i < len(x) else least

    @device_function
    def read(x: Any, i: int) -> Any:
        return at(x, i), at(x, i + step), at(x, i + 2 * step), at(x, i + 3 * step)

    @device_function
    def pair(x: Any) -> Any:
        pairs = no_pairs()
        i = thread_number() % step
        while i < len(x):
            pairs = push_tile(pairs, read(x, i))
            i += tile
        return share_pairs(pairs)

    @device_function
    def write(x: Any, needs: Any, out: Any) -> None:
        i = thread_number() % step
        while i < len(x):
            results = apply(read(x, i), needs)
            for k in range(AT_ONCE):
                if i + k * step < len(x):
                    out[i + k * step] = results[k]
            i += tile

    return pair, write


def _row(op: str) -> Maker:
    """One op on a lane in memory."""

    def maker(x: _Kind, out: _Kind, threads: _Kind) -> Callable[..., Any]:
        pair, write = _walked(op, x.real, threads)
        finish = _functions(op, x.real, threads, AT_ONCE).finish_lanes

        def run(x: Any, out: Any, threads: int) -> None:
            write(x, finish(pair(x)), out)

        return run

    return maker


def _logsumexp_row(x: _Kind, threads: _Kind) -> Callable[..., Any]:
    pair, _ = _walked(LOGSUMEXP, x.real, threads)
    finish = _functions(LOGSUMEXP, x.real, threads, AT_ONCE).finish_values

    def run(x: Any, threads: int) -> Any:
        return finish(pair(x))[0]

    return run


def _empty_state(dtype: _Kind) -> Callable[..., Any]:
    empty = lifted(lambda o: _lanes.empty(o, PARTS), dtype.real, PARTS, State)

    def run(dtype: Any) -> Any:
        return empty()

    return run


def _push(state: _Kind, x: _Kind) -> Callable[..., Any]:
    grown = lifted(lambda o, pair, x: _lanes.grown(o, pair, x), state.real, PARTS, State)
    numbers = _numbers(state.real, max(x.numbers, 1))

    def one(state: Any, x: Any) -> Any:
        return grown(state, numbers((x,)))

    def several(state: Any, x: Any) -> Any:
        return grown(state, numbers(x))

    return several if x.numbers else one


def _merge(state: _Kind, other: _Kind) -> Callable[..., Any]:
    if state.real != other.real:
        raise TypeError(f"other must be of {state.real.name}, as state is, not {other.real.name}")
    joined = lifted(lambda o, p, q: _lanes.join(o, PARTS, p, q), state.real, PARTS, State)

    def run(state: Any, other: Any) -> Any:
        return joined(state, other)

    return run


def _reduce(state: _Kind, threads: _Kind) -> Callable[..., Any]:
    group = _group(threads)
    shared = lifted(lambda o, p: _lanes.shared(o, group, PARTS, p), state.real, PARTS, State)

    def run(state: Any, threads: int) -> Any:
        return shared(state)

    return run


def _finish_logsumexp(state: _Kind) -> Callable[..., Any]:
    finish = lifted(lambda o, pair: _lanes.finish(o, LOGSUMEXP, pair), state.real, 1)

    def run(state: Any) -> Any:
        return finish(state)[0]

    return run


def _finish(op: str) -> Maker:
    def maker(state: _Kind, x: _Kind) -> Callable[..., Any]:
        def answer(o: Any, pair: Any, values: Any) -> Any:
            return _lanes.answers(o, op, values, _lanes.finish(o, op, pair))

        finish, numbers = lifted(answer, state.real, 1), _numbers(state.real, 1)

        def run(state: Any, x: Any) -> Any:
            return finish(state, numbers((x,)))[0]

        return run

    return maker


# -- the functions --------------------------------------------------------------------------------


@_for_kernels(_held(SOFTMAX))
def softmax(values: Any, threads: int) -> Any:
    r"""Softmax of a lane in registers.

    .. math:: p_i = e^{x_i} / \sum_j e^{x_j}

    Parameters
    ----------
    values : number or tuple of numbers
        Those of the lane that this thread holds. A thread of a short lane fills up with -inf.
    threads : int
        How many neighbouring threads hold the lane: a power of two up to 1024, and a constant.
        The size of a block must be a multiple of it. See Notes for who has to call.

    Returns
    -------
    number or tuple of numbers
        The results for ``values``: float64 of float64 and of integers, otherwise float32.

    Raises
    ------
    TypeError
        When the kernel is compiled: ``threads`` is no such constant, ``values`` are no numbers.
    RuntimeError
        Outside of a kernel.

    Notes
    -----
    Of 1 thread, any may call it; of up to 32, all of a warp that have not ended must call it
    together; of more, all of the block. Threads are numbered as CUDA numbers them, through all
    dimensions of the block. More than 32 threads meet in shared memory, 128 or 256 bytes for each
    number of what they exchange; it may be called again at once, in a loop too.

    At most 3 ulp from the exact result, offsets and spreads of any size included. A lane that holds
    a NaN or inf, or nothing but -inf, gives NaN. Global memory is neither read nor written.

    References
    ----------
    The pair of a maximum and a sum: M. Milakov, N. Gimelshein, *Online normalizer calculation for
    softmax*, arXiv:1805.02867.

    Examples
    --------
    A warp for each row of 64 numbers:

    >>> import numpy as np
    >>> from numba import cuda
    >>> from nbsoftmax.cuda import softmax
    >>> @cuda.jit
    ... def rows_of_64(x, out):
    ...     row, lane = cuda.blockIdx.x, cuda.threadIdx.x
    ...     p = softmax((x[row, lane], x[row, lane + 32]), 32)
    ...     out[row, lane], out[row, lane + 32] = p
    >>> x = cuda.to_device(np.full((2, 64), 1e6, np.float32))
    >>> out = cuda.device_array_like(x)
    >>> rows_of_64[2, 32](x, out)
    >>> float(out.copy_to_host().max())
    0.015625
    """
    raise NotImplementedError


@_for_kernels(_held(LOG_SOFTMAX))
def log_softmax(values: Any, threads: int) -> Any:
    r"""Log of the softmax of a lane in registers, without an intermediate that underflows.

    .. math:: y_i = x_i - \log \sum_j e^{x_j}

    Parameters, results, notes and errors are those of `softmax`; where that is 0, this is -inf or
    exact.

    Parameters
    ----------
    values : number or tuple of numbers
        Those of the lane that this thread holds.
    threads : int
        How many neighbouring threads hold the lane.

    Returns
    -------
    number or tuple of numbers
        The results for ``values``.

    Examples
    --------
    >>> import numpy as np
    >>> from numba import cuda
    >>> from nbsoftmax.cuda import log_softmax
    >>> @cuda.jit
    ... def pairs(x, out):
    ...     i = cuda.threadIdx.x
    ...     out[i] = log_softmax(x[i], 2)
    >>> out = cuda.device_array(2, np.float64)
    >>> pairs[1, 2](cuda.to_device(np.array([40.0, 0.0])), out)
    >>> out.copy_to_host()
    array([-4.24835426e-18, -4.00000000e+01])
    """
    raise NotImplementedError


@_for_kernels(_held(LOGSUMEXP))
def logsumexp(values: Any, threads: int) -> Any:
    r"""Log of the sum of exponentials of a lane in registers.

    .. math:: z = \log \sum_j e^{x_j}

    Parameters, notes and errors are those of `softmax`. At most 1.5 ulp of the larger of the result
    and the largest number.

    Parameters
    ----------
    values : number or tuple of numbers
        Those of the lane that this thread holds.
    threads : int
        How many neighbouring threads hold the lane.

    Returns
    -------
    number
        The same for all threads of the lane; -inf if it holds nothing but -inf.

    Examples
    --------
    Each thread a lane of its own, as in a hidden Markov model of two states:

    >>> import numpy as np
    >>> from numba import cuda
    >>> from nbsoftmax.cuda import logsumexp
    >>> @cuda.jit
    ... def join(x, out):
    ...     i = cuda.grid(1)
    ...     if i < x.shape[0]:
    ...         out[i] = logsumexp((x[i, 0], x[i, 1]), 1)
    >>> x = cuda.to_device(np.array([[0.0, 0.0], [-1e5, -np.inf], [0.0, -40.0]]))
    >>> out = cuda.device_array(3, np.float64)
    >>> join[1, 4](x, out)
    >>> out.copy_to_host()
    array([ 6.93147181e-01, -1.00000000e+05,  4.24835426e-18])
    """
    raise NotImplementedError


@_for_kernels(_row(SOFTMAX))
def softmax_row(x: Any, out: Any, threads: int) -> None:
    r"""Softmax of a lane in memory: local, shared or global.

    .. math:: out_i = e^{x_i} / \sum_j e^{x_j}

    Parameters
    ----------
    x : 1-D array
        The lane, of any length and stride: float16, float32, float64 or integers.
    out : 1-D array
        Of the same length; may be ``x``.
    threads : int
        How many neighbouring threads share the work, as in `softmax`. They take turns along x, so
        that neighbours read neighbouring numbers. All of them give the same ``x`` and ``out``.

    Raises
    ------
    TypeError
        When the kernel is compiled, as `softmax`.
    RuntimeError
        Outside of a kernel.

    Notes
    -----
    Reads x twice and writes out once. Where ``out`` lies in shared memory, other threads may read
    it after ``cuda.syncthreads()`` (of up to 32 threads: ``cuda.syncwarp()``), and x must have been
    written before such a barrier. Errors and special values are those of `softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from numba import cuda
    >>> from nbsoftmax.cuda import softmax_row
    >>> @cuda.jit
    ... def rows(x):
    ...     softmax_row(x[cuda.blockIdx.x], x[cuda.blockIdx.x], 64)
    >>> x = cuda.to_device(np.full((3, 100), 700.0))
    >>> rows[3, 64](x)
    >>> float(x.copy_to_host().max())
    0.01
    """
    raise NotImplementedError


@_for_kernels(_row(LOG_SOFTMAX))
def log_softmax_row(x: Any, out: Any, threads: int) -> None:
    r"""Log of the softmax of a lane in memory: `softmax_row` for `log_softmax`.

    .. math:: out_i = x_i - \log \sum_j e^{x_j}

    Parameters
    ----------
    x, out : 1-D array
        The lane, and its results.
    threads : int
        How many neighbouring threads share the work.

    Examples
    --------
    >>> import numpy as np
    >>> from numba import cuda
    >>> from nbsoftmax.cuda import log_softmax_row
    >>> @cuda.jit
    ... def row(x):
    ...     log_softmax_row(x, x, 1)
    >>> x = cuda.to_device(np.array([40.0, 0.0]))
    >>> row[1, 1](x)
    >>> x.copy_to_host()
    array([-4.24835426e-18, -4.00000000e+01])
    """
    raise NotImplementedError


@_for_kernels(_logsumexp_row)
def logsumexp_row(x: Any, threads: int) -> Any:
    r"""Logarithm of the sum of exponentials of a lane in memory. Reads x once.

    .. math:: z = \log \sum_j e^{x_j}

    Parameters
    ----------
    x : 1-D array
        The lane, as in `softmax_row`.
    threads : int
        How many neighbouring threads share the work.

    Returns
    -------
    number
        The same for all threads of the lane; -inf for a lane of no numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from numba import cuda
    >>> from nbsoftmax.cuda import logsumexp_row
    >>> @cuda.jit
    ... def rows(x, out):
    ...     out[cuda.blockIdx.x] = logsumexp_row(x[cuda.blockIdx.x], 32)
    >>> out = cuda.device_array(2, np.float64)
    >>> rows[2, 32](cuda.to_device(np.zeros((2, 1000))), out)
    >>> out.copy_to_host()
    array([6.90775528, 6.90775528])
    """
    raise NotImplementedError


@_for_kernels(_empty_state)
def empty_state(dtype: Any) -> State:
    """State of no numbers: the start of a running logsumexp.

    Parameters
    ----------
    dtype
        ``np.float32`` or ``np.float64``: what is computed in. float16 is taken as float32.

    Returns
    -------
    State
        Neutral in `merge`; its logsumexp is -inf.

    Examples
    --------
    Three numbers that arrive one after the other, and what each weighs in the end:

    >>> import numpy as np
    >>> from numba import cuda
    >>> from nbsoftmax.cuda import empty_state, finish_logsumexp, finish_softmax, push
    >>> @cuda.jit
    ... def run(x, out):
    ...     state = empty_state(np.float64)
    ...     for i in range(x.size):
    ...         state = push(state, x[i])
    ...     out[0] = finish_logsumexp(state)
    ...     for i in range(x.size):
    ...         out[1 + i] = finish_softmax(state, x[i])
    >>> out = cuda.device_array(4, np.float64)
    >>> run[1, 1](cuda.to_device(np.array([-1e6, 1000.0, 1000.0])), out)
    >>> out.copy_to_host()
    array([1.00069315e+03, 0.00000000e+00, 5.00000000e-01, 5.00000000e-01])
    """
    raise NotImplementedError


@_for_kernels(_push)
def push(state: State, x: Any) -> State:
    """State with one more number, or several. ``empty_state`` has an example.

    What a state costs to bring to a new maximum is spent once a call: four numbers pushed together
    take half of the instructions of four calls.

    Parameters
    ----------
    state : State
        Of the numbers so far.
    x : number or tuple of numbers
        Made numbers of the state's dtype. -inf changes nothing; NaN makes every result NaN.

    Returns
    -------
    State
        Of all of them.
    """
    raise NotImplementedError


@_for_kernels(_merge)
def merge(state: State, other: State) -> State:
    """State of the numbers of two states, in either order the same to the last bit.

    Parameters
    ----------
    state, other : State
        Of the same dtype; if not, compilation raises TypeError.

    Returns
    -------
    State
        Of all numbers.
    """
    raise NotImplementedError


@_for_kernels(_reduce)
def reduce(state: State, threads: int) -> State:
    """State of the numbers of several threads.

    Parameters
    ----------
    state : State
        Of this thread's numbers.
    threads : int
        How many neighbouring threads, and who must call, as in `softmax`.

    Returns
    -------
    State
        Of the numbers of them all, and the same for each.

    Examples
    --------
    A block for a row, whatever its length:

    >>> import numpy as np
    >>> from numba import cuda
    >>> from nbsoftmax.cuda import empty_state, finish_logsumexp, push, reduce
    >>> @cuda.jit
    ... def rows(x, out):
    ...     state = empty_state(np.float32)
    ...     for i in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
    ...         state = push(state, x[cuda.blockIdx.x, i])
    ...     state = reduce(state, 64)
    ...     if cuda.threadIdx.x == 0:
    ...         out[cuda.blockIdx.x] = finish_logsumexp(state)
    >>> out = cuda.device_array(2, np.float32)
    >>> rows[2, 64](cuda.to_device(np.zeros((2, 1000), np.float32)), out)
    >>> out.copy_to_host()
    array([6.9077554, 6.9077554], dtype=float32)
    """
    raise NotImplementedError


@_for_kernels(_finish_logsumexp)
def finish_logsumexp(state: State) -> Any:
    """Logarithm of the sum of exponentials of a state's numbers.

    Parameters
    ----------
    state : State
        Of any numbers; of none, the result is -inf.

    Returns
    -------
    number
        Within 1.5 ulp, as `logsumexp`.
    """
    raise NotImplementedError


@_for_kernels(_finish(SOFTMAX))
def finish_softmax(state: State, x: Any) -> Any:
    """Softmax of one of a state's numbers.

    What depends on the state alone is computed once if this stands in a loop.

    Parameters
    ----------
    state : State
        Of all numbers.
    x : number
        One of them; anything above the largest is undefined.

    Returns
    -------
    number
        Within 3 ulp, as `softmax`.
    """
    raise NotImplementedError


@_for_kernels(_finish(LOG_SOFTMAX))
def finish_log_softmax(state: State, x: Any) -> Any:
    """Log of the softmax of one of a state's numbers, as `finish_softmax`.

    Parameters
    ----------
    state : State
        Of all numbers.
    x : number
        One of them.

    Returns
    -------
    number
        Within 3 ulp, as `log_softmax`.
    """
    raise NotImplementedError
