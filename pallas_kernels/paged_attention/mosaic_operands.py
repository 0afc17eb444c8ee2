"""What a variant's functions need of arrays, laid out for the kernels.

``hoisting`` splits ``score_mod`` and ``mask_mod`` into values that XLA computes and an elementwise rest. Here the
values get the shape in which a thread block reads them: ``[P or 1, Hkv or 1]`` for tile and kv head, then the M
rows of the tile if they differ by head or query position, then the keys if they differ by these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.hoisting import Hoisted, SplitMod, split_mod
from jaxpaged.pallas_kernels.paged_attention.mosaic_plan import WorkPlan
from jaxpaged.pallas_kernels.variant import AttentionVariant

# A value over queries and keys is as large as the scores. Past this it is no longer small beside the KV it goes with.
MAX_OPERAND_BYTES = 2**30


@dataclass(frozen=True)
class OperandAxes:
    """Which axes an operand has."""

    tile: bool
    head: bool
    row: bool
    key: bool

    def shape(self, tiles: int, heads: int, tile_m: int, keys: int) -> tuple[int, ...]:
        """The operand's shape."""
        lead = (tiles if self.tile else 1, heads if self.head else 1)
        return lead + (tile_m,) * self.row + (keys,) * self.key


@dataclass(frozen=True)
class KernelMods:
    """The variant's functions as a kernel calls them; ``axes`` are those of all operands, the score's first."""

    score_mod: SplitMod | None
    mask_mod: SplitMod | None

    @property
    def hoisted(self) -> tuple[Hoisted, ...]:
        """Values of both functions."""
        return tuple(h for mod in (self.score_mod, self.mask_mod) if mod is not None for h in mod.hoisted)

    @property
    def axes(self) -> tuple[OperandAxes, ...]:
        """Axes of each operand."""
        return tuple(_axes_of(h) for h in self.hoisted)

    def __bool__(self) -> bool:
        return self.score_mod is not None or self.mask_mod is not None


def split_mods(variant: AttentionVariant) -> KernelMods:
    """Splits both functions of a variant.

    Raises:
      NotImplementedError: a function does with the score what a kernel cannot.
    """
    score, mask = variant.score_mod, variant.mask_mod
    return KernelMods(
        None if score is None else split_mod(score, True), None if mask is None else split_mod(mask, False)
    )


def _axes_of(hoisted: Hoisted) -> OperandAxes:
    row, head, q_pos, kv_pos = (name in hoisted.axes for name in ("row", "head", "q_pos", "kv_pos"))
    return OperandAxes(tile=row or q_pos, head=head, row=head or q_pos, key=kv_pos)


def too_large_reason(mods: KernelMods, tiles: int, heads: int, tile_m: int, keys: int) -> str | None:
    """Why the values do not fit, or None."""
    for hoisted, axes in zip(mods.hoisted, mods.axes, strict=True):
        shape = axes.shape(tiles, heads, tile_m, keys)
        size = 4
        for extent in shape:
            size *= extent
        if size > MAX_OPERAND_BYTES:
            return (
                f"a variant's array indexed by {' and '.join(hoisted.axes)} would take {size / 2**30:.1f} GiB for "
                f"{tiles} query tiles and {keys} keys, more than {MAX_OPERAND_BYTES / 2**30:.0f} GiB"
            )
    return None


def pack_operands(
    mods: KernelMods, plan: WorkPlan, *, num_heads: int, num_kv_heads: int, tile_m: int, keys: int
) -> tuple[jax.Array, ...]:
    """Evaluates the values over the batch, each in the shape that its ``OperandAxes`` says.

    Args:
      mods: the functions.
      plan: the batch's tiles.
      num_heads: Hq.
      num_kv_heads: Hkv.
      tile_m: rows of a tile.
      keys: key positions to cover.
    """
    group = num_heads // num_kv_heads
    member = jnp.arange(tile_m, dtype=jnp.int32)
    row = plan.tile_rows[:, None, None, None]
    # Rows of the tile past its last head or token repeat it: whatever they hold, it must be an index in range.
    slot = jnp.minimum(member // group, plan.tile_tokens.shape[1] - 1)
    q_pos = (plan.tile_first_pos[:, None] + slot[None, :])[:, None, :, None]
    first_head = group * jnp.arange(num_kv_heads, dtype=jnp.int32)
    head = (first_head[:, None] + (member % group)[None, :])[None, :, :, None]
    kv_pos = jnp.arange(keys, dtype=jnp.int32)[None, None, None, :]
    arrays = []
    for hoisted, axes in zip(mods.hoisted, mods.axes, strict=True):
        value = hoisted.evaluate(row, head, q_pos, kv_pos)
        arrays.append(value.reshape(axes.shape(plan.tile_rows.shape[0], num_kv_heads, tile_m, keys)))
    return tuple(arrays)


def pack_queries(q: jax.Array, plan: WorkPlan, num_kv_heads: int, tile_m: int) -> jax.Array:
    """``[T, Hq, D]`` -> ``[P, Hkv, M, D]``, rows of a tile token by token, each with its group of heads."""
    tiles, tile_q = plan.tile_tokens.shape
    _, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    packed = q[plan.tile_tokens].reshape(tiles, tile_q, num_kv_heads, group, head_dim)
    packed = packed.transpose(0, 2, 1, 3, 4).reshape(tiles, num_kv_heads, tile_q * group, head_dim)
    return jnp.pad(packed, ((0, 0), (0, 0), (0, tile_m - tile_q * group), (0, 0)))


class LoadedOperands:
    """Inside a kernel: the operands of one item.

    What does not differ by key is read once, before the loop over keys; the rest step by step, by a call that
    belongs before the wait for the step's keys, so that both are under way together.
    """

    def __init__(
        self,
        axes: Sequence[OperandAxes],
        refs: Sequence[Any],
        tile: Any,
        head: Any,
        extent: tuple[int, int],
        layout: Any,
    ) -> None:
        self._extent, self._layout = extent, layout
        places = [(tile if a.tile else 0, head if a.head else 0) for a in axes]
        self._operands = [
            (a, ref, at, None if a.key else self._fixed(a, ref, at))
            for a, ref, at in zip(axes, refs, places, strict=True)
        ]

    def _fixed(self, axes: OperandAxes, ref: Any, at: tuple[Any, Any]) -> Any:
        if axes.row:
            return plgpu.load(ref.at[at], layout=self._layout.reduce(1), optimized=False)
        return ref[at]

    def at(self, first_key: Any) -> list[jax.Array]:
        """Each operand over ``[M, tile_kv]`` for the keys from ``first_key`` on."""
        return [self._over_tile(*operand, first_key) for operand in self._operands]

    def _over_tile(
        self, axes: OperandAxes, ref: Any, at: tuple[Any, Any], fixed: Any, first_key: Any
    ) -> jax.Array:
        extent, layout = self._extent, self._layout
        keys = pl.ds(first_key, extent[1])
        if axes.key and axes.row:
            return plgpu.load(ref.at[(*at, slice(None), keys)], layout=layout, optimized=False)
        if axes.key:
            line = plgpu.load(ref.at[(*at, keys)], layout=layout.reduce(0), optimized=False)
            return lax.broadcast_in_dim(line, extent, [1])
        if axes.row:
            return lax.broadcast_in_dim(fixed, extent, [0])
        return plgpu.layout_cast(jnp.broadcast_to(fixed, extent), layout)
