"""The launch that both forms of the attention kernel share: operands, results, and who takes which item.

Grid: (items, kv heads), heads fastest, so that the heads of a block, which lie side by side in the pool, are read
at about the same time. See ``mosaic_plan`` for items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxpaged.pallas_kernels.mosaic_gpu import kernel, store_global
from jaxpaged.pallas_kernels.paged_attention.mosaic_plan import WorkPlan
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import Item, TileShape, read_item


@dataclass(frozen=True)
class KernelRefs:
    """References to the operands of a launch, inside the kernel, and the kv head of this thread block."""

    q: Any
    pool: tuple[Any, Any]
    base: Any
    tables: Any
    operands: Sequence[Any]
    out: Any
    log_sums: Any
    scratch: Sequence[Any]
    head: Any
    scales: tuple[Any, ...] = ()

    def store(self, item: Item, results: Sequence[jax.Array], log_sum: jax.Array) -> None:
        """Writes the partial result of an item, columns side by side, whatever the layout of its registers."""
        first = 0
        for result in results:
            store_global(self.out.at[item.index, self.head, :, pl.ds(first, result.shape[1])], result)
            first += result.shape[1]
        store_global(self.log_sums.at[item.index, self.head], log_sum)


ForItems = Callable[[Callable[[Item], None]], None]


@runtime_checkable
class Form(Protocol):
    """One way to attend: what it needs of shared memory and threads, and its code."""

    def scratch(self, shape: TileShape, dtype: Any, interpreted: bool) -> list[Any]:
        """Scratch types of the kernel."""

    def threads(self) -> dict[str, Any]:
        """Arguments of the kernel that say how many warpgroups it has."""

    def body(self, shape: TileShape, refs: KernelRefs, for_items: ForItems) -> None:
        """The kernel; ``for_items`` calls a function for each item of this thread block."""


def attend_items(
    form: Form,
    shape: TileShape,
    q: jax.Array,
    pool: tuple[jax.Array, ...],
    base: jax.Array,
    tables: jax.Array,
    plan: WorkPlan,
    operands: tuple[jax.Array, ...],
    *,
    grid_items: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends every item of a plan.

    Args:
      form: ``MMA`` or ``WGMMA``.
      shape: static sizes.
      q: ``[P, Hkv, M, D]``, queries packed into tiles; for a quantised pool with D as ``mosaic_codes.by_part`` has it,
        and so is the result's.
      pool: keys and values, ``[L*N, Hkv, S, D]``, or the words of their codes and float32 ``[L*N, Hkv, S]`` scales.
      base: int32 ``[1]``, the layer's first block.
      tables: int32 ``[B, M]``.
      plan: the batch's items, ``W`` at most.
      operands: see ``mosaic_operands``.
      grid_items: thread blocks along the items; with fewer than ``W`` each takes several.
      interpret: see ``mosaic_gpu.kernel``.

    Returns:
      float32 ``[W, Hkv, M, D]`` outputs and ``[W, Hkv, M]`` base-2 log-sums; past ``num_items`` unwritten.
    """
    max_items, (_, num_kv_heads, tile_m, head_dim) = plan.items.shape[0], q.shape
    run = kernel(
        f"paged_attention_{shape.config.form}",
        partial(_body, form, shape, max_items, len(pool), len(operands), plan.key_tiles is not None),
        out_type=[
            jax.ShapeDtypeStruct((max_items, num_kv_heads, tile_m, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((max_items, num_kv_heads, tile_m), jnp.float32),
        ],
        grid=(grid_items, num_kv_heads),
        grid_names=("item", "head"),
        scratch_types=form.scratch(shape, q.dtype, interpret is not None),
        interpret=interpret,
        **form.threads(),
    )
    listed = () if plan.key_tiles is None else (plan.key_tiles,)
    out, log_sums = run(q, *pool, base, tables, plan.items, plan.num_items, *listed, *operands)
    return out, log_sums


def _body(
    form: Form,
    shape: TileShape,
    max_items: int,
    num_pool: int,
    num_operands: int,
    has_key_tiles: bool,
    q: Any,
    *refs: Any,
) -> None:
    pool, (base, tables, items, num_items, *rest) = refs[:num_pool], refs[num_pool:]
    key_tiles, rest = (rest[0], rest[1:]) if has_key_tiles else (None, rest)
    operands, rest = rest[:num_operands], rest[num_operands:]
    head = lax.axis_index("head")
    kernel_refs = KernelRefs(
        q, (pool[0], pool[1]), base, tables, operands, rest[0], rest[1], rest[2:], head, pool[2:]
    )
    mine, stride = lax.axis_index("item"), lax.axis_size("item")

    def for_items(attend: Callable[[Item], None]) -> None:
        if stride == max_items:
            pl.when(mine < num_items[0])(lambda: attend(read_item(items, mine, key_tiles)))
            return
        rounds = lax.div(num_items[0] - mine + (stride - 1), jnp.int32(stride))
        pl.loop(0, jnp.maximum(rounds, 0))(lambda i: attend(read_item(items, mine + i * stride, key_tiles)))

    form.body(shape, kernel_refs, for_items)
