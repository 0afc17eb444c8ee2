"""Calls numba-compiled functions from inside jitted XLA:CPU programs, without a C compiler.

``register(name, function)`` wraps a nopython function ``function(frame)`` in a C function with XLA's handler
signature ``XLA_FFI_Error* (XLA_FFI_CallFrame*)`` and registers it as an FFI target. The function gets at its
buffers with ``operand(frame, i)`` and ``result(frame, i)``, raw addresses, and at their shapes with
``operand_dim(frame, i, axis)``. Every field that is read is eight bytes wide, so a frame is walked as 64-bit
words. Field order: ``xla/ffi/api/c_api.h``, which jaxlib carries; its API version is read from there.

The function runs on an XLA thread without the GIL: it must raise nothing and touch no Python object.
"""

import ctypes
import re
import threading
from pathlib import Path
from typing import Any

import jax
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Word offsets into the C structs of c_api.h.
_FRAME_EXTENSION, _FRAME_OPERANDS, _FRAME_RESULTS = 1, 9, 14
_EXTENSION_TYPE, _EXTENSION_METADATA = 1, 3
_METADATA_VERSION, _METADATA_TRAITS = 3, 4
_BUFFER_DATA, _BUFFER_DIMS = 3, 5
_METADATA_EXTENSION_TYPE = 1
_LOW_HALF = 0xFFFFFFFF


@intrinsic
def _word_at(typing_context: Any, address: Any) -> Any:
    """The 64-bit word at a raw address."""
    del typing_context

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), codegen


@intrinsic
def _set_word(typing_context: Any, address: Any, value: Any) -> Any:
    """Writes the 64-bit word at a raw address."""
    del typing_context

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        builder.store(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _call(typing_context: Any, address: Any, frame: Any) -> Any:
    """Calls the C function ``void (int64)`` at a raw address."""
    del typing_context, address, frame

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@numba.njit(cache=True)
def _word(address: int, index: int) -> int:
    return _word_at(address + 8 * index)


@numba.njit(cache=True)
def operand(frame: int, index: int) -> int:
    """Address of the data of operand ``index``."""
    return _word(_word(_word(frame, _FRAME_OPERANDS), index), _BUFFER_DATA)


@numba.njit(cache=True)
def result(frame: int, index: int) -> int:
    """Address of the data of result ``index``."""
    return _word(_word(_word(frame, _FRAME_RESULTS), index), _BUFFER_DATA)


@numba.njit(cache=True)
def operand_dim(frame: int, index: int, axis: int) -> int:
    """Size of one axis of operand ``index``."""
    return _word(_word(_word(_word(frame, _FRAME_OPERANDS), index), _BUFFER_DIMS), axis)


@intrinsic
def float32_pointer(typing_context: Any, address: Any) -> Any:
    """A raw address as a float32 pointer, to be used with ``numba.carray``."""
    del typing_context
    return types.CPointer(types.float32)(types.int64), _address_codegen


@intrinsic
def int32_pointer(typing_context: Any, address: Any) -> Any:
    """A raw address as an int32 pointer, to be used with ``numba.carray``."""
    del typing_context
    return types.CPointer(types.int32)(types.int64), _address_codegen


@intrinsic
def uint8_pointer(typing_context: Any, address: Any) -> Any:
    """A raw address as a byte pointer, to be used with ``numba.carray``."""
    del typing_context
    return types.CPointer(types.uint8)(types.int64), _address_codegen


def _address_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Asks for the cache line of ``array[index]`` (flat index); never faults."""
    del typing_context

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i8, i32 = ir.IntType(8), ir.IntType(32)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), i8.as_pointer())
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32]),
            "llvm.prefetch.p0",
        )
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])

    return types.void(array, types.intp), codegen


def _api_version() -> int:
    """Major and minor number of the installed FFI API, packed as the C struct holds them."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    major, minor = (
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header).group(1))  # type: ignore[union-attr]
        for part in ("MAJOR", "MINOR")
    )
    return major | (minor << 32)


_registered: dict[str, Any] = {}
# Programs are compiled by several threads at once, and XLA refuses a second handler under one name.
_registering = threading.Lock()


def register(name: str, function: Any) -> None:
    """Compiles ``function(frame: int64) -> None`` and registers it as the CPU FFI target ``name``, once.

    Args:
      name: target name for ``jax.ffi.ffi_call``.
      function: a ``numba.njit`` function; it writes the result buffers. Its machine code is cached beside its source.
    """
    with _registering:
        if name not in _registered:
            _registered[name] = _compile_and_register(name, function)


def _compile_and_register(name: str, function: Any) -> Any:
    """What was compiled; the machine code lives as long as these objects."""
    version = _api_version()
    # Reached by its address: a function that the handler calls by name is compiled into it anew in every process,
    # cached or not, which takes a second or two.
    body = numba.cfunc(types.void(types.int64), nopython=True, error_model="numpy", cache=True)(
        function.py_func
    )
    address = body.address

    def handler(frame: int) -> int:
        extension = _word(frame, _FRAME_EXTENSION)
        if extension != 0 and (_word(extension, _EXTENSION_TYPE) & _LOW_HALF) == _METADATA_EXTENSION_TYPE:
            # XLA asks what this handler was built for before it runs it.
            metadata = _word(extension, _EXTENSION_METADATA)
            _set_word(metadata + 8 * _METADATA_VERSION, version)
            _set_word(metadata + 8 * _METADATA_TRAITS, 0)
            return 0
        _call(address, frame)
        return 0

    compiled = numba.cfunc(types.int64(types.int64), nopython=True, error_model="numpy")(handler)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(name, capsule(compiled.address, None, None), platform="cpu")
    return body, compiled
