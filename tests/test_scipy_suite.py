"""SciPy's own tests of these functions, with ours in the place of SciPy's.

They run in a process of their own: the plugin below puts our functions into SciPy's test module
once that is collected. What fails must be a deviation that the contract states, and is listed here.
"""

import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

SUITE = "scipy.special.tests.test_logsumexp"
OURS = ("logsumexp", "softmax", "log_softmax")

# Name of a test in SciPy's suite -> the line of the contract that it contradicts. None does so far:
# the deviations (+inf in log_softmax, empty input of any rank, integers, bool, float16) are cases
# that SciPy leaves untested.
DEVIATIONS: dict[str, str] = {}

PLUGIN = f"""
import nbsoftmax
import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        for name in {OURS!r}:
            assert hasattr(item.module, name)
            setattr(item.module, name, getattr(nbsoftmax, name))

@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    used = {{getattr(session.items[0].module, name).__module__ for name in {OURS!r}}}
    assert all(name.split(".")[0] == "nbsoftmax" for name in used), used
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name -> passed, failed or skipped, of every test that SciPy's suite runs."""
    folder = tmp_path_factory.mktemp("scipy")
    (folder / "in_place_of_scipy.py").write_text(PLUGIN)
    report = folder / "report.xml"
    root = pathlib.Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "--pyargs", SUITE, "-p", "in_place_of_scipy"]
    command += ["-p", "no:cacheprovider", "-q", f"--junitxml={report}", f"--rootdir={folder}"]
    command += ["-c", os.devnull, "-W", "ignore::pytest.PytestRemovedIn10Warning"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(root)])}
    env.pop("PYTEST_ADDOPTS", None)
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    results = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        results[name] = "skipped" if skipped else bad[0].get("message") if bad else "passed"
    return results


@pytest.mark.slow
def test_scipys_suite_really_ran(outcomes):
    executed = [name for name, outcome in outcomes.items() if outcome != "skipped"]
    assert len(executed) > 300
    for test in ("test_logsumexp_b", "test_softmax_multi_axes", "test_log_softmax_3d"):
        assert any(test in name for name in executed)


@pytest.mark.slow
def test_only_stated_deviations_fail(outcomes):
    failed = {k: v for k, v in outcomes.items() if v not in ("passed", "skipped")}
    unexpected = {k: v for k, v in failed.items() if k not in DEVIATIONS}
    assert not unexpected
    assert set(failed) == set(DEVIATIONS), "a deviation is gone, or its test: take it off the list"
