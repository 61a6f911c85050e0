"""Measure where each of nbsoftmax's limits should lie on this machine.

python benchmarks/thresholds.py                          # all of them: some minutes
python benchmarks/thresholds.py serial_bytes few_lanes  # these
python benchmarks/thresholds.py --json FILE              # and write the figures

A limit decides between two regimes: both run on arrays around it, in turn, and the ratio of their
times says which side each size belongs to; "measured" is the last one that belongs below. A limit
that is a size (a block, a chunk) is tried at several values; "measured" is the fastest. Differences
of a few percent are noise: compare two runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import nbsoftmax
from nbsoftmax import _machine, _plan

NEVER = 1 << 60
KIB, MIB = 1 << 10, 1 << 20
SAMPLE_SECONDS = 1e-3
ASLEEP_SECONDS = 2e-3  # after which no helper listens
Changes = dict[str, int]
# Given a size in the limit's own unit: the shape, the axis and the dtype of an array about there.
Arrays = Callable[[int], tuple[tuple[int, ...], int, str]]


@dataclass(frozen=True)
class Border:
    """A limit between two regimes: what sets either, and sizes about it, in its unit."""

    sizes: tuple[int, ...]
    array: Arrays
    # With the limit at its highest, what else leads every array into the regime of small sizes;
    # and with the limit at 0, of large ones.
    below: Changes = field(default_factory=dict)
    above: Changes = field(default_factory=dict)
    cold: bool = False  # single calls, before which helpers have gone to sleep
    op: str = "softmax"


@dataclass(frozen=True)
class Size:
    """A limit that is the size of a piece: values to try, and the array to try them on."""

    values: tuple[int, ...]
    array: tuple[tuple[int, ...], int, str]
    around: Changes  # limits that lead the array into the regime with such pieces


def _doubling(first: int, last: int) -> tuple[int, ...]:
    sizes = [first]
    while 2 * sizes[-1] <= last:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def _rows(dtype: str) -> Arrays:
    """Rows of each length, a million numbers in all."""
    return lambda n: ((MIB // n, n), -1, dtype)


_SHORT = (16, 24, 32, 48, 64, 80, 96, 128, 160)
_DEALT = (2, 3, 4, 5, 6, 7, 8)
_BESIDE = (200, 250, 320, 400, 500, 640, 800, 1000)
EXPERIMENTS: dict[str, Border | Size] = {
    "short_float32_elements": Border(_SHORT, _rows("float32")),
    "short_float64_elements": Border(_SHORT, _rows("float64")),
    "dealt_float32_elements": Border(_DEALT, _rows("float32")),
    "dealt_float64_elements": Border(_DEALT, _rows("float64")),
    "paired_elements": Border((3, 5, 8, 12, 16, 24, 32, 48, 64), _rows("float32")),
    "paired_rows": Border(
        _doubling(16, 1024),
        lambda rows: ((rows, 10), -1, "float32"),
        {"paired_elements": 0},
    ),
    "beside_float32_elements": Border(_BESIDE, _rows("float32")),
    "beside_float64_elements": Border(_BESIDE, _rows("float64")),
    "beside_rows": Size((2, 4, 8), ((1024, 256), -1, "float32"), {}),
    "lane_bytes": Border(
        _doubling(32 * KIB, 4 * MIB),
        lambda size: ((64, size // 4), -1, "float32"),
    ),
    "block_bytes": Size(
        _doubling(8 * KIB, 512 * KIB), ((1, 4 * MIB), -1, "float32"), {"few_lanes_bytes": 0}
    ),
    "few_lanes": Border(
        (1, 2, 4, 8, 16, 32, 64),
        lambda lanes: ((lanes, 40_000), -1, "float32"),
        {"few_lanes_bytes": 0},
        {"lane_bytes": NEVER},
    ),
    "few_lanes_bytes": Border(
        _doubling(16 * KIB, MIB),
        lambda size: ((4, size // 4), -1, "float32"),
    ),
    "panel_bytes": Border(
        _doubling(64 * KIB, 4 * MIB),
        lambda size: ((size // 128, 1024), 0, "float32"),
    ),
    "panel_block_bytes": Size(
        _doubling(8 * KIB, 512 * KIB), ((8192, 512), 0, "float32"), {"panel_bytes": 0}
    ),
    "far_bytes": Border(
        _doubling(4 * MIB, 64 * MIB),
        lambda size: ((4096, size // 16_384), 0, "float32"),
        op="logsumexp",
    ),
    "narrow_panel_least": Border(
        (2, 3, 4, 6, 8, 12, 16, 32),
        lambda n: ((MIB // (128 * n), n, 128), 1, "float32"),
    ),
    "narrow_panel_most": Border(
        _doubling(64, 4096),
        lambda n: ((n, 8 * MIB // n), 0, "float32"),
    ),
    "few_panels": Border(
        (1, 2, 4, 8, 16, 32, 64),
        lambda panels: ((1000, 32 * panels), 0, "float32"),
        {"few_panels_bytes": 0},
        {"panel_bytes": NEVER},
    ),
    "few_panels_bytes": Border(
        _doubling(8 * KIB, 512 * KIB),
        lambda size: ((size // 128, 128), 0, "float32"),
    ),
    "unshifted_panels": Border(
        (2, 4, 8, 12, 16, 32, 64),
        lambda panels: ((MIB // (1024 * panels), 64, 16 * panels), 1, "float32"),
    ),
    "wrapped_vectors": Border(
        (8, 16, 32, 64, 128, 256, 512),
        lambda vectors: ((MIB // vectors, vectors // 4, 64), 1, "float32"),
    ),
    "careful_elements": Border(
        (2, 3, 4, 5, 6, 7, 8, 12),
        lambda n: ((n, MIB // (4 * n)), 0, "float32"),
        op="logsumexp",
    ),
    "narrow_elements": Border(
        (2, 3, 4, 5, 6, 8, 12, 16),
        lambda inner: ((1000, 100, inner), 1, "float32"),
        {"taking_turns_elements": NEVER},
        {"taking_turns_elements": NEVER},
    ),
    "taking_turns_elements": Border(
        _doubling(8, 512),
        lambda elements: ((100_000 // elements, elements // 4, 4), 1, "float32"),
    ),
    "odd_turns_rows": Border(
        (12, 24, 36, 48, 64, 96, 128),
        lambda n: ((100_000 // n, n, 6), 1, "float32"),
    ),
    "serial_bytes": Border(
        _doubling(32 * KIB, 512 * KIB),
        lambda size: ((size // 4000, 1000), -1, "float32"),
    ),
    "wake_bytes": Border(
        _doubling(256 * KIB, 8 * MIB),
        lambda size: ((size // 4000, 1000), -1, "float32"),
        cold=True,
    ),
    "chunks_per_thread": Size(
        (1, 2, 4, 8, 16, 32, 64), ((2048, 1000), -1, "float32"), {"chunk_items": 1}
    ),
    "chunk_bytes": Size(
        _doubling(4 * KIB, 512 * KIB), ((1024, 1000), -1, "float32"), {"chunk_items": 1}
    ),
    "chunk_items": Size((1, 2, 4, 8, 16, 32), ((64, 20_000), -1, "float32"), {}),
    "past_cache_bytes": Border(
        _doubling(2 * MIB, 64 * MIB),
        lambda size: ((size // 4096, 1024), -1, "float32"),
    ),
    "next_item_bytes": Border(
        _doubling(4 * KIB, 256 * KIB),
        lambda size: ((16 * MIB // size, size // 64, 16), 1, "float32"),
    ),
    "ahead_bytes": Size(
        _doubling(512, 32 * KIB), ((256, 32_768), -1, "float32"), {"next_item_bytes": 0}
    ),
    "ahead_rows": Size(_doubling(2, 128), ((4096, 2048), 0, "float32"), {"next_item_bytes": 0}),
    "packed_bytes": Size(
        _doubling(32 * KIB, 4 * MIB), ((256, 16, 256, 2), 1, "float32"), {"narrow_elements": NEVER}
    ),
}


def medians(
    array: tuple[tuple[int, ...], int, str],
    variants: list[Changes],
    rounds: int,
    cold: bool = False,
    op: str = "softmax",
) -> list[float]:
    """Return the median seconds of a function with each of these limits, taken in turn."""
    shape, axis, dtype = array
    x = np.random.default_rng(7).standard_normal(shape, np.float32).astype(dtype)
    call = partial(getattr(nbsoftmax, op), x, axis=axis)
    if op != "logsumexp":
        call = partial(call, out=np.array(x))
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds):
        for changes, seconds in zip(variants, times, strict=True):
            with _plan.using(**changes):
                call()  # plans anew, and may compile
                once = timeit.timeit(call, number=1)
                calls = 1 if cold else 1 + int(SAMPLE_SECONDS / once)
                if cold:
                    time.sleep(ASLEEP_SECONDS)
                seconds.append(timeit.timeit(call, number=calls) / calls)
    return [statistics.median(seconds) for seconds in times]


def crossing(sizes: list[int], ratios: list[float]) -> int | None:
    """Return the largest size up to which the regime of small sizes wins; None if none does.

    `ratios` are its times over the other's. One size may be noise: the cut is where the product of
    what is lost on both sides is least.
    """
    logs = np.log(ratios)
    lost = [logs[:i].sum() - logs[i:].sum() for i in range(len(sizes) + 1)]
    best = int(np.argmin(lost))
    return sizes[best - 1] if best else None


def measure(name: str, experiment: Border | Size, rounds: int) -> dict[str, Any]:
    """Run one experiment; return its figures, beside the limit as it stands."""
    current = getattr(_plan.LIMITS, name)
    best: int | None
    if isinstance(experiment, Size):
        variants = [experiment.around | {name: value} for value in experiment.values]
        times = medians(experiment.array, variants, rounds)
        figures = [time / min(times) for time in times]
        sizes, best = experiment.values, experiment.values[int(np.argmin(times))]
    else:
        figures, sizes = [], experiment.sizes
        for size in sizes:
            variants = [{name: NEVER} | experiment.below, {name: 0} | experiment.above]
            array, cold, op = experiment.array(size), experiment.cold, experiment.op
            below, above = medians(array, variants, rounds, cold, op)
            figures.append(below / above)
        best = crossing(list(sizes), figures)
    return {
        "limit": name,
        "kind": type(experiment).__name__.lower(),
        "current": current,
        "measured": best,
        "sizes": list(sizes),
        "figures": [round(figure, 3) for figure in figures],
    }


def main() -> None:
    """Measure the limits that are asked for, and print each as it is done."""
    fields = list(vars(_plan.LIMITS))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("limits", nargs="*", metavar="LIMIT", help=", ".join(fields))
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    unknown = [name for name in options.limits if name not in fields]
    if unknown:
        parser.error(f"no such limit: {', '.join(unknown)}; there are {', '.join(fields)}")
    console = Console()
    found = []
    for name in options.limits or fields:
        if name not in EXPERIMENTS:
            console.print(f"{name}: no experiment is known for it\n")
            continue
        found.append(measure(name, EXPERIMENTS[name], options.rounds))
        _print(console, found[-1])
    if options.json is not None:
        text = json.dumps({"machine": _machine.machine(), "limits": found}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def _print(console: Console, result: dict[str, Any]) -> None:
    meaning = {
        "border": "time of the regime below the limit / of the one above",
        "size": "time / the least time",
    }[result["kind"]]
    title = f"{result['limit']}: now {result['current']}, measured {result['measured']}"
    table = Table(title=title, title_justify="left", caption=meaning, caption_justify="left")
    for size in result["sizes"]:
        table.add_column(_short(size), justify="right")
    table.add_row(*(f"{figure:.2f}" for figure in result["figures"]))
    console.print(table, "")


def _short(size: int) -> str:
    for unit, name in ((MIB, "M"), (KIB, "K")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


if __name__ == "__main__":
    main()
