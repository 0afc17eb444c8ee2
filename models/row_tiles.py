"""Computing rows in tiles of one size, so that a row's bits do not depend on how many rows there are.

The order in which a matrix product or a sum over a row adds up follows from the shape of the whole array: XLA chooses
another kernel for 8 rows than for 64. Where rows are computed 16 at a time, whatever their number, each of them goes
through the same program. What remains to be the same is a row's result at every place of its tile; for matrix products
whose tile of rows is a multiple of the kernel's it is. (Batch invariance: He et al., "Defeating nondeterminism in LLM
inference", Thinking Machines Lab 2025.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax


class Rows(Protocol):
    """Applies a function to rows: pytrees of arrays ``[T, ...]`` to a pytree of arrays ``[T, ...]``.

    The function must compute every row from the same row of its arguments alone.
    """

    def __call__(self, function: Callable[..., Any], *arrays: Any) -> Any: ...


def all_rows(function: Callable[..., Any], *arrays: Any) -> Any:
    """The ``Rows`` that computes all of them at once."""
    return function(*arrays)


@dataclass(frozen=True)
class RowTiles:
    """The ``Rows`` that computes them in tiles of ``size`` rows.

    Attributes:
      size: rows of a tile.
      num_rows: int32 []; rows after it are padding, and tiles of nothing else are left out: their results are zero.
        None computes all. The number of tiles is then known when compiling, and a GPU runs the loop without waiting
        for the host, but XLA must be told to keep a loop that runs once.
    """

    size: int
    num_rows: jax.Array | None = None

    def __call__(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """``function(*arrays)``, tile by tile; fewer rows than a multiple of ``size`` are padded with zeros."""
        count = jax.tree.leaves(arrays)[0].shape[0]
        tiles = jax.tree.map(self._cut, arrays)

        def one(tile: tuple[Any, ...]) -> Any:
            # What cuts the tile out and puts it back differs with the number of tiles: nothing is fused with it.
            return lax.optimization_barrier(function(*lax.optimization_barrier(tile)))

        done = lax.map(one, tiles) if self.num_rows is None else self._map_real(one, tiles, self.num_rows)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], done)

    def _cut(self, array: jax.Array) -> jax.Array:
        """[T, ...] -> [tiles, size, ...]."""
        padding = [(0, -array.shape[0] % self.size), *[(0, 0)] * (array.ndim - 1)]
        return jnp.pad(array, padding).reshape(-1, self.size, *array.shape[1:])

    def _map_real(self, one: Callable[[Any], Any], tiles: Any, num_rows: jax.Array) -> Any:
        """``one`` of the tiles that hold rows before ``num_rows``.

        XLA does not know how often this loop runs, so it stays one even where there is a single tile.
        """
        num_tiles = jax.tree.leaves(tiles)[0].shape[0]
        result = jax.eval_shape(one, jax.tree.map(lambda a: a[0], tiles))
        zeros = jax.tree.map(lambda a: jnp.zeros((num_tiles, *a.shape), a.dtype), result)

        def step(index: jax.Array, done: Any) -> Any:
            tile = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), tiles)
            write = lambda a, new: lax.dynamic_update_index_in_dim(a, new, index, 0)  # noqa: E731
            return jax.tree.map(write, done, one(tile))

        return lax.fori_loop(0, -(-num_rows // self.size), step, zeros)
