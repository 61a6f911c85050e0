"""Draw the measured figures for README.md and docs/, each for a light and a dark page.

python benchmarks/plot.py             # results/*.json -> docs/img/*.svg; gpu.json if it is there
python benchmarks/plot.py accuracy    # this one: copies, lengths, accuracy or gpu
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cases import SHARED
from gpu import FORMATS, RESULT, SHORT, SUM, Case
from results import DTYPES, OPS, ROOT, Report, load, rows, where

IMAGES = ROOT / "docs" / "img"

# Colours that differ for colour-blind eyes too (Okabe and Ito), and a mark of its own for each.
MARKS = {
    "nbsoftmax": "o", "ONNX Runtime": "D", "torch": "s", "JAX": "^", "SciPy": "v",
    "torch.compile": "P", "CuPy": "D", "Triton": "^", "QuACK": "v",
}  # fmt: skip
SHIFT = {
    "nbsoftmax": 0.0, "ONNX Runtime": -0.18, "torch": 0.18, "JAX": 0.3, "SciPy": -0.3,
    "torch.compile": 0.34, "CuPy": -0.18, "Triton": -0.32, "QuACK": 0.34,
}  # fmt: skip
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "white", "text": "#1f2328", "grid": "#d1d9e0",
        "nbsoftmax": "#d55e00", "ONNX Runtime": "#0072b2", "torch": "#009e73",
        "JAX": "#b0568b", "SciPy": "#59636e",
        "torch.compile": "#8a6d00", "CuPy": "#0072b2", "Triton": "#b0568b", "QuACK": "#59636e",
    },
    "dark": {
        "page": "#0d1117", "text": "#f0f6fc", "grid": "#3d444d",
        "nbsoftmax": "#ff8c42", "ONNX Runtime": "#56b4e9", "torch": "#2fd39b",
        "JAX": "#e59bc5", "SciPy": "#9198a1",
        "torch.compile": "#f0e442", "CuPy": "#56b4e9", "Triton": "#e59bc5", "QuACK": "#9198a1",
    },
}  # fmt: skip
# Where a library can write to an array in use, that is what it is measured by.
BEST = {"nbsoftmax": True, "ONNX Runtime": True, "torch": True, "JAX": False, "SciPy": False}


def _style(theme: dict[str, str]) -> dict[str, Any]:
    lines = dict.fromkeys(("axes.edgecolor", "grid.color"), theme["grid"])
    words = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    marks = {f"{axis}tick.{which}": 0 for axis in "xy" for which in ("major.size", "minor.size")}
    return {
        "svg.hashsalt": "nbsoftmax",  # else identifiers are drawn by lot
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": theme["page"],
        "figure.facecolor": theme["page"],
        "legend.frameon": False,
        **lines,
        **dict.fromkeys(words, theme["text"]),
        **marks,
    }


def _finish(figure: Figure, marks: Axes, title: str, machine: str) -> None:
    """Put the legend below the panels, ours first, and the machine under the title."""
    handles, labels = marks.get_legend_handles_labels()
    columns = 5 if len(labels) == 5 else 3
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("nbsoftmax"))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=columns,
    )
    figure.suptitle(f"{title}\n{machine}", fontsize=10.5)


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _dots(
    axes: Axes, library: str, theme: dict[str, str], values: list[tuple[int, float]], label: str
) -> None:
    """Draw a library's marks, each a little off its line so that equals do not hide each other."""
    x, y = [value for _, value in values], [line + SHIFT[library] for line, _ in values]
    ours = library == "nbsoftmax"
    axes.plot(
        x,
        y,
        linestyle="",
        marker=MARKS[library],
        color=theme[library],
        markersize=8.5 if ours else 6,
        label=label,
        clip_on=False,
        zorder=3 if ours else 2.5,
    )


def _log_ticks(axes: Axes, least: float, most: float) -> None:
    """Label powers of ten as numbers, up to a million."""
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    powers = range(math.ceil(math.log10(least)), math.floor(math.log10(most)) + 1)
    labels = [f"{10.0**k:g}" if k < 4 else f"$10^{k}$" for k in powers]
    axes.set_xticks([10.0**k for k in powers], labels)


def copies(theme: dict[str, str]) -> Figure:
    """Draw the time of each call in copies of its array: a line for each array."""
    report = load("cpu")
    measured = [
        row
        for row in rows(report, "test_speed")
        if BEST.get(row.info["peer"]) == row.info["out"] and row.info["dtype"] in DTYPES
    ]
    arrays = [str(regime) for regime in SHARED]
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey=True)
    for dtype, line in zip(DTYPES, grid, strict=True):
        for op, axes in zip(OPS, line, strict=True):
            for peer in BEST:
                points = [
                    (arrays.index(row.array), row.limits)
                    for row in measured
                    if (row.info["peer"], row.info["op"], row.info["dtype"]) == (peer, op, dtype)
                    and row.array in arrays
                ]
                _dots(axes, peer, theme, points, f"{peer}, out=" if BEST[peer] else peer)
            axes.axvline(1, color=theme["text"], linewidth=1)
            axes.set_title(f"{op}, {dtype}")
    for op, axes in zip(OPS, grid[1], strict=True):
        _log_ticks(axes, 0.5, 1000)
        axes.set_xlabel("time, in reads of x" if op == "logsumexp" else "time, in copies of x")
    _rows(grid[0, 0], arrays)
    libraries = ("SciPy", "torch", "JAX", "ONNX Runtime", "Numba")
    title = "Time of a call, in copies of the same array (the limit is at 1)"
    _finish(figure, grid[0, 0], title, where(report, "nbsoftmax", *libraries))
    return figure


