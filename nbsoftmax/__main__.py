"""The main job's command line: check and time this machine against SciPy."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nbsoftmax import __version__, _check, _gpu, _machine, _report, _timing


class _Stop(Exception):
    """The job cannot be done; the message is one clear line for the user."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nbsoftmax",
        description="Check softmax, log_softmax and logsumexp on this machine against SciPy and "
        "against extended precision, then time them against SciPy and a copy of the same array.",
        epilog="Exit status: 0 all well; 1 a result is further from the exact one than promised; "
        "2 a wrong argument, or a file that cannot be read or written.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small arrays only; a few seconds")
    add("--json", metavar="FILE", type=Path, help="write all figures to FILE")
    add("--plot", metavar="FILE", type=Path, help="draw the speed-ups to FILE (.svg or .png)")
    add("--input", metavar="FILE.npy", type=Path, help="check and time this array instead")
    add("--axis", metavar="N", type=int, help="axis of --input to reduce (default: -1, the last)")
    add("--version", action="version", version=f"nbsoftmax {__version__}")
    return parser


def _reason(error: Exception) -> str:
    """Say why in one line: the operating system's words where it has any."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def _load(path: Path, axis: int) -> tuple[_check.Array, int]:
    """Read the user's array; return it with its axis counted from 0."""
    try:
        x: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _Stop(f"--input: cannot read {path}: {_reason(error)}") from error
    if not isinstance(x, np.ndarray):
        raise _Stop(f"--input: {path} holds several arrays; expected one, in a .npy file")
    if x.dtype.kind not in "iuf" or x.dtype.itemsize > 8:
        raise _Stop(f"--input: {path} has dtype {x.dtype}; expected integers or float16/32/64")
    if x.ndim == 0 or x.size == 0:
        raise _Stop(f"--input: {path} has shape {x.shape}; expected at least one axis and element")
    if not -x.ndim <= axis < x.ndim:
        raise _Stop(f"--axis: {axis} is out of range for the {x.ndim} axes of {path}")
    return x, axis % x.ndim


def _must_be_drawable(path: Path) -> None:
    if path.suffix.lower() not in (".svg", ".png"):
        raise _Stop(f"--plot: {path} ends in {path.suffix!r}; expected .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise _Stop("--plot needs matplotlib: pip install 'nbsoftmax[plot]'")


def _must_be_writable(option: str, path: Path) -> None:
    """Fail before the minute of work rather than after it."""
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise _Stop(f"{option}: cannot write {path}: {_reason(error)}") from error
    if not existed:
        path.unlink()


def _finite_lanes(
    name: str, x: _check.Array, axis: int, items: int
) -> list[tuple[str, _check.Array]]:
    """Take as many lanes of the user's array as the reference computes in about a second."""
    lanes = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    lanes = lanes[np.isfinite(lanes).all(axis=1)][: max(1, items // lanes.shape[1])]
    return [(name, lanes)] if len(lanes) else []


def _run(options: argparse.Namespace, console: Console) -> bool:
    """Do the whole job; return whether every promise was kept."""
    user = None
    if options.input is not None:
        user = _load(options.input, -1 if options.axis is None else options.axis)
    elif options.axis is not None:
        raise _Stop("--axis belongs to --input: name an array")
    if options.plot is not None:
        _must_be_drawable(options.plot)
        _must_be_writable("--plot", options.plot)
    if options.json is not None:
        _must_be_writable("--json", options.json)

    wide = _check.widest()
    copy = _timing.Copy()
    machine = _machine.machine() | {"reference": wide.name, "copy": copy.name}
    _report.print_machine(console, machine)

    items = wide.items // 10 if options.quick else wide.items
    inputs: list[tuple[str, _check.Array]] = []
    arrays: list[tuple[_check.Array, _timing.Axis]] = []
    if user is None:
        for dtype in _timing.DTYPES:
            inputs.extend(_check.hard_inputs(dtype, items // 4, items))
        arrays.extend(_timing.arrays(options.quick))
    else:
        inputs.extend(_finite_lanes(options.input.name, *user, items))
        arrays.append(user)

    accuracy: list[_check.Accuracy] = []
    on_device: list[_check.Accuracy] = []
    device_speed: list[_gpu.Speed] = []
    speed: list[_timing.Speed] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    screen = Console(stderr=True)
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as progress:
        for name, lanes in progress.track(inputs, description="checking"):
            accuracy.extend(_check.compare(name, lanes, wide, _check.libraries()))
        special = _check.special_values()
        for x, axis in progress.track(arrays, description="timing"):
            speed.extend(_timing.measure(x, axis, copy))

        unused = _gpu.missing() if machine["cuda_devices"] else "no CUDA device"
        if not unused:
            for name, lanes in progress.track(inputs, description="checking the GPU"):
                on_device.extend(_check.compare(name, lanes, wide, _gpu.libraries()))
            for x, axis in progress.track(arrays, description="timing the GPU"):
                device_speed.extend(_gpu.measure(x, axis))

    _report.print_accuracy(console, accuracy)
    _report.print_special(console, special)
    _report.print_speed(console, speed)
    if on_device:
        _report.print_gpu(console, machine["cuda_devices"][0], on_device, device_speed)
    elif machine["cuda_devices"]:
        console.print(f"The CUDA device was not used: {unused}", highlight=False)
    kept = not special.wrong and all(row.kept for row in [*accuracy, *on_device])
    if not kept:
        console.print("[bold red]A result is further from the exact one than promised.[/]")

    report = {
        "machine": machine,
        "accuracy": [row.as_dict() for row in accuracy],
        "special_values": special._asdict(),
        "speed": [row.as_dict() for row in speed],
        "cuda_accuracy": [row.as_dict() for row in on_device],
        "cuda_speed": [row.as_dict() for row in device_speed],
        "promises_kept": kept,
    }
    try:
        if options.json is not None:
            _report.write_json(options.json, report)
        if options.plot is not None:
            _report.draw(options.plot, machine, speed)
    except OSError as error:
        raise _Stop(f"cannot write {error.filename}: {_reason(error)}") from error
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return 0 if _run(options, Console()) else 1
    except _Stop as stop:
        print(f"nbsoftmax: {stop}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
