"""``jaxpaged info``: devices, versions, the model, the KV pool and the buckets, as an engine would have them."""

import json
from typing import TYPE_CHECKING, Any

from jaxpaged.kv_cache_dtype import named
from jaxpaged.serve.environment import environment
from jaxpaged.serve.options import EngineOptions
from jaxpaged.serve.terminal import counted, facts_table, listed, size, stdout, waiting

if TYPE_CHECKING:
    from jaxpaged import Engine


def run_info(options: EngineOptions, *, as_json: bool) -> None:
    """Builds the engine of the options and shows what it is made of."""
    with waiting("loading the model"):
        engine = options.open()
    with engine:
        facts = gather(engine)
    facts["model"]["path"] = "embedded" if options.is_embedded else str(options.model)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)


def gather(engine: "Engine") -> dict[str, Any]:
    """Facts about the machine and the engine, as JSON's own types."""
    import dataclasses

    model, config, memory = engine.model_config, engine.config, engine.memory_report()
    return environment() | {
        "model": dataclasses.asdict(model),
        "engine": dataclasses.asdict(config),
        "attention": attention_implementation(engine),
        "pool": {
            "num_blocks": memory.num_blocks,
            "num_tokens": (memory.num_blocks - 1) * config.block_size,
            "bytes": memory.pool,
            "bytes_per_block": memory.block,
            "bytes_per_token": memory.block // config.block_size,
        },
        "memory": dataclasses.asdict(memory),
        "buckets": list(config.buckets),
    }


def attention_implementation(engine: "Engine") -> str:
    """The implementation of paged attention that the engine's steps take; several where layers differ in dtype."""
    import jax

    from jaxpaged import AttentionVariant
    from jaxpaged.pallas_kernels import KVPool
    from jaxpaged.pallas_kernels.paged_attention.api import best_implementation

    model, config = engine.model_config, engine.config
    if config.attention is not None:
        return config.attention
    q = jax.ShapeDtypeStruct((1, model.num_heads, model.head_dim), config.dtype)
    platform = jax.local_devices()[0].platform
    chosen: dict[str, str] = {}

    def choose(q: jax.Array) -> jax.Array:
        for dtype in config.layer_dtypes(model.num_layers):
            pool = KVPool.zeros(
                num_layers=1,
                num_blocks=1,
                num_kv_heads=model.num_kv_heads,
                block_size=config.block_size,
                head_dim=model.head_dim,
                dtype=dtype,
            )
            chosen[dtype] = best_implementation(
                platform, q, pool, AttentionVariant(), deterministic=config.deterministic
            )
        return q

    jax.eval_shape(choose, q)  # traced only: the choice depends on shapes and dtypes
    names = dict.fromkeys(chosen.values())
    if config.deterministic and len(names) > 1:
        return "xla"  # one for all layers, see ``assembly``
    return ", ".join(names)


def _print(facts: dict[str, Any]) -> None:
    console = stdout()
    hardware, model, config, pool = (facts[name] for name in ("hardware", "model", "engine", "pool"))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = [
        ("devices", f"{len(hardware['devices'])} x {hardware['devices'][0]} ({hardware['platform']})"),
        ("processor", f"{hardware['cpu']}, {counted(hardware['cores'], 'core')} for this process"),
        ("memory", size(hardware["memory_bytes"])),
        ("versions", versions),
        ("commit", facts["commit"] or "not in a checkout"),
    ]
    if hardware["device_memory_bytes"]:
        machine.insert(1, ("device memory", size(hardware["device_memory_bytes"])))
    console.print(facts_table("Machine", machine))
    windows = {window for window in model["sliding_windows"] if window is not None}
    heads = (
        f"{model['num_heads']} query heads, {model['num_kv_heads']} key-value heads of {model['head_dim']}"
    )
    described = [
        ("path", model["path"]),
        ("architecture", model["architecture"]),
        ("layers", f"{model['num_layers']} of width {model['hidden_size']}, {heads}"),
        ("vocabulary", f"{model['vocab_size']:,} tokens"),
        ("positions", f"{model['max_position_embeddings']:,}"),
    ]
    if windows:
        described.append(("sliding window", listed(sorted(windows))))
    console.print(facts_table("Model", described))
    in_pool = f"{counted(pool['num_blocks'], 'block')} of {config['block_size']} tokens = {pool['num_tokens']:,} tokens"
    engine = [
        ("KV pool", f"{in_pool}, {size(pool['bytes'])} ({size(pool['bytes_per_token'])} a token)"),
        ("dtype", config["dtype"]),
        ("KV cache dtype", named(config["kv_cache_dtype"])),
        ("attention", facts["attention"]),
        ("sequence", f"up to {config['max_model_len']:,} tokens"),
        ("step", f"up to {config['max_num_seqs']} sequences, {config['max_num_batched_tokens']:,} tokens"),
        ("buckets", f"{len(facts['buckets'])}: {listed(facts['buckets'], 24)} tokens"),
        ("prefix cache", "on" if config["enable_prefix_caching"] else "off"),
        ("host pool", size(facts["memory"]["host_pool"]) if facts["memory"]["host_pool"] else "none"),
        ("policy", str(config["scheduling_policy"])),
        ("steps", "one ahead of the device" if config["async_scheduling"] else "one at a time"),
    ]
    console.print(facts_table("Engine", engine))
