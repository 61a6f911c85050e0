"""Functions that Numba compiles once and keeps on disk: their arguments, names and machine code."""

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import NativeValue, models, register_model, unbox

log = logging.getLogger(__name__)

I64 = ir.IntType(64)

# -- a Numba argument that is an array's address and nothing else ---------------------------------
# Reading the data pointer takes one instruction; unboxing a Numba array takes 0.1 us, and compiles
# again for every number of dimensions.


class Address(types.Type):
    """The data pointer of an array of anything; None is 0."""

    def __init__(self, name: str = "nbsoftmax.Address") -> None:
        super().__init__(name=name)


class Target(Address):
    """The address of x, whose type says which kernel is meant."""

    def __init__(self, job: object) -> None:
        self.job = job
        super().__init__(name=f"nbsoftmax.Target({job})")


@register_model(Address)
@register_model(Target)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, I64)


@unbox(Address)
@unbox(Target)
def _unbox_address(typ: Any, obj: ir.Value, c: Any) -> NativeValue:
    # PyArrayObject starts with the object head, then `char *data`: a part of NumPy's ABI.
    head = ir.Constant(I64, object.__basicsize__)
    field = c.builder.inttoptr(c.builder.add(c.builder.ptrtoint(obj, I64), head), I64.as_pointer())
    none = c.builder.icmp_unsigned("==", obj, c.pyapi.borrow_none())
    return NativeValue(c.builder.select(none, ir.Constant(I64, 0), c.builder.load(field)))


ADDRESS = Address()


# -- the functions --------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A compiled function."""

    call: Callable[..., Any]
    address: int  # of its machine code, for compiled code to call


def _digest() -> str:
    here = Path(__file__).parent
    kernels = ("_cpu_kernels", "_entry", "_formats", "_handover")
    below = ("_llvm", "_scalars", "_semantics", "_simd")
    files = (here / f"{name}.py" for name in kernels + below)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# Of every file that shapes machine code, as it was when this process read it. It is part of each
# function's name: Numba's cache does not see a change in a file that the function's own file
# imports, and would go on running the old binary.
_SOURCES = _digest()


def function(template: FunctionType, words: Iterable[object], cache: bool = True) -> Any:
    """A Numba function of its own name, so that it has its own files in the cache.

    Numba numbers the binaries of one function without a lock: two processes that compile two at
    once would give both the same number, and a third would load the wrong one.
    """
    name = "_".join([*map(str, words), _SOURCES])
    code = template.__code__.replace(co_name=name, co_qualname=name)
    made = FunctionType(code, template.__globals__, name)
    made.__qualname__ = name
    try:
        return njit(nogil=True, cache=cache)(made)
    except RuntimeError:  # no folder for the cache can be written
        return njit(nogil=True)(made)


def ready(
    template: FunctionType, words: Iterable[object], signature: tuple[types.Type, ...]
) -> Entry:
    """From the disk cache, or compiled now."""
    found = function(template, words)
    return _from_disk(found, signature) or _compile(
        found, signature, lambda: function(template, words, cache=False)
    )


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
