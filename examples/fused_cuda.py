"""Softmax inside one's own CUDA kernels: work on both sides of it, without passes over memory.

Two kernels that do in one pass what calls of ready-made functions do in several:

* attention scores, scaled and masked, to weights: 9 bytes an element instead of 25;
* a token drawn for each row of logits, with a temperature: 4 bytes an element instead of 28.

The bytes are those of global memory for float32, read and written; `BYTES` says which.

python examples/fused_cuda.py                                   # on a CUDA device
NUMBA_ENABLE_CUDASIM=1 python -W ignore examples/fused_cuda.py  # in Numba's simulator, whose random
                                                                # numbers warn of their overflows
"""

import math

import numpy as np
from numba import cuda
from numba.cuda.random import create_xoroshiro128p_states, xoroshiro128p_uniform_float32

from nbsoftmax.cuda import empty_state, finish_log_softmax, push, reduce, softmax

THREADS = 128  # of a block, which has a row
LONGEST = 4 * THREADS  # of a row of scores, held in registers
HIDDEN = np.float32(-math.inf)
LEAST, MOST = np.float32(2.0**-100), np.float32(1 - 2.0**-24)

# What each pass reads and writes of an element: fused, and by one call after the other.
BYTES = {
    "attention": (
        (("scores", 4), ("mask", 1), ("weights", 4)),
        (("scale", 4 + 4), ("mask", 4 + 1 + 4), ("softmax", 4 + 4)),
    ),
    "sampling": (
        (("logits", 4),),
        (("divide", 4 + 4), ("log_softmax", 4 + 4), ("add noise", 4 + 4), ("argmax", 4)),
    ),
}


@cuda.jit(device=True)
def seen(scores, visible, scale, row, j):
    """``scale * scores`` where it is visible, and nothing behind the end of a row."""
    return scale * scores[row, j] if j < scores.shape[1] and visible[row, j] else HIDDEN


@cuda.jit
def attention_weights(scores, visible, scale, weights):
    """``weights = softmax(scale * scores)`` of what is visible; rows of up to `LONGEST`."""
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    values = (
        seen(scores, visible, scale, row, thread),
        seen(scores, visible, scale, row, thread + THREADS),
        seen(scores, visible, scale, row, thread + 2 * THREADS),
        seen(scores, visible, scale, row, thread + 3 * THREADS),
    )
    results = softmax(values, THREADS)
    for k in range(4):
        j = thread + k * THREADS
        if j < weights.shape[1]:
            weights[row, j] = results[k]


@cuda.jit
def sample_tokens(logits, temperature, states, tokens, logs):
    """One token a row, drawn from ``softmax(logits / temperature)``, and the log of its chance.

    The largest of ``z_j + g_j``, with Gumbel noise ``g_j``, is a draw from ``softmax(z)``.
    """
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    state = empty_state(np.float32)
    best, value, token = HIDDEN, HIDDEN, -1
    for j in range(thread, logits.shape[1], THREADS):
        z = logits[row, j] / temperature
        state = push(state, z)
        uniform = xoroshiro128p_uniform_float32(states, row * THREADS + thread)
        # From 0, where float32 is fine, comes the largest noise; 0 and 1 themselves have none.
        uniform = min(max(uniform, LEAST), MOST)
        noisy = z - math.log(-math.log1p(-uniform))
        if noisy > best:
            best, value, token = noisy, z, j
    state = reduce(state, THREADS)

    bests = cuda.shared.array(THREADS, np.float32)
    owners = cuda.shared.array(THREADS, np.int32)
    bests[thread], owners[thread] = best, thread
    half = THREADS // 2
    while half > 0:
        cuda.syncthreads()
        if thread < half and bests[thread + half] > bests[thread]:
            bests[thread], owners[thread] = bests[thread + half], owners[thread + half]
        half //= 2
    cuda.syncthreads()
    if thread == owners[0]:
        tokens[row] = token
        logs[row] = finish_log_softmax(state, value)


def main():
    """Run both kernels on a few rows, and say what they save."""
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(3, 200)).astype(np.float32)
    visible = np.tri(3, 200, 150, dtype=bool)
    weights = cuda.device_array((3, 200), np.float32)
    attention_weights[3, THREADS](
        cuda.to_device(scores), cuda.to_device(visible), np.float32(8.0), weights
    )
    print("weights of each row sum to", weights.copy_to_host().sum(axis=1))

    logits = cuda.to_device(np.log(np.tile([0.5, 0.3, 0.2], (3, 1))).astype(np.float32))
    states = create_xoroshiro128p_states(3 * THREADS, seed=1)
    tokens, logs = cuda.device_array(3, np.int64), cuda.device_array(3, np.float32)
    sample_tokens[3, THREADS](logits, np.float32(1.0), states, tokens, logs)
    print("tokens", tokens.copy_to_host(), "of chance", np.exp(logs.copy_to_host()))

    for name, (fused, apart) in BYTES.items():
        one, many = (sum(count for _, count in passes) for passes in (fused, apart))
        print(f"{name}: {one} bytes an element instead of {many}")


if __name__ == "__main__":
    main()
