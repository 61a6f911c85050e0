"""The device functions, called in kernels as users write them."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest

from . import cases, cuda_arrays, oracle

pytestmark = pytest.mark.skipif(bool(cuda_arrays.MISSING), reason=cuda_arrays.MISSING)
if not cuda_arrays.MISSING:
    from numba import cuda

    import nbsoftmax.cuda as nb
    from nbsoftmax.cuda import empty_state, merge, push, reduce

LOGSUMEXP = "logsumexp"
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def rows_of(dtype, count, n):
    """Lanes that need stability: traps where they fit, the others drawn; -inf fills up."""
    lanes = [t.lane(dtype) for t in cases.VALUES.values()]
    lanes = [lane for lane in lanes if lane.size <= n]
    chosen = lanes[:: max(1, len(lanes) // count)][: count - 1]
    x = np.full((count, n), -np.inf, dtype)
    for row, lane in zip(x, chosen, strict=False):
        row[: lane.size] = lane
    x[len(chosen) :] = cases.draw((count - len(chosen), n), dtype, spread=30, offset=1e4)
    return x


def check(op, got, x):
    oracle.assert_right(op, got, x, 1)


def empty_like_result(op, x):
    return cuda.to_device(np.zeros(x.shape[: 1 if op == LOGSUMEXP else 2], x.dtype))


# One kernel for each op, as a call of a global is what Numba compiles.


def held_kernel(op, threads):
    function = getattr(nb, op)

    @cuda.jit
    def several(x, out):
        row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        i = cuda.threadIdx.x
        p = function((x[row, i], x[row, i + threads], x[row, i + 2 * threads]), threads)
        out[row, i], out[row, i + threads], out[row, i + 2 * threads] = p

    @cuda.jit
    def reduced(x, out):
        row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        i = cuda.threadIdx.x
        out[row] = function((x[row, i], x[row, i + threads], x[row, i + 2 * threads]), threads)

    return reduced if op == LOGSUMEXP else several


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("threads", "together"), [(1, 5), (4, 3), (32, 2), (64, 2)])
def test_a_lane_in_registers(threads, together, dtype, op):
    x = rows_of(dtype, 3 * together, 3 * threads)
    out = empty_like_result(op, x)
    held_kernel(op, threads)[3, (threads, together)](cuda.to_device(x), out)
    check(op, out.copy_to_host(), x)


@pytest.mark.parametrize("op", cases.OPS)
def test_a_number_of_each_thread(op):
    function = getattr(nb, op)
    reduces = op == LOGSUMEXP

    @cuda.jit
    def kernel(x, out):
        i = cuda.threadIdx.x
        result = function(x[i // 8, i % 8], 8)
        if reduces:
            out[i // 8, 0] = result
        else:
            out[i // 8, i % 8] = result

    x = rows_of("float32", 4, 8)
    out = cuda.to_device(np.zeros((4, 1 if reduces else 8), np.float32))
    kernel[1, 32](cuda.to_device(x), out)
    got = out.copy_to_host()
    check(op, got[:, 0] if reduces else got, x)


def row_kernel(op, threads, place):
    function = getattr(nb, f"{op}_row")
    longest = 128

    @cuda.jit
    def reduced(x, out):
        out[cuda.blockIdx.x] = function(x[cuda.blockIdx.x], threads)

    @cuda.jit
    def in_global(x, out):
        function(x[cuda.blockIdx.x], out[cuda.blockIdx.x], threads)

    @cuda.jit
    def in_shared(x, out):
        row, n = cuda.blockIdx.x, x.shape[1]
        held = cuda.shared.array(longest, np.float32)
        for i in range(cuda.threadIdx.x, n, threads):
            held[i] = x[row, i]
        cuda.syncthreads()
        function(held[:n], held[:n], threads)
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, n, threads):
            out[row, n - 1 - i] = held[n - 1 - i]

    @cuda.jit
    def in_local(x, out):
        row, n = cuda.blockIdx.x, x.shape[1]
        held = cuda.local.array(longest, np.float32)
        for i in range(n):
            held[i] = x[row, i]
        function(held[:n], held[:n], 1)
        for i in range(n):
            out[row, i] = held[i]

    if op == LOGSUMEXP:
        return reduced
    return {"global": in_global, "shared": in_shared, "local": in_local}[place]


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("n", [1, 3, 40, 127])
@pytest.mark.parametrize(
    ("threads", "place"),
    [(1, "global"), (1, "local"), (8, "global"), (32, "shared"), (64, "shared")],
)
def test_a_row_in_memory(threads, place, n, op):
    x = rows_of("float32", 4, n)
    out = empty_like_result(op, x)
    row_kernel(op, threads, place)[4, threads](cuda.to_device(x), out)
    check(op, out.copy_to_host(), x)


@pytest.mark.parametrize("dtype", ["float16", "int32", "float64"])
def test_rows_of_other_numbers_and_any_stride(dtype):
    @cuda.jit
    def kernel(x, out):
        nb.softmax_row(x[::2], out, 4)

    x = cases.draw((1, 22), spread=3, offset=50).astype(dtype)
    out = cuda.to_device(np.zeros(11, "float16" if dtype == "float16" else np.float64))
    kernel[1, 4](cuda.to_device(x[0]), out)
    check("softmax", out.copy_to_host()[None], x[:, ::2])


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_running_state(dtype, op):
    """Pushed in two halves by 8 threads each, one merged into the other, then all of a lane."""
    number, finish = np.dtype(dtype).type, getattr(nb, f"finish_{op}")

    @cuda.jit(device=True)
    def state_of(x, row, i):
        first, second = empty_state(number), empty_state(number)
        for j in range(i, x.shape[1] // 2, 8):
            first = push(first, x[row, j])
        for j in range(x.shape[1] // 2 + i, x.shape[1], 8):
            second = push(second, x[row, j])
        return reduce(merge(first, second), 8)

    @cuda.jit
    def reduced(x, out):
        out[cuda.blockIdx.x] = finish(state_of(x, cuda.blockIdx.x, cuda.threadIdx.x))

    @cuda.jit
    def several(x, out):
        i, row = cuda.threadIdx.x, cuda.blockIdx.x
        state = state_of(x, row, i)
        for j in range(i, x.shape[1], 8):
            out[row, j] = finish(state, x[row, j])

    kernel = reduced if op == LOGSUMEXP else several
    x = rows_of(dtype, 30, 24)
    out = empty_like_result(op, x)
    kernel[len(x), 8](cuda.to_device(x), out)
    check(op, out.copy_to_host(), x)


def test_several_numbers_pushed_at_once():
    @cuda.jit
    def kernel(x, out):
        row = cuda.blockIdx.x
        state = empty_state(np.float64)
        for j in range(0, x.shape[1], 3):
            state = push(state, (x[row, j], x[row, j + 1], x[row, j + 2]))
        out[row] = nb.finish_logsumexp(state)

    x = rows_of("float64", 60, 12)
    out = cuda.to_device(np.zeros(60))
    kernel[60, 1](cuda.to_device(x), out)
    check(LOGSUMEXP, out.copy_to_host(), x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_numbers_change_nothing(dtype):
    number = np.dtype(dtype).type

    @cuda.jit
    def kernel(x, same, out):
        state = push(empty_state(number), x[0])
        state = push(push(state, x[1]), number(-np.inf))
        merged = merge(empty_state(number), merge(state, empty_state(number)))
        for i in range(4):
            same[i] = merged[i] == state[i]
        out[0] = nb.finish_logsumexp(empty_state(number))

    same, out = cuda.to_device(np.zeros(4, bool)), cuda.to_device(np.zeros(1))
    kernel[1, 1](cuda.to_device(np.array([1e5, 1e5 + 3], dtype)), same, out)
    assert same.copy_to_host().all()
    assert out.copy_to_host()[0] == -np.inf


def test_results_do_not_depend_on_the_order_of_a_merge():
    @cuda.jit
    def kernel(x, same):
        first = push(push(empty_state(np.float32), x[0]), x[1])
        second = push(push(empty_state(np.float32), x[2]), x[3])
        one, other = merge(first, second), merge(second, first)
        for i in range(4):
            same[i] = one[i] == other[i]

    same = cuda.to_device(np.zeros(4, bool))
    kernel[1, 1](cuda.to_device(np.array([1.5, 0.3, 7.7, -2.1], np.float32)), same)
    assert same.copy_to_host().all()


def test_a_block_may_reduce_again_and_again():
    @cuda.jit
    def kernel(x, out):
        i = cuda.threadIdx.x
        for row in range(x.shape[0]):
            state = reduce(push(empty_state(np.float32), x[row, i]), 64)
            if i == row:
                out[row] = nb.finish_logsumexp(state)

    x = rows_of("float32", 12, 64)
    out = cuda.to_device(np.zeros(12, np.float32))
    kernel[1, 64](cuda.to_device(x), out)
    check(LOGSUMEXP, out.copy_to_host(), x)


def test_warps_need_not_call_together():
    @cuda.jit
    def kernel(x, out):
        warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        if warp == 1:
            out[0] = nb.logsumexp(x[0, lane], 32)
        cuda.syncthreads()
        if warp == 0:
            out[1] = nb.logsumexp(x[1, lane], 32)

    x = rows_of("float32", 2, 32)
    out = cuda.to_device(np.zeros(2, np.float32))
    kernel[1, 64](cuda.to_device(x), out)
    check(LOGSUMEXP, out.copy_to_host(), x)


@pytest.mark.parametrize("threads", [0, 3, 48, 2048, -1])
def test_threads_that_are_no_power_of_two_are_refused(threads):
    @cuda.jit
    def kernel(x):
        x[0] = nb.logsumexp(x[0], threads)

    with pytest.raises(Exception, match="threads must be a constant, a power of two"):
        kernel[1, 1](cuda.to_device(np.zeros(1)))


def test_numbers_that_are_none_are_refused():
    @cuda.jit
    def kernel(x):
        x[0] = nb.logsumexp((x[0], x[0]), 1)

    with pytest.raises(Exception, match=r"values must hold .* not complex"):
        kernel[1, 1](cuda.to_device(np.zeros(1, np.complex64)))


def test_numbers_that_are_missing_are_refused():
    @cuda.jit
    def kernel(x):
        x[0] = nb.logsumexp((), 1)

    with pytest.raises(Exception, match="values must hold at least one number"):
        kernel[1, 1](cuda.to_device(np.zeros(1)))


def test_the_widest_of_several_numbers_decides():
    @cuda.jit
    def kernel(x, small, out):
        out[0] = nb.logsumexp((x[0], small[0]), 1)

    out = cuda.to_device(np.zeros(1))
    arrays = [cuda.to_device(a) for a in (np.ones(1, np.float32), np.ones(1, np.int8))]
    kernel[1, 1](*arrays, out)
    check(LOGSUMEXP, out.copy_to_host(), np.ones((1, 2)))


@pytest.mark.parametrize("name", ["softmax", "push", "logsumexp_row"])
def test_a_call_outside_of_kernels_says_so(name):
    with pytest.raises(RuntimeError, match=f"{name} is for kernels"):
        getattr(nb, name)(1.0, 2)


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="no attribute 'sofmax'"):
        nb.sofmax  # noqa: B018


# -- the examples ---------------------------------------------------------------------------------


@functools.cache
def fused():
    spec = importlib.util.spec_from_file_location("fused_cuda", EXAMPLES / "fused_cuda.py")
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():  # Numba's random numbers for the simulator warn of themselves
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def test_fused_attention_weights():
    scores = cases.draw((4, 300), "float32", spread=4)
    visible = cases.draw((4, 300)) > -0.3
    visible[2] = False
    out = cuda.to_device(np.ones_like(scores))
    arrays = [cuda.to_device(a) for a in (scores, visible)]
    fused().attention_weights[4, fused().THREADS](*arrays, np.float32(8), out)
    hidden = np.where(visible, np.float32(8) * scores, -np.inf).astype(np.float32)
    check("softmax", out.copy_to_host(), hidden)


# The simulator's random numbers overflow, as they should, and say so.
@pytest.mark.filterwarnings("ignore")
def test_fused_sampling():
    """Tokens come with the log of their own chance; a temperature near 0 takes the largest."""
    module, logits = fused(), cases.draw((3, 130), "float32", spread=4)
    states = module.create_xoroshiro128p_states(3 * module.THREADS, seed=3)
    for temperature in (np.float32(2.0), np.float32(1e-4)):
        tokens, logs = (
            cuda.to_device(np.zeros(3, np.int64)),
            cuda.to_device(np.zeros(3, np.float32)),
        )
        module.sample_tokens[3, module.THREADS](
            cuda.to_device(logits), temperature, states, tokens, logs
        )
        chosen = tokens.copy_to_host()
        scaled = logits / temperature
        expected = oracle.Lanes.of(scaled, 1, None).answer("log_softmax", False)
        got = logs.copy_to_host()
        oracle.assert_close("log_softmax", got, expected[np.arange(3), chosen])
    np.testing.assert_array_equal(chosen, logits.argmax(axis=1))


@pytest.mark.filterwarnings("ignore")  # the simulator's random numbers, again
def test_what_they_are_timed_against_has_the_same_results(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    gpu, timed = (importlib.import_module(name) for name in ("gpu", "gpu_fused"))
    monkeypatch.setattr(timed, "LENGTHS", {"attention": 300, "sampling": 130})
    library = gpu.Host() if cuda_arrays.SIMULATED else gpu.library_of(None)
    for make in (timed.attention, timed.sampling):
        problem = make(library, 4)
        for name, call in problem.calls.items():
            result = call(0)
            assert problem.wrong(result) is None, name
            spoiled = (result[0], result[1] - 1) if isinstance(result, tuple) else 2 * result
            assert problem.wrong(spoiled) is not None


# -- compiled -------------------------------------------------------------------------------------

COMPILED = """
from numba.cuda import types
from nbsoftmax.cuda import _compile, log_softmax, logsumexp_row, softmax_row

