"""Tile sizes of the Mosaic GPU attention kernels: measured ones where there are any, else by rule.

``benchmarks/gpu/tune_paged_attention.py`` measures and writes ``tuned_<device>.json`` beside this file; a call
takes the entry of the nearest shape.
"""

import json
import math
import re
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

import jax.numpy as jnp

from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget


@dataclass(frozen=True)
class MosaicConfig:
    """Sizes of one launch.

    Attributes:
      form: ``"mma"``, warp-level products on every GPU from Ampere on; ``"wgmma"`` and ``"prefill"``, Hopper only.
      tile_kv: keys of one step of the inner loop.
      stages: tiles of keys and values in shared memory, all but one of them on their way.
      ctas_per_sm: thread blocks meant to run on one multiprocessor; sets how finely long rows are split.
      tile_m: rows of a query tile (query tokens times heads of a kv head); 16, 32 or 64, 64 for wgmma, 128 for
        prefill. It is raised to hold the heads of one token.
    """

    form: str = "mma"
    tile_kv: int = 64
    stages: int = 2
    ctas_per_sm: int = 3
    tile_m: int = 16

    def __post_init__(self) -> None:
        tiles_m = {"mma": (16, 32, 64), "wgmma": (64,), "prefill": (128,)}
        if self.form not in tiles_m:
            raise ValueError(f"MosaicConfig: form={self.form!r} must be 'mma', 'wgmma' or 'prefill'")
        allowed: dict[str, tuple[int, ...]] = {
            "tile_kv": (32, 64, 128) if self.form == "mma" else (64, 128),
            "stages": (2, 3, 4, 5, 6),
            "ctas_per_sm": (1,) if self.form == "prefill" else tuple(range(1, 9)),
            "tile_m": tiles_m[self.form],
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"MosaicConfig: {name}={getattr(self, name)!r} must be one of {values} for form={self.form!r}"
                )


@dataclass(frozen=True)
class CallShape:
    """What of a call the choice may depend on: static shapes only."""

    num_tokens: int
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_len: int


def config_for(
    target: GpuTarget, shape: CallShape, dtype: Any, *, deterministic: bool = False
) -> MosaicConfig:
    """The sizes for a call.

    Args:
      target: the GPU.
      shape: see ``CallShape``.
      dtype: of the pool.
      deterministic: choose by the model's shape alone, so that a row meets the same tiles in every batch.
    """
    if deterministic:
        shape = CallShape(
            1, 1, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size, shape.max_len
        )
    measured = [e for e in _measured(_slug(target.kind)) if e["dtype"] == jnp.dtype(dtype).name]
    same = [e for e in measured if e["head_dim"] == shape.head_dim and e["block_size"] == shape.block_size]
    if deterministic:
        same = [e for e in same if e["config"]["form"] != "prefill"]
    if same:
        return MosaicConfig(**min(same, key=lambda e: _distance(e, shape))["config"])
    return _rule(target, shape)


def _rule(target: GpuTarget, shape: CallShape) -> MosaicConfig:
    """Without measurements: two stages of as many keys as let three blocks share a multiprocessor's memory."""
    many_queries = shape.num_tokens > 2 * shape.num_rows
    group = shape.num_heads // shape.num_kv_heads
    tile_m = 64 if group > 32 else 32 if many_queries or group > 16 else 16
    stage_bytes = 2 * 64 * shape.head_dim * 2
    if many_queries and target.has_wgmma and group * shape.head_dim % 64 == 0:
        return MosaicConfig("prefill", 128 if shape.head_dim <= 128 else 64, 2, 1, 128)
    tile_kv = 64 if 2 * stage_bytes <= target.smem_bytes // 2 else 32
    fitting = max(1, min(4, (target.smem_bytes - 8192) // (stage_bytes * tile_kv // 64 * 2)))
    return MosaicConfig("mma", tile_kv, 3 if fitting >= 4 else 2, min(fitting, 3), tile_m)


def _distance(entry: dict[str, Any], shape: CallShape) -> float:
    """How far a measured shape is, in doublings; the group size decides the tile, so it weighs most."""
    group = shape.num_heads // shape.num_kv_heads
    pairs = [
        (entry["num_heads"] // entry["num_kv_heads"], group, 4.0),
        (entry["num_kv_heads"], shape.num_kv_heads, 1.0),
        (entry["num_rows"], shape.num_rows, 1.0),
        (entry["num_tokens"] / entry["num_rows"], shape.num_tokens / shape.num_rows, 2.0),
        (entry["max_len"], shape.max_len, 0.5),
    ]
    return sum(weight * abs(math.log2(a) - math.log2(b)) for a, b, weight in pairs)


def _slug(kind: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia_h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def table_name(kind: str) -> str:
    """The file of measured sizes of a device."""
    return f"tuned_{_slug(kind)}.json"


@cache
def _measured(slug: str) -> list[dict[str, Any]]:
    """The entries of a device's file, checked; none where there is no file."""
    file = resources.files("jaxpaged.pallas_kernels.paged_attention") / f"tuned_{slug}.json"
    if not file.is_file():
        return []
    entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["entries"]
    wanted = {f.name for f in fields(CallShape)} | {"dtype", "config"}
    for entry in entries:
        missing = wanted - entry.keys()
        if missing:
            raise ValueError(f"{file.name}: an entry lacks {sorted(missing)}")
    return entries
