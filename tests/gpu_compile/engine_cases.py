"""Cases of whole steps: the program that the engine runs for a bucket, over a donated pool."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpaged.assembly import GPU_ROW_TILE
from jaxpaged.batch import PackedLayout
from jaxpaged.kv_layout import KVLayout
from jaxpaged.models import Decoder, ModelConfig, split_parameters
from jaxpaged.pallas_kernels import KVPool, MixedKVPool
from jaxpaged.pallas_kernels.paged_attention.api import IMPLEMENTATIONS
from jaxpaged.program import DeviceState, Programs
from jaxpaged.sampler import init_sampler_state
from tests.gpu_compile.case import CompileCase, Expects, Program, UnavailableError
from tests.gpu_compile.pool_cases import NUM_LAYERS, int32, pool_shape

MAX_NUM_SEQS = 64
MAX_LEN = 4096
BLOCK_SIZE = 16

# Two layers of the size of an 8B model, with a small vocabulary.
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=NUM_LAYERS,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    sliding_windows=(None,) * NUM_LAYERS,
    max_position_embeddings=MAX_LEN,
)


def step_program(
    attention: str,
    num_tokens: int,
    num_steps: int = 1,
    *,
    windows: tuple[int | None, ...] = MODEL.sliding_windows,
    deterministic: bool = False,
    kv_dtypes: tuple[str, ...] | None = None,
) -> Program:
    """One step of a bucket, or several decode steps in one program, with the engine's state donated.

    Args:
      attention: implementation of paged attention.
      num_tokens: of the bucket.
      num_steps: decode steps.
      windows: sliding windows of the layers.
      deterministic: as of the engine.
      kv_dtypes: format of the KV cache of each layer; bfloat16 if None.
    """
    if attention not in IMPLEMENTATIONS:
        raise UnavailableError(f"paged_attention has no implementation {attention!r} yet")
    dtype = jnp.bfloat16
    config = replace(MODEL, sliding_windows=windows)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    weights, merge = split_parameters(model)
    groups = KVLayout.of(windows, MAX_LEN)
    row_tile = GPU_ROW_TILE if deterministic else None
    programs = Programs(merge, groups, None, attention, 20, "raw_logprobs", row_tile)
    sampler = jax.eval_shape(lambda: init_sampler_state(MAX_NUM_SEQS + 1, MODEL.vocab_size))
    pool: KVPool | MixedKVPool = pool_shape(block_size=BLOCK_SIZE, num_layers=groups.layers_per_block)
    if kv_dtypes is not None:
        sizes = {"num_blocks": pool.num_blocks, "num_kv_heads": 8, "block_size": BLOCK_SIZE, "head_dim": 128}
        pool = jax.eval_shape(partial(MixedKVPool.zeros, dtypes=kv_dtypes, **sizes))
    state = DeviceState(pool, sampler, int32(MAX_NUM_SEQS + 1))
    layout = PackedLayout(num_tokens, min(num_tokens, MAX_NUM_SEQS), MAX_LEN // BLOCK_SIZE, groups.num_groups)
    function: Any = partial(programs.step, layout=layout)
    if num_steps > 1:
        function = partial(programs.decode_steps, layout=layout, num_steps=num_steps)
    arguments = (weights, state, int32(layout.size), ())
    return Program(function, arguments, (1,), programs.compiler_options)


XLA = Expects(updates_in_place=True, max_temp_share=1 / 4)
# An attention kernel and a scatter for each layer, though equal ones may be shared.
MOSAIC = Expects(updates_in_place=True, max_temp_share=1 / 4, min_kernels=2, has_async_copies=True)

CASES = (
    CompileCase("step-xla-decode", partial(step_program, "xla", 64), ("h200",), XLA),
    CompileCase("step-mosaic-decode", partial(step_program, "mosaic_gpu", 64), ("h200", "a100"), MOSAIC),
    CompileCase("step-mosaic-mixed", partial(step_program, "mosaic_gpu", 512), ("h200",), MOSAIC),
    CompileCase(
        "step-mosaic-codes",
        partial(step_program, "mosaic_gpu", 512, kv_dtypes=("int8", "int4")),
        ("h200",),
        # Temporaries are as large as ever, the pool is less than half.
        replace(MOSAIC, max_temp_share=1 / 2),
    ),
    CompileCase(
        "step-mosaic-hybrid", partial(step_program, "mosaic_gpu", 64, windows=(None, 128)), ("h200",), MOSAIC
    ),
    *(
        CompileCase(
            f"step-deterministic-{n}",
            partial(step_program, "mosaic_gpu", n, deterministic=True),
            ("h200",),
            MOSAIC,
        )
        for n in (8, 512)
    ),
    CompileCase(
        "step-deterministic-scan",
        partial(step_program, "mosaic_gpu", 8, 4, deterministic=True),
        ("h200",),
        MOSAIC,
    ),
    CompileCase("step-mosaic-scan", partial(step_program, "mosaic_gpu", 8, 4), ("h200",), MOSAIC),
)
