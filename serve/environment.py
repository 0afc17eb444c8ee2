"""What a measurement was taken with: machine, devices, versions, commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jaxpaged", "jax", "jaxlib", "flax", "numba", "numpy", "safetensors", "tokenizers")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


def environment() -> dict[str, Any]:
    """Everything a figure has to be read with, as JSON's own types. Starts JAX's backend."""
    return {"hardware": hardware(), "versions": versions(), "commit": commit()}


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, and JAX's devices."""
    import jax

    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    return {
        **host(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "device_memory_bytes": stats.get("bytes_limit"),
    }


def host() -> dict[str, Any]:
    """The processor and the cores this process may use; starts nothing."""
    return {"cpu": _cpu_name(), "cores": _num_cores()}


def versions() -> dict[str, str]:
    """Versions of the interpreter and the packages that matter for speed and results."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *PLUGINS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree that runs, with "-dirty" where it was changed; None outside of a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Only our own repository: a package installed inside of somebody else's must not report theirs.
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=False,
        )
        if tracked.returncode != 0:
            return None
        described = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return described.stdout.strip() or None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
