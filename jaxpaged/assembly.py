"""From the constructor's arguments to the parts of an engine, everything checked before weights are read."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.batch import BatchBuilder
from jaxpaged.block_space import BlockSpace
from jaxpaged.buckets import rows_of
from jaxpaged.config import EngineConfig
from jaxpaged.core import EngineCore
from jaxpaged.errors import InvalidRequestError
from jaxpaged.host_pool import HostPool
from jaxpaged.host_tier import HostTier
from jaxpaged.kv_layout import MAX_WASTE, KVLayout
from jaxpaged.memory import (
    MIN_BLOCKS,
    MemoryReport,
    bytes_per_token,
    num_blocks_for,
    step_bytes,
    tree_bytes,
)
from jaxpaged.memory_monitor import MemoryMonitor
from jaxpaged.models import Decoder, ModelConfig, flat_parameters, load_config, load_model, split_parameters
from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool, MixedKVPool
from jaxpaged.pallas_kernels.paged_attention.api import (
    DETERMINISTIC,
    IMPLEMENTATIONS,
    best_implementation,
    unsupported_reason,
)
from jaxpaged.policies import policy_from
from jaxpaged.preemption import Preemption
from jaxpaged.preemption_cost import PreemptionCost
from jaxpaged.program import DeviceState, Pool, Programs
from jaxpaged.runner import Runner
from jaxpaged.sampler import init_sampler_state
from jaxpaged.scheduler import Scheduler
from jaxpaged.tokenizer import Tokenizer
from jaxpaged.waiting_queue import WaitingQueue

logger = logging.getLogger(__name__)

# Rows of a tile of a deterministic engine. On a CPU as many as keep its vectors busy; on a GPU as many as cost no more
# than one, because reading the weights takes longer than multiplying them.
CPU_ROW_TILE, GPU_ROW_TILE = 16, 256


def check_types(model: object, params: object, tokenizer: object, variant: object, folder: object) -> None:
    """What the constructor takes as objects; ``EngineConfig`` checks the numbers and switches."""
    if not isinstance(model, str | os.PathLike | Decoder) or model == "":
        raise InvalidRequestError("model", model, "must be the folder of a checkpoint, or a Decoder")
    if params is not None and not isinstance(model, Decoder):
        raise InvalidRequestError("params", type(params), "go with a Decoder, not with a checkpoint folder")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise InvalidRequestError("tokenizer", tokenizer, "must be a Tokenizer")
    if variant is not None and not isinstance(variant, AttentionVariant):
        raise InvalidRequestError("variant", variant, "must be an AttentionVariant")
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise InvalidRequestError("compilation_cache_dir", folder, "must be a path")


def keep_compiled_programs(folder: str | os.PathLike[str]) -> None:
    """Turns on JAX's persistent compilation cache in ``folder``, for this process."""
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def with_weights(model: Decoder, params: Any) -> Decoder:
    """The decoder over ``params``, or over its own weights; missing, foreign and misshapen ones are found here."""
    own, merge = split_parameters(model)
    given = own if params is None else flat_parameters(params)
    for name in sorted(own.keys() ^ given.keys()):
        reason = "is missing" if name in own else "is not a parameter of this model"
        raise InvalidRequestError("params", name, reason)
    for name, array in given.items():
        if not isinstance(array, jax.Array | np.ndarray) or not jnp.issubdtype(array.dtype, jnp.floating):
            raise InvalidRequestError("params", f"{name}: {type(array).__name__}", "must be a float array")
        if array.shape != own[name].shape:
            raise InvalidRequestError("params", f"{name}: {array.shape}", f"must be {own[name].shape}")
    return model if params is None else merge({name: jnp.asarray(array) for name, array in given.items()})


def resolve(
    model: str | os.PathLike[str] | Decoder,
    arguments: dict[str, Any],
    variant: AttentionVariant | None,
    device: Any,
) -> tuple[ModelConfig, EngineConfig, Decoder]:
    """Configuration of model and engine, and the model."""
    model_config = model.config if isinstance(model, Decoder) else load_config(Path(model))
    if isinstance(model, Decoder):
        own = str(jnp.dtype(model.dtype))
        if (asked := arguments.get("dtype")) not in (None, own):
            raise InvalidRequestError("dtype", asked, f"the Decoder was made for {own}")
        arguments = arguments | {"dtype": own}
    config = EngineConfig.resolve(
        arguments, platform=device.platform, max_position_embeddings=model_config.max_position_embeddings
    )
    dtypes = config.layer_dtypes(model_config.num_layers)
    config = replace(config, kv_cache_dtype=dtypes[0] if len(set(dtypes)) == 1 else dtypes)
    if config.attention is not None and config.attention not in list(IMPLEMENTATIONS):
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise InvalidRequestError("attention", config.attention, f"must be None or one of {known}")
    _check_attention(model_config, config, variant or AttentionVariant())
    # What only the scheduler's parts can tell of their arguments, before weights are read.
    WaitingQueue(policy_from(config.scheduling_policy), config.tenant_weights)
    MemoryMonitor(config.memory_warning, config.memory_critical)
    if not isinstance(model, Decoder):
        model = load_model(Path(model), dtype=jnp.dtype(config.dtype))
    return model_config, config, model


