"""The house: who imports whom, what is public, and what stays unloaded until it is needed."""

import ast
import pathlib
import subprocess
import sys
import types

import pytest

import nbsoftmax

PACKAGE = pathlib.Path(nbsoftmax.__file__).parent
ROOT = PACKAGE.parent

# Module -> the package's modules it may import, when it is loaded or later. What is not listed here
# fails the test below, so that a new module gets its place.
LAYERS: dict[str, set[str]] = {
    "_semantics": set(),
    "_plan": {"_semantics"},
    "_scalars": set(),
    "_plain": {"_scalars", "_semantics"},
    "_llvm": {"_scalars"},
    "_simd": {"_llvm", "_scalars"},
    "_formats": {"_llvm", "_scalars", "_simd"},
    "_entry": set(),
    "_cpu_kernels": {"_entry", "_formats", "_llvm", "_scalars", "_semantics", "_simd"},
    "_handover": {"_entry"},
    "_direct": {"_entry"},
    "_memory": set(),
    "_cores": set(),
    "_pool": {"_cores", "_handover"},
    "_cpu": {
        *("_cpu_kernels", "_direct", "_formats", "_handover", "_memory", "_plain", "_plan"),
        *("_pool", "_scalars", "_semantics"),
    },
    "_backends": {"_cpu", "_semantics", "cuda._run"},
    "_api": {"_backends", "_semantics"},
    "__init__": {"_api"},
    # Arrays on a CUDA device: loaded by the first one.
    "cuda.__init__": {"cuda._in_kernels"},
    "cuda._plan": {"_semantics"},
    "cuda._jobs": {"_formats", "_scalars", "_semantics"},
    "cuda._prims": {"_formats", "_llvm", "_plain", "_scalars", "cuda._jobs"},
    "cuda._lanes": {"_scalars", "_semantics", "cuda._jobs"},
    "cuda._kernels": {
        *("_formats", "_scalars", "_semantics", "cuda._jobs", "cuda._lanes", "cuda._prims"),
    },
    "cuda._in_kernels": {
        *("_formats", "_scalars", "_semantics"),
        *("cuda._jobs", "cuda._kernels", "cuda._lanes", "cuda._prims"),
    },
    "cuda._compile": {"cuda._jobs", "cuda._kernels"},
    "cuda._arrays": {"_formats", "_semantics", "cuda._jobs"},
    "cuda._device": {"cuda._arrays", "cuda._compile", "cuda._jobs", "cuda._kernels", "cuda._prims"},
    "cuda._run": {
        *("_formats", "_semantics", "cuda._arrays", "cuda._device", "cuda._jobs", "cuda._plan"),
    },
    # The programme that checks and times a machine.
    "_machine": {"__init__", "_pool"},
    "_check": {"__init__"},
    "_timing": {"_check", "_cpu"},
    "_gpu": {"_check", "_timing"},
    "_report": {"_check", "_gpu", "_timing"},
    "__main__": {"__init__", "_check", "_gpu", "_machine", "_report", "_timing"},
}

# Loaded by no import of the package: each is slow to load, or may be missing.
LAZY = ("scipy", "dask", "numba.cuda", "cupy", "torch", "jax", "matplotlib", "mpmath", "ml_dtypes",
        "pytest", "rich")  # fmt: skip


def sources():
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }


def imports_of(name, path):
    """The package's own modules that this one imports, anywhere in it."""
    known = set(sources())
    package = name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = ["", *package.split(".")] if package else [""]
            base = ".".join(p for p in parts[: len(parts) - node.level + 1] if p)
            module = ".".join(p for p in (base, node.module) if p)
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else module or "__init__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nbsoftmax":
            rest = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{rest}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else rest or "__init__")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nbsoftmax":
                    found.add(alias.name.partition(".")[2] or "__init__")
    return found


@pytest.mark.parametrize("name", sorted(sources()))
def test_module_imports_only_from_lower_layers(name):
    assert name in LAYERS, "give the new module its place in LAYERS"
    assert imports_of(name, sources()[name]) <= LAYERS[name]


def test_layers_have_no_ghosts_and_no_circles():
    assert set(LAYERS) == set(sources())
    placed = set()
    while placed != set(LAYERS):
        free = {name for name, below in LAYERS.items() if below <= placed} - placed
        assert free, f"a circle among {set(LAYERS) - placed}"
        placed |= free


@pytest.mark.parametrize("name", ["_semantics", "_plan", "cuda._plan"])
def test_pure_modules_do_not_know_numba(name):
    tree = ast.parse(sources()[name].read_text())
    modules = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert modules.isdisjoint({"numba", "llvmlite"})


def test_public_names():
    assert set(nbsoftmax.__all__) == {"log_softmax", "logsumexp", "softmax"}
    public = {name: value for name, value in vars(nbsoftmax).items() if not name.startswith("_")}
    modules = {name for name, value in public.items() if isinstance(value, types.ModuleType)}
    assert modules <= {"cuda"}, "loaded by the first array on a device"
    assert set(public) - modules == set(nbsoftmax.__all__)
    assert isinstance(nbsoftmax.__version__, str)


def test_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def loaded_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return set(done.stdout.split())


@pytest.mark.slow
def test_import_leaves_the_heavy_and_the_optional_alone():
    before = loaded_after("import numba")
    after = loaded_after("import nbsoftmax")
    assert "nbsoftmax" in after
    for name in LAZY:
        assert name not in after - before, name
    assert "numba.cuda" not in after


@pytest.mark.slow
def test_first_call_leaves_the_optional_alone():
    code = "import numpy, nbsoftmax; nbsoftmax.softmax(numpy.arange(3.0))"
    after = loaded_after(code)
    for name in ("dask", "numba.cuda", "cupy", "torch", "jax", "matplotlib", "mpmath", "pytest"):
        assert name not in after, name


@pytest.mark.parametrize("name", sorted(sources()))
def test_no_kernel_is_fast_and_loose(name):
    """fastmath=True breaks NaN and infinities: flags belong on single instructions."""
    for node in ast.walk(ast.parse(sources()[name].read_text())):
        if isinstance(node, ast.keyword) and node.arg == "fastmath":
            off = isinstance(node.value, ast.Set) or not getattr(node.value, "value", True)
            assert off, f"line {node.value.lineno}"


@pytest.mark.parametrize("name", sorted(set(sources()) - {"__main__", "_report"}))
def test_nothing_is_printed(name):
    tree = ast.parse(sources()[name].read_text())
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]
