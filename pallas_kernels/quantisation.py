"""Keys and values in fewer bits: the formats of a pool, and what codes and scales mean.

A vector of a token and head, ``x`` ``[D]``, is kept as codes and one float32 scale, ``x = scale * codes``: symmetric,
so that a kernel has nothing to subtract, and per token, so that a write touches nothing that was there before. The
scale leaves the inner products: of a key it multiplies the score, of a value the weight (``q . (s c) = s (q . c)``),
and codes of all formats are exact in bfloat16. What a kernel has to do for an element is a conversion.

========  ===================  =====================  ==========================
format    codes                bytes of a vector      largest error of an element
========  ===================  =====================  ==========================
fp8_e4m3  float8_e4m3fn        ``D + 4``              2**-4 of the element, or 2**-10 of ``scale``
int8      int8, -127 to 127    ``D + 4``              ``max |x| / 254``
int4      -7 to 7, two a byte  ``D / 2 + 4``          ``max |x| / 14``
========  ===================  =====================  ==========================

Byte ``j`` of an int4 vector holds elements ``j`` (its low half) and ``j + D / 2``: whoever unpacks a vector has its
two halves side by side, each in order, and a product over D becomes two over D / 2.

The formats are those of vLLM's per-token-head caches and of KIVI (arXiv:2402.02750), with the keys scaled per token.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class KVFormat:
    """How a pool keeps its vectors.

    Attributes:
      name: as users write it.
      storage: dtype of the pool's arrays, from which the format is known again.
      largest: the code of the largest element of a vector.
      per_byte: elements in one element of the arrays, 1 or 2.
    """

    name: str
    storage: jnp.dtype
    largest: float
    per_byte: int = 1


FORMATS: dict[str, KVFormat] = {
    "fp8_e4m3": KVFormat("fp8_e4m3", jnp.dtype(jnp.float8_e4m3fn), 448.0),
    "int8": KVFormat("int8", jnp.dtype(jnp.int8), 127.0),
    "int4": KVFormat("int4", jnp.dtype(jnp.uint8), 7.0, 2),
}


def format_of(dtype: Any) -> KVFormat | None:
    """The format of arrays of a dtype; None where they hold the vectors as they are."""
    return _by_storage().get(jnp.dtype(dtype))


@cache
def _by_storage() -> dict[jnp.dtype, KVFormat]:
    return {kind.storage: kind for kind in FORMATS.values()}


def quantise(vectors: jax.Array, kind: KVFormat) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of vectors.

    Args:
      vectors: float ``[..., D]``; D even for int4.
      kind: of ``FORMATS``.

    Returns:
      codes ``[..., D / per_byte]`` in ``kind.storage``, and float32 scales ``[...]``: the largest absolute value over
      ``kind.largest``, and 1 where no element reaches 1e-30. Rounding is to nearest, ties to even.
      A vector with NaN or infinity in it has such a scale, too: all of it reads as NaN.
    """
    vectors = vectors.astype(jnp.float32)
    largest = jnp.abs(vectors).max(axis=-1)
    # A scale below 2**-126 would be rounded to zero on devices that have no smaller numbers.
    scale = jnp.where(largest < 1e-30, 1.0, largest * (1.0 / kind.largest))
    scaled = vectors * (1.0 / scale)[..., None]
    # Rounding of the two factors can carry the largest element past its code, which fp8 would turn into NaN.
    scaled = jnp.clip(scaled, -kind.largest, kind.largest)
    if kind.storage == jnp.float8_e4m3fn:
        return scaled.astype(kind.storage), scale
    codes = jnp.round(scaled).astype(jnp.int8)
    return (pack_int4(codes) if kind.per_byte == 2 else codes), scale


def codes_of(stored: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The codes as numbers, ``[..., D]`` of ``dtype``: exact in float32, bfloat16 and float16."""
    if stored.dtype == jnp.uint8:
        stored = unpack_int4(stored)
    return stored.astype(dtype)


def dequantise(stored: jax.Array, scale: jax.Array) -> jax.Array:
    """The vectors, float32 ``[..., D]``, of stored codes ``[..., D / per_byte]`` and scales ``[...]``."""
    return codes_of(stored) * scale[..., None]


def pack_int4(codes: jax.Array) -> jax.Array:
    """int8 codes ``[..., D]`` from -8 to 7 to uint8 ``[..., D / 2]``."""
    low, high = jnp.split(lax.bitcast_convert_type(codes, jnp.uint8), 2, axis=-1)
    return (low & 15) | (high << 4)


def unpack_int4(packed: jax.Array) -> jax.Array:
    """The inverse of ``pack_int4``."""
    # A shift to the left and back fills the upper half of a byte with its sign.
    signed = lax.bitcast_convert_type(packed, jnp.int8)
    return jnp.concatenate(
        [jnp.right_shift(jnp.left_shift(signed, 4), 4), jnp.right_shift(signed, 4)], axis=-1
    )
