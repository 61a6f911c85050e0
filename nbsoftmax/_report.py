"""What the main job found, for the eye and for programs: tables, a JSON file, a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nbsoftmax import _check, _gpu, _timing


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _ulp(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1e}"


def _table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    """Make a table that fits 80 columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_machine(console: Console, machine: dict[str, Any]) -> None:
    """Print what was found."""
    grid = Table.grid(padding=(0, 2))
    layers = ", ".join(machine["numba_threading_layers"]) or "none"
    for name, value in (
        ("date", machine["date"]),
        ("versions", ", ".join(f"{name} {v}" for name, v in machine["versions"].items())),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"),
        ("SIMD", machine["simd"]),
        ("threads", f"{machine['threads']}, nbsoftmax's own (Numba's layers here: {layers})"),
        ("CUDA devices", ", ".join(machine["cuda_devices"]) or "none"),
        ("reference", machine["reference"]),
        ("copy", machine["copy"]),
    ):
        grid.add_row(name, value)
    console.print(grid, "", highlight=False)


def print_accuracy(console: Console, rows: Sequence[_check.Accuracy]) -> None:
    """Print the worst errors; those beyond the promise in red."""
    table = _table(
        "Worst error in ulp, nbsoftmax (SciPy), against extended precision",
        ("input", "dtype"),
        _check.FUNCTIONS,
    )
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        ours, scipys = (_ulp(row.ulp[library]) for library in ("nbsoftmax", "SciPy"))
        style = "green" if row.kept else "bold red"
        cell = f"[{style}]{ours}[/] {f'({scipys})':>9}"
        cells.setdefault((escape(row.input), row.dtype), []).append(cell)
    for (name, dtype), three in cells.items():
        table.add_row(name, dtype, *three)
    console.print(table, "", highlight=False)


def print_gpu(
    console: Console, device: str, rows: Sequence[_check.Accuracy], speed: Sequence[_gpu.Speed]
) -> None:
    """Print what a CUDA device gave."""
    table = _table(f"Worst error in ulp on {device}", ("input", "dtype"), _check.FUNCTIONS)
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        style = "green" if row.kept else "bold red"
        cell = f"[{style}]{_ulp(row.ulp['nbsoftmax'])}[/]"
        cells.setdefault((escape(row.input), row.dtype), []).append(cell)
    for words, three in cells.items():
        table.add_row(*words, *three)
    console.print(table, "", highlight=False)
    words, figures = ("array", "function"), ("time", "GB/s", "% copy")
    table = _table("Median time with out=, against a copy on the device", words, figures)
    for speed_row in speed:
        table.add_row(
            f"{speed_row.shape}, axis {speed_row.axis}, {speed_row.dtype}",
            speed_row.function,
            _time(speed_row.out_s),
            f"{speed_row.gb_per_s:.0f}",
            f"{speed_row.percent_of_copy:.0f}",
        )
    console.print(table, "", highlight=False)


def print_special(console: Console, seen: _check.SpecialValues) -> None:
    """Print how many special results are right, which are not, and where SciPy has others."""
    right = seen.looked_at - len(seen.wrong)
    console.print(f"Special values: {right} of {seen.looked_at} as documented.", highlight=False)
    for name in seen.wrong:
        console.print(f"[bold red]Wrong:[/] {name}", highlight=False)
    if seen.scipy_differs:
        console.print(f"SciPy has other results for {', '.join(seen.scipy_differs)}.")
    console.print()


def print_speed(console: Console, rows: Sequence[_timing.Speed]) -> None:
    """Print the times, three rows for each array."""
    table = _table(
        "Median time of a call; out=, GB/s, % copy: with a result array in use",
        ("array", "function"),
        ("SciPy", "nbsoftmax", "speed-up", "out=", "GB/s", "% copy"),
    )
    array = None
    for row in rows:
        if array != (row.shape, row.axis, row.dtype):
            array = (row.shape, row.axis, row.dtype)
            table.add_section()
            labels = iter((str(row.shape), f"axis {row.axis}, {row.dtype}"))
        table.add_row(
            next(labels, ""),
            row.function,
            _time(row.scipy_s),
            _time(row.nbsoftmax_s),
            f"[bold]{row.speed_up:.1f}[/]",
            _time(row.out_s),
            f"{row.gb_per_s:.1f}",
            f"{row.percent_of_copy:.0f}",
        )
    first = sum(row.first_s for row in rows)
    console.print(table, "", highlight=False)
    console.print(f"First calls in all (compiled, or loaded if compiled before): {_time(first)}.")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write all figures."""
    text = json.dumps(report, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def draw(path: Path, machine: dict[str, Any], rows: Sequence[_timing.Speed]) -> None:
    """Draw the speed-ups over SciPy: a line for each array, a mark on it for each function."""
    from matplotlib.figure import Figure

    arrays = list(dict.fromkeys(f"{row.shape}, axis {row.axis}, {row.dtype}" for row in rows))
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(arrays)), layout="constrained")
    axes = figure.subplots()
    for function, marker in zip(_check.FUNCTIONS, "osD", strict=True):
        speed_ups = [row.speed_up for row in rows if row.function == function]
        axes.plot(speed_ups, range(len(speed_ups)), marker, label=function)
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set_xscale("log")
    fastest = max(row.speed_up for row in rows)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if tick <= 2 * fastest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(arrays)), arrays)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set_xlabel("SciPy's time / nbsoftmax's time")
    versions = machine["versions"]
    axes.set_title(
        f"nbsoftmax {versions['nbsoftmax']} and SciPy {versions['SciPy']}\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
