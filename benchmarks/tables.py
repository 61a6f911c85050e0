"""Put the measured figures into README.md and docs/, between their markers.

python benchmarks/tables.py            # rewrites them from results/*.json
python benchmarks/tables.py --check    # fails where a table is not the measured one
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FUNCTIONS = ("softmax", "log_softmax", "logsumexp")
Report = dict[str, Any]


def _where(report: Report, *libraries: str) -> str:
    """Say on what and when the figures were taken."""
    m = report["machine"]
    versions = ", ".join(f"{name} {m['versions'][name]}" for name in libraries)
    return f"{m['cpu']}, {m['cores']} cores, {m['simd']}; {versions}; {m['date']}."


def _markdown(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (head, ["---"] + ["---:"] * (len(head) - 1), *rows):
        yield "| " + " | ".join(row) + " |"


def _case(row: Report) -> str:
    shape = "(" + ", ".join(map(str, row["shape"])) + ")"
    return f"{shape}, axis {row['axis']}"


def _ulp(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2f}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def speed_ups() -> Iterator[str]:
    """Yield the README's table: how many times faster than SciPy."""
    report = _load("speed")
    cells: dict[str, list[str]] = {}
    columns: dict[str, None] = {}
    for row in report["speed"]:
        columns[f"{row['function']} {row['dtype']}"] = None
        cells.setdefault(_case(row), []).append(f"{row['speed_up']:.1f}")
    yield from _markdown(["array", *columns], [[case, *three] for case, three in cells.items()])
    yield ""
    yield _where(report, "nbsoftmax", "SciPy", "NumPy", "Numba")


def speed() -> Iterator[str]:
    """Yield the full table of times."""
    report = _load("speed")
    rows = [
        [
            f"{_case(row)}, {row['dtype']}",
            row["function"],
            *(f"{1e3 * row[key]:.3g}" for key in ("scipy_s", "nbsoftmax_s")),
            f"{row['speed_up']:.1f}",
            f"{1e3 * row['out_s']:.3g}",
            f"{row['gb_per_s']:.1f}",
            f"{row['percent_of_copy']:.0f}",
        ]
        for row in report["speed"]
    ]
    head = "array|function|SciPy, ms|nbsoftmax, ms|speed-up|with out=, ms|GB/s|% of copy"
    yield from _markdown(head.split("|"), rows)
    yield ""
    where = _where(report, "nbsoftmax", "SciPy", "NumPy", "Numba")
    yield f"{where} Copy: {report['machine']['copy']}."


def accuracy() -> Iterator[str]:
    """Yield a table of worst errors for each dtype."""
    report = _load("accuracy")
    libraries = list(report["accuracy"][0]["ulp"])
    for dtype in ("float32", "float64"):
        cells: dict[str, list[str]] = {}
        for row in report["accuracy"]:
            if row["dtype"] == dtype:
                figures = " · ".join(_ulp(value) for value in row["ulp"].values())
                cells.setdefault(row["input"], []).append(figures)
        yield f"{dtype}: {' · '.join(libraries)}, worst ulp"
        yield ""
        yield from _markdown(["input", *FUNCTIONS], [[name, *c] for name, c in cells.items()])
        yield ""
    where = _where(report, *libraries, "NumPy", "Numba")
    yield f"{where} Reference: {report['machine']['reference']}."


PLACES: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
    ("README.md", speed_ups),
    ("docs/performance.md", speed),
    ("docs/accuracy.md", accuracy),
)


def _load(name: str) -> Report:
    path = Path(__file__).parent / "results" / f"{name}.json"
    report: Report = json.loads(path.read_text(encoding="utf-8"))
    return report


def main(check: bool) -> int:
    """Rewrite the tables, or say which are stale; return the exit status."""
    stale = []
    for file, table in PLACES:
        path = ROOT / file
        old = path.read_text(encoding="utf-8")
        block = f"<!-- table: {table.__name__} -->\n" + "\n".join(table()) + "\n<!-- end -->"
        pattern = rf"<!-- table: {table.__name__} -->.*?<!-- end -->"
        new, found = re.subn(pattern, lambda _, block=block: block, old, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{file}: expected one place for the table {table.__name__}")
        if new != old:
            stale.append(file)
            if not check:
                path.write_text(new, encoding="utf-8")
    for file in stale:
        print(f"{file}: {'stale; run benchmarks/tables.py' if check else 'rewritten'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
