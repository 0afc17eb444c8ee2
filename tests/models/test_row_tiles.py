"""Rows in tiles of one size: the same as all at once, and the same bits wherever a row is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.models.row_tiles import RowTiles, all_rows

SIZE = 16
WIDTH = 96
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((3 * SIZE + 5, WIDTH))
KERNEL = RNG.standard_normal((WIDTH, 160)) / WIDTH**0.5


def norm_and_product(x: jax.Array, places: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A sum over each row, a product, and another array whose rows belong to the first one's."""
    normed = x / jnp.sqrt((x * x).mean(-1, keepdims=True))
    return normed @ jnp.asarray(KERNEL, x.dtype), places["place"] + 1


@jax.jit
def in_tiles(rows: jax.Array, num_rows: jax.Array | None = None) -> Any:
    places = {"place": jnp.arange(len(rows), dtype=jnp.int32)}
    return RowTiles(SIZE, num_rows)(norm_and_product, rows, places)


@pytest.mark.parametrize("count", [1, SIZE, SIZE + 1, len(ROWS)])
def test_the_same_as_all_at_once(count: int) -> None:
    rows = jnp.asarray(ROWS[:count], jnp.float32)
    expected, places = all_rows(norm_and_product, rows, {"place": jnp.arange(count, dtype=jnp.int32)})
    for num_rows in (None, jnp.int32(count)):
        out, out_places = in_tiles(rows, num_rows)
        np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(out_places, places)


@pytest.mark.parametrize("skips_padding", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_at_every_place_among_any_others(dtype: str, skips_padding: bool) -> None:
    """A single tile is compiled without a loop unless the number of rows is known to the device alone."""
    row = ROWS[0]
    found = []
    for count in (1, SIZE - 2, SIZE, 2 * SIZE, len(ROWS)):
        for place in {0, count // 2, count - 1}:
            rows = ROWS[::-1][:count].copy()
            rows[place] = row
            num_rows = jnp.int32(count) if skips_padding else None
            found.append(np.asarray(in_tiles(jnp.asarray(rows, dtype), num_rows)[0][place], np.float32))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_tiles_of_padding_are_left_out() -> None:
    rows = jnp.asarray(ROWS, jnp.float32)
    out, _ = in_tiles(rows, jnp.int32(SIZE + 1))
    whole, _ = in_tiles(rows)
    np.testing.assert_array_equal(out[: 2 * SIZE], whole[: 2 * SIZE])
    assert not out[2 * SIZE :].any()
    assert not in_tiles(rows, jnp.int32(0))[0].any()
