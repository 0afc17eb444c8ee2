"""Choosing one token per row: the most likely one, or one drawn by its weight.

Both work on the vocabulary in chunks, [B, V] -> [B, C, S]: one pass reduces every chunk to a number, the
row's chunk is chosen among those, and only that chunk is looked at again. On XLA:CPU this is much
faster than ``jnp.argmax``, whose (value, index) reduction is not vectorised, and than Gumbel-max, which
needs V random numbers per row where a draw by cumulative weight needs two.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

# Chunks this long keep vectors full and leave few chunks; a power of two so that usual vocabularies divide.
_CHUNK_SIZES = (256, 128, 64)


def chunked(values: Array) -> Array:
    """The vocabulary in chunks: float32 [B, V] -> [B, C, S], padded with -inf when no chunk size divides V."""
    rows, vocab_size = values.shape
    # About sqrt(V): the pass over the chunks and the pass within one then cost the same.
    fitting = [size for size in _CHUNK_SIZES if size * size <= max(vocab_size, _CHUNK_SIZES[-1] ** 2)]
    size = next((size for size in fitting if vocab_size % size == 0), None)
    if size is None:
        size = fitting[0]
        values = jnp.pad(values, ((0, 0), (0, -vocab_size % size)), constant_values=-jnp.inf)
    return values.reshape(rows, -1, size)


def chunk_maxima(chunks: Array) -> Array:
    """The largest value of each chunk, [B, C, S] -> [B, C]; NaN counts as -inf."""
    maxima = chunks.max(axis=-1)

    def without_nan() -> Array:
        return jnp.where(jnp.isnan(chunks), -jnp.inf, chunks).max(axis=-1)

    # max() propagates NaN, so NaN is noticed for free and the slower pass runs only when there is one.
    return lax.cond(jnp.isnan(maxima).any(), without_nan, lambda: maxima)


def argmax(chunks: Array, maxima: Array) -> Array:
    """Index of the largest value of each row, the lowest one among equals: int32 [B].

    chunks [B, C, S] with their ``chunk_maxima`` [B, C]. A row of only NaN or -inf gives 0.
    """
    row_max = maxima.max(axis=-1, keepdims=True)
    chunk = _first(maxima == row_max)
    within = _first(_chunk_of(chunks, chunk) == row_max)
    return chunk * chunks.shape[-1] + within


def weights(values: Array, row_max: Array, inverse_temperature: Array, cutoff: Array) -> Array:
    """Probability of each value up to its row's common factor: 1 for the largest, 0 below the cutoff.

    values float32 [B, ...]; row_max, inverse_temperature, cutoff float32 [B]. NaN values weigh 0.
    """
    row_max, inverse_temperature, cutoff = (
        row.reshape(-1, *(1,) * (values.ndim - 1)) for row in (row_max, inverse_temperature, cutoff)
    )
    # Equal to the maximum means a distance of zero even where both are +inf.
    below = jnp.where(values == row_max, 0.0, (values - row_max) * inverse_temperature)
    # Selecting before exp rather than after it: XLA:CPU then vectorises exp, which halves the time.
    return jnp.exp(jnp.where(values >= cutoff, below, -jnp.inf))


def draw(chunks: Array, row_max: Array, inverse_temperature: Array, cutoff: Array, uniforms: Array) -> Array:
    """Draw an index of each row with probability proportional to its ``weights``: int32 [B].

    chunks [B, C, S], row_max, inverse_temperature and cutoff [B], uniforms [B, 2] in [0, 1): the first
    picks the chunk by its total weight, the second the place in it, so that the resolution in either is that
    of a whole float32. An index of weight 0 is never drawn from a row that has any weight.
    """
    totals = weights(chunks, row_max, inverse_temperature, cutoff).sum(axis=-1)
    chunk = _pick(totals, uniforms[:, 0])
    within = _pick(weights(_chunk_of(chunks, chunk), row_max, inverse_temperature, cutoff), uniforms[:, 1])
    return chunk * chunks.shape[-1] + within


def uniforms(seeds: Array, positions: Array) -> Array:
    """Two numbers in [0, 1) for each row that depend on its own seed and position alone: float32 [B, 2].

    seeds uint32 [B, 2] (low and high word), positions int32 [B]. Threefry-2x32 as in Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3" (2011).
    """

    def bits(seed: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, position), (2,), jnp.uint32)

    # 24 bits are what float32 holds exactly below 1; rounding more of them could give 1.0.
    return (jax.vmap(bits)(seeds, positions) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _chunk_of(chunks: Array, index: Array) -> Array:
    """Chunk ``index`` [B] of each row: [B, C, S] -> [B, S]."""
    return jnp.take_along_axis(chunks, index[:, None, None], axis=1)[:, 0]


def _first(mask: Array) -> Array:
    """Index of the first True of each row, 0 when there is none: bool [B, N] -> int32 [B]."""
    places = lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    first = jnp.where(mask, places, mask.shape[1]).min(axis=-1)
    return jnp.where(first < mask.shape[1], first, 0)


def _pick(weight: Array, uniform: Array) -> Array:
    """The place where the cumulated weight passes ``uniform`` of the total: [B, N], [B] -> int32 [B]."""
    cumulated = jnp.cumsum(weight, axis=-1)
    passed = (cumulated > uniform[:, None] * cumulated[:, -1:]) & (weight > 0)
    places = lax.broadcasted_iota(jnp.int32, weight.shape, 1)
    last = jnp.where(weight > 0, places, 0).max(axis=-1)  # where rounding leaves nothing above the target
    return jnp.where(passed.any(axis=-1), _first(passed), last)
