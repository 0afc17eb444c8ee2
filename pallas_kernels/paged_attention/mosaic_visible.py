"""Which tiles of keys a ``mask_mod`` leaves: the others are not copied, nor computed.

The function is evaluated once a step, by XLA, for every query of a tile and every key that is not hidden by position
anyway, and reduced to one bit for a tile of queries and one of keys: FlexAttention's block mask (arXiv:2412.05496), but
over the real tokens of a ragged batch. Where documents are packed into sequences this is what makes attention linear in
their number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpaged.pallas_kernels.variant import MaskMod

# Values of the mask that exist at a time, should XLA not fuse their evaluation into the reduction.
_MAX_VALUES = 2**27


class QueryTiles(NamedTuple):
    """Tiles of queries: int32 ``[P]`` each."""

    row: jax.Array
    first_pos: jax.Array
    size: jax.Array
    """Tokens."""
    begin: jax.Array
    """First tile of keys that is not hidden by position,"""
    end: jax.Array
    """and the one after the last."""


def visible_key_tiles(
    mask_mod: MaskMod, tiles: QueryTiles, *, tile_q: int, tile_kv: int, num_heads: int, max_len: int
) -> tuple[jax.Array, jax.Array]:
    """Tiles of keys that any query of a tile sees, in any head.

    Args:
      mask_mod: as in ``AttentionVariant``.
      tiles: see ``QueryTiles``.
      tile_q, tile_kv: tokens of a tile of queries and of one of keys.
      num_heads: Hq.
      max_len: tokens a block table has room for.

    Returns:
      int32 ``[P, K]``: their numbers in order, those of the other tiles after them; int32 ``[P]``: how many there are.
    """
    num_tiles, key_tiles = len(tiles.row), -(-max_len // tile_kv)
    at_a_time = max(1, min(key_tiles, _MAX_VALUES // (num_tiles * tile_q * tile_kv)))
    rounds = -(-key_tiles // at_a_time)
    place = jnp.arange(tile_q, dtype=jnp.int32)
    # Places past a tile's last token repeat it.
    place = jnp.minimum(place[None, :], jnp.maximum(tiles.size, 1)[:, None] - 1)
    axes = (num_tiles, 1, tile_q, 1, 1)
    q_pos = (tiles.first_pos[:, None] + place).reshape(axes)
    row = tiles.row.reshape(num_tiles, 1, 1, 1, 1)
    head = jnp.arange(num_heads, dtype=jnp.int32).reshape(1, num_heads, 1, 1, 1)

    def some(first: jax.Array | int) -> jax.Array:
        keys = first * tile_kv + jnp.arange(at_a_time * tile_kv, dtype=jnp.int32)
        kv_pos = keys.reshape(1, 1, 1, at_a_time, tile_kv)
        seen = jnp.vectorize(mask_mod)(row, head, q_pos, kv_pos) & (kv_pos <= q_pos)
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(seen.shape, axes)).any((1, 2, 4))

    if rounds == 1:
        seen = some(0)
    else:

        def one_round(i: jax.Array, seen: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(seen, some(i * at_a_time), (jnp.int32(0), i * at_a_time))

        nothing = jnp.zeros((num_tiles, rounds * at_a_time), bool)
        seen = lax.fori_loop(0, -(-tiles.end.max() // at_a_time), one_round, nothing)[:, :key_tiles]
    number = jnp.arange(key_tiles, dtype=jnp.int32)[None, :]
    seen = seen & (number >= tiles.begin[:, None]) & (number < tiles.end[:, None])
    order = jnp.argsort(jnp.logical_not(seen), axis=1, stable=True)
    return order.astype(jnp.int32), seen.sum(1, dtype=jnp.int32)
