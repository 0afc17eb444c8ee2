"""Vector loops of the CPU kernel over quantised pools: codes to float32, and scales taken in, as LLVM IR.

Codes are bytes, ``quantisation`` says what they mean. A code becomes a float32 exactly. Its scale is left out: of a
key it multiplies the score, of a value the weight, and there are far fewer of these than elements.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from jaxpaged.pallas_kernels.paged_attention.numba_vector import LANES, array_data, loop

_F16, _F32 = ir.HalfType(), ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _splat(kind: Any, lanes: int, value: Any) -> Any:
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def _from_int8(builder: Any, codes: Any, lanes: int) -> list[Any]:
    return [builder.sitofp(codes, ir.VectorType(_F32, lanes))]


def _from_int4(builder: Any, codes: Any, lanes: int) -> list[Any]:
    """The low halves, then the high ones: elements that are half a vector apart."""
    wide = builder.sext(codes, ir.VectorType(_I32, lanes))
    low = builder.ashr(builder.shl(wide, _splat(_I32, lanes, 28)), _splat(_I32, lanes, 28))
    high = builder.ashr(wide, _splat(_I32, lanes, 4))
    return [builder.sitofp(half, ir.VectorType(_F32, lanes)) for half in (low, high)]


def _from_fp8(builder: Any, codes: Any, lanes: int) -> list[Any]:
    """e4m3 as the float16 of the same sign, exponent and mantissa, times 2**8, the difference of their biases.

    Subnormal codes become subnormal float16, whose conversion is exact in every mode of the processor. Subnormal
    float32 in their place would be taken for zero by XLA's threads.
    """
    # Bits 7 to 15 are the sign; one place to the left of the code's exponent it must not stay.
    bits = builder.shl(builder.sext(codes, ir.VectorType(_I16, lanes)), _splat(_I16, lanes, 7))
    half = builder.bitcast(builder.and_(bits, _splat(_I16, lanes, 0xBFFF)), ir.VectorType(_F16, lanes))
    number = builder.fmul(builder.fpext(half, ir.VectorType(_F32, lanes)), _splat(_F32, lanes, 256.0))
    magnitude = builder.and_(codes, _splat(_I8, lanes, 0x7F))
    is_nan = builder.icmp_unsigned("==", magnitude, _splat(_I8, lanes, 0x7F))
    return [builder.select(is_nan, _splat(_F32, lanes, float("nan")), number)]


def _access(builder: Any, pointer: Any, at: Any, kind: Any, lanes: int) -> Any:
    return builder.bitcast(builder.gep(pointer, [at]), ir.VectorType(kind, lanes).as_pointer())


def _decoder(convert: Callable[[Any, Any, int], list[Any]]) -> Any:
    def decode(typing: Any, out: Any, out_at: Any, codes: Any, codes_at: Any, count: Any) -> Any:
        """``out[out_at + i] = codes[codes_at + i]`` for ``i < count``; second parts of bytes to ``count`` further on.

        ``out`` is float32, ``codes`` bytes, both contiguous and of any rank; ``*_at`` are flat offsets.
        """
        del typing, out_at, codes_at, count

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            numbers, stored = (array_data(context, builder, signature.args[i], args[i]) for i in (0, 2))

            def step(lanes: int) -> Any:
                def body(i: Any, _: list[Any]) -> list[Any]:
                    place = _access(builder, stored, builder.add(args[3], i), _I8, lanes)
                    at = builder.add(args[1], i)
                    for part in convert(builder, builder.load(place, align=1), lanes):
                        builder.store(part, _access(builder, numbers, at, _F32, lanes), align=4)
                        at = builder.add(at, args[4])
                    return []

                return body

            whole = builder.and_(args[4], _I64(-LANES))
            loop(builder, _I64(0), whole, LANES, [], step(LANES))
            loop(builder, whole, args[4], 1, [], step(1))
            return context.get_dummy_value()

        at = types.int64
        return types.void(out, at, codes, at, at), codegen

    return intrinsic(decode)


decode_int8, decode_int4, decode_fp8 = _decoder(_from_int8), _decoder(_from_int4), _decoder(_from_fp8)


@intrinsic
def multiply(typing: Any, out: Any, out_at: Any, factors: Any, factors_at: Any, count: Any) -> Any:
    """``out[out_at : out_at + count] *= factors[factors_at : factors_at + count]``, float32; nothing else is read."""
    del typing, out_at, factors_at, count

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, others = (array_data(context, builder, signature.args[i], args[i]) for i in (0, 2))

        def step(lanes: int) -> Any:
            def body(i: Any, _: list[Any]) -> list[Any]:
                place = _access(builder, data, builder.add(args[1], i), _F32, lanes)
                factor = builder.load(_access(builder, others, builder.add(args[3], i), _F32, lanes), align=4)
                builder.store(builder.fmul(builder.load(place, align=4), factor), place, align=4)
                return []

            return body

        whole = builder.and_(args[4], _I64(-LANES))
        loop(builder, _I64(0), whole, LANES, [], step(LANES))
        loop(builder, whole, args[4], 1, [], step(1))
        return context.get_dummy_value()

    at = types.int64
    return types.void(out, at, factors, at, at), codegen
