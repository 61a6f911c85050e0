"""Time every tile that the CUDA plan could hold a lane in, and name the fastest for each length.

python benchmarks/gpu_sweep.py                       # rows -> results/gpu_sweep.json and .md
python benchmarks/gpu_sweep.py --columns             # lanes across rows of 1024 elements
python benchmarks/gpu_sweep.py --n 1000 4096 --dtype float16 --op logsumexp
python benchmarks/gpu_sweep.py --limit block=256 --limit held_float32=64   # what else may be set
python benchmarks/gpu_sweep.py --dry-run             # the tiles of each length; needs no GPU

A tile is (threads, vectors of each), as in `Limits.rows` and `Limits.columns`; a third number is
the blocks of a cluster. "table" is what the plan chooses by itself. As in gpu.py: results are
compared with float64 first, all tiles of a length take turns, and shares are of a copy's speed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu
from gpu import Arrays, Call, Case, Report
from nbsoftmax.cuda import _plan

RESULT = Path(__file__).parent / "results" / "gpu_sweep.json"
TABLE = "table"

ROW_LENGTHS = (
    *(4, 8, 10, 16, 32, 64, 100, 128, 256, 512, 1000, 1024, 2048, 4093, 4096, 8192, 16_384),
    *(32_768, 50_257, 65_536, 131_072, 262_144),
)
COLUMN_LENGTHS = (2, 4, 8, 16, 32, 64, 100, 128, 256, 512, 1024)
INNER = 1024
THREADS = tuple(2**k for k in range(11))  # of a block, at most
VECTORS = (1, 2, 4, 8, 16)
CLUSTERS = (2, 4, 8)
FULL = 4  # a tile with room for so many times the lane leaves too many threads without work
CLUSTER_ARCHITECTURE = 90


class Tile(NamedTuple):
    """Threads that share a lane, vectors that each holds, and blocks of a cluster."""

    threads: int
    vectors: int
    blocks: int = 1

    def __str__(self) -> str:
        """Name it by its numbers."""
        return " x ".join(map(str, self if self.blocks > 1 else self[:2]))

    def limits(self, columns: bool) -> dict[str, object]:
        """Return the limits that leave the plan no other choice."""
        if columns:
            return {"columns": ((self.threads, self.vectors),)}
        clusters = (self.blocks,) if self.blocks > 1 else ()
        return {"rows": ((self.threads, self.vectors),), "clusters": clusters}


def case_of(op: str, dtype: str, n: int, inner: int) -> Case:
    """Return a case larger than any cache: rows of `n`, or lanes of `n` across rows of `inner`."""
    if inner == 1:
        return Case(op, dtype, gpu.rows_of(n, dtype), -1)
    planes, _ = gpu.rows_of(n * inner, dtype)
    return Case(op, dtype, (planes, n, inner), 1)


def planned(case: Case, columns: bool) -> _plan.Plan:
    """Return what the plan chooses under the present limits."""
    itemsize = gpu.FORMATS[case.dtype].itemsize
    outer, inner = case.shape[0], case.shape[-1] if columns else 1
    return _plan.plan(case.op, outer, case.n, inner, itemsize, max(4, itemsize), cluster=True)


def admissible(case: Case, columns: bool, clusters: bool) -> Iterator[Tile]:
    """Yield the tiles that hold a lane of the case, and are not far too large for it."""
    blocks = (1, *CLUSTERS) if clusters and not columns else (1,)
    for tile in itertools.starmap(Tile, itertools.product(THREADS, VECTORS, blocks)):
        if tile.blocks > 1 and tile.threads < _plan.LIMITS.block:
            continue  # a cluster's blocks are whole
        if _chosen(case, columns, tile) and _room(case, columns, tile) < FULL * case.n:
            yield tile


def _chosen(case: Case, columns: bool, tile: Tile) -> bool:
    """Say whether the plan can be led to this tile."""
    try:
        with _plan.using(**tile.limits(columns)):
            plan = planned(case, columns)
    except IndexError:  # no thread may hold so much
        return False
    if plan.chunks or plan.block > THREADS[-1]:
        return False
    return (plan.deep, plan.vectors, plan.clusters) == tile


def _room(case: Case, columns: bool, tile: Tile) -> int:
    """Return how many elements of a lane a tile holds; the smallest tile is never too large."""
    width = 1 if columns else _plan.VECTOR_BYTES // gpu.FORMATS[case.dtype].itemsize
    return 0 if tile == (1, 1, 1) else tile.threads * tile.vectors * tile.blocks * width


def _within(tile: Tile, columns: bool) -> Callable[[Case, Arrays], Call]:
    """Return what makes calls that hold lanes in this tile."""

    def make(case: Case, arrays: Arrays) -> Call:
        ours = gpu.CONTENDERS["nbsoftmax out="](case, arrays)

        def call(i: int) -> Any:
            with _plan.using(**tile.limits(columns)):
                return ours(i)

        return call

    return make


def sweep(case: Case, columns: bool, clusters: bool, pool: gpu.Pool, clock: gpu.Clock) -> Report:
    """Check and time all tiles on one case."""
    arrays = pool.arrays(case)
    ours = gpu.CONTENDERS["nbsoftmax out="]
    tiles = {str(tile): tile for tile in admissible(case, columns, clusters)}
    makers = {name: _within(tile, columns) for name, tile in tiles.items()}
    right, reasons = gpu.ready(case, arrays, {TABLE: ours, **makers})
    # The limits are set outside of what is timed: with them goes what the package remembers.
    call = ours(case, arrays)
    around = {
        name: functools.partial(_plan.using, **tile.limits(columns))
        for name, tile in tiles.items()
        if name in right
    }
    calls = {**gpu.yardsticks(case, arrays), **dict.fromkeys(right, call)}
    rows = gpu.figures(case, clock.measure(calls, around=around))
    for row in rows:
        tile = tiles.get(row["contender"])
        row.update(n=case.n, tile=tile, columns=columns)
    table = planned(case, columns)
    chosen = (table.deep, table.vectors, table.clusters) if not table.chunks else None
    return {
        "rows": rows,
        "not_timed": [{"n": case.n, "tile": tile, "reason": why} for tile, why in reasons.items()],
        "best": [best(case.n, rows, chosen)],
    }


def best(n: int, rows: list[Report], chosen: tuple[int, ...] | None) -> Report:
    """Name the fastest tiles of a length, and what the table has for it."""
    shares = {row["contender"]: row["share_of_copy"] for row in rows}
    tiles = [row["contender"] for row in rows if row["tile"] is not None]
    first, second, *_ = *sorted(tiles, key=shares.__getitem__, reverse=True), "", ""
    return {
        "n": n,
        "best": first,
        "share": shares.get(first),
        "next": second,
        "next_share": shares.get(second),
        "table": str(Tile(*chosen)) if chosen else "in chunks",
        "table_share": shares.get(TABLE),
    }


def markdown(rows: list[Report]) -> str:
    """Return the best tiles as a table."""
    head = ("n", "best", "share", "next", "share", "table", "share")
    lines = [head, ("---:",) * len(head)]
    for row in rows:
        lines.append(tuple(map(_cell, row.values())))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _cell(value: Any) -> str:
    return (
        f"{100 * value:.1f}%" if isinstance(value, float) else "-" if value is None else f"{value}"
    )


def run(chosen: list[Case], columns: bool, library: gpu.Library, minutes: float) -> Report:
    """Time the tiles of each length while there is time."""
    stop = time.perf_counter() + 60 * minutes
    report = {"machine": gpu.machine(library), "limits": repr(_plan.LIMITS)}
    report |= {"rows": [], "not_timed": [], "best": [], "dropped": []}
    clock, pool = gpu.Clock(library), gpu.Pool(library, chosen, report["machine"]["l2_bytes"])
    clusters = int(report["machine"].get("architecture", "sm_0")[3:]) >= CLUSTER_ARCHITECTURE
    for number, case in enumerate(chosen):
        if time.perf_counter() > stop:
            report["dropped"] = [each.n for each in chosen[number:]]
            break
        for key, found in sweep(case, columns, clusters, pool, clock).items():
            report[key] += found
        print("| " + " | ".join(map(_cell, report["best"][-1].values())) + " |", flush=True)
    return report


def _limit(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def main() -> int:
    """Time what the arguments say; return an exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", help="lengths of a lane")
    parser.add_argument("--columns", action="store_true", help="lanes that are not rows")
    parser.add_argument("--inner", type=int, default=INNER, help="columns beside each other")
    parser.add_argument("--op", choices=gpu.OPS, default="softmax")
    parser.add_argument("--dtype", choices=gpu.FORMATS, default="float32")
    parser.add_argument("--limit", type=_limit, action="append", default=[], metavar="NAME=INT")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no length after that")
    parser.add_argument("--json", type=Path, default=RESULT, help="file for the figures")
    parser.add_argument("--library", choices=gpu.LIBRARIES, help="whose arrays")
    parser.add_argument("--dry-run", action="store_true", help="list the tiles")
    given = parser.parse_args()
    lengths = given.n or (COLUMN_LENGTHS if given.columns else ROW_LENGTHS)
    inner = given.inner if given.columns else 1
    chosen = [case_of(given.op, given.dtype, n, inner) for n in lengths]
    with _plan.using(**dict(given.limit)):
        if given.dry_run:
            for case in chosen:
                tiles = ", ".join(map(str, admissible(case, given.columns, clusters=True)))
                print(f"{case}: {tiles or 'none: in chunks'}")
            return 0
        library = gpu.library_of(given.library)
        report = run(chosen, given.columns, library, given.minutes)
    table = markdown(report["best"])
    gpu.write(report, given.json)
    given.json.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"\n{table}\n{given.json}: dropped {report['dropped'] or 'nothing'}")
    for row in report["not_timed"]:
        print(f"not timed: {json.dumps(row)}")
    return 1 if report["not_timed"] else 0


if __name__ == "__main__":
    sys.exit(main())