def kernel(x, out):
    softmax_row(x, out, 32)
    out[0] = log_softmax(x[0], 32) + logsumexp_row(x, 64)

array = types.Array(types.float32, 1, "C")
for architecture in ((9, 0), (7, 5), (9, 0)):
    code, _ = _compile.machine_code(kernel, (array, array), 64, architecture)
    print(len(code) > 0)
"""


@pytest.mark.slow
def test_one_process_compiles_for_several_architectures():
    """An instruction that only the first one has must not get into the code of the second."""
    environment = {name: v for name, v in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["True"] * 3, done.stderr


def test_a_thread_loses_nothing_of_a_long_lane_of_16_bits():
    """Its plain sums are of a tile: of all, each addition would round the same way."""
    from nbsoftmax import _scalars
    from nbsoftmax.cuda import _lanes, _prims

    o = _prims._simulated(_scalars.HALF)
    x = np.float32(-0.3564453125)
    pair = _lanes.grown(o, _lanes.empty(o, 4), [np.float32(0.0)])
    tiles, each = 1500, 32
    for _ in range(tiles):
        pair = _lanes.grown(o, pair, [x] * each)
    m, count, s, c = (float(v) for v in pair)
    exact = tiles * each * np.exp(np.float64(x))
    assert (m, count) == (0.0, 1.0)
    assert abs((s + c) / 2.0**_scalars.HALF.bias / exact - 1) < 2.0**-16
