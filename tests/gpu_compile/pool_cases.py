"""Cases of the operations that write into the pool: cache scatter and block copy."""

import importlib
import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels import KVPool, cache_scatter, copy_blocks
from jaxpaged.pallas_kernels.quantisation import FORMATS
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
    """An abstract pool, by default of 1 GiB for keys and as much for values; ``dtype`` may name a quantised format."""
    sizes = {"num_kv_heads": num_kv_heads, "block_size": block_size, "head_dim": head_dim}
    zeros = partial(KVPool.zeros, num_layers=num_layers, num_blocks=num_blocks, dtype=dtype, **sizes)
    return jax.eval_shape(zeros)


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
    dtype = kv_pool.k.dtype if kv_pool.format is None else jnp.bfloat16
    new = jax.ShapeDtypeStruct((num_tokens, kv_pool.num_kv_heads, kv_pool.head_dim), dtype)
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
# Codes and scales of keys and values leave from one launch.
QUANTISED = Expects(updates_in_place=True, min_kernels=1)

CASES = (
    CompileCase("scatter-xla-decode", partial(scatter_program, "xla", 64), ALL_TARGETS, IN_PLACE),
    CompileCase("scatter-xla-prefill", partial(scatter_program, "xla", 2048), ("h200",), IN_PLACE),
    CompileCase("copy-xla", partial(copy_program, "xla"), ("h200", "a100"), IN_PLACE),
    # XLA:CPU converts a whole pool of fp8 to write to it; for GPUs it must not.
    CompileCase(
        "scatter-xla-fp8", partial(scatter_program, "xla", 64, dtype="fp8_e4m3"), ("h200", "a100"), IN_PLACE
    ),
    CompileCase("copy-xla-fp8", partial(copy_program, "xla", dtype="fp8_e4m3"), ("h200", "a100"), IN_PLACE),
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
    *(
        CompileCase(
            f"scatter-mosaic-{kind}-{name}",
            partial(scatter_program, "mosaic_gpu", num_tokens, dtype=kind, **sizes),
            targets,
            QUANTISED,
        )
        for kind in FORMATS
        for name, num_tokens, sizes, targets in (
            ("decode", 64, {}, ("h200", "a100", "l40", "b200", "rtxpro6000")),
            ("prefill", 16384, {}, ("h200", "a100")),
            ("narrow", 64, {"num_kv_heads": 1, "head_dim": 96}, ("h200",)),
        )
    ),
    *(
        CompileCase(
            f"copy-mosaic-{kind}",
            partial(copy_program, "mosaic_gpu", dtype=kind),
            ("h200", "a100", "b200", "rtxpro6000"),
            Expects(updates_in_place=True, min_kernels=4),
        )
        for kind in FORMATS
    ),
)
