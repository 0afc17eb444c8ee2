"""Small programs written for these tests: one that is right, and ones with the faults that the checks must find."""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels import KVPool, cache_scatter
from jaxpaged.pallas_kernels.mosaic_gpu import gpu_target, kernel, store_global
from tests.gpu_compile.case import ALL_TARGETS, CompileCase, Expects, Program
from tests.gpu_compile.engine_cases import step_program
from tests.gpu_compile.pool_cases import IN_PLACE, int32, pool_shape

ROWS, COLUMNS = 16, 256
MMA = Expects(min_kernels=1, has_async_copies=True, instructions=frozenset({"mma.sync", "ldmatrix"}))


def products(num_products: int = 1, stages: int = 1, has_tma: bool | None = None) -> Program:
    """``num_products`` sums of matrix products by ``mma.sync``, all in registers at the same time.

    One accumulator takes 32 registers of a thread, so eight of them spill.

    Args:
      num_products: accumulators.
      stages: how many tiles shared memory has room for, 8 KiB each; only the first is used.
      has_tma: how the tile comes, by TMA or by cp.async; None for what the target has.
    """
    lhs, rhs, out = (
        layout(jnp.bfloat16, m_warps=1)
        for layout in (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
    )

    def body(a_ref: Any, b_ref: Any, out_ref: Any, smem: Any, *barriers: Any) -> None:
        if barriers:
            plgpu.copy_gmem_to_smem(b_ref, smem.at[0], barriers[0])
            plgpu.barrier_wait(barriers[0])
        else:
            plgpu.copy_gmem_to_smem(b_ref, smem.at[0], oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
            plgpu.wait_gmem_to_smem(0)
        b = plgpu.load(smem.at[0], layout=rhs, optimized=False)
        zero = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), out)

        def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            a = [plgpu.load(a_ref.at[i, j], layout=lhs, optimized=False) for j in range(num_products)]
            return tuple(plgpu.mma(total, a_j, b) for total, a_j in zip(sums, a, strict=True))

        for j, total in enumerate(lax.fori_loop(0, 8, step, (zero,) * num_products)):
            store_global(out_ref.at[j], total)

    def program(a: jax.Array, b: jax.Array) -> jax.Array:
        target = gpu_target()
        assert target is not None
        by_tma = target.has_tma if has_tma is None else has_tma
        return kernel(
            "planted",
            body,
            out_type=jax.ShapeDtypeStruct((num_products, ROWS, COLUMNS), jnp.float32),
            grid=(1,),
            grid_names=("block",),
            scratch_types=[
                plgpu.SMEM((stages, ROWS, COLUMNS), jnp.bfloat16),
                *([plgpu.Barrier()] if by_tma else []),
            ],
        )(a, b)

    a = jax.ShapeDtypeStruct((8, num_products, ROWS, ROWS), jnp.bfloat16)
    return Program(program, (a, jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bfloat16)))


def scatter_without_donation() -> Program:
    """All of the pool is copied, because it is not donated."""

    def program(kv_pool: KVPool, new: jax.Array, slots: jax.Array) -> KVPool:
        return cache_scatter(kv_pool, new, new, 0, slots)

    return Program(program, (pool_shape(), jax.ShapeDtypeStruct((8, 8, 128), jnp.bfloat16), int32(8)))


def old_pool_read_late() -> Program:
    """The pool is donated, but read again beside its successor, so that both must exist."""

    def program(kv_pool: KVPool, new: jax.Array, slots: jax.Array) -> tuple[KVPool, jax.Array]:
        changed = cache_scatter(kv_pool, new, new, 0, slots)
        return changed, kv_pool.k.at[slots].get() - changed.k.at[slots].get()

    args = (pool_shape(), jax.ShapeDtypeStruct((8, 8, 128), jnp.bfloat16), int32(8))
    return Program(program, args, (0,))


def inlined_tile() -> Program:
    """A deterministic step of one tile, compiled without being told to keep it a loop."""
    return step_program("mosaic_gpu", 8, deterministic=True)._replace(compiler_options={})


def abort() -> Program:
    """Ends the process as LLVM does when it cannot select an instruction."""
    os.abort()


SOUND = CompileCase("planted-nothing", products, ALL_TARGETS, MMA)
FAULTY = (
    CompileCase("planted-spill", partial(products, 8), ("h200", "a100"), MMA),
    CompileCase("planted-too-much-smem", partial(products, stages=16), ("a40",), MMA),
    CompileCase("planted-wrong-gpu", partial(products, has_tma=True), ("a100",), MMA),
    CompileCase("planted-abort", abort),
    CompileCase("planted-no-wgmma", products, expects=Expects(instructions=frozenset({"wgmma.mma_async"}))),
    CompileCase("planted-no-donation", scatter_without_donation, expects=IN_PLACE),
    CompileCase("planted-late-read", old_pool_read_late, expects=IN_PLACE),
    CompileCase("planted-inlined-tile", inlined_tile, expects=Expects(max_temp_share=1 / 4)),
)
