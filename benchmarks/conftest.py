"""What the suite adds to pytest-benchmark: an option, checked calls, and the form of its JSON."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peers
from nbsoftmax import _machine, _timing
from problem import Problem


def pytest_addoption(parser: pytest.Parser) -> None:
    """Name another Python, which has the last SciPy with a fast logsumexp."""
    parser.addoption(
        "--scipy-1.14",
        dest="scipy_1_14",
        metavar="PYTHON",
        help=f"time SciPy 1.14 as well, in this interpreter; {peers.SCIPY_1_14_HOW}",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start the other Python, if there is one."""
    python = config.getoption("scipy_1_14")
    if python:
        peers.scipy_1_14 = peers.OtherSciPy(python)
        config.add_cleanup(peers.scipy_1_14.close)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where nothing is timed, one fresh process of each kind says as much as all."""
    if not config.getoption("benchmark_disable"):
        return
    first = {
        getattr(item, "originalname", ""): item
        for item in reversed(items)
        if item.path.name == "test_fresh.py"
    }
    left = [i for i in items if i.path.name == "test_fresh.py" and i not in first.values()]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def quiet_numpy() -> Iterator[None]:
    """Let overflows pass: they are some peers' way."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def call_of() -> Callable[[str, Problem, str], peers.Made]:
    """Return what makes a peer's call, once its result is the right one; skips what it lacks."""

    def make(peer: str, problem: Problem, op: str) -> peers.Made:
        try:
            made = peers.PEERS[peer](op, problem.x, problem.regime.axis)
        except peers.Lacks as reason:
            pytest.skip(str(reason))
        got = made.result()
        if not problem.deviation(peer):
            problem.check(op, got)
        return made

    return make


# -- the JSON file ---------------------------------------------------------------------------------


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Describe the machine as the main job does; name neither host nor paths."""
    machine = _machine.machine()
    for library, package in (("torch", "torch"), ("JAX", "jax"), ("ONNX Runtime", "onnxruntime")):
        try:
            machine["versions"][library] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    if peers.scipy_1_14 is not None:
        machine["versions"]["SciPy 1.14"] = peers.scipy_1_14.version
    return machine | {"copy": _timing.Copy.name, "read": _timing.Read.name}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    """Leave out branch and project names: they are of one checkout."""
    return {}


# What no table or picture here needs, nor `pytest-benchmark compare`.
_SPARE = ("data", "total", "q1", "q3", "ld15iqr", "hd15iqr", "iqr_outliers", "stddev_outliers")


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Keep what is read again: no single rounds, no options, five digits."""
    for row in output_json["benchmarks"]:
        if not config.getoption("benchmark_save_data"):
            for name in _SPARE:
                row["stats"].pop(name, None)
        row |= {"options": {}, "params": None, "param": None}
        for figures in (row["stats"], row["extra_info"]):
            for name, value in figures.items():
                if isinstance(value, float):
                    figures[name] = float(f"{value:.5g}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write each row of the JSON file on a line: smaller, and a diff shows which rows changed."""
    path = Path(session.config.getoption("benchmark_json") or "")
    if not path.is_file() or not path.stat().st_size:
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = ",\n".join(json.dumps(row) for row in report.pop("benchmarks"))
    head = json.dumps(report, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "benchmarks": [\n{rows}\n]}}\n', encoding="utf-8")
