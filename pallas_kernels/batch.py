"""The two pytrees that every paged operation takes: the KV pool and the ragged batch over it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.quantisation import FORMATS, KVFormat, format_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "k_scale", "v_scale"],
    meta_fields=["num_layers"],
)
@dataclass(frozen=True)
class KVPool:
    """All KV memory of a model: one array for keys, one for values, every layer in it.

    Attributes:
      k, v: ``[L*N, Hkv, S, D]``, or ``[L*N, Hkv, S, D/2]`` where a byte holds two elements. Block ``b`` of layer ``l``
        is entry ``l * N + b``.
      num_layers: L.
      k_scale, v_scale: float32 ``[L*N, Hkv, S]``, the factor of each vector (see ``quantisation``); None where the pool
        holds the vectors as they are.

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
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def zeros(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: Any,
    ) -> "KVPool":
        """A pool of zeros: stale NaN in unused slots would leak through ``0 * NaN``.

        Args:
          num_layers, num_blocks, num_kv_heads, block_size, head_dim: L, N, Hkv, S and D.
          dtype: of the arrays, or the name of a format of ``quantisation.FORMATS``.

        Raises:
          ValueError: two elements a byte, and an odd number of them.
        """
        kind = FORMATS.get(dtype) if isinstance(dtype, str) else format_of(dtype)
        vectors = (num_layers * num_blocks, num_kv_heads, block_size)
        if kind is None:
            k, v = (jnp.zeros((*vectors, head_dim), dtype) for _ in range(2))
            return cls(k, v, num_layers)
        if head_dim % kind.per_byte:
            raise ValueError(f"KVPool.zeros: head_dim={head_dim} must be even for dtype={kind.name!r}")
        k, v = (jnp.zeros((*vectors, head_dim // kind.per_byte), kind.storage) for _ in range(2))
        return cls(k, v, num_layers, jnp.zeros(vectors, jnp.float32), jnp.zeros(vectors, jnp.float32))

    @property
    def num_blocks(self) -> int:
        """N, the dummy block included."""
        return self.k.shape[0] // self.num_layers

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.k.shape[1]

    @property
    def block_size(self) -> int:
        """S."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        kind = self.format
        return self.k.shape[3] * (1 if kind is None else kind.per_byte)

    @property
    def format(self) -> KVFormat | None:
        """How vectors are kept, None as they are."""
        return None if self.k_scale is None else format_of(self.k.dtype)

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """k, v, and the scales of both if there are any: each ``[L*N, Hkv, S, ...]``."""
        found = (self.k, self.v, self.k_scale, self.v_scale)
        return tuple(array for array in found if array is not None)

    def with_arrays(self, arrays: Sequence[jax.Array]) -> "KVPool":
        """The pool with others in the place of ``arrays``, in that order."""
        k, v, *scales = arrays
        return KVPool(k, v, self.num_layers, *scales)

    @property
    def parts(self) -> tuple["KVPool", ...]:
        """Pools of one format each, this one; see ``MixedKVPool``."""
        return (self,)

    def part_of(self, layer: int) -> tuple["KVPool", int]:
        """The pool of one format that holds a layer, and which of its layers that is."""
        return self, layer

    def with_part(self, layer: int, part: "KVPool") -> "KVPool":
        """The pool with another in the place of that of ``part_of(layer)``."""
        del layer
        return part


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["places"])
@dataclass(frozen=True)
class MixedKVPool:
    """A pool whose layers do not all have one format: for each format a pool of the layers that have it.

    A block is a block of all parts: their N and S are equal.

    Attributes:
      parts: one pool for each format.
      places: for each layer its part, and which of the part's layers it is.
    """

    parts: tuple[KVPool, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def zeros(cls, *, dtypes: Sequence[Any], **sizes: int) -> "MixedKVPool":
        """A pool of zeros.

        Args:
          dtypes: of each layer, as in ``KVPool.zeros``.
          **sizes: ``num_blocks``, ``num_kv_heads``, ``block_size`` and ``head_dim``, as there.
        """
        kinds = list(dict.fromkeys(dtypes))
        layers = [[i for i, dtype in enumerate(dtypes) if dtype == kind] for kind in kinds]
        place = {layer: (part, index) for part, held in enumerate(layers) for index, layer in enumerate(held)}
        parts = [
            KVPool.zeros(num_layers=len(held), dtype=kind, **sizes)
            for kind, held in zip(kinds, layers, strict=True)
        ]
        return cls(tuple(parts), tuple(place[layer] for layer in range(len(dtypes))))

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.places)

    @property
    def num_blocks(self) -> int:
        """N, the dummy block included."""
        return self.parts[0].num_blocks

    @property
    def block_size(self) -> int:
        """S."""
        return self.parts[0].block_size

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Those of all parts."""
        return tuple(array for part in self.parts for array in part.arrays)

    def with_arrays(self, arrays: Sequence[jax.Array]) -> "MixedKVPool":
        """The pool with others in the place of ``arrays``, in that order."""
        parts, rest = [], list(arrays)
        for part in self.parts:
            count = len(part.arrays)
            parts.append(part.with_arrays(rest[:count]))
            rest = rest[count:]
        return replace(self, parts=tuple(parts))

    def part_of(self, layer: int) -> tuple[KVPool, int]:
        """The pool of one format that holds a layer, and which of its layers that is."""
        part, index = self.places[layer]
        return self.parts[part], index

    def with_part(self, layer: int, part: KVPool) -> "MixedKVPool":
        """The pool with another in the place of that of ``part_of(layer)``."""
        at = self.places[layer][0]
        return replace(self, parts=(*self.parts[:at], part, *self.parts[at + 1 :]))


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
