"""The instructions that kernels are made of, run on this machine's CPU with the NaNs of a GPU.

The simulator runs the same functions on numbers, but not what they write for a device. Here the
instructions of one thread are compiled for the CPU; what only a GPU has (its own product and
magnitude) is replaced, and every NaN is made a GPU's: all ones but for the sign.
"""

import ctypes
import functools

import numpy as np
import pytest

from . import cases, cuda_arrays, oracle

pytestmark = pytest.mark.skipif(bool(cuda_arrays.MISSING), reason=cuda_arrays.MISSING)
if not cuda_arrays.MISSING:
    from llvmlite import binding, ir

    from nbsoftmax._llvm import I32, I64, Vector
    from nbsoftmax.cuda._jobs import Group, Job
    from nbsoftmax.cuda._kernels import Functions
    from nbsoftmax.cuda._prims import Device

    class Builder(ir.IRBuilder):
        """Whose arithmetic gives a GPU's NaN."""

        def as_on_gpu(self, value):
            if isinstance(value.type, ir.HalfType):
                return value
            single = isinstance(value.type, ir.FloatType)
            kind, ones = (I32, 0x7FFFFFFF) if single else (I64, 0x7FFFFFFFFFFFFFFF)
            nan = self.fcmp_unordered("uno", value, value)
            bits = self.select(nan, ir.Constant(kind, ones), self.bitcast(value, kind))
            return self.bitcast(bits, value.type)

        def fadd(self, *arguments, **keywords):
            return self.as_on_gpu(super().fadd(*arguments, **keywords))

        def fsub(self, *arguments, **keywords):
            return self.as_on_gpu(super().fsub(*arguments, **keywords))

        def fdiv(self, *arguments, **keywords):
            return self.as_on_gpu(super().fdiv(*arguments, **keywords))

        def fptrunc(self, *arguments, **keywords):
            return self.as_on_gpu(super().fptrunc(*arguments, **keywords))

    class OnCpu(Device):
        """A device's instructions, less those that a CPU does not know."""

        def product(self, a, b):
            return Vector(self, self.b.as_on_gpu(self.b.fmul(a.value, b.value)))

        def magnitude(self, a):
            return self.call("llvm.fabs", [a])

        def maximum_number(self, a, b):
            return self.where(a > b, a, b)

        larger = maximum_number  # keeps a NaN in b

        def quotient(self, a, b):
            return Vector(self, self.b.fdiv(a.value, b.value))

        def exp2(self, t):
            power = self.call("llvm.exp2", [t])
            flushed = self.where(power < self.const(2.0**-126), self.const(0.0), power)
            return Vector(self, self.b.as_on_gpu(flushed.value))

        def fma(self, a, b, c):
            return Vector(self, self.b.as_on_gpu(super().fma(a, b, c).value))

        def opaque(self, value):
            return value


def body(functions, o, values):
    """What one thread does with a lane that it holds alone."""
    if functions.job.op == "softmax":
        return functions._softmax(o, values)
    known = functions._sums(o, values, None)
    careful = functions._careful_sums(o, values, known, None)  # keeps what is good enough
    return functions._logarithms(o, values, careful)


@functools.cache
def compiled(op, dtype, n):
    """``f(address of x, address of out)`` for lanes of n numbers."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    job = Job("whole", op, dtype, dtype, True, Group(1, 1), 1, n, 1, 1)
    module = ir.Module()
    module.triple = binding.get_default_triple()
    kind = ir.FunctionType(ir.VoidType(), [I64, I64])
    function = ir.Function(module, kind, "run")
    b = Builder(function.append_basic_block())
    o, form = OnCpu(b, job.real), job.form
    x, out = (b.inttoptr(place, form.element.as_pointer()) for place in function.args)
    places = [[ir.Constant(I32, i)] for i in range(n)]
    values = [form.widen(o, b.load(b.gep(x, place))) for place in places]
    results = body(Functions(job), o, values)
    for result, place in zip(results, places, strict=False):
        b.store(o._stored(form, result), b.gep(out, place))
    b.ret_void()
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten()
    )
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), target)
    engine.finalize_object()
    address = engine.get_function_address("run")
    run = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)(address)
    return engine, run


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_traps_on_a_devices_instructions(dtype, op):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for name, trap in cases.VALUES.items():
        x = trap.lane(dtype)
        if x.size > 8:
            continue
        out = np.zeros(1 if op == "logsumexp" else x.size, x.dtype)
        compiled(op, dtype, x.size)[1](x.ctypes.data, out.ctypes.data)
        try:
            oracle.assert_right(op, out[0] if op == "logsumexp" else out, x)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