def lengths(theme: dict[str, str]) -> Figure:
    """Draw the time of an element against the length of the lanes."""
    report = load("cpu")
    measured = list(rows(report, "test_time_against_n"))
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for op, line in zip(("softmax", "logsumexp"), grid, strict=True):
        for axis, axes in zip((-1, 0), line, strict=True):
            for peer in ("nbsoftmax", "torch", "SciPy"):
                for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
                    points = [
                        (row.info["n"], 1e9 * row.seconds / math.prod(row.info["shape"]))
                        for row in measured
                        if (row.info["peer"], row.info["dtype"]) == (peer, dtype)
                        and (row.info["op"], row.info["axis"]) == (op, axis)
                    ]
                    axes.plot(
                        *zip(*points, strict=True) if points else ((), ()),
                        linestyle=style,
                        marker=MARKS[peer],
                        markersize=5,
                        color=theme[peer],
                        label=f"{peer}{', out=' if BEST[peer] else ''}, {dtype}",
                    )
            axes.set_title(f"{op}, {'last axis' if axis else 'axis 0 of (n, inner)'}")
            axes.set_yscale("log")
            _log_ticks(axes, 0.8, 1.3e7)
    for axes in grid[:, 0]:
        axes.set_ylabel("ns for an element")
    for axes in grid[1]:
        axes.set_xlabel("n, elements of a lane")
    title = "Time of an element against the length of its lane, 4 million elements or one lane"
    _finish(figure, grid[0, 0], title, where(report, "nbsoftmax", "SciPy", "torch", "Numba"))
    return figure


def accuracy(theme: dict[str, str]) -> Figure:
    """Draw the worst errors on the hard inputs: a line for each input."""
    least, most = 0.1, 1e6
    report = load("accuracy")
    libraries = list(report["accuracy"][0]["ulp"])
    # Short lanes of ordinary numbers are in the table; here are the inputs that are hard.
    long = ("n = 1,000,000;", "n = 10,000,000;")
    names = [
        name
        for name in dict.fromkeys(row["input"] for row in report["accuracy"])
        if not name.startswith("n = ") or name.startswith(long)
    ]
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey=True)
    for dtype, line in zip(DTYPES, grid, strict=True):
        for op, axes in zip(OPS, line, strict=True):
            found = {
                row["input"]: row["ulp"]
                for row in report["accuracy"]
                if (row["function"], row["dtype"]) == (op, dtype)
            }
            for library in libraries:
                ulps = [found[name][library] for name in names]
                # What is beyond the picture is at its edge.
                shown = [most if u is None else min(max(u, least), most) for u in ulps]
                _dots(axes, library, theme, list(enumerate(shown)), library)
            axes.axvline(
                1.5 if op == "logsumexp" else 3,
                color=theme["nbsoftmax"],
                linestyle=":",
                linewidth=2,
            )
            axes.set_title(f"{op}, {dtype}")
    for axes in grid[1]:
        _log_ticks(axes, least, most)
        axes.set_xlabel("worst error, ulp")
    _rows(grid[0, 0], names)
    title = "Worst error, and nbsoftmax's promise (dotted); at the right edge: a million and more"
    _finish(figure, grid[0, 0], title, where(report, "nbsoftmax", *libraries, "Numba"))
    return figure


# The contenders of the GPU picture, and the packages whose versions are told under its title.
CONTENDERS = ("nbsoftmax out=", "torch", "torch.compile", "CuPy", "Triton out=", "QuACK")
PACKAGES = {
    "nbsoftmax": "nbsoftmax", "numba-cuda": "numba-cuda", "torch": "torch", "triton": "Triton",
    "cupy": "CuPy", "cupy-cuda12x": "CuPy", "cupy-cuda13x": "CuPy", "quack-kernels": "QuACK",
}  # fmt: skip
VECTOR = 16  # bytes: where rows do not begin at a multiple of them, they are read in another way
# More lengths are measured than there is room for.
SHORT_SHOWN = (2, 3, 5, 8)
OTHER_DTYPES_SHOWN = (1000, 4093, 131_072)


def _where_gpu(report: Report) -> str:
    """Say on which GPU and when the figures were taken."""
    m = report["machine"]
    device = [m["gpu"] or f"NumPy on {m['host']}, no GPU"]
    device += [f"{name} {m[name.lower()]}" for name in ("CUDA", "driver") if m.get(name.lower())]
    versions = [f"{name} {m['versions'][p]}" for p, name in PACKAGES.items() if p in m["versions"]]
    return f"{', '.join(device)}; {m['date']}.\n{', '.join(versions)}."


