"""Compiled kernels are kept on disk, are never stale, and do without a disk where they must."""

import ast
import concurrent.futures
import json
import os
import re
import shutil
import sys

import pytest

from . import process_parent
from .process_parent import PACKAGE, TESTS, environment, run, run_scenario

pytestmark = pytest.mark.slow

# What the first call of a process must not wait for.  `import numba` has some of scipy, not these.
HEAVY = (
    "scipy.",
    "numba.np.linalg",
    "numba.cuda",
    "numba_cuda",
    "dask",
    "jax",
    "torch",
    "cupy",
    "matplotlib",
    "mpmath",
    "rich",
    "ml_dtypes",
    "multiprocessing",
    "concurrent.futures.process",
)


def first_call(function="softmax", dtype="float32", **changes):
    """The report of process_start.py."""
    output = run(TESTS / "process_start.py", function, dtype, env=environment(**changes))
    report = json.loads(output.splitlines()[-1])
    print({name: value for name, value in report.items() if name not in ("modules", "result")})
    return report


def kernels(report):
    """What was compiled besides the two sides of the hand-over, which all kernels share."""
    return [name for name in report["compiled"] if not name.startswith(("listen_", "lend_"))]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def suffixes(compiled):
    """Numba keeps an index and a binary for each function."""
    return [".nbc"] * len(compiled) + [".nbi"] * len(compiled)


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, which children import instead of the original."""
    folder = tmp_path / "site" / "nbsoftmax"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def with_copy(copy, **changes):
    path = os.pathsep.join((str(copy.parent), str(TESTS)))
    # Python's own cache of byte code goes by a file's size and date, which these tests keep.
    return {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **changes}


# ---- starting fast


@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp"])
def test_first_call_compiles_one_kernel_and_the_next_process_none(function, cache):
    cold = first_call(function, NUMBA_CACHE_DIR=str(cache))
    kept = files(cache)
    assert len(kernels(cold)) == 1
    assert sorted(path.suffix for path in kept) == suffixes(cold["compiled"])

    warm = first_call(function, NUMBA_CACHE_DIR=str(cache))
    assert (warm["compiled"], warm["passes"]) == ([], 0)
    assert files(cache) == kept
    assert warm["result"] == cold["result"]
    assert not [name for name in warm["modules"] if name.startswith(HEAVY)]


def test_importing_compiles_nothing_and_starts_no_thread(cache):
    code = """if True:
        import os, threading
        import numba
        tasks = "/proc/self/task" if os.path.isdir("/proc/self/task") else "/"
        before = os.listdir(tasks)
        import nbsoftmax
        assert os.listdir(tasks) == before
        assert threading.active_count() == 1
    """
    run("-c", code, env=environment(NUMBA_CACHE_DIR=str(cache)))
    assert not files(cache)


def test_calls_leave_numbas_threading_layer_alone():
    code = """if True:
        import numba
        from process_child import check
        check(("rows", "columns"))
        try:
            numba.threading_layer()
        except ValueError:  # as long as nobody has started it
            pass
        else:
            raise AssertionError("started")
    """
    folder = process_parent.prepared()
    env = {"PROCESS_TESTS_FOLDER": str(folder / "data"), "NUMBA_CACHE_DIR": str(folder / "cache")}
    run("-c", code, env=environment(**env))


# ---- never stale


def edit(path, pattern, replacement):
    """Change a source file, keeping its length and its dates."""
    text, status = path.read_text(), path.stat()
    changed, count = re.subn(pattern, replacement, text)
    assert count, f"{path.name} has no {pattern}: adapt this test to it"
    path.write_text(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    return text


def test_changed_mathematics_is_never_run_from_an_old_binary(copy, cache):
    environment = with_copy(copy, NUMBA_CACHE_DIR=str(cache))
    original = first_call(**environment)
    file = copy / "_scalars.py"
    text = edit(file, r"(exp=\(\s*0\.)\d", r"\g<1>1")  # e^r = 1 + r + 0.1 r^2 + ...
    changed = first_call(**environment)
    assert changed["result"] != original["result"]

    dates = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text(text)
    os.utime(file, ns=dates)
    assert first_call(**environment)["result"] == original["result"]


def imported_by(file):
    """The file and every file of the package that it imports, directly or not."""
    found, new = set(), {file}
    while new:
        path = new.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                new |= {path.with_name(f"{name}.py") for name in names} - found
    return sorted(found)


def test_kernels_are_compiled_anew_when_a_file_they_import_has_changed(copy, cache):
    environment = with_copy(copy, NUMBA_CACHE_DIR=str(cache))
    first_call("logsumexp", **environment)
    stale = []
    for file in imported_by(copy / "_cpu_kernels.py"):
        with file.open("a") as source:
            source.write("# changed\n")
        if not kernels(first_call("logsumexp", **environment)):
            stale.append(file.name)
    assert not stale


UPGRADED_BETWEEN_IMPORT_AND_CALL = """
import sys, nbsoftmax, numpy as np
file, old, new = sys.argv[1:]
text = open(file).read()
assert old in text
open(file, "w").write(text.replace(old, new))
nbsoftmax.log_softmax(np.zeros((400, 1000), "f4"), axis=1)
"""


def test_a_process_keeps_its_code_under_the_sources_that_it_read(copy, cache):
    """An upgrade while it runs must not leave the old kernel in the new version's place."""
    environment_ = with_copy(copy, NUMBA_CACHE_DIR=str(cache))
    file, old, new = copy / "_scalars.py", "return (x - m) - log", "return (x - m) + log"
    script = [UPGRADED_BETWEEN_IMPORT_AND_CALL, str(file), old, new]
    run("-c", *script, env=environment(**environment_))
    changed = first_call("log_softmax", **environment_)
    assert len(kernels(changed)) == 1
    assert max(changed["result"]) > 0


