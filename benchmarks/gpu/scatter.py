"""Time of writing new keys and values to their slots, beside writing the same bytes to one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.inputs import DTYPE
from benchmarks.gpu.measure import Setting, reason
from benchmarks.gpu.participants import OURS
from benchmarks.gpu.points import Scatter
from benchmarks.gpu.report import verdict
from benchmarks.gpu.timing import DISPLACING_BYTES, Step
from jaxpaged.pallas_kernels import KVPool, cache_scatter

MOST_OVER_CONTIGUOUS = 1.5


def _sets(shape: Scatter, setting: Setting) -> tuple[Any, list[Any]]:
    """A pool larger than any L2 cache, and several steps' keys, values and slots."""
    block_bytes = 2 * shape.num_kv_heads * shape.block_size * shape.head_dim * 2
    num_blocks = max(min(4 * DISPLACING_BYTES, setting.max_bytes // 2) // block_bytes, 8)
    pool = KVPool.zeros(
        num_layers=1,
        num_blocks=num_blocks,
        num_kv_heads=shape.num_kv_heads,
        block_size=shape.block_size,
        head_dim=shape.head_dim,
        dtype=jnp.dtype(DTYPE),
    )
    num_slots = (num_blocks - 1) * shape.block_size
    rng = np.random.default_rng(0)
    sets = []
    for index in range(setting.num_sets(shape.moved_bytes)):
        k, v = jax.random.normal(
            jax.random.key(index), (2, shape.num_tokens, shape.num_kv_heads, shape.head_dim), DTYPE
        )
        if shape.prefill:  # rows of consecutive tokens, their blocks anywhere
            blocks = rng.permutation(num_blocks - 1)[: -(-shape.num_tokens // shape.block_size)] + 1
            slots = (blocks[:, None] * shape.block_size + np.arange(shape.block_size)).reshape(-1)
            slots = slots[: shape.num_tokens]
        else:
            slots = rng.choice(num_slots, shape.num_tokens, replace=False) + shape.block_size
        place = jnp.int32(2 * index * shape.num_tokens % num_slots)
        sets.append((k, v, jnp.asarray(slots, jnp.int32), jnp.concatenate([k, v]), place))
    return pool, sets


def _scatter_step(implementation: str) -> Step:
    def step(pool: KVPool, new: Any, _: Any) -> KVPool:
        k, v, slots = new[:3]
        return cache_scatter(pool, k, v, 0, slots, implementation=implementation)

    return step


def _contiguous_step(memory: jax.Array, new: Any, _: Any) -> jax.Array:
    """The same bytes to consecutive places of one array ``[tokens, Hkv, D]``, keys and values in one launch.

    Nothing is known of the place when it is compiled, as for slots.
    """
    return jax.lax.dynamic_update_slice(memory, new[3], (new[4], jnp.int32(0), jnp.int32(0)))


def measure_scatter(shape: Scatter, setting: Setting) -> Iterator[dict[str, Any]]:
    """One entry an implementation, with its time over that of the contiguous write."""
    steps: dict[str, Step] = {"contiguous": _contiguous_step, "xla": _scatter_step("xla")}
    steps[OURS] = _scatter_step("xla" if setting.is_dry else OURS)
    floor: float | None = None
    what = f"{shape.num_tokens} tokens of {'prefill' if shape.prefill else 'decoding'}"
    for name, step in steps.items():
        if setting.budget.left <= 0:
            return
        entry: dict[str, Any] = {
            "participant": name,
            "num_tokens": shape.num_tokens,
            "prefill": shape.prefill,
        }
        try:
            carry, sets = _sets(shape, setting)
            if name == "contiguous":
                carry = jnp.zeros((2 * carry.k.size // carry.k[0, :, 0].size, *carry.k.shape[1::2]), DTYPE)
            timing = setting.time(step, carry, sets, donate=True)
            del carry, sets
        except Exception as error:  # one implementation that fails ends no run
            entry |= reason(error)
            yield {**entry, "text": f"{what}, {name}: n/a, {entry['reason']}"}
            continue
        floor = timing.seconds if name == "contiguous" else floor
        entry |= {**timing.as_json(), "bytes": shape.moved_bytes}
        text = f"{what}, {name}: {entry['us']:.1f} us"
        if floor and name != "contiguous":
            entry["over_contiguous"] = round(timing.seconds / floor, 3)
            said = verdict(entry["over_contiguous"] <= MOST_OVER_CONTIGUOUS, setting.is_dry)
            text += f", {entry['over_contiguous']:.2f}x of writing the same bytes to one place"
            text += f" (bar {MOST_OVER_CONTIGUOUS:.1f}x: {said})" if name == OURS else ""
        yield {**entry, "text": text}
