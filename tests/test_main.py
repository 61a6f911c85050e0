"""The main job: its report, its files, its refusals, and the reference that it trusts."""

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import scipy.special

from nbsoftmax import _check, _machine, _timing
from nbsoftmax.__main__ import main

ROOT = Path(__file__).parents[1]
EXAMPLES = np.random.default_rng(1).normal(0, 10, (6, 40, 5))


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    monkeypatch.setattr(_timing, "_SECONDS", 0.0)


def refusal(capsys, *arguments):
    """The one line on stderr of a call that exits with status 2."""
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nbsoftmax: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.slow
def test_quick_run_prints_and_writes_everything(tmp_path):
    files = tmp_path / "figures.json", tmp_path / "plot.svg"
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "nbsoftmax", "--quick"),
            *("--json", files[0], "--plot", files[1]),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("SIMD", "CUDA devices", "Worst error in ulp", "as documented", "speed-up"):
        assert word in done.stdout
    report = json.loads(files[0].read_text())
    assert report["promises_kept"] is True
    cases = [case for case in _timing.CASES if case.items <= _timing.QUICK_ITEMS]
    assert len(report["speed"]) == len(cases) * len(_timing.DTYPES) * len(_check.FUNCTIONS)
    assert all(row["speed_up"] > 0 and row["percent_of_copy"] > 0 for row in report["speed"])
    assert xml.etree.ElementTree.parse(files[1]).getroot().tag.endswith("svg")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16", ">f8"])
def test_a_users_array(dtype, tmp_path, capsys):
    path, figures, plot = tmp_path / "x[1].npy", tmp_path / "x.json", tmp_path / "x.png"
    np.save(path, EXAMPLES.astype(dtype))
    files = ["--json", str(figures), "--plot", str(plot)]
    assert main(["--input", str(path), "--axis", "1", *files]) == 0
    assert "x[1].npy" in capsys.readouterr().out
    report = json.loads(figures.read_text())
    assert [row["shape"] for row in report["speed"]] == [[6, 40, 5]] * 3
    assert [row["input"] for row in report["accuracy"]] == ["x[1].npy"] * 3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_users_array_without_a_finite_lane(tmp_path, capsys):
    np.save(tmp_path / "x.npy", [[np.nan, 1.0]])
    assert main(["--input", str(tmp_path / "x.npy")]) == 0
    assert "(1, 2)" in capsys.readouterr().out


def test_a_broken_promise_is_status_1(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", EXAMPLES)
    wrong = _check.libraries()
    wrong["nbsoftmax"] = dict(wrong["nbsoftmax"], softmax=lambda x, axis, out=None: x)
    monkeypatch.setattr(_check, "libraries", lambda: wrong)
    assert main(["--input", str(tmp_path / "x.npy")]) == 1
    assert "further from the exact one than promised" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "file", "words"),
    [
        ("--json", "missing/figures.json", "No such file or directory"),
        ("--json", ".", "Is a directory"),
        ("--plot", "missing/plot.svg", "No such file or directory"),
        ("--plot", "plot.pdf", "expected .svg or .png"),
        ("--input", "missing.npy", "No such file or directory"),
        ("--input", ".", "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_used(option, file, words, tmp_path, capsys):
    line = refusal(capsys, option, tmp_path / file)
    assert option in line
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, capsys):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    np.save(tmp_path / "x.npy", EXAMPLES)
    assert main(["--input", str(tmp_path / "x.npy"), "--json", str(full)]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_matplotlib_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'nbsoftmax[plot]'" in refusal(capsys, "--plot", tmp_path / "plot.svg")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([{}], dtype=object), "Object arrays cannot be loaded"),
        (np.zeros(3, complex), "has dtype complex128"),
        (np.zeros(3, bool), "has dtype bool"),
        (np.zeros(3, "U1"), "has dtype <U1"),
        (np.float64(1), "has shape ()"),
        (np.zeros((0, 3)), "has shape (0, 3)"),
    ],
)
def test_an_array_that_cannot_be_used(array, words, tmp_path, capsys):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    assert words in refusal(capsys, "--input", tmp_path / "x.npy")


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_array(content, tmp_path, capsys):
    (tmp_path / "x.npy").write_bytes(content)
    assert "cannot read" in refusal(capsys, "--input", tmp_path / "x.npy")


def test_several_arrays_in_one_file(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", EXAMPLES)
    assert "several arrays" in refusal(capsys, "--input", tmp_path / "x.npz")


@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_out_of_range(axis, tmp_path, capsys):
    np.save(tmp_path / "x.npy", EXAMPLES)
    assert "out of range" in refusal(capsys, "--input", tmp_path / "x.npy", f"--axis={axis}")


def test_an_axis_without_an_array(capsys):
    assert "--axis belongs to --input" in refusal(capsys, "--axis", 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_references_agree(dtype):
    """The wide arithmetic of this machine against 150 bits, on every hard input."""
    scipys = {"SciPy": _check.functions_of(scipy.special)}
    for name, x in _check.hard_inputs(dtype, 2000, 2000):
        pair = [
            [row.ulp["SciPy"] for row in _check.compare(name, x, wide, scipys)]
            for wide in (_check.widest(), _check.multiprecision())
        ]
        np.testing.assert_allclose(*pair, atol=0.01, rtol=1e-6)


@pytest.mark.parametrize("wide", [_check.widest(), _check.multiprecision()], ids=lambda w: w.name)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_step_is_one_ulp(dtype, wide):
    """In every binade, at both ends of it, among the subnormals, and next to 0."""
    info = np.finfo(dtype)
    values = np.array([1, 1.5, info.tiny, info.smallest_subnormal, 0, info.max, -2], dtype)
    below = np.nextafter(values, dtype(-np.inf))
    above = np.nextafter(below, dtype(np.inf))
    for got, want in zip(below, above, strict=True):
        exactly = wide.array(np.array([want]))
        # The unit is that of the exact value: below a power of two a step is half of it.
        step = 0.5 if abs(np.frexp(want)[0]) == 0.5 and abs(got) < abs(want) else 1
        step = 1 if abs(want) <= info.tiny else step
        ulp = _check.worst_ulp(np.array([got]), exactly, abs(exactly), wide)
        assert ulp == step, (got, want)


def test_results_that_are_not_finite_are_infinitely_wrong():
    wide = _check.widest()
    one = wide.array(np.ones(1))
    assert _check.worst_ulp(np.array([np.nan]), one, one, wide) == np.inf


def test_machine_description_is_plain_json():
    found = json.loads(json.dumps(_machine.machine()))
    assert found["cores"] >= 1
    assert found["threads"] >= 1


def test_no_driver_is_no_cuda_device(monkeypatch):
    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr(_machine.ctypes, "CDLL", no_driver)
    assert _machine.cuda_devices() == []


def test_tables_are_the_measured_ones():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
