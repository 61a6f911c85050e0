"""The peers: for each name how to make its call, or the reason why there is none."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Axis = int | tuple[int, ...]


class Lacks(Exception):
    """The peer is not installed or knows no such call; the message is the reason."""


@dataclass(frozen=True)
class Made:
    """A call that is ready to be timed."""

    call: Callable[[], Any]
    to_numpy: Callable[[Any], Array] = np.asarray

    def result(self) -> Array:
        """Call once; return the result as NumPy's."""
        return self.to_numpy(self.call())

    def seconds(self, calls: int) -> float:
        """Return what one of `calls` calls takes, without the garbage collector."""
        return timeit.timeit(self.call, number=calls) / calls


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Lacks(f"{name} is not installed: pip install '.[bench]'") from None


def _floats_only(x: Array, library: str) -> None:
    if x.dtype.kind in "iu":
        raise Lacks(f"{library} takes floating-point arrays only")


def _nbsoftmax(op: str, x: Array, axis: Axis) -> Made:
    return Made(functools.partial(getattr(_module("nbsoftmax"), op), x, axis=axis))


def _nbsoftmax_out(op: str, x: Array, axis: Axis) -> Made:
    function = getattr(_module("nbsoftmax"), op)
    out = np.array(function(x, axis=axis))  # a full reduction returns a scalar
    return Made(functools.partial(function, x, axis=axis, out=out))


def _scipy(op: str, x: Array, axis: Axis) -> Made:
    if x.dtype.name == "bfloat16":
        raise Lacks("SciPy knows no bfloat16")
    return Made(functools.partial(getattr(_module("scipy.special"), op), x, axis=axis))


def _numpy_formula(op: str, x: Array, axis: Axis) -> Made:
    if x.dtype.name == "bfloat16" or x.dtype.kind in "iu":
        raise Lacks("the formula in NumPy is timed for NumPy's floating-point numbers only")

    def softmax() -> Array:
        e = np.exp(x - x.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    def log_softmax() -> Array:
        d = x - x.max(axis=axis, keepdims=True)
        return d - np.log(np.exp(d).sum(axis=axis, keepdims=True))

    def logsumexp() -> Array:
        top = x.max(axis=axis, keepdims=True)
        return np.log(np.exp(x - top).sum(axis=axis)) + top.squeeze(axis)

    formulas = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}
    return Made(formulas[op])


def _torch_parts(op: str, x: Array, axis: Axis) -> tuple[Any, Any, Callable[[Any], Array]]:
    torch = _module("torch")
    _floats_only(x, "torch")
    if isinstance(axis, tuple) and op != "logsumexp":
        raise Lacks(f"torch.{op} takes one axis")
    call = functools.partial(getattr(torch, op), dim=axis)
    if x.dtype.name != "bfloat16":
        return call, torch.from_numpy(x), lambda tensor: tensor.numpy()
    # NumPy and torch do not know each other's bfloat16, but the bits are the same.
    tensor = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return call, tensor, lambda tensor: tensor.view(torch.int16).numpy().view(x.dtype)


def _torch(op: str, x: Array, axis: Axis) -> Made:
    function, tensor, to_numpy = _torch_parts(op, x, axis)
    return Made(functools.partial(function, tensor), to_numpy)


def _torch_out(op: str, x: Array, axis: Axis) -> Made:
    function, tensor, to_numpy = _torch_parts(op, x, axis)
    return Made(functools.partial(function, tensor, out=function(tensor)), to_numpy)


def _jax(op: str, x: Array, axis: Axis) -> Made:
    jax = _module("jax")
    _floats_only(x, "jax.nn.softmax")
    if not x.flags.c_contiguous:
        raise Lacks("JAX arrays have no row pitch")
    jax.config.update("jax_enable_x64", True)
    function = jax.jit(functools.partial(getattr(jax.nn, op), axis=axis))
    on_device = jax.numpy.asarray(x)
    return Made(lambda: function(on_device).block_until_ready())


# The operators' names in the ONNX standard.
_ONNX = {"softmax": "Softmax", "log_softmax": "LogSoftmax", "logsumexp": "ReduceLogSumExp"}


