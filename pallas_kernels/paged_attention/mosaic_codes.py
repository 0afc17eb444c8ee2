"""Codes of a quantised pool inside the attention kernels: words of 16 bits in, operands of the products out.

The pool's arrays are read as 16-bit words, each with two codes (fp8, int8) or four (int4). To copies, swizzles and
``ldmatrix``, transposed or not, a word is what a bfloat16 is, so nothing of these changes but the width. The same code
of every word, say all low bytes, is a *part*: each second or fourth element of the vectors, as a matrix in the very
registers that the words came in. A product over D is the sum of the parts' products, once queries are in their order
(``by_part``); of values each part gives its own columns of the result (``from_parts``). No code is moved between
threads, and none is written back to shared memory.

To convert a part takes a mask, perhaps a shift, and one multiplication and addition for two elements at a time:

* The bits of an integer ``u`` below ``2**(mantissa + 1)`` are those of the number ``u * tiny``, ``tiny`` being the
  smallest subnormal; times the largest power of two that is ``u / unit``. Codes are stored with their sign, so their
  highest bit is flipped first and half of the range subtracted last.
* An e4m3 moved to where the wider format has sign, exponent and mantissa is too small by the difference of the
  biases, subnormals included.

All of it is exact; ``unit`` goes with the scales. Subnormals are numbers to ``fma`` and ``mul`` on bfloat16 and
float16 without ``.ftz`` (PTX ISA). There are no NaN: the codes of e4m3 for these give 480, so that a vector whose
weight is zero adds nothing, whatever its memory holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxpaged.pallas_kernels.quantisation import KVFormat

WORD = jnp.dtype(jnp.uint16)


def codes_per_word(kind: KVFormat) -> int:
    """How many parts a word has."""
    return 2 * kind.per_byte


def ring_width(head_dim: int, kind: KVFormat | None) -> int:
    """Elements of 16 bits that a vector takes: D, or words of codes."""
    return head_dim if kind is None else head_dim // codes_per_word(kind)


def words_of(codes: jax.Array) -> jax.Array:
    """``[..., X]`` bytes as uint16 ``[..., X / 2]``: the same memory, no copy."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return lax.bitcast_convert_type(pairs, WORD)


