"""Functions that Numba compiles once and keeps on disk: their arguments, names and machine code."""

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import NativeValue, box, models, register_model, unbox

log = logging.getLogger(__name__)

I64 = ir.IntType(64)
BYTES = ir.IntType(8).as_pointer()  # what C calls a void pointer
WORD_BYTES = 8
HEAD_WORDS = object.__basicsize__ // WORD_BYTES  # of every object

# -- arguments that are an address and nothing else -----------------------------------------------
# Reading the data pointer takes one instruction; unboxing a Numba array takes 0.1 us, and compiles
# again for every number of dimensions.


def word(b: ir.IRBuilder, address: ir.Value, index: int | ir.Value) -> ir.Value:
    """A pointer to one of the words at an address."""
    if isinstance(index, int):
        index = ir.Constant(I64, index)
    place = b.add(address, b.mul(index, ir.Constant(I64, WORD_BYTES)))
    return b.inttoptr(place, I64.as_pointer())


class ArrayObject:
    """A NumPy array in machine code: the first fields of PyArrayObject, a part of NumPy's ABI."""

    FIELDS = ("data", "ndim", "shape", "strides", "base", "descr", "flags")
    INTS = ("ndim", "flags")  # of 32 bits; all others are words

    def __init__(self, builder: ir.IRBuilder, address: ir.Value) -> None:
        self.b = builder
        self.address = address

    def _word(self, index: int) -> ir.Value:
        return word(self.b, self.address, index)

    @property
    def kind(self) -> ir.Value:
        """The object's type, the last word of every object's head."""
        return self.b.load(self._word(HEAD_WORDS - 1))

    def __getattr__(self, name: str) -> ir.Value:
        place = self._word(HEAD_WORDS + self.FIELDS.index(name))
        if name in self.INTS:
            half = self.b.bitcast(place, ir.IntType(32).as_pointer())
            return self.b.sext(self.b.load(half), I64)
        return self.b.load(place)


class Address(types.Type):
    """The data pointer of an array of anything; None is 0."""

    def __init__(self, name: str = "nbsoftmax.Address") -> None:
        super().__init__(name=name)


class Target(Address):
    """The address of x, whose type says which kernel is meant."""

    def __init__(self, job: object) -> None:
        self.job = job
        super().__init__(name=f"nbsoftmax.Target({job})")


class Object(types.Type):
    """Any object of the interpreter, where it is; as a result, a reference that is given away."""

    def __init__(self) -> None:
        super().__init__(name="nbsoftmax.Object")


@register_model(Address)
@register_model(Target)
@register_model(Object)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, I64)


@unbox(Address)
@unbox(Target)
def _unbox_address(typ: Any, obj: ir.Value, c: Any) -> NativeValue:
    data = ArrayObject(c.builder, c.builder.ptrtoint(obj, I64)).data
    none = c.builder.icmp_unsigned("==", obj, c.pyapi.borrow_none())
    return NativeValue(c.builder.select(none, ir.Constant(I64, 0), data))


@unbox(Object)
def _unbox_object(typ: Any, obj: ir.Value, c: Any) -> NativeValue:
    return NativeValue(c.builder.ptrtoint(obj, I64))


@box(Object)
def _box_object(typ: Any, value: ir.Value, c: Any) -> ir.Value:
    return c.builder.inttoptr(value, c.pyapi.pyobj)


ADDRESS = Address()
OBJECT = Object()


# -- the functions --------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A compiled function."""

    call: Callable[..., Any]
    address: int  # of its machine code, for compiled code to call


def _digest() -> str:
    here = Path(__file__).parent
    kernels = ("_cpu_kernels", "_direct", "_entry", "_formats", "_handover")
    below = ("_llvm", "_scalars", "_semantics", "_simd")
    files = (here / f"{name}.py" for name in kernels + below)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# Of every file that shapes machine code, as it was when this process read it. It is part of each
# function's name: Numba's cache does not see a change in a file that the function's own file
# imports, and would go on running the old binary.
_SOURCES = _digest()


def function(
    template: FunctionType, words: Iterable[object], cache: bool = True, nogil: bool = True
) -> Any:
    """A Numba function of its own name, so that it has its own files in the cache.

    Numba numbers the binaries of one function without a lock: two processes that compile two at
    once would give both the same number, and a third would load the wrong one.
    """
    name = "_".join([*map(str, words), _SOURCES])
    code = template.__code__.replace(co_name=name, co_qualname=name)
    made = FunctionType(code, template.__globals__, name)
    made.__qualname__ = name
    try:
        return njit(nogil=nogil, cache=cache)(made)
    except RuntimeError:  # no folder for the cache can be written
        return njit(nogil=nogil)(made)


def ready(
    template: FunctionType,
    words: Iterable[object],
    signature: tuple[types.Type, ...],
    nogil: bool = True,
) -> Entry:
    """From the disk cache, or compiled now.

    ``nogil``: it lets go of the interpreter, for it may take long and needs none of its objects.
    """
    found = function(template, words, nogil=nogil)
    return _from_disk(found, signature) or _compile(
        found, signature, lambda: function(template, words, cache=False, nogil=nogil)
    )


def call_address(b: ir.IRBuilder, address: ir.Value, arguments: list[ir.Value]) -> None:
    """Call an `Entry` that raises nothing and returns None at its address, with words."""
    kinds = [BYTES.as_pointer(), BYTES.as_pointer(), *[I64] * len(arguments)]
    kind = ir.FunctionType(ir.IntType(32), kinds).as_pointer()
    places = [cgutils.alloca_once(b, BYTES) for _ in range(2)]
    b.call(b.inttoptr(address, kind), [*places, *arguments])


def _entry(result: Any) -> Entry:
    name = result.fndesc.llvm_func_name
    return Entry(result.entry_point, result.library.get_pointer_to_function(name))


def _from_disk(function: Any, signature: tuple[types.Type, ...]) -> Entry | None:
    """The cached function, without waiting for all that other compiled code may use.

    Numba's own way first imports it, scipy.linalg included: 0.3 s for functions no kernel calls.
    """
    try:
        found = function._cache._load_overload(signature, cpu_target.target_context)
    except Exception:  # another version of Numba, an unreadable cache: the usual way decides
        log.debug("no quick way to the cached function", exc_info=True)
        return None
    return _entry(found) if found is not None else None


def _compile(
    function: Any, signature: tuple[types.Type, ...], uncached: Callable[[], Any]
) -> Entry:
    def compiled(function: Any) -> Entry:
        function.compile(signature)
        return _entry(function.overloads[signature])

    try:
        return compiled(function)
    except Exception:
        log.debug("the cache is damaged, full or gone", exc_info=True)
    try:
        function._cache.flush()
        return compiled(function)
    except Exception:
        log.debug("the function is compiled for this process alone", exc_info=True)
        return compiled(uncached())
