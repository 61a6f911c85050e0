"""Reads what was measured, results/*.json, for the tables and the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPS = ("softmax", "log_softmax", "logsumexp")
DTYPES = ("float32", "float64")
Report = dict[str, Any]


def load(name: str) -> Report:
    """Return the report results/`name`.json."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    report: Report = json.loads(path.read_text(encoding="utf-8"))
    report.setdefault("machine", report.get("machine_info"))  # pytest-benchmark's name for it
    return report


def where(report: Report, *libraries: str) -> str:
    """Say on what and when the figures were taken."""
    m = report["machine"]
    names = dict.fromkeys(name for name in libraries if name in m["versions"])
    versions = ", ".join(f"{name} {m['versions'][name]}" for name in names)
    return f"{m['cpu']}, {m['cores']} cores, {m['simd']}; {versions}; {m['date']}."


@dataclass(frozen=True)
class Row:
    """One row of the suite: who computed what in how many seconds."""

    test: str  # the test function
    name: str  # of the row in its group
    group: str
    seconds: float  # median of one call
    info: dict[str, Any]

    @property
    def array(self) -> str:
        """The array's shape and axis, as people write them."""
        shape, axis = tuple(self.info["shape"]), self.info["axis"]
        pitch = self.info.get("pitch", 0)
        more = f", row pitch {shape[-1] + pitch}" if pitch else ""
        return f"{shape}, axis {tuple(axis) if isinstance(axis, list) else axis}{more}"

    @property
    def limits(self) -> float:
        """The time in copies of the array; for logsumexp in reads."""
        return 100 / self.info[f"percent_of_{self.info['yardstick']}"]


def rows(report: Report, test: str) -> Iterator[Row]:
    """Yield the rows of one test function, in the order in which they ran."""
    for each in report["benchmarks"]:
        function = each["fullname"].partition("::")[2].partition("[")[0]
        if function == test:
            seconds = each["stats"]["median"]
            yield Row(function, each["name"], each["group"], seconds, each["extra_info"])
