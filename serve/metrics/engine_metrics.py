"""What an engine's counters look like to Prometheus: ``EngineStats`` as metric families.

Names are vLLM's where vLLM has them, and those of the founding documents (``num_free_blocks``, ``alloc_rate``,
``reuse_rate``, ``fragmentation``, ``refcount_hist``, ``gpu_mem_used``) where these have them.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import Metric

from jaxpaged.kv_cache_dtype import named
from jaxpaged.serve.metrics.exposition import FamilyMaker

if TYPE_CHECKING:
    from jaxpaged.config import EngineConfig
    from jaxpaged.memory import MemoryReport
    from jaxpaged.outputs import EngineStats

# Metric, attribute of EngineStats, documentation.
GAUGES = (
    ("num_requests_running", "num_requests_running", "Sequences that run."),
    ("num_requests_waiting", "num_requests_waiting", "Sequences that wait, swapped ones among them."),
    ("num_requests_swapped", "num_requests_swapped", "Sequences that wait with their blocks on the host."),
    (
        "kv_cache_usage_perc",
        "kv_cache_usage_perc",
        "Share of the KV blocks that somebody holds; 1 is all of them.",
    ),
    ("num_blocks", "num_blocks", "KV blocks of the pool."),
    (
        "num_free_blocks",
        "num_free_blocks",
        "KV blocks that nobody holds, those with a findable prefix among them.",
    ),
    ("num_pinned_prefixes", "num_pinned_prefixes", "Prefixes that are pinned."),
    (
        "reuse_rate",
        "reuse_rate",
        "Share of the blocks taken that came with their content, from the prefix cache.",
    ),
    ("fragmentation", "internal_fragmentation", "Share of the slots in held blocks that hold nothing now."),
    ("kv_waste", "kv_waste", "Share of the slots in held blocks that held nothing, over all steps."),
    ("padding_waste", "padding_waste", "Share of the computed tokens that were padding, over all steps."),
)
COUNTERS = (
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    ("num_preemptions", "num_preemptions", "How often a running sequence gave up its blocks."),
    ("prompt_tokens", "num_prompt_tokens", "Tokens of the prompts that came."),
    ("generation_tokens", "num_generation_tokens", "Tokens sampled and kept."),
    ("steps", "num_steps", "Steps of the engine."),
    ("computed_tokens", "num_tokens", "Tokens computed in steps, padding left out."),
    ("padded_tokens", "num_padded_tokens", "Tokens computed for padding."),
    ("compiles", "num_compiles", "Programs compiled."),
    ("compile_seconds", "compile_time", "Seconds spent on compiling."),
    ("blocks_allocated", "blocks_allocated", "KV blocks taken for new content."),
    ("blocks_reused", "blocks_reused", "KV blocks taken with the content that they had."),
    ("blocks_evicted", "blocks_evicted", "KV blocks with a findable prefix that were lost to new content."),
    ("blocks_copied", "blocks_copied", "KV blocks copied on write."),
    ("blocks_trimmed", "blocks_trimmed", "KV blocks given back behind a sliding window."),
    ("blocks_swapped_out", "blocks_swapped_out", "KV blocks of preempted sequences that went to the host."),
    (
        "blocks_swapped_in",
        "blocks_swapped_in",
        "KV blocks of preempted sequences that came back from the host.",
    ),
    ("blocks_demoted", "blocks_demoted", "KV blocks of evicted prefixes that went to the host."),
    ("blocks_promoted", "blocks_promoted", "KV blocks of evicted prefixes that came back from the host."),
    ("host_blocks_evicted", "host_blocks_evicted", "Prefixes that lost their place on the host."),
)
MEMORY_LEVELS = ("normal", "warning", "critical")
PREEMPTION_MODES = ("recompute", "swap")
LARGEST_HOLDERS = 64  # what more hold is one bucket


def engine_families(make: FamilyMaker, stats: "EngineStats", is_active: bool = True) -> Iterator[Metric]:
    """All that a snapshot tells.

    Args:
      make: makes the families.
      stats: the snapshot.
      is_active: whether a step was done in the last seconds; the snapshot's rate of allocations is as of the last step,
        so without one it is 0 by now.
    """
    for name, attribute, documentation in GAUGES:
        yield make.gauge(name, documentation, getattr(stats, attribute))
    for name, attribute, documentation in COUNTERS:
        yield make.counter(name, documentation, getattr(stats, attribute))
    rate = stats.blocks_allocated_per_second if is_active else 0.0
    yield make.gauge("alloc_rate", "KV blocks taken for new content, a second, in the last ten.", rate)
    yield from _by_label(make, stats)
    yield from _blocks(make, stats)
    if stats.device_memory_in_use is not None:
        yield make.gauge(
            "gpu_mem_used",
            "Bytes of device memory in use, by the device's own account.",
            stats.device_memory_in_use,
        )


def _by_label(make: FamilyMaker, stats: "EngineStats") -> Iterator[Metric]:
    preemptions = {mode: stats.preemptions.get(mode, 0) for mode in PREEMPTION_MODES}
    yield make.counters("preemptions", "Preemptions by what became of the blocks.", "mode", preemptions)
    times = {
        "schedule": stats.schedule_time,
        "build": stats.build_time,
        "device": stats.device_time,
        "update": stats.update_time,
    }
    documentation = "Seconds of the engine's loop: plans, arrays of the batch, the device, what came back."
    yield make.counters("engine_time_seconds", documentation, "part", times)
    moved = {"to_host": stats.bytes_to_host, "from_host": stats.bytes_from_host}
    yield make.counters(
        "swap_bytes", "Bytes of KV blocks copied between device and host.", "direction", moved
    )
    yield make.states(
        "memory_level",
        "1 for the level of the KV pool, by how full it is.",
        "level",
        MEMORY_LEVELS,
        stats.memory_level,
    )
    entered = {level: stats.memory_levels_entered.get(level, 0) for level in MEMORY_LEVELS}
    yield make.counters(
        "memory_level_entered", "How often each level of the KV pool began.", "level", entered
    )


def _blocks(make: FamilyMaker, stats: "EngineStats") -> Iterator[Metric]:
    shared = sum(count for holders, count in stats.block_holders.items() if holders > 1)
    states = {
        "free": stats.num_free_blocks - stats.num_cached_blocks,
        "cached": stats.num_cached_blocks,
        "live": stats.num_blocks - stats.num_free_blocks - shared,
        "shared": shared,
    }
    documentation = (
        "KV blocks by state, which add up to num_blocks: nobody's and empty, nobody's with a findable prefix, held by "
        "one, held by several."
    )
    yield make.gauges("blocks", documentation, "state", states)
    on_host = {
        "free": stats.num_host_blocks_free,
        "swapped": stats.num_host_blocks_held,
        "cached": stats.num_host_blocks_cached,
    }
    documentation = "Host blocks by state: empty, of swapped sequences, of evicted prefixes."
    yield make.gauges("host_blocks", documentation, "state", on_host)
    holders = holder_buckets(stats.block_holders)
    yield make.gauges("refcount_hist", "KV blocks by how many hold them.", "holders", holders)


def holder_buckets(block_holders: Mapping[int, int]) -> dict[str, int]:
    """Blocks by number of holders in buckets that double: "1", "2", "3-4", "5-8" and so on, at last "65+"."""
    buckets, low, high = {}, 1, 1
    while high <= LARGEST_HOLDERS:
        name = f"{low}" if low == high else f"{low}-{high}"
        buckets[name] = sum(count for holders, count in block_holders.items() if low <= holders <= high)
        low, high = high + 1, high * 2
    buckets[f"{low}+"] = sum(count for holders, count in block_holders.items() if holders >= low)
    return buckets


def config_families(make: FamilyMaker, config: "EngineConfig", stats: "EngineStats") -> Iterator[Metric]:
    """The sizes that the engine was built with; ``num_gpu_blocks`` and ``cache_dtype`` are vLLM's names for two."""
    facts = {
        "block_size": config.block_size,
        "num_blocks": stats.num_blocks,
        "num_gpu_blocks": stats.num_blocks,
        "num_host_blocks": stats.num_host_blocks,
        "dtype": config.dtype,
        "cache_dtype": named(config.kv_cache_dtype),
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
    }
    texts = {name: str(value) for name, value in facts.items()}
    yield make.info("cache_config", "Sizes of the KV pool and of a step.", texts)


def memory_families(
    make: FamilyMaker, memory: "MemoryReport", stats: "EngineStats | None"
) -> Iterator[Metric]:
    """Where memory goes. What the founding documents call ``gpu_mem_used``, bytes of KV in use, is ``kv_mem_used``."""
    parts = {
        "weights": memory.weights,
        "kv_pool": memory.pool,
        "step": memory.step,
        "sampler": memory.sampler,
        "host_pool": memory.host_pool,
    }
    known = {part: size for part, size in parts.items() if size is not None}
    yield make.gauges("memory_bytes", "Bytes that each part of the engine was given.", "part", known)
    if memory.limit is not None:
        yield make.gauge("gpu_mem_limit", "Bytes of device memory that the engine may use.", memory.limit)
    if stats is not None:
        used = (stats.num_blocks - stats.num_free_blocks) * memory.block
        yield make.gauge("kv_mem_used", "Bytes of the KV blocks that somebody holds.", used)