def _onnx_session(op: str, x: Array, axis: Axis) -> Any:
    runtime, onnx = _module("onnxruntime"), _module("onnx")
    if isinstance(axis, tuple) and op != "logsumexp":
        raise Lacks(f"ONNX's {_ONNX[op]} takes one axis")
    if op != "logsumexp" and axis not in (-1, x.ndim - 1):
        raise Lacks(f"ONNX Runtime's {_ONNX[op]} transposes for any axis but the last: not timed")
    axes = axis if isinstance(axis, tuple) else (axis,)
    attributes = {"axes": axes, "keepdims": 0} if op == "logsumexp" else {"axis": axis}
    make = onnx.helper
    if x.dtype.kind in "iu":
        raise Lacks(f"ONNX Runtime has no {_ONNX[op]} for {x.dtype.name}")
    kind = make.np_dtype_to_tensor_dtype(x.dtype)
    graph = make.make_graph(
        [make.make_node(_ONNX[op], ["x"], ["out"], **attributes)],
        op,
        [make.make_tensor_value_info("x", kind, x.shape)],
        [make.make_tensor_value_info("out", kind, None)],
    )
    # The first version in which the axis means what it means in NumPy.
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)], ir_version=8)
    missing = runtime.capi.onnxruntime_pybind11_state.NotImplemented
    try:
        return runtime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except missing:
        raise Lacks(f"ONNX Runtime has no {_ONNX[op]} for {x.dtype.name}") from None


def _onnx(op: str, x: Array, axis: Axis) -> Made:
    session = _onnx_session(op, x, axis)
    return Made(lambda: session.run(None, {"x": x})[0])


def _onnx_out(op: str, x: Array, axis: Axis) -> Made:
    session = _onnx_session(op, x, axis)
    if not x.flags.c_contiguous:
        raise Lacks("ONNX Runtime binds contiguous arrays only")
    runtime = _module("onnxruntime")
    out = session.run(None, {"x": x})[0]
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", runtime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("out", runtime.OrtValue.ortvalue_from_numpy(out))

    def call() -> Any:
        session.run_with_iobinding(binding)
        return binding

    return Made(call, lambda bound: bound.copy_outputs_to_cpu()[0])


SCIPY_1_14_HOW = (
    "python3 -m venv scipy114 && scipy114/bin/pip install 'scipy==1.14.*' 'numpy<2.3', "
    "then --scipy-1.14=scipy114/bin/python"
)


class OtherSciPy:
    """SciPy of another version, in an interpreter of its own; its calls are timed there."""

    def __init__(self, python: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name("worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._x: Array | None = None
        self.version = self._answer()["SciPy"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request; wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def make(self, op: str, x: Array, axis: Axis) -> MadeElsewhere:
        """Hand over the array, unless it is there already, and prepare the call."""
        if x is not self._x:
            file = Path(self._folder.name, "x.npy")
            np.save(file, x)
            self.ask(load=str(file))
            self._x = x
        self.ask(op=op, axis=axis)
        return MadeElsewhere(functools.partial(self.ask, calls=1), other=self)

    def result(self) -> Array:
        """Fetch what the prepared call returns."""
        file = Path(self._folder.name, "result.npy")
        self.ask(save=str(file))
        return np.load(file)

    def close(self) -> None:
        """End the process and remove the arrays."""
        self._process.communicate()
        self._folder.cleanup()


@dataclass(frozen=True)
class MadeElsewhere(Made):
    """A call that another process makes and times."""

    other: OtherSciPy | None = None

    def result(self) -> Array:
        """Call once there; return the result."""
        return self.other.result()

    def seconds(self, calls: int) -> float:
        """Return what one of `calls` calls takes there."""
        return self.other.ask(calls=calls)["seconds"]


scipy_1_14: OtherSciPy | None = None  # set by the option


def _scipy_1_14(op: str, x: Array, axis: Axis) -> Made:
    if scipy_1_14 is None:
        raise Lacks(f"SciPy 1.14 needs a Python of its own: {SCIPY_1_14_HOW}")
    if not x.flags.c_contiguous or x.dtype.name not in ("float32", "float64"):
        raise Lacks("SciPy 1.14 is timed on contiguous float32 and float64 arrays only")
    return scipy_1_14.make(op, x, axis)


# What is like another library, or another version of it: timed on the main job's arrays only.
SHARED_ONLY = ("SciPy 1.14", "NumPy formula")

# A name that ends in "out=" writes to an array in use; the others return a new one.
PEERS: dict[str, Callable[[str, Array, Axis], Made]] = {
    "nbsoftmax": _nbsoftmax,
    "nbsoftmax out=": _nbsoftmax_out,
    "SciPy": _scipy,
    "SciPy 1.14": _scipy_1_14,
    "NumPy formula": _numpy_formula,
    "torch": _torch,
    "torch out=": _torch_out,
    "JAX": _jax,
    "ONNX Runtime": _onnx,
    "ONNX Runtime out=": _onnx_out,
}
