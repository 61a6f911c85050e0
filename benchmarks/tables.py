"""Put the measured figures into README.md and docs/, between their markers.

python benchmarks/tables.py            # rewrites them from results/*.json
python benchmarks/tables.py --check    # fails where a table is not the measured one
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator

import occupancy
from results import DTYPES, OPS, ROOT, Row, load, rows, where

# Column -> the rows of the suite that it compares, like with like: both return a new array, or
# both write to one in use.
PEERS = {
    "SciPy": ("SciPy", "nbsoftmax"),
    "SciPy 1.14": ("SciPy 1.14", "nbsoftmax"),
    "NumPy": ("NumPy formula", "nbsoftmax"),
    "torch": ("torch", "nbsoftmax"),
    "torch out=": ("torch out=", "nbsoftmax out="),
    "JAX": ("JAX", "nbsoftmax"),
    "ONNX": ("ONNX Runtime", "nbsoftmax"),
    "ONNX out=": ("ONNX Runtime out=", "nbsoftmax out="),
}
LIBRARIES = ("nbsoftmax", "SciPy", "torch", "JAX", "ONNX Runtime", "NumPy", "Numba")


def _markdown(head: Iterable[str], lines: Iterable[Iterable[str]], words: int = 1) -> Iterator[str]:
    """Yield a table whose first columns are words and the others figures."""
    head = list(head)
    for line in (head, ["---"] * words + ["---:"] * (len(head) - words), *lines):
        yield "| " + " | ".join(line) + " |"


def _ulp(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2f}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _figure(value: float) -> str:
    """Two or three digits, never an exponent."""
    if value >= 9.95:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:#.2g}"


def _groups(test: str) -> dict[str, dict[str, Row]]:
    """Return the rows of each group by name."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows(load("cpu"), test):
        found.setdefault(row.group, {})[row.name] = row
    return found


def speed_ups() -> Iterator[str]:
    """Yield the README's table: how many times faster than SciPy."""
    report = load("speed")
    cells: dict[str, list[str]] = {}
    columns: dict[str, None] = {}
    for row in report["speed"]:
        columns[f"{row['function']} {row['dtype']}"] = None
        case = f"{tuple(row['shape'])}, axis {row['axis']}"
        cells.setdefault(case, []).append(f"{row['speed_up']:.1f}")
    yield from _markdown(["array", *columns], [[case, *three] for case, three in cells.items()])
    yield ""
    yield where(report, "nbsoftmax", "SciPy", "NumPy", "Numba")


def _speed_line(group: dict[str, Row]) -> Iterator[str]:
    ours = group["nbsoftmax out="]
    yield ours.array
    yield ours.info["op"]
    yield _figure(1e3 * ours.seconds)
    yield f"{ours.limits:.2f}" if ours.limits < 10 else f"{ours.limits:.0f}"
    yield _figure(ours.info["gb_per_s"])
    for theirs, as_ours in PEERS.values():
        row = group.get(theirs)
        if row is None:
            yield ""
        else:
            note = "*" if "deviates" in row.info else ""
            yield _figure(row.seconds / group[as_ours].seconds) + note


def speed() -> Iterator[str]:
    """Yield a table of times for each dtype."""
    groups = [group for group in _groups("test_speed").values() if "nbsoftmax out=" in group]
    dtypes = dict.fromkeys(group["nbsoftmax out="].info["dtype"] for group in groups)
    for dtype in dtypes:
        lines = [
            _speed_line(group) for group in groups if group["nbsoftmax out="].info["dtype"] == dtype
        ]
        yield f"{dtype}:"
        yield ""
        yield from _markdown(["array", "function", "ms", "copies", "GB/s", *PEERS], lines, 2)
        yield ""
    yield f"{where(load('cpu'), *LIBRARIES)} With *: the result deviates, for a known reason."


def threads() -> Iterator[str]:
    """Yield how many times faster more threads are than one."""
    cells: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows(load("cpu"), "test_threads"):
        key = (row.array, row.info["dtype"], row.info["op"])
        cells.setdefault(key, {})[row.info["threads"]] = row.seconds
    counts = sorted({count for times in cells.values() for count in times})
    lines = [
        [
            ", ".join(key[:2]),
            key[2],
            f"{1e3 * times[1]:.3g}",
            *(f"{times[1] / times[count]:.2f}" for count in counts[1:]),
        ]
        for key, times in cells.items()
    ]
    yield from _markdown(["array", "function", "1 thread, ms", *map(str, counts[1:])], lines, 2)


def first_calls() -> Iterator[str]:
    """Yield the times that only a fresh process sees."""
    report = load("cpu")
    lines = [[row.name, f"{1e3 * row.seconds:.0f}", ""] for row in rows(report, "test_import")]
    calls: dict[str, dict[str, float]] = {}
    for row in rows(report, "test_first_call"):
        calls.setdefault(row.name, {})[row.info["cache"]] = 1e3 * row.seconds
    lines += [
        [name, f"{times['cold']:.0f}", f"{times['warm']:.0f}"] for name, times in calls.items()
    ]
    yield from _markdown(["in a fresh process", "ms", "from the disk cache, ms"], lines)