def assemble(
    model: Decoder, config: EngineConfig, variant: AttentionVariant | None, device: Any
) -> EngineCore:
    """Sizes the pool and puts the parts together."""
    shape = model.config
    weights, merge = split_parameters(model)
    spec, operands = (variant or AttentionVariant()).split()
    layout = kv_layout(shape, config, variant)
    functions = Programs(
        merge,
        layout,
        spec if variant is not None else None,
        config.attention,
        min(config.max_logprobs, shape.vocab_size),
        config.logprobs_mode,
    )
    if config.deterministic:
        functions = _deterministic(functions, shape, config, variant or AttentionVariant(), device)
    new_state = partial(_new_state, shape, config, layout)
    empty = jax.eval_shape(lambda: new_state(MIN_BLOCKS))
    num_blocks, largest_step = config.num_blocks, None
    if num_blocks is None:
        if device.platform != "cpu":
            largest_step = step_bytes(functions, weights, operands, config, new_state)
        reserved = (largest_step or 0) + tree_bytes(empty.sampler)
        num_blocks = num_blocks_for(shape, config, layout, device, tree_bytes(weights), reserved)
    builder = BatchBuilder(
        buckets=config.buckets,
        max_num_seqs=config.max_num_seqs,
        table_width=config.table_width,
        block_size=config.block_size,
        num_blocks=num_blocks,
        num_scheduler_steps=config.num_scheduler_steps,
        num_groups=layout.num_groups,
    )
    host_pool, tier, cost = _host_memory(config, empty.pool, device)
    block_bytes = tree_bytes(empty.pool) // MIN_BLOCKS
    report = MemoryReport(
        weights=tree_bytes(weights),
        step=largest_step,
        sampler=tree_bytes(empty.sampler),
        pool=num_blocks * block_bytes,
        block=block_bytes,
        num_blocks=num_blocks,
        host_pool=0 if host_pool is None else host_pool.num_blocks * block_bytes,
        limit=(device.memory_stats() or {}).get("bytes_limit"),
    )
    report.log()
    runner = Runner(functions, weights, operands, builder, partial(new_state, num_blocks), host_pool)
    space = BlockSpace(num_blocks, config.block_size, config.enable_prefix_caching, layout.windows, tier)
    scheduler = Scheduler(
        space,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        watermark=config.watermark,
        num_scheduler_steps=config.num_scheduler_steps,
        policy=policy_from(config.scheduling_policy),
        tenant_weights=config.tenant_weights,
        monitor=MemoryMonitor(config.memory_warning, config.memory_critical),
        preemption=Preemption(space, config.preemption_mode, cost),
    )
    return EngineCore(
        scheduler,
        builder,
        runner,
        vocab_size=shape.vocab_size,
        overlap=config.async_scheduling,
        memory=report,
    )


def kv_layout(shape: ModelConfig, config: EngineConfig, variant: AttentionVariant | None) -> KVLayout:
    """Which layers share block tables; a window of the user's variant is that of every layer."""
    windows = shape.sliding_windows
    if variant is not None and variant.sliding_window is not None:
        windows = (variant.sliding_window,) * shape.num_layers
    dtypes = config.layer_dtypes(shape.num_layers)
    sizes = {dtype: bytes_per_token(shape, dtype) for dtype in dtypes}
    layout = KVLayout.of(windows, config.max_model_len, dtypes, sizes)
    taken = layout.num_groups * sum(sizes[dtype] for dtype in layout.dtypes)
    waste = 1 - sum(sizes[dtype] for dtype in dtypes) / taken
    if waste > MAX_WASTE:
        logger.warning(
            "kv_cache_dtype=%r: %.0f %% of the KV pool will hold nothing: layers with other sliding windows share its "
            "blocks, and do not have each dtype as often",
            config.kv_cache_dtype,
            100 * waste,
        )
    return layout


