"""From the constructor's arguments to the parts of an engine, everything checked before weights are read."""

import logging
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.batch import BatchBuilder
from jaxpaged.block_space import BlockSpace
from jaxpaged.config import EngineConfig
from jaxpaged.core import EngineCore
from jaxpaged.errors import InvalidRequestError
from jaxpaged.host_pool import HostPool
from jaxpaged.host_tier import HostTier
from jaxpaged.kv_layout import KVLayout
from jaxpaged.memory import MIN_BLOCKS, num_blocks_for, step_bytes, tree_bytes
from jaxpaged.memory_monitor import MemoryMonitor
from jaxpaged.models import Decoder, ModelConfig, flat_parameters, load_config, load_model, split_parameters
from jaxpaged.pallas_kernels import AttentionVariant, KVPool
from jaxpaged.pallas_kernels.paged_attention.api import IMPLEMENTATIONS, unsupported_reason
from jaxpaged.policies import policy_from
from jaxpaged.preemption import Preemption
from jaxpaged.preemption_cost import PreemptionCost
from jaxpaged.program import DeviceState, Programs
from jaxpaged.runner import Runner
from jaxpaged.sampler import init_sampler_state
from jaxpaged.scheduler import Scheduler
from jaxpaged.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


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
    if config.attention is not None and config.attention not in list(IMPLEMENTATIONS):
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise InvalidRequestError("attention", config.attention, f"must be None or one of {known}")
    _check_attention(model_config, config, variant or AttentionVariant())
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
    new_state = partial(_new_state, shape, config, layout)
    num_blocks = config.num_blocks
    if num_blocks is None:
        reserved = (
            0 if device.platform == "cpu" else step_bytes(functions, weights, operands, config, new_state)
        )
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
    host_pool, tier, cost = _host_memory(config, jax.eval_shape(lambda: new_state(MIN_BLOCKS)).pool, device)
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
    overlap = config.async_scheduling
    return EngineCore(scheduler, builder, runner, vocab_size=shape.vocab_size, overlap=overlap)


def kv_layout(shape: ModelConfig, config: EngineConfig, variant: AttentionVariant | None) -> KVLayout:
    """Which layers share block tables; a window of the user's variant is that of every layer."""
    windows = shape.sliding_windows
    if variant is not None and variant.sliding_window is not None:
        windows = (variant.sliding_window,) * shape.num_layers
    return KVLayout.of(windows, config.max_model_len)


def _host_memory(
    config: EngineConfig, pool: KVPool, device: Any
) -> tuple[HostPool | None, HostTier | None, PreemptionCost | None]:
    """Host blocks, who holds them, and the estimate of what moving them costs."""
    block_bytes = sum(a.dtype.itemsize * math.prod(a.shape) // MIN_BLOCKS for a in (pool.k, pool.v))
    num_blocks = config.num_host_blocks
    if num_blocks is None:
        num_blocks = int(config.swap_space * 2**30) // block_bytes
    if not num_blocks:
        return None, None, None
    logger.info("host pool: %d blocks, %.2f GiB", num_blocks, num_blocks * block_bytes / 2**30)
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
    reasons: list[str | None] = []

    def ask(q: jax.Array, kv: jax.Array) -> None:
        reasons.append(unsupported_reason(config.attention or "", q, KVPool(kv, kv, 1), variant))

    dtype = jnp.dtype(config.dtype)
    q = jax.ShapeDtypeStruct((1, shape.num_heads, shape.head_dim), dtype)
    kv = jax.ShapeDtypeStruct((1, shape.num_kv_heads, config.block_size, shape.head_dim), dtype)
    jax.eval_shape(ask, q, kv)  # traced only
    if reasons[0] is not None:
        raise NotImplementedError(f"attention={config.attention!r} cannot be used here: {reasons[0]}")


def _new_state(shape: ModelConfig, config: EngineConfig, layout: KVLayout, num_blocks: int) -> DeviceState:
    pool = KVPool.zeros(
        num_layers=layout.layers_per_block,
        num_blocks=num_blocks,
        num_kv_heads=shape.num_kv_heads,
        block_size=config.block_size,
        head_dim=shape.head_dim,
        dtype=jnp.dtype(config.dtype),
    )
    num_rows = config.max_num_seqs + 1
    return DeviceState(pool, init_sampler_state(num_rows, shape.vocab_size), jnp.zeros(num_rows, jnp.int32))
