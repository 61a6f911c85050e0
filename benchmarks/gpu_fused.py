"""Time the kernels of examples/fused_cuda.py against the calls that they replace, on the GPU.

python benchmarks/gpu_fused.py                     # a minute -> results/gpu_fused.json
python benchmarks/gpu_fused.py --library torch     # whose arrays make the calls one by one
NUMBA_ENABLE_CUDASIM=1 python -W ignore benchmarks/gpu_fused.py --library host --rows 2

The calls one by one are the array library's own, and nbsoftmax's or the library's softmax among
them. Noise for them is drawn before. Beside each time stands the bytes that each element should
cost (`fused_cuda.BYTES`), and how many of a copy's bytes fit in the time that it took. Results are
compared with float64 first, and samples taken as in gpu.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

import gpu
import nbsoftmax
from gpu import COPY, Call, Report, to_numpy

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import fused_cuda

RESULT = Path(__file__).parent / "results" / "gpu_fused.json"
ROWS = {"attention": 2**17, "sampling": 2**11}
LENGTHS = {"attention": fused_cuda.LONGEST, "sampling": 50_257}
SCALE, TEMPERATURE = np.float32(0.125), np.float32(0.7)
FUSED = "fused"


@dataclass(frozen=True)
class Problem:
    """Calls that do the same, and what says whether a result of theirs is right."""

    name: str
    calls: dict[str, Call]
    wrong: Callable[[Any], str | None]
    items: int


def module_of(library: gpu.Library) -> Any:
    """Return the library's module, whose functions make whole arrays of whole arrays."""
    names = {"torch": "torch", "CuPy": "cupy", "host": "numpy"}
    if library.name not in names:
        raise SystemExit(f"{library.name} has no functions of whole arrays: --library torch, cupy")
    return gpu.imported(names[library.name])


def launched(library: gpu.Library, array: Any) -> Any:
    """Return an array as Numba launches kernels with it in the least time."""
    return array if library.name == "host" else gpu.imported("numba.cuda").as_cuda_array(array)


def calls_of(
    fused: Call, one_by_one: Callable[[Callable[[Any], Any]], Call], library: gpu.Library, op: str
) -> dict[str, Call]:
    """Return the fused call, and those one by one with each softmax function that they may use."""
    ours = getattr(nbsoftmax, op)
    calls = {FUSED: fused, f"nbsoftmax's {op}": one_by_one(lambda x: ours(x, axis=-1))}
    if library.name == "torch":
        theirs = getattr(module_of(library), op)
        calls[f"torch's {op}"] = one_by_one(lambda x: theirs(x, -1))
    return calls


def attention(library: gpu.Library, rows: int) -> Problem:
    """Weights of scaled and masked scores."""
    xp, shape = module_of(library), (rows, LENGTHS["attention"])
    scores = library.normal(rows * shape[1], "float32").reshape(shape)
    visible, weights = scores > -10, library.empty(shape, "float32")
    hidden = xp.full_like(scores, -np.inf)
    launch = fused_cuda.attention_weights[rows, fused_cuda.THREADS]
    x, mask, out = (launched(library, array) for array in (scores, visible, weights))

    def fused(_: int) -> Any:
        launch(x, mask, SCALE, out)
        return weights

    def one_by_one(softmax: Callable[[Any], Any]) -> Call:
        return lambda _: softmax(xp.where(visible, scores * float(SCALE), hidden))

    first = to_numpy(scores[:4])
    want = special.softmax(np.where(first > -10, first * float(SCALE), -np.inf), axis=-1)

    def wrong(result: Any) -> str | None:
        return None if np.allclose(to_numpy(result[:4]), want, 1e-4) else "wrong weights"

    calls = calls_of(fused, one_by_one, library, "softmax")
    return Problem("attention", calls, wrong, rows * shape[1])


def sampling(library: gpu.Library, rows: int) -> Problem:
    """Tokens drawn from rows of logits, and the logs of their chances."""
    xp, n = module_of(library), LENGTHS["sampling"]
    logits = library.normal(rows * n, "float32").reshape((rows, n))
    tokens, logs = logits.argmax(-1), library.empty((rows,), "float32")
    uniform = library.normal(rows * n, "float32").reshape((rows, n)) % 1
    noise = -xp.log(-xp.log(1e-6 + 0.999 * uniform))
    states = fused_cuda.create_xoroshiro128p_states(rows * fused_cuda.THREADS, seed=7)
    launch = fused_cuda.sample_tokens[rows, fused_cuda.THREADS]
    row = xp.arange(rows, device=logits.device) if library.name == "torch" else xp.arange(rows)
    x, drawn_tokens, their_logs = (launched(library, a) for a in (logits, tokens, logs))

    def fused(_: int) -> Any:
        launch(x, TEMPERATURE, states, drawn_tokens, their_logs)
        return tokens, logs

    def one_by_one(log_softmax: Callable[[Any], Any]) -> Call:
        def call(_: int) -> Any:
            log_chances = log_softmax(logits / float(TEMPERATURE))
            drawn = (log_chances + noise).argmax(-1)
            return drawn, log_chances[row, drawn]

        return call

    want = special.log_softmax(to_numpy(logits[:4]) / float(TEMPERATURE), axis=-1)

    def wrong(result: Any) -> str | None:
        drawn, got = (to_numpy(each[:4]) for each in result)
        chances = want[np.arange(len(drawn)), drawn.astype(int)]
        return None if np.allclose(got, chances, 1e-4, 1e-4) else "not the logs of these tokens"

    calls = calls_of(fused, one_by_one, library, "log_softmax")
    return Problem("sampling", calls, wrong, rows * n)


def time_problem(problem: Problem, library: gpu.Library, clock: gpu.Clock) -> list[Report]:
    """Check and time all calls of a problem, beside a copy of as many float32 numbers."""
    for name, call in problem.calls.items():
        reason = problem.wrong(call(0))
        if reason is not None:
            raise SystemExit(f"{problem.name}, {name}: {reason}")
    x = library.normal(problem.items, "float32")
    out = library.empty((problem.items,), "float32")
    times = clock.measure({COPY: lambda _: library.copy(out, x), **problem.calls})
    fused, apart = (sum(count for _, count in passes) for passes in fused_cuda.BYTES[problem.name])
    bytes_ = {COPY: 8, FUSED: fused}
    per_us = 8 / times[COPY].median_us
    return [
        {
            "problem": problem.name,
            "items": problem.items,
            "contender": name,
            **t._asdict(),
            "bytes_an_element": bytes_.get(name, apart),
            "copied_bytes_an_element": round(per_us * t.median_us, 2),
        }
        for name, t in times.items()
    ]


def main() -> None:
    """Time both examples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULT, help="file for the figures")
    parser.add_argument("--library", choices=gpu.LIBRARIES, help="whose arrays; else the first")
    parser.add_argument("--rows", type=int, help="instead of as many as fill a GPU")
    arguments = parser.parse_args()
    library = gpu.library_of(arguments.library)
    clock, rows = gpu.Clock(library), []
    for make in (attention, sampling):
        problem = make(library, arguments.rows or ROWS[make.__name__])
        rows += time_problem(problem, library, clock)
    for row in rows:
        print(
            f"{row['problem']}, {row['contender']}: {row['median_us']:.1f} us, "
            f"{row['copied_bytes_an_element']} bytes an element at a copy's speed, "
            f"{row['bytes_an_element']} expected"
        )
    gpu.write({"machine": gpu.machine(library), "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