def _host_memory(
    config: EngineConfig, pool: Pool, device: Any
) -> tuple[HostPool | None, HostTier | None, PreemptionCost | None]:
    """Host blocks, who holds them, and the estimate of what moving them costs."""
    block_bytes = tree_bytes(pool) // MIN_BLOCKS
    num_blocks = config.num_host_blocks
    if num_blocks is None:
        num_blocks = int(config.swap_space * 2**30) // block_bytes
    if not num_blocks:
        return None, None, None
    threshold = min(256, config.max_num_batched_tokens)
    return (
        HostPool(num_blocks, pool, device=device),
        HostTier(num_blocks),
        PreemptionCost(block_bytes, min_step_tokens=threshold),
    )


def _check_attention(shape: ModelConfig, config: EngineConfig, variant: AttentionVariant) -> None:
    """Refuses a named attention that cannot run here, before anything is allocated."""
    if config.attention is None:
        return
    if config.deterministic and config.attention not in DETERMINISTIC:
        raise NotImplementedError(
            f"attention={config.attention!r} cannot be used with deterministic=True: its order of additions depends on "
            f"the batch; {', '.join(sorted(DETERMINISTIC))} can"
        )
    name = config.attention
    for reason in _ask(lambda q, pool, _: unsupported_reason(name, q, pool, variant), shape, config):
        if reason is not None:
            raise NotImplementedError(f"attention={config.attention!r} cannot be used here: {reason}")


def _deterministic(
    functions: Programs, shape: ModelConfig, config: EngineConfig, variant: AttentionVariant, device: Any
) -> Programs:
    """The programs with tiles of one size, and one implementation of attention for all buckets and layers."""
    on_cpu = device.platform == "cpu"

    def best(q: jax.Array, pool: KVPool, batch: AttentionBatch) -> str:
        return best_implementation(device.platform, q, pool, variant, batch, deterministic=True)

    attention = config.attention
    if attention is None:
        answers = set(_ask(best, shape, config))
        attention = answers.pop() if len(answers) == 1 else "xla"  # which takes layers of all dtypes
    return replace(
        functions,
        attention=attention,
        row_tile=CPU_ROW_TILE if on_cpu else GPU_ROW_TILE,
        skip_padding=on_cpu,
    )


def _ask(
    question: Callable[[jax.Array, KVPool, AttentionBatch], str | None],
    shape: ModelConfig,
    config: EngineConfig,
) -> list[str | None]:
    """Answers to a question about the attention of the largest bucket, asked of traced arrays: one for each dtype."""
    tokens = config.buckets[-1]
    rows, width = rows_of(tokens, config.max_num_seqs), config.table_width
    answers: list[str | None] = []

    def ask(q: jax.Array, pools: list[KVPool], ints: jax.Array) -> None:
        table = ints[: rows * width].reshape(rows, width)
        per_token = [ints[:tokens]] * 3
        batch = AttentionBatch(table, ints[:rows], ints[: rows + 1], *per_token)
        answers.extend(question(q, pool, batch) for pool in pools)

    q = jax.ShapeDtypeStruct((tokens, shape.num_heads, shape.head_dim), jnp.dtype(config.dtype))
    dtypes = dict.fromkeys(config.layer_dtypes(shape.num_layers))
    pools = [jax.eval_shape(partial(_new_pool, shape, config, (dtype,), 1)) for dtype in dtypes]
    ints = jax.ShapeDtypeStruct((rows * width + tokens + 1,), jnp.int32)
    jax.eval_shape(ask, q, pools, ints)  # traced only
    return answers


def _new_pool(shape: ModelConfig, config: EngineConfig, dtypes: tuple[str, ...], num_blocks: int) -> Pool:
    """A pool of zeros, with a layer of each of ``dtypes``."""
    sizes = {
        "num_blocks": num_blocks,
        "num_kv_heads": shape.num_kv_heads,
        "block_size": config.block_size,
        "head_dim": shape.head_dim,
    }
    if len(set(dtypes)) == 1:
        return KVPool.zeros(num_layers=len(dtypes), dtype=dtypes[0], **sizes)
    return MixedKVPool.zeros(dtypes=dtypes, **sizes)


def _new_state(shape: ModelConfig, config: EngineConfig, layout: KVLayout, num_blocks: int) -> DeviceState:
    pool = _new_pool(shape, config, layout.dtypes, num_blocks)
    num_rows = config.max_num_seqs + 1
    return DeviceState(pool, init_sampler_state(num_rows, shape.vocab_size), jnp.zeros(num_rows, jnp.int32))
