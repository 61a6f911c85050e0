"""Runs Python in a child process, with a hard limit of time, for the process-safety tests."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Where this test run finds the package, without importing it.
PACKAGE = Path(importlib.util.find_spec("nbsoftmax").origin).parent
# A fork beside other threads is what some scenarios are about.
WARNINGS = ("-W", "error", "-W", "ignore:This process:DeprecationWarning")
LIMIT_SECONDS = 60


class ChildFailure(AssertionError):
    pass


def environment(**changes):
    """This process's environment without Numba's settings; a value of None removes a name."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    env["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), str(TESTS)])
    if changes.get("NUMBA_THREADING_LAYER") == "tbb":
        # pip puts the libraries of the tbb package where the loader does not look.
        libraries = (f"{sys.prefix}/lib", env.get("LD_LIBRARY_PATH"))
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    env["NUMBA_NUM_THREADS"] = "4"  # also on a machine with fewer cores
    env.update(changes)
    return {name: value for name, value in env.items() if value is not None}


def run(*arguments, env, limit=LIMIT_SECONDS, **options):
    """The output of a Python process, or a failure that shows it."""
    command = [sys.executable, "-X", "faulthandler", *WARNINGS, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        env=env,
        cwd=tempfile.gettempdir(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )
    verdict = None
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        verdict = f"still running after {limit} s"
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints where
        try:
            output, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    if verdict is None and process.returncode:
        verdict = f"exit status {process.returncode}"
    if verdict:
        raise ChildFailure(f"{verdict}: {' '.join(map(str, arguments))}\n{output}")
    return output


@functools.cache
def _prepared():
    place = tempfile.TemporaryDirectory(prefix="nbsoftmax-tests-")
    folder = Path(place.name)
    folder.chmod(0o755)
    (folder / "data").mkdir()
    (folder / "cache").mkdir()
    env = environment(
        PROCESS_TESTS_FOLDER=str(folder / "data"), NUMBA_CACHE_DIR=str(folder / "cache")
    )
    try:
        run(TESTS / "process_child.py", env=env)
        failure = None
    except ChildFailure as error:
        failure = str(error)
    return place, folder, failure


def prepared():
    """The folder with the inputs and the results of an ordinary process, and a warm cache."""
    _, folder, failure = _prepared()
    if failure:
        pytest.fail(f"an ordinary process: {failure}")
    return folder


def run_scenario(name, *, limit=LIMIT_SECONDS, options=None, **changes):
    """Run a function of process_scenarios.py."""
    folder = prepared()
    env = {"PROCESS_TESTS_FOLDER": str(folder / "data"), "NUMBA_CACHE_DIR": str(folder / "cache")}
    env = environment(**{**env, **changes})
    output = run(TESTS / "process_scenarios.py", name, env=env, limit=limit, **(options or {}))
    print(output)
    return output


@functools.cache
def missing(layer):
    """Why this threading layer of Numba cannot be used here, or None."""
    code = "from process_scenarios import launch_the_layer; launch_the_layer()"
    env = environment(NUMBA_THREADING_LAYER=layer, NUMBA_CACHE_DIR=str(prepared() / "cache"))
    try:
        run("-c", code, env=env)
    except ChildFailure as error:
        return f"Numba cannot load its layer {layer}: {str(error).strip().splitlines()[-1]}"
    return None