def _yardstick(report: Report, op: str) -> str:
    """Name what 100% is, which may be the copy for some arrays and the read for others."""
    names = {row["yardstick"] for row in report["rows"] if row["op"] == op}
    return "a read" if names == {SUM} else "a copy or a read" if SUM in names else "a copy"


def _last(case: Case) -> bool:
    return case.place == len(case.shape) - 1


def _many_rows(case: Case) -> bool:
    """Say whether a case is on a line against n: only n tells it from its neighbours."""
    whole = case.n * FORMATS[case.dtype].itemsize % VECTOR == 0
    rows = case.dtype == "float32" and _last(case) and case.items > case.n
    return rows and whole and case.n > SHORT[-1]


def _other(case: Case) -> bool:
    """Say whether a case has a line of dots."""
    if not _last(case):
        return True
    if case.dtype != "float32":
        return case.n in OTHER_DTYPES_SHOWN
    return not _many_rows(case) and (case.n > SHORT[-1] or case.n in SHORT_SHOWN)


def _array(case: Case) -> str:
    return f"{case.shape}, axis {case.axis}, {case.dtype}"


def _order(case: Case) -> tuple[int, bool, int, int]:
    """Order by dtype, then axes from the first to the last, then lanes from long to short."""
    return list(FORMATS).index(case.dtype), _last(case), case.place, -case.n


def gpu(theme: dict[str, str]) -> Figure:
    """Draw the share of a copy's speed on a GPU: against the length of rows, and elsewhere."""
    try:
        report = load("gpu")
    except FileNotFoundError:
        reason = f"there is no {RESULT.name}: benchmarks/gpu.py writes it, on a machine with a GPU"
        raise SystemExit(reason) from None
    shares = {
        (Case(row["op"], row["dtype"], tuple(row["shape"]), row["axis"]), row["contender"]): (
            100 * row["share_of_copy"]
        )
        for row in report["rows"]
        if row["contender"] in CONTENDERS
    }
    others = sorted({case for case, _ in shares if _other(case)}, key=_order)
    arrays = list(dict.fromkeys(map(_array, others)))
    numbers = [case.n for case, _ in shares if _many_rows(case)]
    if not arrays or not numbers:  # as after gpu.py --only
        raise SystemExit(f"{RESULT.name} has too few cases for a picture; run benchmarks/gpu.py")
    figure = Figure(figsize=(11, 5.4 + 0.24 * len(arrays)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)  # else 100 touches the next panel's 0
    # Two figures, because the names of the arrays need a margin that the upper panels do not.
    upper, lower = figure.subfigures(2, 1, height_ratios=(3.4, 1 + 0.24 * len(arrays)))
    lines = upper.subplots(1, 3, sharex=True, sharey=True)
    dots = lower.subplots(1, 3, sharex=True, sharey=True)
    for op, above, below in zip(OPS, lines, dots, strict=True):
        for contender in CONTENDERS:
            found = {
                c: share for (c, who), share in shares.items() if (c.op, who) == (op, contender)
            }
            if not found:
                continue
            library, label = contender.removesuffix(" out="), contender.replace(" out", ", out")
            ours = library == "nbsoftmax"
            points = sorted((case.n, share) for case, share in found.items() if _many_rows(case))
            above.plot(
                *zip(*points, strict=True) if points else ((), ()),
                marker=MARKS[library],
                markersize=7 if ours else 5,
                color=theme[library],
                label=label,
                zorder=3 if ours else 2.5,
            )
            values = [(arrays.index(_array(c)), share) for c, share in found.items() if _other(c)]
            _dots(below, library, theme, values, label)
        above.axhline(100, color=theme["text"], linewidth=1)
        below.axvline(100, color=theme["text"], linewidth=1)
        above.set_title(f"{op}, rows of float32")
        below.set_title(f"{op}, other arrays")
        above.set_xlabel("n, elements of a row")
        above.set_ylabel(f"% of {_yardstick(report, op)}")
        below.set_xlabel(f"% of {_yardstick(report, op)}")
    _log_ticks(lines[0], min(numbers) / 1.5, max(numbers) * 1.5)
    lines[0].set_ylim(bottom=0)
    dots[0].set_xlim(left=0)
    _rows(dots[0], arrays)
    title = "Bytes moved in a second on a GPU, in % of what a copy or a read of the array moves"
    _finish(figure, lines[0], title, _where_gpu(report))
    return figure


PICTURES: tuple[Callable[[dict[str, str]], Figure], ...] = (copies, lengths, accuracy, gpu)


def main(names: list[str]) -> None:
    """Draw the named pictures, or all, in both themes."""
    IMAGES.mkdir(exist_ok=True)
    for picture in PICTURES:
        # Few machines have a GPU: where there are no figures its picture is drawn on request only.
        asked = picture.__name__ in names if names else picture is not gpu or RESULT.exists()
        if not asked:
            continue
        for name, theme in THEMES.items():
            with mpl.rc_context(_style(theme)):
                figure = picture(theme)
                path = IMAGES / f"{picture.__name__}-{name}.svg"
                # No date and no version: the same figures give the same file.
                figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(sys.argv[1:])