def memory() -> Iterator[str]:
    """Yield the memory that a call takes for a while, in percent of x."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows(load("cpu"), "test_peak_memory"):
        key = (row.array, row.info["op"])
        cells.setdefault(key, {})[row.name] = f"{row.info['percent_of_x']:.0f}"
    names = list(dict.fromkeys(name for line in cells.values() for name in line))
    lines = [[*key, *(line.get(name, "") for name in names)] for key, line in cells.items()]
    yield from _markdown(["array, float32", "function", *names], lines, 2)


def accuracy() -> Iterator[str]:
    """Yield a table of worst errors for each dtype."""
    report = load("accuracy")
    libraries = list(report["accuracy"][0]["ulp"])
    for dtype in DTYPES:
        cells: dict[str, list[str]] = {}
        for row in report["accuracy"]:
            if row["dtype"] == dtype:
                figures = " · ".join(_ulp(value) for value in row["ulp"].values())
                cells.setdefault(row["input"], []).append(figures)
        yield f"{dtype}: {' · '.join(libraries)}, worst ulp"
        yield ""
        yield from _markdown(["input", *OPS], [[name, *c] for name, c in cells.items()])
        yield ""
    reference = report["machine"]["reference"]
    yield f"{where(report, *libraries, 'NumPy', 'Numba')} Reference: {reference}."


def _kernel(name: str) -> str:
    """Name a kernel as the tables do."""
    op, stage, form, (_, n, inner) = occupancy.parts(name)
    lanes = "row" if inner == 1 else "columns"
    part = "" if stage == "whole" else f", {stage}"
    return f"{op}{part}, {lanes} of {n:,} {form}"


def beside_nvcc() -> Iterator[str]:
    """Yield for each architecture what a number takes in our code, and in nvcc's."""
    report = load("nvcc")
    code = report["code"]
    lines = []
    for name in next(iter(code.values())):
        kernels = [code[architecture][name] for architecture in code]
        cells = []
        for key, form in (("registers", "{}"), ("per_number", "{:.1f}")):
            cells.append(
                [" · ".join(form.format(k[who][key]) for who in ("ours", "nvcc")) for k in kernels]
            )
        ours = [k["ours"] for k in kernels]
        loads = " ".join(f"{k['loads_ahead']}/{k['loads']}" for k in ours)
        width = " ".join(str(k["widest_load"]) for k in ours)
        lines.append(
            [_kernel(name), *cells[1], " ".join(cells[0]).replace(" · ", "·"), width, loads]
        )
    heads = ["kernel", *code, "registers", "bytes a load", "loads ahead"]
    yield from _markdown(heads, lines)
    yield ""
    versions = report["machine"]["versions"]
    most = max(k["ours"]["spilled"] for kernels in code.values() for k in kernels.values())
    yield (
        f"Ours (numba-cuda {versions['numba-cuda']}) · nvcc {versions['nvcc']}, "
        f"{report['machine']['date']}; registers, bytes and loads ahead of the first use for each "
        f"architecture in turn. At most {most} bytes spilled."
    )


def _resident(name: str, kernel: occupancy.Kernel) -> Iterator[str]:
    """Yield a kernel's line; what falls short is marked."""
    code, needed, budget = kernel.code, kernel.needed, kernel.budget
    yield _kernel(name)
    yield str(code["registers"])
    yield f"{kernel.blocks} of {kernel.plan.block}"
    yield f"{code['loads_ahead']} of {code['loads']}"
    flight = kernel.flight(kernel.ahead)
    yield f"{_figure(flight / 1024)} of {_figure(needed / 1024)}{'*' if flight < needed else ''}"
    short = code["per_number"] > budget
    yield f"{_figure(code['per_number'])} of {_figure(budget)}{'*' if short else ''}"


def resident() -> Iterator[str]:
    """Yield what resides on each GPU, what it has in flight, and what its instructions take."""
    report = load("nvcc")
    head = ["kernel", "registers", "blocks, threads", "loads ahead", "KiB in flight, needed"]
    for architecture, made in occupancy.kernels(report).items():
        gpu = occupancy.GPUS[architecture]
        yield f"{architecture}, {gpu.name}:"
        yield ""
        lines = (_resident(name, kernel) for name, kernel in made.items())
        yield from _markdown([*head, "instructions, allowed"], lines)
        yield ""
    yield f"Compiled by numba-cuda {report['machine']['versions']['numba-cuda']}, not run on a GPU."


PLACES: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
    ("README.md", speed_ups),
    ("docs/performance.md", speed),
    ("docs/performance.md", threads),
    ("docs/performance.md", first_calls),
    ("docs/performance.md", memory),
    ("docs/accuracy.md", accuracy),
    ("docs/internals.md", beside_nvcc),
    ("docs/internals.md", resident),
)


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
    for file in dict.fromkeys(stale):
        print(f"{file}: {'stale; run benchmarks/tables.py' if check else 'rewritten'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