def by_part(x: jax.Array, kind: KVFormat) -> jax.Array:
    """Reorders the last axis, ``[..., D]``: the elements of part 0 in their order, those of part 1, ..."""
    # Byte j has the elements j and, of int4, j + D / 2; a word has the bytes 2 j and 2 j + 1.
    lead, head_dim = x.shape[:-1], x.shape[-1]
    split = x.reshape(*lead, kind.per_byte, head_dim // codes_per_word(kind), 2)
    return jnp.moveaxis(split, -1, -3).reshape(*lead, head_dim)


def from_parts(x: jax.Array, kind: KVFormat) -> jax.Array:
    """The inverse of ``by_part``."""
    lead, head_dim = x.shape[:-1], x.shape[-1]
    split = x.reshape(*lead, 2, kind.per_byte, head_dim // codes_per_word(kind))
    return jnp.moveaxis(split, -3, -1).reshape(*lead, head_dim)


@dataclass(frozen=True)
class Numbers:
    """What of a 16-bit float format counts here: bits of its mantissa and its bias.

    ``units`` are those of integers and of e4m3. Weights are multiplied by a scale and its unit before they are rounded
    to the format: in float16 that must neither pass its largest number nor be much less than its smallest normal one.
    """

    dtype: Any
    mantissa: int
    bias: int
    units: tuple[float, float]

    @property
    def tiny(self) -> float:
        """The smallest subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def top(self) -> float:
        """The highest power of two."""
        return 2.0**self.bias


NUMBERS = {
    jnp.dtype(n.dtype): n
    for n in (Numbers(jnp.bfloat16, 7, 127, (64.0, 1.0)), Numbers(jnp.float16, 10, 15, (8.0, 32.0)))
}


def unit_of(kind: KVFormat, dtype: Any) -> float:
    """What ``parts_of`` must be multiplied by to be the codes; a power of two."""
    numbers = NUMBERS[jnp.dtype(dtype)]
    return numbers.units[kind.storage == jnp.float8_e4m3fn]


def parts_of(
    words: jax.Array, kind: KVFormat, dtype: Any, layout: Any, *, interpreted: bool
) -> list[jax.Array]:
    """Inside a kernel: every part of words as numbers, in the order of ``by_part``.

    Args:
      words: uint16 of any shape, in registers of ``layout``.
      kind: the pool's format.
      dtype: bfloat16 or float16.
      layout: of registers, with pairs of elements of a row or column in each, as the products' operands have.
      interpreted: whether the kernel runs in the interpreter.

    Returns:
      Codes over ``unit_of``, of the shape of ``words`` and in ``layout``.
    """
    numbers = NUMBERS[jnp.dtype(dtype)]

    def shifted(bits: jax.Array, left: int) -> jax.Array:
        return _shift_lanes(bits, left) if interpreted else _shift_pairs(bits, left, layout)

    value = _value_on_cpu if interpreted else _value
    return [value(numbers, *part) for part in bits_of_parts(words, kind, numbers, shifted)]


def bits_of_parts(
    words: Any, kind: KVFormat, numbers: Numbers, shifted: Callable[[Any, int], Any]
) -> list[tuple[Any, float, float, float]]:
    """Of each part a float's bits, what to multiply it by, to subtract then, and to multiply by last.

    ``shifted`` moves words to the left, or by a negative number to the right; what it fills with is masked.
    """
    make = _float_bits if kind.storage == jnp.float8_e4m3fn else _integer_bits
    return make(words, kind, numbers, shifted)


def _integer_bits(
    words: Any, kind: KVFormat, numbers: Numbers, shifted: Callable[[Any, int], Any]
) -> list[tuple[Any, float, float, float]]:
    """Of int8 or int4; float16 has no power of two that would do in one step."""
    step = numbers.tiny * numbers.top
    last = 1.0 / (numbers.units[0] * step)
    if kind.per_byte == 1:
        words = words ^ _word(0x8080)
        return [(b & _word(0xFF), numbers.top, 128 * step, last) for b in (words, shifted(words, -8))]
    words = words ^ _word(0x8888)
    return [
        (b & _word(0xF << low), numbers.top / 2.0**low, 8 * step, last)
        for b in (words, shifted(words, -8))
        for low in (0, 4)
    ]


def _float_bits(
    words: Any, kind: KVFormat, numbers: Numbers, shifted: Callable[[Any, int], Any]
) -> list[tuple[Any, float, float, float]]:
    """Of e4m3, whose bias is 7 and whose mantissa has 3 bits."""
    del kind
    sign, wider = _word(0x8000), 15 - numbers.mantissa - 4
    magnitude = _word(0x7F00 >> wider)
    low = (shifted(words, 8 - wider) & magnitude) | (shifted(words, 8) & sign)
    high = (shifted(words, -wider) & magnitude) | (words & sign)
    return [(bits, 2.0 ** (numbers.bias - 7) / numbers.units[1], 0.0, 1.0) for bits in (low, high)]


def _word(value: int) -> Any:
    return np.uint16(value)


def _value(numbers: Numbers, bits: jax.Array, factor: float, subtracted: float, last: float) -> jax.Array:
    exact = lambda x: jnp.asarray(x, numbers.dtype)  # noqa: E731
    scaled = lax.bitcast_convert_type(bits, numbers.dtype) * exact(factor)
    scaled = scaled - exact(subtracted) if subtracted else scaled
    return scaled * exact(last) if last != 1.0 else scaled


def _value_on_cpu(
    numbers: Numbers, bits: jax.Array, factor: float, subtracted: float, last: float
) -> jax.Array:
    """As ``_value``, where subnormals are zero: XLA on CPUs flushes them."""
    bits = bits.astype(jnp.int32)
    exponent, mantissa = (bits & 0x7FFF) >> numbers.mantissa, bits & ((1 << numbers.mantissa) - 1)
    whole = jnp.where(
        exponent == 0, mantissa, (mantissa | 1 << numbers.mantissa) << jnp.maximum(exponent - 1, 0)
    )
    signed = jnp.where(bits >= 0x8000, -whole, whole).astype(jnp.float32)
    scaled = signed * np.float32(numbers.tiny * factor) - np.float32(subtracted)
    return (scaled * np.float32(last)).astype(numbers.dtype)


def _shift_lanes(words: jax.Array, left: int) -> jax.Array:
    return words << _word(left) if left > 0 else words >> _word(-left)


def _shift_pairs(words: jax.Array, left: int, layout: Any) -> jax.Array:
    """Shifts registers of two words as a whole, one instruction where LLVM makes six of two shifts of 16 bits.

    Bits cross from one word to the other: those that ``bits_of_parts`` masks.
    """
    result = plgpu.ShapeDtypeStruct(words.shape, words.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def shift(_: Any, held: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((1,), i32)
        by = vector.broadcast(pair, mgpu.c(abs(left), i32))
        move = arith.shli if left > 0 else arith.shrui
        registers = np.empty_like(held.registers)
        for at, register in np.ndenumerate(held.registers):
            registers[at] = vector.bitcast(register.type, move(vector.bitcast(pair, register), by))
        return mgpu.FragmentedArray(_registers=registers, _layout=held.layout, _is_signed=held.is_signed)

    return shift(words)
