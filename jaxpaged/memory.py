"""How many blocks the pool gets."""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.batch import PackedLayout
from jaxpaged.block_space import BlockSpace
from jaxpaged.buckets import rows_of
from jaxpaged.config import EngineConfig
from jaxpaged.kv_layout import KVLayout
from jaxpaged.models import ModelConfig, Parameters
from jaxpaged.pallas_kernels.quantisation import FORMATS
from jaxpaged.program import DeviceState, Programs

logger = logging.getLogger(__name__)

# Of a CPU's free memory the pool takes at most this share: the machine has other work to do.
CPU_SHARE = 0.25
MIN_BLOCKS = 2  # the dummy and one more


@dataclass(frozen=True)
class MemoryReport:
    """Where memory goes, in bytes.

    Attributes:
      weights: of the model.
      step: what the largest step needs beside weights, pool and sampler, by XLA's account of its compiled program;
        None where the pool was not sized by it: on a CPU, or with ``num_blocks`` given.
      sampler: the sampler's state, a line of the vocabulary for each row.
      pool: all KV blocks, the dummy included; of quantised ones codes and scales.
      block: one of them.
      num_blocks: how many.
      host_pool: host memory for blocks that do not fit, at most.
      limit: what the device lets us have; None if it does not tell.
    """

    weights: int
    step: int | None
    sampler: int
    pool: int
    block: int
    num_blocks: int
    host_pool: int
    limit: int | None

    def log(self) -> None:
        """One line for the user."""
        gib = 2.0**30
        logger.info(
            "memory: weights %.2f GiB, KV pool %.2f GiB (%d blocks), largest step %s, sampler %.2f GiB, of %s; "
            "host pool %.2f GiB",
            self.weights / gib,
            self.pool / gib,
            self.num_blocks,
            "not measured" if self.step is None else f"{self.step / gib:.2f} GiB",
            self.sampler / gib,
            "an unknown limit" if self.limit is None else f"{self.limit / gib:.2f} GiB",
            self.host_pool / gib,
        )


def bytes_per_token(model: ModelConfig, dtype: str) -> int:
    """Key and value of one token in a layer of a dtype or format, scales included."""
    kind = FORMATS.get(dtype)
    if kind is None:
        vector = model.head_dim * jnp.dtype(dtype).itemsize
    else:
        vector = model.head_dim // kind.per_byte * kind.storage.itemsize + jnp.dtype(jnp.float32).itemsize
    return 2 * model.num_kv_heads * vector


def bytes_per_block(model: ModelConfig, config: EngineConfig, layout: KVLayout) -> int:
    """Keys and values of one block in the layers of a group, scales included."""
    return config.block_size * sum(bytes_per_token(model, dtype) for dtype in layout.dtypes)


def num_blocks_for(
    model: ModelConfig,
    config: EngineConfig,
    layout: KVLayout,
    device: Any,
    weight_bytes: int,
    reserved_bytes: int,
) -> int:
    """Blocks of the pool: what the memory allows and the engine can use.

    Args:
      model, config, layout: sizes.
      device: a JAX device.
      weight_bytes: device memory of the weights.
      reserved_bytes: what else has to fit: sampler state and temporaries of the largest step.

    Raises:
      MemoryError: not even one sequence of ``max_model_len`` fits; says what to change.
    """
    space = BlockSpace(MIN_BLOCKS, config.block_size, windows=layout.windows)
    longest = space.peak_blocks(config.max_model_len, config.max_num_batched_tokens)
    useful = config.max_num_seqs * longest + 1
    size = bytes_per_block(model, config, layout)
    available = available_bytes(config, device, weight_bytes, reserved_bytes)
    blocks = min(useful, available // size)
    if blocks < longest + 1:
        raise MemoryError(
            f"the KV pool would have {blocks} blocks of {size} bytes, but one sequence of "
            f"max_model_len={config.max_model_len} needs {longest + 1}; lower max_model_len, raise "
            f"gpu_memory_utilization={config.gpu_memory_utilization} or set num_blocks"
        )
    return int(blocks)


def available_bytes(config: EngineConfig, device: Any, weight_bytes: int, reserved_bytes: int) -> int:
    """Bytes that the pool may take on a device."""
    if device.platform == "cpu":
        return int(CPU_SHARE * _free_host_bytes())
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise MemoryError(f"{device} does not report its memory; set num_blocks")
    # bytes_limit is what XLA's allocator may have, which is less than the device has.
    budget = int(config.gpu_memory_utilization * stats["bytes_limit"])
    used = max(int(stats.get("bytes_in_use", 0)), weight_bytes)
    return max(0, budget - used - reserved_bytes)


def _free_host_bytes() -> int:
    """What the machine, or the container that bounds us, could still give."""
    bounds = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        # Counts the page cache, which gives way, as free.
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        if found:
            bounds[0] = 1024 * int(found.group(1))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        bounds.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return max(0, min(bounds))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_bytes(
    functions: Programs,
    weights: Parameters,
    operands: tuple[jax.Array, ...],
    config: EngineConfig,
    new_state: Callable[[int], DeviceState],
) -> int:
    """What the largest step needs beside weights and state, from XLA's account of its compiled program.

    The program is compiled over a pool of ``MIN_BLOCKS`` blocks that is never allocated; temporaries do not depend
    on the size of the pool, which is updated in place.
    """
    bucket = config.buckets[-1]
    layout = PackedLayout(
        bucket, rows_of(bucket, config.max_num_seqs), config.table_width, functions.layout.num_groups
    )
    state = jax.eval_shape(lambda: new_state(MIN_BLOCKS))
    buffer = jax.ShapeDtypeStruct((layout.size,), np.int32)
    jitted = jax.jit(partial(functions.step, layout=layout), donate_argnums=1)
    lowered = jitted.lower(weights, state, buffer, operands)
    found = lowered.compile(functions.compiler_options).memory_analysis()
    if found is None:
        raise MemoryError("XLA gives no account of its memory on this device; set num_blocks")
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.temp_size_in_bytes + max(0, outputs))