def test_kernels_share_no_cache_file(cache):
    """Numba numbers a function's binaries without a lock: processes could swap two kernels."""
    compiled = []
    for function in ("softmax", "log_softmax", "logsumexp"):
        compiled += first_call(function, NUMBA_CACHE_DIR=str(cache))["compiled"]
    assert len(set(compiled)) == len(compiled)
    assert sorted(path.suffix for path in files(cache)) == suffixes(compiled)


# ---- with a bad folder for the cache, or none


@pytest.mark.parametrize("place", ["a file", "/proc/nbsoftmax", "not made yet"])
def test_right_when_the_cache_folder_is(place, tmp_path, copy):
    (tmp_path / "a file").write_text("")
    folder = tmp_path / place
    run_scenario("two_kernels", **with_copy(copy, NUMBA_CACHE_DIR=str(folder)))


def test_right_when_there_is_no_place_for_a_cache(tmp_path, copy):
    """Nor can one be made, not even by root."""
    (copy / "__pycache__").write_text("")
    nowhere = str(copy / "__init__.py" / "below")
    names = ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "LOCALAPPDATA")
    run_scenario("two_kernels", **with_copy(copy, **dict.fromkeys(names, nowhere)))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]


@pytest.mark.skipif(sys.platform != "linux", reason="permissions are Linux's here")
def test_right_for_a_user_who_may_write_nowhere(copy):
    copy.chmod(0o555)
    changes = with_copy(copy, NUMBA_CACHE_DIR=None, HOME=str(copy), XDG_CACHE_HOME=None)
    try:
        run_scenario("nowhere_to_write", **changes)
    finally:
        copy.chmod(0o755)
    assert not (copy / "__pycache__").exists()


@pytest.mark.parametrize("scenario", ["full_disk", "cache_folder_vanishes"])
def test_right_when_saving_fails(scenario, cache):
    run_scenario(scenario, NUMBA_CACHE_DIR=str(cache))


@pytest.mark.parametrize(("suffix", "left"), [(".nbi", 0.5), (".nbc", 0)])
def test_right_when_a_cache_file_is_damaged(suffix, left, cache):
    """As a power cut leaves them; the next process has a sound cache again."""
    settings = {"NUMBA_CACHE_DIR": str(cache)}
    original = first_call(**settings)
    paths = list(cache.rglob(f"*{suffix}"))
    assert len(paths) == len(original["compiled"])
    for path in paths:
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    assert first_call(**settings)["result"] == original["result"]
    assert not first_call(**settings)["compiled"]


def test_threads_may_compile_at_once(cache):
    run_scenario("first_compilation_from_many_threads", NUMBA_CACHE_DIR=str(cache))


def test_processes_may_fill_a_cache_at_once(cache):
    settings = {"NUMBA_CACHE_DIR": str(cache)}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda _: first_call(**settings), range(4)))
    reports.append(first_call(**settings))
    assert len({str(report["result"]) for report in reports}) == 1
    assert not reports[-1]["compiled"]
