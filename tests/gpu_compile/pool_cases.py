"""Cases of the operations that write into the pool: cache scatter and block copy."""

import importlib
import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels import KVPool, cache_scatter, copy_blocks
from tests.gpu_compile.case import ALL_TARGETS, CompileCase, Expects, Program, UnavailableError

NUM_LAYERS = 2
NUM_BLOCKS = 16384


def pool_shape(
    *,
    num_kv_heads: int = 8,
    block_size: int = 16,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    num_blocks: int = NUM_BLOCKS,
    num_layers: int = NUM_LAYERS,
) -> KVPool:
    """An abstract pool, by default of 1 GiB for keys and as much for values."""
    shape = (num_layers * num_blocks, num_kv_heads, block_size, head_dim)
    array: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return KVPool(array, array, num_layers)


def int32(*shape: int) -> Any:
    """An abstract int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def taking(function: Any, implementation: str | None) -> Any:
    """The function with a named implementation."""
    if implementation is None:
        return function
    if "implementation" not in inspect.signature(function).parameters:
        raise UnavailableError(f"{function.__name__} has no implementations to choose from yet")
    kernels = importlib.import_module(function.__module__.rpartition(".")[0] + ".api")
    if implementation not in getattr(kernels, "IMPLEMENTATIONS", {implementation: None}):
        raise UnavailableError(f"{function.__name__} has no implementation {implementation!r} yet")
    return partial(function, implementation=implementation)


def scatter_program(implementation: str | None, num_tokens: int, **pool: Any) -> Program:
    """Keys and values of ``num_tokens`` tokens into layer 1 of a donated pool."""
    kv_pool = pool_shape(**pool)
    _, num_kv_heads, _, head_dim = kv_pool.k.shape
    new = jax.ShapeDtypeStruct((num_tokens, num_kv_heads, head_dim), kv_pool.k.dtype)
    scatter = taking(cache_scatter, implementation)

    def program(kv_pool: KVPool, k: jax.Array, v: jax.Array, slots: jax.Array) -> KVPool:
        return scatter(kv_pool, k, v, 1, slots)

    return Program(program, (kv_pool, new, new, int32(num_tokens)), (0,))


def copy_program(implementation: str | None, **pool: Any) -> Program:
    """Sixteen block copies in a donated pool."""
    copy = taking(copy_blocks, implementation)
    return Program(copy, (pool_shape(**pool), int32(16), int32(16)), (0,))


IN_PLACE = Expects(updates_in_place=True)
MOSAIC = Expects(updates_in_place=True, min_kernels=1)

CASES = (
    CompileCase("scatter-xla-decode", partial(scatter_program, "xla", 64), ALL_TARGETS, IN_PLACE),
    CompileCase("scatter-xla-prefill", partial(scatter_program, "xla", 2048), ("h200",), IN_PLACE),
    CompileCase("copy-xla", partial(copy_program, "xla"), ("h200", "a100"), IN_PLACE),
    CompileCase("scatter-mosaic-decode", partial(scatter_program, "mosaic_gpu", 64), ALL_TARGETS, MOSAIC),
    CompileCase("scatter-mosaic-prefill", partial(scatter_program, "mosaic_gpu", 2048), ("h200",), MOSAIC),
    *(
        CompileCase(
            f"scatter-mosaic-{dtype}-d{head_dim}-s{block_size}",
            partial(scatter_program, "mosaic_gpu", 64, dtype=dtype, head_dim=head_dim, block_size=block_size),
            ("h200", "a100"),
            MOSAIC,
        )
        for dtype, head_dim, block_size in (("float16", 64, 32), ("float32", 96, 16), ("bfloat16", 256, 128))
    ),
    CompileCase("copy-mosaic", partial(copy_program, "mosaic_gpu"), ALL_TARGETS, MOSAIC),
)
