"""Copy bandwidth of the device's memory: the ceiling that the other figures are shares of.

    python benchmarks/gpu/bandwidth.py

Bytes read plus bytes written, over the time of copying one large buffer to another. Three ways are tried and the
best one counts, so that a share is never flattered by a slow copy: an elementwise program (reads, changes,
writes), XLA's own copy, and PyTorch's, if it is installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from benchmarks.gpu import device
from benchmarks.gpu.timing import time_jax, time_torch

BUFFER_BYTES = 2**30


def copy_bandwidth(buffer_bytes: int = BUFFER_BYTES) -> dict[str, Any]:
    """Bytes a second: ``best``, and that of each way; a way that failed has its reason instead."""
    source = jax.random.bits(jax.random.key(0), (buffer_bytes // 4,), jnp.uint32)
    ways: dict[str, Any] = {}
    for name, seconds in {
        "elementwise": _elementwise,
        "xla_copy": _xla_copy,
        "torch_copy": _torch_copy,
    }.items():
        try:
            ways[name] = 2 * source.nbytes / seconds(source)
        except Exception as error:  # a peer that is missing or broken ends no run
            ways[name] = f"{type(error).__name__}: {error}"[:200]
    best = max(value for value in ways.values() if isinstance(value, float))
    return {"bytes_per_second": best, "buffer_bytes": source.nbytes, "ways": ways}


def _elementwise(source: jax.Array) -> float:
    # One launch a program: several would be merged into one pass. A launch takes long enough here.
    return time_jax(lambda x, _, k: x ^ k, source, [None], jnp.uint32(0x55555555), launches=1).seconds


def _xla_copy(source: jax.Array) -> float:
    return time_jax(lambda x, _, __: jnp.copy(x), source, [None], launches=1).seconds


def _torch_copy(source: jax.Array) -> float:
    import torch

    if source.devices().pop().platform != "gpu":
        raise NotImplementedError("needs a GPU")
    tensor = torch.from_dlpack(source.view(jnp.int32))
    target = torch.empty_like(tensor)

    def step(carry: Any, _: Any, __: Any) -> Any:
        target.copy_(tensor)
        return carry

    return time_torch(step, None, [None], launches=4).seconds


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--buffer-mib", type=int, default=BUFFER_BYTES // 2**20)
    args = parser.parse_args()
    device.prepare()
    if reason := device.missing_gpu_reason():
        print(f"this is no figure of a GPU: {reason}")
    found = copy_bandwidth(args.buffer_mib * 2**20)
    for name, value in found["ways"].items():
        print(f"{name:12} {value / 1e12:.3f} TB/s" if isinstance(value, float) else f"{name:12} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
