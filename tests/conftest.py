"""Fixtures: the backends that keep the contract, and the regimes that a backend has."""

from __future__ import annotations

import contextlib
import sys
import zlib
from enum import Enum

import numpy as np
import pytest

import nbsoftmax
from nbsoftmax import _cores, _direct

from . import cases, cuda_arrays

# In the simulator a call takes a tenth of a second, and an element 30 us.
SIMULATED_SHARE = 2000
SIMULATED_ELEMENTS = 2500
SHORT_ELEMENTS = 20_000  # no more than machine code finds calls of


class Backend(Enum):
    """Who computes.

    A test takes the fixture `backend` and calls it with the function's name, the input and the
    keywords; arrays go in and come out as NumPy's, whatever the backend computes on. A deviation
    from the contract is a mark on the test, with its reason::

        @pytest.mark.skip_backend(Backend.X, reason="...")
        @pytest.mark.xfail_backend(Backend.X, reason="...")
    """

    NUMPY = "numpy"
    CUDA = "cuda"

    @classmethod
    def present(cls):
        """The backends that can be tested here."""
        return [backend for backend in cls if backend is not cls.CUDA or not cuda_arrays.MISSING]

    def put(self, array, as_array=True):
        """A NumPy array as this backend's, with the same strides where it has strides."""
        if self is Backend.CUDA:
            return cuda_arrays.put(array, as_array)
        return array

    def get(self, result):
        """This backend's result as NumPy's."""
        return cuda_arrays.get(result) if self is Backend.CUDA else result

    def __call__(self, op, x, *args, out=None, **kwargs):
        inputs = {"x": x, **{name: kwargs[name] for name in ("where", "b") if name in kwargs}}
        before = {name: _bytes(value) for name, value in inputs.items()}
        in_out = {name for name, value in inputs.items() if _shares_memory(value, out)}
        for name in ("where", "b"):
            if name in kwargs:
                kwargs[name] = self.put(kwargs[name], as_array=False)
        if self is Backend.CUDA and np.size(x) > SIMULATED_ELEMENTS and cuda_arrays.SIMULATED:
            pytest.skip("too many elements for the simulator")
        given = out
        if out is not None:
            kwargs["out"] = given = self.put(out) if self is Backend.CUDA else out

        def call(x, **others):
            return getattr(nbsoftmax, op)(x, *args, **{**kwargs, **others})

        if self is Backend.NUMPY and in_out <= {"x"}:
            result = _twice(call, inputs, in_place=bool(in_out))
        else:
            result = call(self.put(x))
        if given is not out and not isinstance(result, tuple):
            assert result is given
            cuda_arrays.fetch(given, out)
            result = out
        result = self.get(result)
        for name, value in inputs.items():
            assert name in in_out or _bytes(value) == before[name], f"{op} wrote to {name}"
        return result


def _twice(call, inputs, in_place):
    """Call, and if the array is small once more, with the same bits as the result.

    The second time machine code may know the call, and the inputs are read-only.
    """
    x = inputs["x"]
    before = x.copy() if in_place else None
    result = call(**inputs)
    if np.size(x) > SHORT_ELEMENTS:
        return result
    first = _bits(result)
    if in_place:
        x[...] = before
    result = call(**{name: _read_only(value) for name, value in inputs.items()})
    assert _bits(result) == first
    return result


def _read_only(value):
    if not isinstance(value, np.ndarray):
        return value
    view = value.view()
    view.flags.writeable = False
    return view


def _shares_memory(value, out):
    return isinstance(value, np.ndarray) and np.may_share_memory(value, out)


def _bits(result):
    return [np.asarray(part).tobytes() for part in (result if type(result) is tuple else [result])]


def _bytes(value):
    return value.tobytes() if isinstance(value, np.ndarray) and value.dtype != object else None


def pytest_report_header():
    return cuda_arrays.report(SIMULATED_SHARE)


def pytest_collection_modifyitems(config, items):
    """In the simulator a part of the cases has to do; which, the names decide."""
    if not cuda_arrays.SIMULATED:
        return

    def chosen(item):
        call = getattr(item, "callspec", None)
        on_cuda = call is not None and call.params.get("backend") is Backend.CUDA
        every = item.get_closest_marker("every_backend") is not None
        return not on_cuda or every or zlib.crc32(item.nodeid.encode()) % SIMULATED_SHARE == 0

    left = [item for item in items if not chosen(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if chosen(item)]


def pytest_configure(config):
    _direct.UNKNOWN_CALLS = 1
    _cores.LOOK_NS = 1 << 62  # helpers take part even while other tests keep all cores busy
    if cuda_arrays.SIMULATED:
        # Its threads wait for one another: the interpreter must change between them more often.
        sys.setswitchinterval(3e-4)
        cuda_arrays.share_arrays_for_good()
    config.addinivalue_line("markers", "every_backend: all cases, in the simulator too")
    config.addinivalue_line("markers", "skip_backend(*backends, reason): no such thing there")
    config.addinivalue_line("markers", "xfail_backend(*backends, reason): a stated deviation")


@pytest.fixture(params=Backend.present(), ids=lambda backend: backend.value)
def backend(request):
    """Each backend in turn, less those that the test is marked to skip."""
    for mark in request.node.iter_markers("skip_backend"):
        if request.param in _backends_of(mark):
            pytest.skip(mark.kwargs["reason"])
    for mark in request.node.iter_markers("xfail_backend"):
        if request.param in _backends_of(mark):
            reason = mark.kwargs["reason"]
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    if request.param is Backend.CUDA:
        with cuda_arrays.using("default"):
            yield request.param
    else:
        yield request.param


def _backends_of(mark):
    if not mark.args or set(mark.kwargs) != {"reason"}:
        raise pytest.UsageError(f"{mark.name} takes backends and reason=")
    for which in mark.args:
        Backend(which)  # ValueError for anything else
    return mark.args


@pytest.fixture(params=cases.REGIMES)
def regime(request):
    """Each regime in turn, by thresholds low enough that small inputs meet it."""
    with using(request.param):
        yield request.param


@contextlib.contextmanager
def using(name):
    """The thresholds of one regime of `cases.REGIMES`."""
    from nbsoftmax import _plan

    with _plan.using(**cases.REGIMES[name]), cuda_arrays.using(name):
        yield
