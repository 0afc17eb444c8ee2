"""The two pytrees that every paged operation takes: the KV pool and the ragged batch over it."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["num_layers"])
@dataclass(frozen=True)
class KVPool:
    """All KV memory of a model: one array for keys, one for values, every layer in it.

    Attributes:
      k, v: ``[L*N, Hkv, S, D]``. Block ``b`` of layer ``l`` is entry ``l * N + b``.
      num_layers: L.

    Why this layout. *Head-major*: the keys of one block and head, what one thread block of a kernel needs, are
    contiguous: 4 KiB at S=16, D=128 in bfloat16, one box of a bulk copy that lands in swizzled shared memory, and
    whole DRAM bursts; token-major it would be S pieces of 256 bytes, ``Hkv * D`` apart. The price is the scatter's: a
    token's heads go to Hkv places instead of one. It writes one token where attention reads thousands.
    *K and V apart*: attention can release a tile of keys while it still waits for the values, and a pool may give the
    two different dtypes. *All layers in one array*: XLA copies the slices of a stacked ``[L, ...]`` pool.
    FlashInfer found no significant difference between head-major and token-major in 16 bits (arXiv:2501.01005).
    Not measured on a GPU yet.

    Block 0 of each layer is the dummy block: padding may write to it, no table of a real row names it.
    """

    k: jax.Array
    v: jax.Array
    num_layers: int

    @classmethod
    def zeros(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: jnp.dtype,
    ) -> "KVPool":
        """A pool of zeros: stale NaN in unused slots would leak through ``0 * NaN``."""
        shape = (num_layers * num_blocks, num_kv_heads, block_size, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), num_layers)

    @property
    def num_blocks(self) -> int:
        """N, the dummy block included."""
        return self.k.shape[0] // self.num_layers

    @property
    def block_size(self) -> int:
        """S."""
        return self.k.shape[2]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["block_tables", "seq_lens", "query_start_loc", "rows", "positions", "slots"],
    meta_fields=[],
)
@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens a step computes and where their sequences live; padded to a bucket.

    Attributes:
      block_tables: int32 ``[B, M]``, block ids of each row in the order of its positions; 0 beyond its end.
      seq_lens: int32 ``[B]``, tokens of the row in the cache after this step; 0 for a padding row.
      query_start_loc: int32 ``[B+1]``, cumulative query tokens; row ``b`` owns tokens
        ``query_start_loc[b]:query_start_loc[b+1]``. The last entry is the number of real tokens.
      rows: int32 ``[T]``, the row of each token; 0 for padding.
      positions: int32 ``[T]``, the position of each token in its sequence; 0 for padding.
      slots: int32 ``[T]``, where its key and value go, ``block_id * S + offset``; 0 (dummy block) for padding.
    """

    block_tables: jax.Array
    seq_lens: jax.Array
    query_start_loc: jax.Array
    rows: jax.Array
    positions: jax.Array
    slots: jax.Array
