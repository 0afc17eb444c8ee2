"""The device a benchmark runs on: whether there is one, how much of it may be used, what a figure is read with.

Command line: ``python -m benchmarks.gpu.device`` names the GPU, or says why there is none and exits with 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax

from jaxpaged.serve.environment import environment

# Of the device's memory for JAX; the rest is for PyTorch, which allocates its own results, and for cuDNN.
MEMORY_FRACTION = "0.85"
DRY_RUN_BYTES = 2**28
PEERS = (
    "torch",
    "triton",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-cuda-nvcc",
)
SMI_FIELDS = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")


def prepare() -> None:
    """Sets how much memory JAX takes. Call before the first array: its backend reads the variable when it starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)


def missing_gpu_reason() -> str | None:
    """Why there is no NVIDIA GPU to run on, or None if there is one."""
    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:  # a CUDA plugin without a driver
        return f"JAX found no device: {error}"
    if device.platform == "gpu" and hasattr(device, "compute_capability"):
        return None
    return (
        f"no NVIDIA GPU: JAX {jax.__version__} runs on {device.platform!r} here. A CUDA build of JAX comes with "
        "`make EXTRAS=dev,cuda13 ...`; an interpreter that has one already is named by `GPU_PYTHON=python3`"
    )


def memory_bytes() -> int:
    """What JAX may allocate on the device; a small figure on a CPU, where only dry runs take place."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", DRY_RUN_BYTES))


def describe(commit: str | None = None) -> dict[str, Any]:
    """Hardware, driver, versions and commit, as JSON's own types.

    Args:
      commit: what runs, where the sources were copied without their repository.
    """
    found = environment()
    found["commit"] = found["commit"] or commit
    for name in PEERS:
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["hardware"]["gpu"] = driver()
    return found


def driver() -> dict[str, str] | None:
    """What the driver says of the first GPU, only read; None without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(SMI_FIELDS, values, strict=False))


def main() -> int:
    """Returns 0 with a GPU and 1 without."""
    reason = missing_gpu_reason()
    print(
        f"nothing was run: {reason}" if reason else f"GPU: {jax.local_devices()[0].device_kind}, {driver()}"
    )
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
